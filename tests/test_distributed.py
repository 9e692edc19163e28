"""Several processes on the CPU (gloo), started by torchrun: the same run as in one process."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, SMALL, call, read_records, wait_for

import main
from utils.checkpoint import read

pytestmark = pytest.mark.slow


def flags(images, out, extra=""):
    return f"--data folder --data_path {images} -o {out} {SMALL} {extra}".split()


def torchrun(processes, arguments, options=()):
    """A started process, torchrun with `processes` copies of main.py."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        *options,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, *options, "main.py", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=100):
    """(exit status, output)"""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


def model(out, name):
    (path,) = out.rglob(name)
    return read(path)


def train_alone(images, out, extra):
    done = call(main, *flags(images, out, extra))
    assert done.returncode == 0, done.stderr


def largest_difference(one, other):
    return max((one["model"][name] - other["model"][name]).abs().max().item() for name in one["model"])


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_two_processes_do_what_one_does(dtype, tolerance, images, tmp_path):
    extra = f"--dtype {dtype} --max_steps 20 --print_step 4 --lr 3e-3"
    train_alone(images, tmp_path / "one", extra)
    status, output = finish(torchrun(2, flags(images, tmp_path / "two", extra)))
    assert status == 0, output
    states = [model(tmp_path / name, "4.state") for name in ("one", "two")]
    assert states[0]["step"] == states[1]["step"] == 20
    assert largest_difference(*states) < tolerance
    logs = [read_records(next((tmp_path / name).rglob("out.jsonl"))) for name in ("one", "two")]
    for one, other in zip(*logs, strict=True):
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        assert one["bpd"] == pytest.approx(other["bpd"], abs=1e-5)
    text = next((tmp_path / "two").rglob("out.log")).read_text()
    assert "2 processes: 8 images per step in all, 4 in each" in text


def test_a_run_resumes_with_another_number_of_processes(images, tmp_path):
    train_alone(images, tmp_path / "one", "--max_steps 15")
    for processes, steps in ((2, 6), (1, 10), (2, 15)):
        status, output = finish(torchrun(processes, flags(images, tmp_path / "parts", f"--max_steps {steps}")))
        assert status == 0, output
    assert largest_difference(*(model(tmp_path / name, "3.state") for name in ("one", "parts"))) < 1e-10


def trained(out):
    """Whether a run has written training records."""
    return any(path.stat().st_size for path in out.rglob("out.jsonl"))


def workers(process):
    """Process numbers of the copies of main.py below torchrun, by rank."""
    found = {}
    for entry in os.listdir("/proc"):
        try:
            parent = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid:
                found[int(re.search(r"\0RANK=(\d+)\0", Path(f"/proc/{entry}/environ").read_text())[1])] = int(entry)
        except (OSError, ValueError, IndexError, TypeError):
            continue
    return found


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes in /proc")
@pytest.mark.parametrize("receiver, name", [("second process", "SIGUSR1"), ("torchrun", "SIGTERM")])
def test_a_signal_stops_all_at_the_same_step(receiver, name, images, tmp_path, start):
    out = tmp_path / "two"
    process = torchrun(2, flags(images, out, "--max_steps 100000 --save_epoch 0 --plot_epoch 0"))
    wait_for(lambda: trained(out))
    os.kill(process.pid if receiver == "torchrun" else workers(process)[1], getattr(signal, name))
    finish(process, 60)
    state = model(out, "last.state")
    assert f"{name}: stopped at step {state['step']}" in next(out.rglob("out.log")).read_text()
    run = start(f"--max_steps {state['step'] + 1}", "two")
    assert run.step == state["step"] + 1


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job(rank, images, tmp_path):
    out = tmp_path / "two"
    process = torchrun(2, flags(images, out, "--max_steps 100000 --save_epoch 0 --plot_epoch 0"))
    wait_for(lambda: trained(out))
    os.kill(workers(process)[rank], signal.SIGKILL)
    begin = time.monotonic()
    status, output = finish(process, 60)
    assert time.monotonic() - begin < 60
    assert status != 0
    assert "another process of the run has ended" in output
    assert not list(out.rglob("*.state"))


def test_a_failing_process_shows_its_error(images, tmp_path):
    out = tmp_path / "two"
    out.mkdir()
    (out / "folder").write_text("in the way")  # only the first process writes there
    status, output = finish(torchrun(2, flags(images, out, "--max_steps 4")), 60)
    assert status != 0
    assert f"error: --out_dir {out}: cannot be written" in output


def test_batch_size_must_be_divisible(images, tmp_path):
    status, output = finish(torchrun(3, flags(images, tmp_path, "--max_steps 4")), 60)
    assert status != 0
    assert "--batch_size 8: must be divisible by the 3 processes" in output


def test_restarts_continue_from_the_last_checkpoint(images, tmp_path):
    """torchrun --max_restarts after a process was killed: the job resumes and ends like an undisturbed run."""
    extra = "--max_steps 300 --plot_epoch 0"
    train_alone(images, tmp_path / "one", extra)
    process = torchrun(2, flags(images, tmp_path / "two", extra), ["--max_restarts=1"])
    wait_for(lambda: list((tmp_path / "two").rglob("[0-9]*.state")))
    os.kill(workers(process)[1], signal.SIGKILL)
    status, output = finish(process)
    assert status == 0, output
    assert "continuing from" in next((tmp_path / "two").rglob("out.log")).read_text()
    assert largest_difference(*(model(tmp_path / name, "60.state") for name in ("one", "two"))) < 1e-8
