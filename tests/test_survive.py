"""Runs that are stopped, killed, damaged or started twice: what they leave, and how they resume."""

import errno
import os
import re
import shutil
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from runs import at_steps, call, command, equal, flags_of, process, records, wait_for, weights
from test_checkpoint import full_ones, names, same

import main
import plot_mix_temperature
from args import get_args
from flow import load
from utils import checkpoint
from utils.checkpoint import read
from utils.cli import UserError

FLAGS = "--epoch 4 --print_step 3 --lr_schedule cosine --warmup_steps 3 --keep_epoch 2"  # 20 steps
TIMES = {"time", "images_per_s", "seconds"}


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """An undisturbed run."""
    torch.set_default_dtype(torch.float64)
    run = main.Run(get_args(flags_of(images, tmp_path_factory.mktemp("whole"), FLAGS)))
    run.train()
    return run


@pytest.fixture
def stopped(new):
    """A run that gets a signal during the steps given, {step: signal}; returns what `Run.train` did, and the Run."""

    def stopped(signals, flags=FLAGS):
        run = new(flags)
        at_steps(run, lambda: [os.kill(os.getpid(), signals[step]) for step in signals if step == run.step + 1])
        return run.train(), run

    return stopped


def argv_of(run):
    return flags_of(run.args.data_path, run.args.out_dir)


def without_times(run):
    found = records(run, "train") + records(run, "test")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in found]


