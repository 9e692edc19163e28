"""Training end to end on a small folder of images."""

import math
import os
import signal

import numpy as np
import pytest
import torch
from checks import randomise
from runs import at_steps, call, command, equal, flags_of, records, weights
from test_checkpoint import names, same

import main
import plot_mix_temperature
from data.batches import Batches
from flow import RGFlow, load
from flow.preprocess import Loss
from utils.checkpoint import read, save
from utils.cli import UserError
from utils.distributed import Peers
from utils.optim import Descent, learning_rate


def test_files_of_a_run(start, tmp_path):
    run = start("--epoch 3 --keep_epoch 2 --plot_epoch 2 --out_infix _x")
    base = tmp_path / "run" / "folder" / "laplace_nl1_nr1_nm1_nh8"
    expected = ".jsonl .lock .log _samples _samples/epoch2.png _samples/epoch3.png _save _save/2.state _save/3.state"
    files = sorted(str(path.relative_to(base)) for path in base.rglob("*"))
    assert files == [f"out_x{name}" for name in expected.split()]
    assert [record["step"] for record in records(run, "train")] == list(range(1, 16))
    tests = records(run, "test")
    assert [(record["epoch"], record["step"]) for record in tests] == [(1, 5), (2, 10), (3, 15)]
    assert all(record["images"] == 6 and {"bpd", "bpd_stderr"} <= set(record) for record in tests)
    state = read(base / "out_x_save" / "3.state")
    assert (state["epoch"], state["step"]) == (3, 15)
    assert not {"no_stdout", "export", "gpus"} & set(state["config"])
    assert "nlayers=[1, 1]" in (base / "out_x.log").read_text()
    picture = base / "out_x_samples" / "epoch3.png"
    before = picture.read_bytes()
    run.plot()
    assert picture.read_bytes() == before


def test_tests_inside_an_epoch_change_nothing_else(start, monkeypatch):
    """Tests after steps 3, 5 (once, the end of the epoch), 6 and 7, the last. One run is stopped after step 3, and its
    seconds of training go on. Only steps and tests take time on the clock.
    """
    clock = [0.0]

    def taking(seconds, function):
        def timed(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        return timed

    monkeypatch.setattr(main.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Descent, "update", taking(1, Descent.update))
    monkeypatch.setattr(main, "bits_per_dim_of_all", taking(100, main.bits_per_dim_of_all))
    start("--max_steps 3 --print_step 2", "plain")
    plain = start("--max_steps 7 --print_step 2", "plain")
    tested = start("--max_steps 7 --test_steps 6,3,5,100 --print_step 2", "tested")
    states = [read(run.folder / "last.state") for run in (tested, plain)]
    assert all(same(states[0][key], states[1][key]) for key in ("model", "optimizer", "seconds"))
    rows = [[{**record, "time": 0} for record in records(run, "train")] for run in (tested, plain)]
    assert rows[0] == rows[1] and [(row["step"], row["seconds"]) for row in rows[0]] == [(2, 2), (4, 4), (6, 6)]
    tests = [[{**record, "time": 0} for record in records(run, "test")] for run in (tested, plain)]
    found = [(record["epoch"], record["step"], record["seconds"]) for record in tests[0]]
    assert found == [(1, 3, 3), (1, 5, 5), (2, 6, 6), (2, 7, 7)]
    assert tests[1] == [record for record in tests[0] if record["step"] != 6]
    assert names(plain.folder) == ["1.state", "last.state"]
    assert names(plain.folder.parent / "out_samples") == ["epoch1.png", "step3.png", "step7.png"]


def test_mirrored_images_of_a_run(start):
    """Their batches are those of `Batches` with flips; a checkpoint from before --flip had those of its data set."""
    run = start("--max_steps 1 --flip")
    mirrored, plain = (Batches(run.dataset.train, 8, "cpu", 0, flips, torch.float64)(3) for flips in (True, False))
    assert equal(run.batches(3), mirrored) and not torch.equal(mirrored[0], plain[0])
    state = read(run.folder / "last.state")
    assert state["config"].pop("flip") is True
    for flags in ("", "--flip"):
        save(run.folder / "last.state", state)
        lines = start(f"--max_steps 2 {flags}").log.text_path.read_text().splitlines()
        changed = [line for line in lines if "changed: " in line][-1]
        assert "flip False -> True" in changed if flags else "flip" not in changed


def test_other_settings_need_another_infix(start):
    first = start("--max_steps 2")
    with pytest.raises(UserError, match=r"seed 0 -> 1; batch_size 8 -> 4.*--out_infix"):
        start("--max_steps 4 --seed 1 --batch_size 4")
    run = start("--max_steps 4 --lr 5e-4 --weight_decay 0.1")
    assert run.descent.optimizer.param_groups[0]["weight_decay"] == 0.1
    text = run.log.text_path.read_text()
    assert "continuing from" in text and "lr 0.001 -> 0.0005" in text
    before = (run.folder / "last.state").read_bytes()
    start("--max_steps 4")  # finished
    assert (run.folder / "last.state").read_bytes() == before
    other = start("--max_steps 2 --seed 1 --out_infix _other")
    apart = max((one - two).abs().max() for one, two in zip(weights(first), weights(other), strict=True))
    assert apart > 0.01 and not equal(first.batches(3), other.batches(3))  # two steps move weights by about 0.002


class Twins(Peers):
    """Two processes that draw the same batches."""

    def __init__(self, device):
        super().__init__(device)
        self.size = 2

    def sum_(self, tensor):
        return tensor.mul_(2)


def descend(peers, graph=False):
    """The weights after 6 steps with decay and clipping."""
    torch.manual_seed(0)
    flow = randomise(RGFlow(1, 8, nlayers=1, nresblocks=1, nhidden=9), 0.3).requires_grad_(True)
    batch = torch.randint(256, (4, 1, 8, 8), dtype=torch.uint8), torch.rand(4, 1, 8, 8)
    descent = Descent(Loss(flow.to(peers.device)), 0.1, 0.5, peers, graph)
    for step in range(6):
        descent(step, 1e-2, *(each.to(peers.device) for each in batch))
    assert descent.failed_step == -1 and descent.window[1] == 6
    return [parameter.detach() for parameter in flow.parameters()]


def test_several_processes_step_by_the_mean_of_their_gradients():
    one, two = (descend(each(torch.device("cpu"))) for each in (Peers, Twins))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_learning_rate():
    rates = [learning_rate(step, 0.1, 4, "cosine", 24) for step in (0, 1, 2, 3, 14, 24)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.05, 0], abs=1e-12)
    assert learning_rate(14, 0.1, 4, "constant", 24) == 0.1


