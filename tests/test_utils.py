"""Logs, files, locks, signals, figures and seeds."""

import numpy as np
import torch

from utils.logging import RunLog, read_records
from utils.plotting import image_grid
from utils.random import derived_seed, generator


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
