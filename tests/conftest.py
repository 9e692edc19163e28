"""Tests compute in float64 with a fixed seed and one thread: the networks are tiny."""

import pytest
import torch
from runs import SMALL, make_images

import main
from args import get_args


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 40 training and 6 test images."""
    folder = tmp_path_factory.mktemp("images")
    make_images(folder)
    return folder


@pytest.fixture
def start(images, tmp_path):
    """Start or continue a run with extra flags; returns the Run."""

    def start(flags="", out="run"):
        argv = f"--data folder --data_path {images} -o {tmp_path / out} {SMALL} {flags}".split()
        run = main.Run(get_args(argv))
        run.train()
        return run

    return start
