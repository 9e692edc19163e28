"""Training end to end on a small folder of images."""

import json
import math

import numpy as np
import pytest
import torch
from runs import SMALL, at_steps, call, command, records, weights

import main
import plot_mix_temperature
from args import get_args
from flow import load
from flow.preprocess import bits_per_dim
from utils.checkpoint import read
from utils.cli import UserError
from utils.optim import Descent, learning_rate


def test_files_of_a_run(start, tmp_path):
    run = start("--epoch 3 --keep_epoch 2 --plot_epoch 2 --out_infix _x")
    base = tmp_path / "run" / "folder" / "laplace_nl1_nr1_nm1_nh8"
    files = sorted(str(path.relative_to(base)) for path in base.rglob("*"))
    samples, states = (
        ["_samples", "_samples/epoch2.png", "_samples/epoch3.png"],
        ["_save", "_save/2.state", "_save/3.state"],
    )
    assert files == [f"out_x{name}" for name in (".jsonl", ".lock", ".log", *samples, *states)]
    assert [record["step"] for record in records(run, "train")] == list(range(1, 16))
    tests = records(run, "test")
    assert [(record["epoch"], record["step"]) for record in tests] == [(1, 5), (2, 10), (3, 15)]
    assert all(set(record) >= {"bpd", "bpd_stderr"} for record in tests)
    state = read(base / "out_x_save" / "3.state")
    assert (state["epoch"], state["step"]) == (3, 15)
    assert not {"no_stdout", "export", "gpus"} & set(state["config"])
    assert "nlayers=[1, 1]" in (base / "out_x.log").read_text()


def test_a_run_that_ends_inside_an_epoch(start):
    run = start("--max_steps 7 --print_step 3")
    assert [path.name for path in sorted(run.folder.iterdir())] == ["1.state", "last.state"]
    assert [record["step"] for record in records(run, "train")] == [3, 6]
    assert [(record["epoch"], record["step"]) for record in records(run, "test")] == [(1, 5), (2, 7)]
    assert (run.folder.parent / "out_samples" / "step7.png").exists()


def test_tests_inside_an_epoch_change_nothing_else(start, monkeypatch):
    """Tests after steps 3, 5 (once, the end of the epoch) and 6 of 7; only steps and tests take time on the clock."""
    clock = [0.0]

    def taking(seconds, function):
        def timed(*args, **kwargs):
            clock[0] += seconds
            return function(*args, **kwargs)

        return timed

    monkeypatch.setattr(main.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(Descent, "update", taking(1, Descent.update))
    monkeypatch.setattr(main, "bits_per_dim_of_all", taking(100, main.bits_per_dim_of_all))
    tested = start("--max_steps 7 --test_steps 6,3,5,100 --print_step 2", "tested")
    plain = start("--max_steps 7 --print_step 2", "plain")
    for key in ("model", "optimizer"):
        states = [read(run.folder / "last.state")[key] for run in (tested, plain)]
        torch.testing.assert_close(*states, rtol=0, atol=0)
    rows = [[{**record, "time": 0} for record in records(run, "train")] for run in (tested, plain)]
    assert rows[0] == rows[1] and [row["seconds"] for row in rows[0]] == [2, 4, 6]
    tests = records(tested, "test")
    assert [tuple(record[key] for key in ("epoch", "step", "seconds")) for record in tests] == [
        *((1, 3, 3), (1, 5, 5), (2, 6, 6), (2, 7, 7))
    ]
    assert tested.test_bpds == plain.test_bpds == {1: tests[1]["bpd"]}
    assert tests[0]["bpd"] == records(start("--max_steps 3", "short"), "test")[0]["bpd"]


def test_a_test_inside_an_epoch_after_a_restart(start):
    flags = "--test_steps 2,3,4"
    start(f"{flags} --max_steps 3")
    run = start(f"{flags} --max_steps 6")
    assert [record["step"] for record in records(run, "test")] == [2, 3, 4, 5, 6]


def test_checkpoint_alone_gives_the_trained_flow(start):
    run = start("--epoch 1")
    flow, config = load(run.folder / "1.state")
    assert not flow.training
    assert config["data"] == "folder"
    images = torch.from_numpy(np.array(run.dataset.test))
    values = [bits_per_dim(each, images, torch.Generator().manual_seed(0)) for each in (flow, run.flow)]
    assert torch.equal(*values)


def test_reported_test_bpd(start):
    """The mean over the split and its standard error, computed here from the loaded weights with other noise."""
    run = start("--epoch 4 --lr 1e-2")
    flow, _ = load(run.folder / "4.state")
    images = torch.from_numpy(np.array(run.dataset.test))
    draws = torch.stack([bits_per_dim(flow, images).detach() for _ in range(200)])
    reported = records(run, "test")[-1]
    assert reported["images"] == 6
    assert reported["bpd"] == pytest.approx(draws.mean().item(), abs=5 * draws.mean(1).std().item())
    assert reported["bpd_stderr"] == pytest.approx(draws.mean(0).std().item() / math.sqrt(6), rel=0.5)


def test_records_beyond_the_checkpoint_are_written_again(start):
    run = start("--max_steps 5")
    with open(run.log.records_path, "a") as file:
        file.write(json.dumps({"kind": "train", "epoch": 2, "step": 6, "bpd": 0.0}) + '\n{"kind": "tr')
    run = start("--max_steps 7")
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4, 5, 6, 7]
    assert all(record["bpd"] > 0 for record in records(run, "train"))


