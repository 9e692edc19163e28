"""Checkpoint files: what is written, kept, slimmed, read and refused."""

import os
import zipfile

import numpy as np
import pytest
import torch

from utils import checkpoint


def state(epoch, step, mid_epoch=False):
    return {"config": {}, "epoch": epoch, "step": step, "mid_epoch": mid_epoch, "model": {"w": torch.randn(50)}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_save_and_read(tmp_path):
    saved = state(1, 5)
    checkpoint.save(tmp_path / "a.state", saved)
    assert torch.equal(checkpoint.read(tmp_path / "a.state")["model"]["w"], saved["model"]["w"])
    assert names(tmp_path) == ["a.state"]


def test_keep_epoch(tmp_path):
    for epoch in range(1, 8):
        checkpoint.save_run(tmp_path, state(epoch, epoch), keep_epoch=3)
    assert names(tmp_path) == ["3.state", "6.state", "7.state"]
    for epoch in (8, 9, 10):
        checkpoint.save_run(tmp_path, state(epoch, epoch), keep_epoch=0)
    assert names(tmp_path) == ["10.state", "3.state", "6.state", "7.state", "8.state", "9.state"]


def test_newest_means_most_steps(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save_run(tmp_path, state(9, 90), 1)
    checkpoint.save_run(tmp_path, state(10, 100), 1)
    assert checkpoint.newest(tmp_path)[0].name == "10.state"
    checkpoint.save_run(tmp_path, state(10, 105, mid_epoch=True), 1)
    assert checkpoint.newest(tmp_path)[0].name == "last.state"
    checkpoint.save_run(tmp_path, state(11, 110), 1)
    assert checkpoint.newest(tmp_path)[0].name == "11.state"
    assert "last.state" not in names(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.state"
    checkpoint.save(path, state(1, 1))
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.files.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, state(2, 2))
    assert path.read_bytes() == before
    assert names(tmp_path) == ["a.state"]


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "a.state"
    checkpoint.save(path, state(1, 1))
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(good), 40):
        damaged = bytearray(good)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            loaded = checkpoint.read(path)
        except checkpoint.CheckpointError as error:
            assert str(path) in str(error)
            assert "\n" not in str(error)
        else:
            path.write_bytes(good)
            assert torch.equal(loaded["model"]["w"], checkpoint.read(path)["model"]["w"])
    for length in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.read(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.state"
    torch.save({"net.0.weight": torch.zeros(3)}, path)
    with pytest.raises(checkpoint.CheckpointError, match="not of this program"):
        checkpoint.read(path)
    torch.save({"format": 99, "config": {}}, path)
    with pytest.raises(checkpoint.CheckpointError, match="format 99"):
        checkpoint.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(checkpoint.CheckpointError, match="damaged"):
        checkpoint.read(path)


def test_reading_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "evil"), "w"))

    torch.save({"format": 1, "config": {}, "model": Evil()}, tmp_path / "a.state")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.read(tmp_path / "a.state")
    assert not (tmp_path / "evil").exists()


