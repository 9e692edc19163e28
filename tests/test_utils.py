"""Logs, files, locks, signals, figures and seeds."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import ROOT

from utils.files import lock, replacing
from utils.logging import RunLog, read_records
from utils.plotting import image_grid
from utils.random import derived_seed, generator
from utils.signals import StopSignals


def test_log_cuts_records_beyond_the_step(tmp_path, capsys):
    log = RunLog(tmp_path / "out", stdout=True)
    log.text("hello")
    for step in (1, 2, 3):
        log.record(kind="train", step=step)
    with open(tmp_path / "out.jsonl", "a") as file:
        file.write('{"kind": "tra')
    RunLog(tmp_path / "out", stdout=False, step=2)
    assert [record["step"] for record in read_records(tmp_path / "out.jsonl")] == [1, 2]
    assert (tmp_path / "out.log").read_text() == "hello\n"
    assert capsys.readouterr().out == "hello\n"


def test_seeds_differ_by_seed_purpose_and_index():
    seeds = {derived_seed(seed, purpose, k) for seed in range(5) for purpose in ("a", "b") for k in range(100)}
    assert len(seeds) == 1000
    assert torch.equal(torch.rand(3, generator=generator(1, "a", 2)), torch.rand(3, generator=generator(1, "a", 2)))


def test_image_grid():
    images = np.stack([np.full((1, 16, 16), value) for value in (0.0, 0.25, 0.5)])
    grid = image_grid(images, 2)
    assert grid.shape == (33, 33, 3)
    assert (grid[:16, :16] == 0).all()
    assert (grid[:16, 17:] == 0.25).all()
    assert (grid[17:, :16] == 0.5).all()
    assert (grid[16] == 1).all()
    assert (grid[17:, 17:] == 1).all()


def test_only_what_is_beyond_the_step_or_no_record_is_cut(tmp_path):
    path = tmp_path / "out.jsonl"
    good = b'{"kind": "train",  "step": 1}\n{"kind": "test", "step": 2}\n'
    junk = [b"5\n", b"[1]\n", b'{"step": "x"}\n', b"\xff\xfe\n", bytes(100), b'{"step": 3}\n', b'\n{"step": 2']
    path.write_bytes(good + b"".join(junk))
    RunLog(tmp_path / "out", stdout=False, step=2)
    assert path.read_bytes() == good
    before = path.stat()
    RunLog(tmp_path / "out", stdout=False, step=2)
    assert path.stat().st_ino == before.st_ino


def test_an_incomplete_line_of_prose_is_ended(tmp_path):
    (tmp_path / "out.log").write_text("whole\nhal")
    log = RunLog(tmp_path / "out", stdout=False)
    log.text("next")
    log.sync()
    assert (tmp_path / "out.log").read_text() == "whole\nhal\nnext\n"


def test_replacing(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(ValueError), replacing(path) as file:
        file.write(b"half")
        raise ValueError
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("path", ["none/a", "file/a", "folder"])
def test_replacing_names_the_file(path, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught, replacing(tmp_path / path) as file:
        file.write(b"x")
    assert caught.value.filename == str(tmp_path / path)
    assert caught.value.strerror
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_lock(tmp_path):
    """Held against other openings, given up on closing and when the process that holds it is killed."""
    path = tmp_path / "a.lock"
    with lock(path), pytest.raises(BlockingIOError):
        lock(path)
    code = f"from utils.files import lock; held = lock({str(path)!r}); print('held', flush=True); input()"
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, cwd=ROOT)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(BlockingIOError):
        lock(path)
    holder.kill()
    holder.wait()
    lock(path).close()


def test_leave_on_signals():
    """Ends the process with 128 + the number; where that is swallowed, the next context knows."""
    head = "import os, signal; from utils.signals import StopSignals, leave_on_signals; leave_on_signals()\n"
    plain = "try: os.kill(os.getpid(), signal.SIGTERM)\nfinally: print('cleared up')"
    swallowed = "try: os.kill(os.getpid(), signal.SIGTERM)\nexcept: pass\n"
    swallowed += "with StopSignals() as stop: print(stop.number)"
    for code, status, text in ((plain, 143, "cleared up\n"), (swallowed, 0, "15\n")):
        done = subprocess.run([sys.executable, "-c", head + code], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (status, text, "")


def test_stop_signals():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopSignals() as stop:
        assert stop.number is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.number == signal.SIGUSR1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