def test_other_settings_need_another_infix(start):
    start("--max_steps 2")
    with pytest.raises(UserError, match=r"seed 0 -> 1.*--out_infix"):
        start("--max_steps 4 --seed 1")
    with pytest.raises(UserError, match="batch_size 8 -> 4"):
        start("--max_steps 4 --batch_size 4")
    run = start("--max_steps 4 --lr 5e-4 --weight_decay 0.1")
    assert run.descent.optimizer.param_groups[0]["weight_decay"] == 0.1
    text = run.log.text_path.read_text()
    assert "continuing from" in text
    assert "lr 0.001 -> 0.0005" in text
    start("--max_steps 2 --seed 1 --out_infix _other")


def test_a_finished_run_stays_as_it_is(start):
    first = start("--max_steps 3")
    before = (first.folder / "last.state").read_bytes()
    start("--max_steps 3")
    assert (first.folder / "last.state").read_bytes() == before


def test_seeds_give_different_runs_and_the_same_seed_the_same(start):
    a, b, c = (weights(start(f"--max_steps 3 --seed {seed}", out)) for seed, out in ((0, "a"), (0, "b"), (1, "c")))
    assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(a, c, strict=True))


def test_learning_rate():
    rates = [learning_rate(step, 0.1, 4, "cosine", 24) for step in (0, 1, 2, 3, 14, 24)]
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.05, 0], abs=1e-12)
    assert learning_rate(14, 0.1, 4, "constant", 24) == 0.1


@pytest.mark.parametrize("where, level", [("disentanglers.0", 0), ("decimators.1", 1)])
def test_a_step_that_is_not_finite_never_reaches_the_weights(start, images, tmp_path, monkeypatch, where, level):
    good = (start("--epoch 1").folder / "1.state").read_bytes()
    run = main.Run(get_args(f"--data folder --data_path {images} -o {tmp_path / 'run'} {SMALL} --epoch 3".split()))
    assert run.step == 5
    bijector = run.flow.get_submodule(where)
    forward = bijector.forward

    def broken(x):
        y, log_det = forward(x)
        return (y * math.inf, log_det) if run.step >= 7 or run.descent.failed_step >= 0 else (y, log_det)

    bijector.forward = broken
    steps = []
    update = run.descent.optimizer.step
    monkeypatch.setattr(run.descent.optimizer, "step", lambda: (update(), steps.append(weights(run)))[0])
    with pytest.raises(UserError, match=rf"epoch 2, step 8: loss is not finite, first at level h = {level}"):
        run.train()
    assert all(value.isfinite().all() for value in steps[-1])
    assert all(torch.equal(*pair) for pair in zip(steps[-1], steps[-2], strict=True))
    assert not all(torch.equal(*pair) for pair in zip(steps[-2], steps[-3], strict=True))
    assert (run.folder / "1.state").read_bytes() == good
    assert [path.name for path in run.folder.iterdir()] == ["1.state"]


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(start):
    run = start("--max_steps 1")
    before = weights(run)
    run.total_steps = 5
    run.flow.decimators[1].networks.scale.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="epoch 1, step 2: gradient is not finite, first at level h = 1"):
        run.train()
    assert all(torch.equal(*pair) for pair in zip(weights(run), before, strict=True))


