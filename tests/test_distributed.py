"""Several processes on the CPU (gloo), started by torchrun: the same run as in one process."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from runs import call, flags_of, process, read_records, wait_for

import main
from utils.checkpoint import read

pytestmark = pytest.mark.slow
finds_processes = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds the processes in /proc")


def torchrun(processes, arguments, *options):
    """A started process, torchrun with `processes` copies of main.py."""
    launcher = "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"
    return process(*launcher, *options, "main.py", *arguments)


def finish(job, timeout=100):
    """(exit status, output)"""
    try:
        output, _ = job.communicate(timeout=timeout)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    return job.returncode, output


def state_of(out, name):
    (path,) = out.rglob(name)
    return read(path)


def train(processes, images, out, extra):
    """To the end, in so many processes of torchrun; 0: in this one."""
    if processes == 0:
        done = call(main, *flags_of(images, out, extra))
        status, output = done.returncode, done.stderr
    else:
        status, output = finish(torchrun(processes, flags_of(images, out, extra)))
    assert status == 0, output


def largest_difference(one, other):
    return max((one["model"][name] - other["model"][name]).abs().max().item() for name in one["model"])


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-10), ("float32", 1e-5)])
def test_two_processes_do_what_one_does(dtype, tolerance, images, tmp_path):
    extra = f"--dtype {dtype} --max_steps 20 --print_step 4 --lr 3e-3"
    train(0, images, tmp_path / "one", extra)
    train(2, images, tmp_path / "two", extra)
    states = [state_of(tmp_path / name, "4.state") for name in ("one", "two")]
    assert states[0]["step"] == states[1]["step"] == 20 and largest_difference(*states) < tolerance
    logs = [read_records(next((tmp_path / name).rglob("out.jsonl"))) for name in ("one", "two")]
    for one, other in zip(*logs, strict=True):
        assert (one["kind"], one["step"]) == (other["kind"], other["step"])
        assert one["bpd"] == pytest.approx(other["bpd"], abs=1e-5)
    text = next((tmp_path / "two").rglob("out.log")).read_text()
    assert "2 processes: 8 images per step in all, 4 in each" in text


def test_a_run_resumes_with_another_number_of_processes(images, tmp_path):
    train(0, images, tmp_path / "one", "--max_steps 15")
    for processes, steps in ((0, 6), (2, 10), (1, 15)):
        train(processes, images, tmp_path / "parts", f"--max_steps {steps}")
    assert largest_difference(*(state_of(tmp_path / name, "3.state") for name in ("one", "parts"))) < 1e-10


def endless(images, out):
    """Two processes that have begun to train."""
    job = torchrun(2, flags_of(images, out, "--max_steps 100000 --save_epoch 0 --plot_epoch 0"))
    wait_for(lambda: any(path.stat().st_size for path in out.rglob("out.jsonl")))
    return job


def workers(job):
    """Process numbers of the copies of main.py below torchrun, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError, ValueError):
            rank, parent = re.search(r"\0RANK=(\d+)\0", path.read_text()), path.with_name("stat").read_text()
            if rank and int(parent.rpartition(")")[2].split()[1]) == job.pid:
                found[int(rank[1])] = int(path.parent.name)
    return found


@finds_processes
@pytest.mark.parametrize("receiver, name", [("second process", "SIGUSR1"), ("torchrun", "SIGTERM")])
def test_a_signal_stops_all_at_the_same_step(receiver, name, images, tmp_path, start):
    out = tmp_path / "two"
    job = endless(images, out)
    os.kill(job.pid if receiver == "torchrun" else workers(job)[1], getattr(signal, name))
    finish(job, 60)
    state = state_of(out, "last.state")
    assert f"{name}: stopped at step {state['step']}" in next(out.rglob("out.log")).read_text()
    assert start(f"--max_steps {state['step'] + 1}", "two").step == state["step"] + 1


@finds_processes
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job(rank, images, tmp_path):
    out = tmp_path / "two"
    job = endless(images, out)
    os.kill(workers(job)[rank], signal.SIGKILL)
    status, output = finish(job, 60)
    assert status != 0 and "another process of the run has ended" in output
    assert not list(out.rglob("*.state"))


ERRORS = {2: "error: --out_dir {out}: cannot be written"}  # only by the first process
ERRORS |= {3: "--batch_size 8: must be divisible by the 3 processes"}


@pytest.mark.parametrize("processes", ERRORS)
def test_a_failing_process_shows_its_error(processes, images, tmp_path):
    (tmp_path / "folder").write_text("in the way")
    status, output = finish(torchrun(processes, flags_of(images, tmp_path, "--max_steps 4")), 60)
    assert status != 0 and ERRORS[processes].format(out=tmp_path) in output


def test_restarts_continue_from_the_last_checkpoint(images, tmp_path):
    """torchrun --max_restarts after a process was killed: the job resumes and ends like an undisturbed run."""
    extra = "--max_steps 200 --plot_epoch 0"
    train(0, images, tmp_path / "one", extra)
    job = torchrun(2, flags_of(images, tmp_path / "two", extra), "--max_restarts=1")
    wait_for(lambda: list((tmp_path / "two").rglob("[0-9]*.state")))
    os.kill(workers(job)[1], signal.SIGKILL)
    status, output = finish(job)
    assert status == 0, output
    assert "continuing from" in next((tmp_path / "two").rglob("out.log")).read_text()
    assert largest_difference(*(state_of(tmp_path / name, "40.state") for name in ("one", "two"))) < 1e-8