@pytest.mark.parametrize(
    "what, where, level", [("loss", "disentanglers.0", 0), ("loss", "decimators.1", 1), ("gradient", "decimators.1", 1)]
)
def test_a_step_that_is_not_finite_never_reaches_the_weights(start, new, monkeypatch, what, where, level):
    good = (start("--epoch 1").folder / "1.state").read_bytes()
    run = new("--epoch 3")
    bijector = run.flow.get_submodule(where)
    forward = bijector.forward

    def factor():
        return math.inf if run.step >= 7 else 1

    def broken(x):
        y, log_det = forward(x)
        return y * factor(), log_det

    if what == "loss":
        bijector.forward = broken
    else:
        bijector.networks.scale.register_hook(lambda gradient: gradient * factor())
    steps = []
    update = run.descent.optimizer.step
    monkeypatch.setattr(run.descent.optimizer, "step", lambda: (update(), steps.append(weights(run)))[0])
    with pytest.raises(UserError, match=rf"epoch 2, step 8: {what} is not finite, first at level h = {level}"):
        run.train()
    assert all(value.isfinite().all() for value in steps[-1])
    assert equal(steps[-1], steps[-2]) and not equal(steps[-2], steps[-3])
    assert names(run.folder) == ["1.state"] and (run.folder / "1.state").read_bytes() == good


def test_a_run_that_stopped_goes_on_with_the_flags_that_its_message_names(start):
    start("--max_steps 5")
    for _ in range(2):
        with pytest.raises(UserError, match=r"not finite.*--lr \(1e\+30 here\).*--clip_grad \(1, 0 for .*--init"):
            start("--max_steps 10 --lr 1e30")
    assert start("--max_steps 10 --lr 1e-4").step == 10


@pytest.mark.parametrize(
    "step, message",
    [(7, "weights are not finite; nothing"), (10, "BPD of test images is not finite, first at level h = 0; nothing")],
)
def test_weights_that_are_not_finite_are_not_saved(start, new, step, message):
    """The update before a signal, or the last one of an epoch, can blow up what no later step would see."""
    good = (start("--max_steps 5").folder / "1.state").read_bytes()
    run = new("--max_steps 10")

    def blow_up():
        if run.step == step - 1:
            for parameter in run.flow.parameters():
                parameter.data.mul_(math.inf)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(UserError, match=f"epoch 2, step {step}: {message}"):
        at_steps(run, after=blow_up).train()
    assert names(run.folder) == ["1.state"] and (run.folder / "1.state").read_bytes() == good
    assert [record["step"] for record in records(run, "test")] == [5]


def test_overfitting_16_images(start, images, tmp_path):
    """More than 3 bits off the untrained flow's BPD on the training images themselves."""
    for n in range(18):
        path = tmp_path / "sixteen" / ("train" if n < 16 else "test") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((images / "train" / f"{n}.png").read_bytes())
    flags = f"--data_path {tmp_path / 'sixteen'} --batch_size 16 --nlayers 2 --nhidden 32 --lr 1e-2 --max_steps 120"
    run = start(f"{flags} --dtype float32 --epoch 1000 --save_epoch 0 --plot_epoch 0")
    curve = [record["bpd"] for record in records(run, "train")]
    assert curve[0] - np.mean(curve[-5:]) > 3