def test_weights_that_give_no_finite_bpd_are_not_saved(start):
    """The very last update can blow up what no later step would see."""
    run = start("--epoch 1")
    good = (run.folder / "1.state").read_bytes()
    run.total_steps = 10

    def blow_up():
        for parameter in run.flow.parameters() if run.step == 9 else ():
            parameter.data.mul_(1e200)

    with pytest.raises(UserError, match=r"epoch 2, step 10: BPD of test images is not finite, first at level h = 0"):
        at_steps(run, after=blow_up).train()
    assert [path.name for path in run.folder.iterdir()] == ["1.state"]
    assert (run.folder / "1.state").read_bytes() == good
    assert [record["step"] for record in records(run, "test")] == [5]


def test_every_draw_is_a_function_of_seed_epoch_and_step(start):
    run, same, other = (start(f"--max_steps 1 --seed {seed}", out) for out, seed in (("a", 0), ("b", 0), ("c", 1)))

    def draw(run, step):
        images, noise = run.batches(step)
        return torch.stack((images.double(), noise))

    assert torch.equal(draw(run, 3), draw(same, 3))
    assert not torch.equal(draw(run, 3)[1], draw(run, 4)[1])
    assert not torch.equal(draw(run, 3), draw(other, 3))
    run.test()
    tests = records(run, "test")
    assert tests[0]["bpd"] == tests[1]["bpd"]
    picture = run.folder.parent / "out_samples" / "step1.png"
    before = picture.read_bytes()
    run.plot()
    assert picture.read_bytes() == before


def test_overfitting_16_images(start, images, tmp_path):
    """More than 3 bits off the untrained flow's BPD on the training images themselves."""
    folder = tmp_path / "sixteen"
    for split, number in (("train", 16), ("test", 2)):
        (folder / split).mkdir(parents=True)
        for n in range(number):
            (folder / split / f"{n}.png").write_bytes((images / "train" / f"{n}.png").read_bytes())
    flags = f"--data_path {folder} --batch_size 16 --nlayers 2 --nhidden 32 --lr 5e-3 --max_steps 400 --dtype float32"
    run = start(f"{flags} --save_epoch 0 --plot_epoch 0")
    curve = [record["bpd"] for record in records(run, "train")]
    assert curve[0] - np.mean(curve[-5:]) > 3


def test_gradient_is_clipped(start):
    """With a tiny clip the first Adam step does not change, but the reported norm is that before clipping."""
    plain, clipped = start("--max_steps 1", "a"), start("--max_steps 1 --clip_grad 1e-3", "b")
    norms = [records(run, "train")[0]["grad_norm"] for run in (plain, clipped)]
    assert norms[0] == norms[1] > 1e-3
    moments = [
        torch.cat([state["exp_avg"].flatten() for state in run.descent.optimizer.state.values()]).norm().item()
        for run in (plain, clipped)
    ]
    assert moments[1] == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert moments[0] == pytest.approx(0.1 * min(1.0, norms[0]), rel=1e-3)