def assert_same_end(run, whole):
    """Weights, optimiser state, best numbers and records equal bit for bit, and the same files are there."""
    states = [read(each.folder / "4.state") for each in (run, whole)]
    for state in states:
        del state["config"], state["seconds"]
    assert run.step == whole.step and same(*states)
    assert without_times(run) == without_times(whole)
    assert full_ones(run.folder) == full_ones(whole.folder) and names(run.folder) == names(whole.folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_that_signals_stop_equals_an_uninterrupted_one(whole, stopped, number):
    """In the first epoch, at its end, at a print, between prints, at the end of a kept epoch, in the last step."""
    for step in (2, 4, 5, 6, 7, 10, 13):
        result, run = stopped({step: number})
        assert (result, run.step) == (number, step)
        assert (run.folder / "last.state").exists() == (step % 5 != 0)  # already saved there
        assert f"{number.name}: stopped at step {step}" in run.log.text_path.read_text()
    result, run = stopped({20: number})
    assert result == number
    assert_same_end(run, whole)


def test_a_signal_at_the_end_of_an_epoch_that_is_not_saved(start, stopped):
    flags = f"{FLAGS} --save_epoch 2"
    whole = start(flags, "whole")
    _, run = stopped({5: signal.SIGTERM}, flags)
    assert names(run.folder) == ["last.state"]
    assert_same_end(start(flags), whole)


def test_a_second_signal_during_a_save_is_ignored(start, stopped, whole, monkeypatch):
    save = checkpoint.save

    def interrupted(*args):
        for number in (signal.SIGTERM, signal.SIGINT) if args[0].name == "last.state" else ():
            os.kill(os.getpid(), number)
        save(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", interrupted)
        result, run = stopped({7: signal.SIGUSR1})
    assert (result, run.step) == (signal.SIGUSR1, 7)
    assert_same_end(start(FLAGS), whole)


def test_save_minutes(start, whole, monkeypatch):
    """With a time that is over after every step, every state is saved; nothing else changes."""
    steps, save = [], checkpoint.save_run
    monkeypatch.setattr(checkpoint, "save_run", lambda *args: steps.append(args[1]["step"]) or save(*args))
    assert_same_end(start(f"{FLAGS} --save_minutes 1e-9"), whole)
    assert steps == list(range(1, 21))
    assert whole.log.text_path.read_text().count("\nweights: ") == 4


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_faults():
    """Few cases of each kind; docs/reliability.md has the counts of many."""
    done = command("tests/faults.py", "-n", "2", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ends bit for bit as an undisturbed run") >= 5
    assert "BAD" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at the process in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("moment", ["torch is imported", "the run is set up", "an epoch is over"])
def test_a_process_that_gets_a_signal(moment, number, images, tmp_path):
    started = process("main.py", *flags_of(images, tmp_path, "--epoch 100000 --print_step 0"))
    base = tmp_path / "folder" / "laplace_nl1_nr1_nm1_nh8"
    maps = Path(f"/proc/{started.pid}/maps")
    reached = {
        "torch is imported": lambda: "libtorch" in maps.read_text(),
        "the run is set up": (base / "out.lock").exists,
        "an epoch is over": (base / "out_save" / "1.state").exists,
    }
    wait_for(reached[moment])
    started.send_signal(number)
    assert "Traceback" not in started.communicate(timeout=60)[0]
    over = moment == "an epoch is over"
    assert started.returncode in (128 + number, 128 + number if over else -number)
    assert not over or checkpoint.newest(base / "out_save", full=True)[1]["step"] >= 5


def test_a_damaged_newest_file_is_named_and_the_one_before_used(start, stopped, whole):
    """Records of later steps, and one cut short, are written again."""
    _, run = stopped({12: signal.SIGTERM})
    (run.folder / "last.state").write_bytes((run.folder / "last.state").read_bytes()[:-500])
    assert records(run, "train")[-1]["step"] == 12
    with open(run.log.records_path, "a") as file:
        file.write('{"kind": "tr')
    run = start(FLAGS)
    text = run.log.text_path.read_text()
    assert re.search(r"last\.state: damaged.*passed over", text)
    assert re.search(r"continuing from \S*2\.state, step 10", text)
    assert_same_end(run, whole)
    (run.folder / "5.state").write_bytes((run.folder / "2.state").read_bytes()[:1000])
    done = call(plot_mix_temperature, *argv_of(run), "--fig_dir", run.folder.parent / "figures")
    assert done.returncode == 0, done.stderr
    assert "5.state: damaged" in done.stderr and "4.state at T" in done.stdout


def test_slim_files_serve_scripts_but_not_training(start):
    run = start("--epoch 3 --keep_epoch 1 --lr 1e-2")
    assert full_ones(run.folder) == ["3.state"]
    checkpoint.save(run.folder / "3.state", checkpoint.slim(read(run.folder / "3.state")))
    assert equal(load(run.folder / "3.state")[0].parameters(), run.flow.parameters())
    done = call(main, *argv_of(run), "--epoch", "4")
    assert done.returncode == 1 and re.fullmatch(r"error: \S*3\.state is slim, .*--init \S*3\.state\n", done.stderr)
    (run.folder / "3.state").write_bytes(b"")
    with pytest.raises(UserError, match=r"2\.state is slim.*3\.state: damaged"):
        start("--epoch 4 --keep_epoch 1 --lr 1e-2")


def test_init(start, new, tmp_path):
    """Weights of another run, fresh optimiser, step 0; only where the run has no checkpoint of its own."""
    first = start("--epoch 1 --lr 1e-2", "first")
    file = first.folder / "1.state"
    checkpoint.save(tmp_path / "slim.state", checkpoint.slim(read(file)))
    for given in (file, tmp_path / "slim.state"):
        flags = f"--out_infix {given.stem} --seed 5 --init {given}"
        run = new(flags, "first")
        assert run.step == 0 and run.descent.optimizer.state_dict()["state"] == {}
        assert equal(weights(run), weights(first))
        run.total_steps = 2
        run.train()
        assert f"starting from the weights of {given}" in run.log.text_path.read_text()
        again = new(flags, "first")
        assert again.step == 2
        again.lock.close()
    with pytest.raises(UserError, match=r"another network \(nhidden 8 -> 4\)"):
        start(f"--nhidden 4 --init {file}", "other")
    with pytest.raises(UserError, match="no such file"):
        start(f"--init {tmp_path / 'none.state'}", "none")


def test_export(start, tmp_path):
    run, file = start("--max_steps 7"), tmp_path / "new" / "folder" / "x.state"
    done = call(main, *argv_of(run), "--export", file)
    assert done.returncode == 0 and "last.state" in done.stdout, done.stderr
    expected = checkpoint.slim(read(run.folder / "last.state"))
    assert str(tmp_path) in expected["config"].pop("out_dir")
    expected["config"]["folder"] = expected["config"].pop("data_path").rpartition("/")[2]
    assert same(read(file), expected)
    assert equal(load(file)[0].parameters(), run.flow.parameters())
    (run.folder / "last.state").write_bytes(file.read_bytes())  # an export in a run's folder is exported, too
    main.main([*argv_of(run), "--export", str(tmp_path / "again.state")])
    assert same(read(tmp_path / "again.state"), expected)
    for flags, words in (
        (["--export", run.folder / "last.state"], "--export"),
        (["--out_infix", "none", "--export", "x.state"], "no checkpoint"),
    ):
        done = call(main, *argv_of(run), *flags)
        assert done.returncode == 1 and words in done.stderr


def test_two_runs_on_one_folder(start, new):
    run = new("--max_steps 2")
    done = call(main, *argv_of(run), "--max_steps", "2")
    assert done.returncode == 1 and re.fullmatch(r"error: \S*out\.lock: another process .*--out_infix.*\n", done.stderr)
    start("--max_steps 2 --out_infix _beside")
    run.train()
    start("--max_steps 3")


def test_disk_space(start, monkeypatch):
    run = start("--epoch 4 --keep_epoch 2")
    start("--epoch 3 --keep_epoch 2", "unfinished")
    line = re.search(r"disk: .*", run.log.text_path.read_text())[0]
    size = 8 * sum(parameter.numel() for parameter in run.flow.parameters())
    assert f"need up to {checkpoint.disk_space(size, kept=2) / 1e9:.3g} GB" in line
    monkeypatch.setattr("utils.run.disk_usage", usage := Mock(return_value=shutil._ntuple_diskusage(10, 5, 5)))
    with pytest.raises(UserError, match=r"--out_dir .*: disk: .*5e-09 GB are free"):
        start("--epoch 4 --keep_epoch 2", "other")
    start("--epoch 4 --keep_epoch 2")  # finished: needs none
    usage.return_value = shutil._ntuple_diskusage(0, 0, checkpoint.disk_space(size, kept=2) - 1000)
    start("--epoch 4 --keep_epoch 2", "unfinished")  # what is there needs no more


@pytest.mark.parametrize("below", ["", "folder", "folder/laplace_nl1_nr1_nm1_nh8"])
def test_output_path_below_a_regular_file(new, tmp_path, below):
    path = tmp_path / "run" / below
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"--out_dir .*/run: cannot be written"):
        new()
    assert path.read_text() == "mine"


@pytest.mark.parametrize("flags", ["--epoch 2", "--epoch 2 --print_step 0 --save_minutes 1e-9"])
def test_output_folder_removed_during_the_run(new, flags):
    """The user has removed it, or a disk is gone: the run ends, and does not make a folder in its place."""
    run = new(flags)
    at_steps(run, lambda: shutil.rmtree(run.folder.parent) if run.step == 3 else None)
    for write in (run.train, run.plot, run.save):
        with pytest.raises(FileNotFoundError) as caught:
            write()
        assert str(run.folder.parent) in str(caught.value.filename)
    assert not run.folder.parent.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_names_the_file(start, monkeypatch, code):
    run, save = start("--max_steps 5"), torch.save
    full = Mock(write=Mock(side_effect=OSError(code, os.strerror(code))))
    monkeypatch.setattr(torch, "save", lambda state, file: save(state, full))
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        start("--max_steps 7")
    assert caught.value.filename == str(run.folder / "last.state") and names(run.folder) == ["1.state"]
