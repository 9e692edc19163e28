"""Shared by the tests of whole runs: small flags, small images, ways to start a script, and what a run left."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from utils.cli import script
from utils.logging import read_records
from utils.signals import STOP

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = "--L 8 --nlayers 1 --nresblocks 1 --nmlp 1 --nhidden 8 --batch_size 8 --lr 1e-3 --dtype float64 --no_stdout"


def make_images(folder):
    """40 training and 6 test images in `folder`, smooth ramps of random colours: 5 steps of 8 images per epoch."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, 8)
    for split, number in (("train", 40), ("test", 6)):
        (folder / split).mkdir(parents=True)
        for n in range(number):
            corner = rng.integers(0, 128, (2, 3))
            image = corner[0] + ramp[:, None, None] * corner[1] * ramp[None, :, None]
            Image.fromarray(image.astype(np.uint8)).save(folder / split / f"{n}.png")


def flags_of(images, out, flags=""):
    """The flags of a small run, as a list."""
    return (
        f"--data folder --data_path {images} --prepared_path {images}/prepared_arrays -o {out} {SMALL} {flags}".split()
    )


def records(run, kind):
    return [record for record in read_records(run.log.records_path) if record["kind"] == kind]


def weights(run):
    return [parameter.detach().clone() for parameter in run.flow.parameters()]


def equal(one, other):
    """Whether two sequences of tensors are equal bit for bit."""
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def process(*arguments, **pipes):
    """A started Python process in the root folder, in a group of its own; stderr goes to stdout unless pipes differ."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True, **pipes}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT, **pipes)


def command(*arguments, **environment):
    """A script in a process of its own, as a user runs it."""
    options = {"cwd": ROOT, "env": ENVIRONMENT | environment, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *arguments], **options)


def call(module, *arguments):
    """The same in this process, where importing torch costs nothing: returncode, stdout, stderr."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    handlers, dtype = {number: signal.getsignal(number) for number in STOP}, torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with redirect_stdout(out), redirect_stderr(err):
            script(lambda: module.main([str(argument) for argument in arguments]))
    except SystemExit as stop:  # with a message, as `sys.exit("…")` has it, or a number
        status = stop.code if isinstance(stop.code, int) else 1
        err.write("" if isinstance(stop.code, int) else f"{stop.code}\n")
    finally:
        torch.set_default_dtype(dtype)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def at_steps(run, before=lambda: None, after=lambda: None):
    """Call functions before and after each update of a run's weights; `run.step` counts from 0 in both."""
    update = run.descent.run

    def with_hooks(*inputs):
        before()
        norm = update(*inputs)
        after()
        return norm

    run.descent.run = with_hooks
    return run


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too long"
        time.sleep(0.02)
