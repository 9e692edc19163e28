"""Runs that are stopped, killed, damaged or started twice: what they leave, and how they resume."""

import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, SMALL, at_steps, call, command, records, wait_for, weights
from test_checkpoint import full_ones, same

import main
import plot_mix_temperature
from args import get_args
from flow import load
from utils import checkpoint
from utils.checkpoint import read
from utils.cli import UserError
from utils.plotting import grid_figure

FLAGS = "--epoch 4 --print_step 3 --lr_schedule cosine --warmup_steps 3 --keep_epoch 2"  # 20 steps
TIMES = {"time", "images_per_s", "seconds"}


@pytest.fixture
def new(images, tmp_path):
    """A Run with extra flags that has not started yet."""

    def new(flags=FLAGS, out="run"):
        return main.Run(get_args(f"--data folder --data_path {images} -o {tmp_path / out} {SMALL} {flags}".split()))

    return new


@pytest.fixture
def stopped(new):
    """A run that gets a signal during the steps given, {step: signal}; returns what `Run.train` did, and the Run."""

    def stopped(signals, flags=FLAGS):
        run = new(flags)

        def send():
            if run.step + 1 in signals:
                os.kill(os.getpid(), signals[run.step + 1])

        return at_steps(run, send).train(), run

    return stopped


def without_times(run):
    return [
        [{k: v for k, v in record.items() if k not in TIMES} for record in records(run, kind)]
        for kind in ("train", "test")
    ]


