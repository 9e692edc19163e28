"""Tests compute in float64 with a fixed seed, and with one thread, since the networks are tiny."""

import pytest
import torch
from checks import randomise
from runs import SMALL, flags_of, make_images

import data
import main
from args import get_args
from flow.load import build
from utils import checkpoint


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session", autouse=True)
def prepared(tmp_path_factory):
    """Prepared arrays of folders lie in a temporary folder."""
    data.PREPARED = tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of 40 training and 6 test images."""
    folder = tmp_path_factory.mktemp("images")
    make_images(folder)
    return folder


@pytest.fixture
def new(images, tmp_path):
    """A Run with extra flags, before its first step."""
    return lambda flags="", out="run": main.Run(get_args(flags_of(images, tmp_path / out, flags)))


@pytest.fixture
def start(new):
    """Start or resume a run with extra flags; returns the Run."""

    def start(flags="", out="run"):
        run = new(flags, out)
        run.train()
        return run

    return start


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Checkpoints of randomised flows on 8 x 8 images of two levels: RG-Flow, Real NVP, RG-Flow of one channel; and an
    RG-Flow on 16 x 16 images."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    files = {}
    kinds = ("rgflow", ""), ("realnvp", "--model realnvp"), ("grey", "--nchannels 1"), ("large", "--L 16")
    for name, flags in kinds:
        config = vars(get_args(f"--data folder {SMALL} {flags}".split()))
        model = randomise(build(config), 0.2).state_dict()
        files[name] = str(tmp_path_factory.mktemp("weights") / f"{name}.state")
        checkpoint.save(files[name], {"config": config, "epoch": 1, "step": 5, "model": model})
    return files


@pytest.fixture
def draw(weights, tmp_path, capsys):
    """Run a script's main with flags; returns the paths of its pictures and the rest of its output."""

    def draw(script, name, flags=""):
        script.main([*(["--weights", weights[name]] if name else []), "--fig_dir", str(tmp_path / "f"), *flags.split()])
        lines = capsys.readouterr().out.splitlines()
        paths = [line for line in lines if line.startswith(str(tmp_path / "f"))]
        return paths, "\n".join(line for line in lines if line not in paths)

    return draw