def test_gradient_is_clipped(start):
    """With a tiny clip the first Adam step does not change, but the reported norm is that before clipping."""
    plain, clipped = start("--max_steps 1", "a"), start("--max_steps 1 --clip_grad 1e-3", "b")
    norms = [records(run, "train")[0]["grad_norm"] for run in (plain, clipped)]
    assert norms[0] == norms[1] > 1e-3
    for run, norm in ((plain, min(1.0, norms[0])), (clipped, 1e-3)):
        moments = [state["exp_avg"].flatten() for state in run.descent.optimizer.state.values()]
        assert torch.cat(moments).norm().item() == pytest.approx(0.1 * norm, rel=1e-3)


def test_real_nvp_trains_resumes_plots_and_exports(start, tmp_path):
    flags = "--model realnvp --nmlp 2 --lr 1e-2"
    whole = start(f"{flags} --max_steps 10", "whole")
    assert "realnvp_laplace_nl1_nr1_nm2_nh8" in str(whole.folder)
    assert "multiply-adds" in whole.log.text_path.read_text()
    assert records(whole, "train")[-1]["bpd"] < records(whole, "train")[0]["bpd"] - 0.3
    start(f"{flags} --max_steps 4", "halves")
    halves = start(f"{flags} --max_steps 10", "halves")
    assert equal(weights(halves), weights(whole))
    exported, file = tmp_path / "exported.state", whole.folder / "2.state"
    run = flags_of(whole.args.data_path, whole.args.out_dir)
    done = call(main, *run, *flags.split(), "--export", exported)
    assert done.returncode == 0, done.stderr
    flow, config = load(exported)
    assert config["model"] == "realnvp" and not flow.training and equal(flow.parameters(), weights(whole))
    drawn = call(plot_mix_temperature, "--weights", file, "--fig_dir", tmp_path / "figures")
    assert drawn.returncode == 0, drawn.stderr
    refused = call(main, *run, "--out_infix", "_b", "--init", file)
    assert refused.returncode == 1 and "model realnvp -> rgflow" in refused.stderr


def test_no_output_files(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(main, *flags_of(images, "unused", "--max_steps 2"), "-o", "")
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []


def test_scripts_from_the_command_line(images, tmp_path):
    """main.py as a user runs it, and a script by flags and by --weights."""
    flags = flags_of(images, tmp_path / "run", "--max_steps 2")
    trained = command("main.py", *flags)
    assert trained.returncode == 0, trained.stderr
    file = ["--weights", next((tmp_path / "run").rglob("last.state"))]
    for given, folder in ((flags, "a"), ([*file, "--temperatures", "0.2,0.6"], "b")):
        done = call(plot_mix_temperature, *given, "--fig_dir", tmp_path / folder)
        assert done.returncode == 0, done.stderr
    pictures = [
        next((tmp_path / folder).glob("mix_temperature_folder_laplace_nl1_nr1_nm1_nh8_*.png")) for folder in "ab"
    ]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert pictures[0].with_suffix(".pdf").exists()


@pytest.mark.parametrize(
    "script, arguments, status, words",
    [
        (main, "--data folder", 2, ["--data: folder: needs --data_path"]),
        (main, "--data folder --data_path {tmp}/nothing", 1, ["nothing"]),
        (main, "--data folder --data_path {images} --batch_size 41", 1, ["--batch_size 41", "40"]),
        (plot_mix_temperature, "--weights {tmp}/no.state", 1, ["no.state", "no such file"]),
        (plot_mix_temperature, "--weights {tmp}/text.state", 1, ["text.state", "damaged"]),
        (plot_mix_temperature, "--weights {rgflow} --data msds1", 2, ["--data: msds1", "no data set", "on folder"]),
        (plot_mix_temperature, "--weights {rgflow} --temperatures 1,1,1", 2, ["--temperatures"]),
        (plot_mix_temperature, "--weights {rgflow} --lr 1e-3", 2, ["unrecognized arguments: --lr 1e-3"]),
        (plot_mix_temperature, "-o {tmp}", 1, ["no checkpoint", "--weights"]),
    ],
)
def test_bad_flags_and_files(script, arguments, status, words, images, weights, tmp_path):
    (tmp_path / "text.state").write_text("not a checkpoint")
    small = f"--nlayers 1 --nhidden 4 -o {tmp_path / 'out'}" if script is main else ""
    done = call(script, *f"{arguments.format(tmp=tmp_path, images=images, **weights)} {small}".split())
    assert done.returncode == status and all(word in done.stderr for word in words)
