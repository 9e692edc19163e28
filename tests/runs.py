"""What tests of whole runs share: small flags, small images, and how to look at what a run left."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from utils.logging import read_records

ROOT = Path(__file__).parents[1]
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


def records(run, kind):
    return [record for record in read_records(run.log.records_path) if record["kind"] == kind]


def weights(run):
    return [parameter.detach().clone() for parameter in run.flow.parameters()]


def command(*arguments):
    """A script in a process of its own, as a user runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