def test_real_nvp_trains_resumes_plots_and_exports(start, tmp_path):
    flags = "--model realnvp --nmlp 2 --lr 1e-2"
    whole = start(f"{flags} --max_steps 10", "whole")
    assert "realnvp_laplace_nl1_nr1_nm2_nh8" in str(whole.folder)
    assert "multiply-adds" in whole.log.text_path.read_text()
    assert records(whole, "train")[-1]["bpd"] < records(whole, "train")[0]["bpd"] - 0.3
    start(f"{flags} --max_steps 4", "halves")
    halves = start(f"{flags} --max_steps 10", "halves")
    assert all(torch.equal(*pair) for pair in zip(weights(halves), weights(whole), strict=True))
    exported, file = tmp_path / "exported.state", str(whole.folder / "2.state")
    run = ["--data", "folder", "--data_path", whole.args.data_path, "-o", whole.args.out_dir, *SMALL.split()]
    done = call(main, *run, *flags.split(), "--export", exported)
    assert done.returncode == 0, done.stderr
    flow, config = load(exported)
    assert config["model"] == "realnvp"
    assert all(torch.equal(*pair) for pair in zip(flow.parameters(), weights(whole), strict=True))
    drawn = call(plot_mix_temperature, "--weights", file, "--fig_dir", tmp_path / "figures")
    assert drawn.returncode == 0, drawn.stderr
    refused = call(main, *run, "--out_infix", "_b", "--init", file)
    assert refused.returncode == 1
    assert "model realnvp -> rgflow" in refused.stderr


def test_training_time_continues_after_a_restart(start):
    """Seconds of training grow from record to record, over a restart too, and the checkpoint carries them."""
    first = start("--max_steps 3")
    assert 0 < first.seconds == read(first.folder / "last.state")["seconds"]
    second = start("--max_steps 6")
    seconds = [record["seconds"] for record in records(second, "train")]
    assert len(seconds) == 6
    assert seconds == sorted(seconds)
    assert seconds[2] <= first.seconds < seconds[3]


def test_no_output_files(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = main.Run(get_args([*f"--data folder --data_path {images} {SMALL} --max_steps 2".split(), "-o", ""]))
    run.train()
    assert run.step == 2
    assert list(tmp_path.iterdir()) == []


def test_scripts_from_the_command_line(images, tmp_path):
    """main.py and plot_mix_temperature.py as a user runs them, by flags and by --weights."""
    flags = f"--data folder --data_path {images} -o {tmp_path / 'run'} {SMALL} --max_steps 2".split()
    trained = command("main.py", *flags)
    assert trained.returncode == 0, trained.stderr
    by_flags = command("plot_mix_temperature.py", *flags, "--fig_dir", str(tmp_path / "a"))
    assert by_flags.returncode == 0, by_flags.stderr
    file = ["--weights", next((tmp_path / "run").rglob("last.state"))]
    by_file = call(plot_mix_temperature, *file, "--temperatures", "0.2,0.6", "--fig_dir", tmp_path / "b")
    assert by_file.returncode == 0, by_file.stderr
    pictures = [tmp_path / folder / "mix_temperature_T0.2,0.6_folder_laplace_nl1_nr1_nm1_nh8.png" for folder in "ab"]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert pictures[0].with_suffix(".pdf").exists()
    for extra, status, word in (
        (["--temperatures", "1,1,1"], 2, "--temperatures"),
        (["--data", "msds1"], 1, "--data msds1"),
        (["--lr", "1e-3"], 2, "unrecognized arguments: --lr 1e-3"),
    ):
        bad = call(plot_mix_temperature, *file, *extra)
        assert bad.returncode == status and word in bad.stderr and "Traceback" not in bad.stderr


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        (main, "--data celeba32 --data_path {tmp}", ["list_eval_partition.txt"]),
        (main, "--data folder --data_path {tmp}/nothing", ["nothing"]),
        (main, "--data folder --data_path {images} --batch_size 41", ["--batch_size 41", "40"]),
        (plot_mix_temperature, "--weights {tmp}/no.state", ["no.state", "no such file"]),
        (plot_mix_temperature, "--weights {tmp}/text.state", ["text.state", "damaged"]),
        (plot_mix_temperature, "-o {tmp}", ["no checkpoint", "--weights"]),
    ],
)
def test_bad_files(script, arguments, words, images, tmp_path):
    (tmp_path / "text.state").write_text("not a checkpoint")
    small = f"--nlayers 1 --nhidden 4 -o {tmp_path / 'out'}" if script is main else ""
    done = call(script, *f"{arguments.format(tmp=tmp_path, images=images)} {small}".split())
    assert done.returncode == 1
    assert all(word in done.stderr for word in words)