def assert_same_end(run, whole):
    """Weights, optimiser state, best numbers and records equal bit for bit, and the same files are there."""
    assert run.step == whole.step
    states = [read(each.folder / "4.state") for each in (run, whole)]
    for state in states:
        del state["config"], state["seconds"]
    assert same(*states)
    assert without_times(run) == without_times(whole)
    assert full_ones(run.folder) == full_ones(whole.folder)
    assert {path.name for path in run.folder.iterdir()} == {path.name for path in whole.folder.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals(start, stopped, number):
    """In the first epoch, between prints, at a print, at the end of an epoch, in the last step."""
    whole = start(FLAGS, "whole")
    for step in (2, 4, 6, 10, 13):
        result, run = stopped({step: number})
        assert (result, run.step) == (number, step)
        assert (run.folder / "last.state").exists() == (step != 10)  # already saved there
        assert f"{number.name}: stopped at step {step}" in run.log.text_path.read_text()
    result, run = stopped({20: number})
    assert result == number
    assert_same_end(run, whole)


def test_a_signal_at_the_end_of_an_epoch_that_is_not_saved(start, stopped):
    flags = f"{FLAGS} --save_epoch 2"
    whole = start(flags, "whole")
    _, run = stopped({5: signal.SIGTERM}, flags)
    assert [path.name for path in run.folder.iterdir()] == ["last.state"]
    assert_same_end(start(flags), whole)


def test_a_second_signal_during_a_save_is_ignored(start, stopped, monkeypatch):
    save = checkpoint.save

    def interrupted(*args):
        for number in (signal.SIGTERM, signal.SIGINT) if args[0].name == "last.state" else ():
            os.kill(os.getpid(), number)
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        result, run = stopped({7: signal.SIGUSR1})
    assert (result, run.step) == (signal.SIGUSR1, 7)
    assert_same_end(start(FLAGS), start(FLAGS, "whole"))


def test_save_minutes(start, monkeypatch):
    """With a time that is over after every step, every state is saved; nothing else changes."""
    steps = []
    save = checkpoint.save_run
    monkeypatch.setattr(
        checkpoint, "save_run", lambda folder, state, keep: steps.append(state["step"]) or save(folder, state, keep)
    )
    run = start(f"{FLAGS} --save_minutes 1e-9")
    assert steps == list(range(1, 21))
    assert_same_end(run, start(FLAGS, "whole"))
    assert steps[20:] == [5, 10, 15, 20]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_faults(tmp_path):
    """Few cases of each kind; docs/reliability.md has the counts of many."""
    done = command("tests/faults.py", "-n", "2", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ends bit for bit as an undisturbed run") >= 5
    assert "BAD" not in done.stdout


@pytest.mark.parametrize("cut", [5, 7, 10])
def test_stop_and_continue_equals_an_uninterrupted_run(start, stopped, cut):
    whole = start(FLAGS, "whole")
    _, run = stopped({cut: signal.SIGTERM})
    assert run.step == cut
    assert_same_end(start(FLAGS), whole)


def test_what_is_not_finite_is_not_saved(start, new):
    """The weights after the last step, which no test has seen."""
    good = (start("--max_steps 5").folder / "1.state").read_bytes()
    run = new("--max_steps 9")

    def blow_up():
        if run.step == 6:
            for parameter in run.flow.parameters():
                parameter.data.mul_(math.inf)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(UserError, match="epoch 2, step 7: weights are not finite"):
        at_steps(run, after=blow_up).train()
    assert [path.name for path in run.folder.iterdir()] == ["1.state"]
    assert (run.folder / "1.state").read_bytes() == good


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at the process in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["torch is imported", "the run is set up", "an epoch is over"])
def test_a_process_that_gets_a_signal(moment, number, images, tmp_path):
    argv = f"main.py --data folder --data_path {images} -o {tmp_path} {SMALL} --epoch 100000 --print_step 0".split()
    process = subprocess.Popen(
        [sys.executable, *argv], cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    base = tmp_path / "folder" / "laplace_nl1_nr1_nm1_nh8"
    maps = Path(f"/proc/{process.pid}/maps")
    reached = {
        "torch is imported": lambda: "libtorch" in maps.read_text(),
        "the run is set up": (base / "out.lock").exists,
        "an epoch is over": (base / "out_save" / "1.state").exists,
    }
    wait_for(reached[moment])
    process.send_signal(number)
    status = process.wait(60)
    assert b"Traceback" not in process.stderr.read()
    if moment == "an epoch is over":
        assert status == 128 + number
        assert checkpoint.newest(base / "out_save", full=True)[1]["step"] >= 5
    else:
        assert status in (-number, 128 + number)


def test_samples_do_not_bring_back_a_folder_that_was_removed(start, monkeypatch):
    run = start("--max_steps 5")
    monkeypatch.setattr(main, "grid_figure", lambda *_: shutil.rmtree(run.folder.parent) or grid_figure(*_))
    with pytest.raises(FileNotFoundError):
        run.plot()
    assert not run.folder.parent.exists()


def test_a_damaged_newest_file_is_named_and_the_one_before_used(start, stopped):
    whole = start(FLAGS, "whole")
    _, run = stopped({12: signal.SIGTERM})
    (run.folder / "last.state").write_bytes((run.folder / "last.state").read_bytes()[:-500])
    run = start(FLAGS)
    text = run.log.text_path.read_text()
    assert re.search(r"last\.state: damaged.*passed over", text)
    assert re.search(r"continuing from \S*2\.state, step 10", text)
    assert_same_end(run, whole)
    shutil.copy(run.folder / "2.state", run.folder / "5.state")
    with open(run.folder / "5.state", "r+b") as file:
        file.truncate(1000)
    done = call(plot_mix_temperature, *argv_of(run), "--fig_dir", run.folder.parent / "figures")
    assert done.returncode == 0, done.stderr
    assert "5.state: damaged" in done.stderr and "4.state at T" in done.stdout


def argv_of(run):
    return f"--data folder --data_path {run.args.data_path} -o {run.args.out_dir} {SMALL}".split()


def test_no_good_file_is_one_sentence(start):
    run = start("--max_steps 7")
    for path in run.folder.iterdir():
        path.write_bytes(b"PK")
    with pytest.raises(UserError, match="no other file in"):
        start("--max_steps 9")
    done = call(main, *argv_of(run), "--max_steps", "9")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "last.state: damaged" in done.stderr


def test_slim_files_serve_scripts_but_not_training(start):
    run = start("--epoch 3 --keep_epoch 1 --lr 1e-2")
    best = min(run.test_bpds, key=run.test_bpds.get)
    assert full_ones(run.folder) == sorted({f"{best}.state", "3.state"})
    for path in run.folder.iterdir():
        state = read(path)
        checkpoint.save(path, checkpoint.slim(state))
    flow, _ = load(run.folder / "3.state")
    assert all(torch.equal(*pair) for pair in zip(flow.parameters(), run.flow.parameters(), strict=True))
    done = call(main, *argv_of(run), "--epoch", "4")
    assert done.returncode == 1
    assert re.fullmatch(r"error: \S*3\.state is slim, .*--init \S*3\.state\n", done.stderr)
    (run.folder / "3.state").write_bytes(b"")
    with pytest.raises(UserError, match=r"2\.state is slim.*3\.state: damaged"):
        start("--epoch 4 --keep_epoch 1 --lr 1e-2")


def test_init(start, tmp_path):
    """Weights of another run, fresh optimiser, step 0; only where the run has no checkpoint of its own."""
    first = start("--epoch 1 --lr 1e-2", "first")
    file = first.folder / "1.state"
    checkpoint.save(tmp_path / "slim.state", checkpoint.slim(read(file)))
    for given in (file, tmp_path / "slim.state"):
        run = main.Run(get_args([*argv_of(first), "--out_infix", given.stem, "--seed", "5", "--init", str(given)]))
        assert run.step == 0 and run.descent.optimizer.state_dict()["state"] == {}
        assert all(torch.equal(*pair) for pair in zip(weights(run), weights(first), strict=True))
        run.total_steps = 2
        run.train()
        assert f"starting from the weights of {given}" in run.log.text_path.read_text()
        again = main.Run(run.args)
        assert again.step == 2
        again.lock.close()
    with pytest.raises(UserError, match=r"another network \(nhidden 8 -> 4\)"):
        start(f"--nhidden 4 --init {file}", "other")
    with pytest.raises(UserError, match="no such file"):
        start(f"--init {tmp_path / 'none.state'}", "none")


def test_export(start, tmp_path):
    run = start("--max_steps 7")
    done = call(main, *argv_of(run), "--export", tmp_path / "new" / "x.state")
    assert done.returncode == 0, done.stderr
    assert "last.state" in done.stdout
    state = read(tmp_path / "new" / "x.state")
    expected = checkpoint.slim(read(run.folder / "last.state"))
    assert str(tmp_path) in expected["config"].pop("out_dir") and expected["config"].pop("data_path")
    assert same(state, expected)
    flow, _ = load(tmp_path / "new" / "x.state")
    assert all(torch.equal(*pair) for pair in zip(flow.parameters(), run.flow.parameters(), strict=True))
    done = call(main, *argv_of(run), "--export", run.folder / "last.state")
    assert done.returncode == 1 and "--export" in done.stderr
    done = call(main, *argv_of(run), "--out_infix", "none", "--export", "x.state")
    assert done.returncode == 1 and "no checkpoint" in done.stderr


def test_two_runs_on_one_folder(start, new):
    run = new("--max_steps 2")
    done = call(main, *argv_of(run), "--max_steps", "2")
    assert done.returncode == 1
    assert re.fullmatch(r"error: \S*out\.lock: another process is training this run.*--out_infix.*\n", done.stderr)
    start("--max_steps 2 --out_infix _beside")
    run.train()
    start("--max_steps 3")


def test_disk_space(start, monkeypatch):
    run = start("--epoch 4 --keep_epoch 2")
    line = re.search(r"disk: .*", run.log.text_path.read_text())[0]
    weights = 8 * sum(parameter.numel() for parameter in run.flow.parameters())
    assert f"need up to {checkpoint.disk_space(weights, kept=2) / 1e9:.3g} GB" in line
    monkeypatch.setattr("utils.run.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(UserError, match=r"--out_dir .*: disk: .*5e-09 GB are free"):
        start("--epoch 4 --keep_epoch 2", "other")
    start("--epoch 4 --keep_epoch 2")  # finished: needs none


@pytest.mark.parametrize("below", ["", "folder", "folder/laplace_nl1_nr1_nm1_nh8"])
def test_output_path_below_a_regular_file(images, tmp_path, below):
    path = tmp_path / "out" / below if below else tmp_path / "out"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"--out_dir .*/out: cannot be written"):
        main.Run(get_args(f"--data folder --data_path {images} -o {tmp_path / 'out'} {SMALL}".split()))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("flags", ["--epoch 2", "--epoch 2 --print_step 0 --save_minutes 1e-9"])
def test_output_folder_removed_during_the_run(new, flags):
    """It is the user's will, or another disk: the run ends, and does not fill the place with a folder of its own."""
    run = new(flags)
    at_steps(run, lambda: shutil.rmtree(run.folder.parent) if run.step == 3 else None)
    with pytest.raises(FileNotFoundError) as caught:
        run.train()
    assert str(run.folder.parent) in str(caught.value.filename)
    for write in (run.plot, run.save):
        with pytest.raises(FileNotFoundError):
            write()
    assert not run.folder.parent.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_file(start, monkeypatch, code):
    run = start("--max_steps 5")

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            raise OSError(code, os.strerror(code))

        def __getattr__(self, name):
            return getattr(self.file, name)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, Full(file)))
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        start("--max_steps 7")
    assert caught.value.filename == str(run.folder / "last.state")
    assert [path.name for path in run.folder.iterdir()] == ["1.state"]
