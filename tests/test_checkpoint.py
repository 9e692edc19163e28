"""Checkpoint files: what is written, kept, slimmed, read and refused."""

import os
import zipfile
from contextlib import suppress

import numpy as np
import pytest
import torch

from utils import checkpoint
from utils.cli import UserError


def state(epoch, step, mid_epoch=False, **more):
    state = {"config": {}, "epoch": epoch, "step": step, "mid_epoch": mid_epoch, "model": {"w": torch.randn(50)}}
    return {**state, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "window": torch.zeros(2), **more}


def same(one, other):
    """Whether two states are equal bit for bit."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def full_ones(folder):
    return sorted(path.name for path in folder.iterdir() if checkpoint.is_full(checkpoint.read(path)))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, epochs, keep_epoch=1):
    for epoch in epochs:
        checkpoint.save_run(folder, state(epoch, 5 * epoch), keep_epoch)


def refused(path, words):
    with pytest.raises(UserError, match=words) as caught:
        checkpoint.read(path)
    return str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_of_a_run(tmp_path):
    """keep_epoch keeps; all numbered files but the newest are slim; the newest is the one with most steps."""
    assert checkpoint.newest(tmp_path) is None
    for epoch in range(6, 12):
        fill(tmp_path, [epoch], keep_epoch=2)
        assert checkpoint.newest(tmp_path)[0].name == f"{epoch}.state" and "last.state" not in names(tmp_path)
        checkpoint.save_run(tmp_path, state(epoch, 5 * epoch + 3, mid_epoch=True), 2)
        assert checkpoint.newest(tmp_path)[0].name == "last.state"
        assert full_ones(tmp_path) == [f"{epoch}.state", "last.state"]
    assert names(tmp_path) == ["10.state", "11.state", "6.state", "8.state", "last.state"]
    slim = checkpoint.read(tmp_path / "6.state")
    assert slim["model"]["w"].shape == (50,) and "window" not in slim
    assert os.path.getsize(tmp_path / "6.state") < os.path.getsize(tmp_path / "11.state")
    fill(tmp_path, (12, 13), keep_epoch=0)
    assert names(tmp_path) == [f"{epoch}.state" for epoch in (10, 11, 12, 13, 6, 8)]
    damaged = (tmp_path / "13.state").read_bytes().replace(b"epoch", b"epocH")
    (tmp_path / "13.state").write_bytes(damaged)
    fill(tmp_path, [14])
    assert (tmp_path / "13.state").read_bytes() == damaged


def test_damaged_files_are_refused(tmp_path):
    """Of 1,000 single-bit flips each is refused or changes nothing that is loaded; so is each truncation refused."""
    path, saved = tmp_path / "a.state", state(1, 1)
    checkpoint.save(path, saved)
    good, original = path.read_bytes(), {"format": 2, **saved, "config": {"model": "rgflow"}}
    assert same(checkpoint.read(path), original)
    rng, harmless = np.random.default_rng(0), 0
    for bit in rng.choice(8 * len(good), 1000, replace=False):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << int(bit % 8)
        path.write_bytes(damaged)
        try:
            assert same(checkpoint.read(path), original), bit
            harmless += 1
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    assert harmless < 700
    for length in [*rng.integers(0, len(good), 40), 0, len(good) - 1]:
        path.write_bytes(good[:length])
        assert refused(path, "damaged")


def test_the_bit_that_no_checksum_covers(tmp_path):
    """It makes a member a folder for torch, which then returns whatever was in memory in place of the tensor."""
    path = tmp_path / "a.state"
    checkpoint.save(path, state(1, 1))
    damaged = bytearray(path.read_bytes())
    damaged[damaged.rindex(b"archive/data/0") - 46 + 38] ^= 0x10  # of the external attributes in the directory
    path.write_bytes(damaged)
    assert zipfile.ZipFile(path).testzip() is None
    assert refused(path, "damaged")


class Evil:
    """Unpickling it creates a file."""

    def __reduce__(self):
        return (open, ("evil", "w"))


def test_bombs_and_foreign_files_are_refused(tmp_path, monkeypatch):
    """And no code in them runs."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.state"
    whole = {"format": checkpoint.FORMAT, "config": {}, "epoch": 1, "step": 1, "model": {}}
    for content, words in (
        ({"net.0.weight": torch.zeros(3)}, "not of this program"),
        ({**whole, "epoch": "1"}, "incomplete"),
        ({"format": 99, "config": {}}, "format 99"),
        ({**whole, "model": Evil()}, "damaged"),
    ):
        torch.save(content, path)
        assert refused(path, words)
    for method, name, content in (
        (zipfile.ZIP_STORED, "a.txt", b"hello"),
        (zipfile.ZIP_DEFLATED, "archive/data.pkl", bytes(10**6)),
    ):
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr(name, content)
        assert refused(path, "damaged")
    assert names(tmp_path) == ["a.state"]


def test_the_one_before_a_damaged_newest_file_is_used(tmp_path):
    """Here a folder is in its place. All damage is one to `newest`: what `read` refuses."""
    fill(tmp_path, (1, 2))
    checkpoint.save_run(tmp_path, state(2, 13, mid_epoch=True), 1)
    for bad, good in (("last.state", "2.state"), ("2.state", "1.state"), ("1.state", None)):
        (tmp_path / bad).unlink()
        (tmp_path / bad).mkdir()
        if good:
            path, found, warnings = checkpoint.newest(tmp_path)
            assert path.name == good and found["epoch"] == int(good[0])
            assert any(bad in warning and "passed over" in warning for warning in warnings)
    with pytest.raises(UserError, match=r"no other file in .* can be used$"):
        checkpoint.newest(tmp_path)


def test_newest_for_training_passes_over_slim_files(tmp_path):
    fill(tmp_path, (1, 2, 3))
    assert checkpoint.newest(tmp_path, full=True)[0].name == "3.state"
    checkpoint.save(tmp_path / "1.state", state(1, 5))  # full, as older versions kept it
    (tmp_path / "3.state").write_bytes(b"")
    assert checkpoint.newest(tmp_path)[0].name == "2.state"
    assert checkpoint.newest(tmp_path, full=True)[0].name == "1.state"
    (tmp_path / "1.state").unlink()
    path, found, _ = checkpoint.newest(tmp_path, full=True)  # for the caller to explain
    assert path.name == "2.state" and not checkpoint.is_full(found)


def test_last_state_between_numbered_ones(tmp_path):
    """Left behind when a process is killed between a save and the removal of what it replaces."""
    checkpoint.save(tmp_path / "last.state", state(2, 13, mid_epoch=True))
    for epoch, best in ((1, "last.state"), (2, "last.state"), (3, "3.state")):
        checkpoint.save(tmp_path / f"{epoch}.state", state(epoch, 5 * epoch))
        assert checkpoint.newest(tmp_path)[0].name == best
    (tmp_path / "3.state").write_bytes(b"")
    assert checkpoint.newest(tmp_path)[0].name == "last.state"


def test_a_file_replaced_by_a_run_while_it_is_looked_for(tmp_path, monkeypatch):
    checkpoint.save_run(tmp_path, state(1, 5), 0)
    read = checkpoint.read

    def read_too_late(path, *args):
        if path.name == "1.state":
            checkpoint.save_run(tmp_path, state(2, 10), 10)
        return read(path, *args)

    monkeypatch.setattr(checkpoint, "read", read_too_late)
    path, _, warnings = checkpoint.newest(tmp_path)
    assert path.name == "2.state" and warnings == []


def test_killed_at_any_moment_of_a_save(tmp_path, monkeypatch):
    """Before each call that changes the disk, a complete full file is there: the new one or that before."""
    functions = [(os, "replace"), (os, "fsync"), (checkpoint.Path, "unlink"), (torch, "save")]
    for moment in range(100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        fill(folder, range(1, 5), 2)
        checkpoint.save_run(folder, state(4, 23, mid_epoch=True), 2)
        calls = 0

        def dying(function, moment=moment):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls > moment:
                    raise KeyboardInterrupt
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in functions:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            with suppress(KeyboardInterrupt):
                checkpoint.save_run(folder, state(4, 24, mid_epoch=True), 2)
                fill(folder, [6], 2)
        _, found, warnings = checkpoint.newest(folder, full=True)
        assert found["step"] in (23, 24, 30) and checkpoint.is_full(found) and warnings == []
        checkpoint.remove_leftovers(folder)
        assert not [name for name in names(folder) if name.startswith(".") or not name.endswith(".state")]
        if calls <= moment:  # not killed
            assert found["step"] == 30
            break
    assert 8 < moment < 99


def test_disk_space_is_what_a_run_takes_at_most(tmp_path, monkeypatch):
    """Measured at every save, with the temporary file beside the others."""
    largest = 0
    replace = os.replace

    def measure(*args):
        nonlocal largest
        largest = max(largest, sum(path.stat().st_size for path in tmp_path.iterdir()))
        replace(*args)

    monkeypatch.setattr(os, "replace", measure)
    weights = torch.randn(4 * 10**5)
    more = {"model": {"w": weights}, "optimizer": {"a": weights.clone(), "b": weights.clone()}}
    for epoch in range(1, 10):
        checkpoint.save_run(tmp_path, state(epoch - 1, 5 * epoch - 2, mid_epoch=True, **more), 2)
        checkpoint.save_run(tmp_path, state(epoch, 5 * epoch, **more), 2)
    predicted = checkpoint.disk_space(32 * 10**5, kept=4)
    assert 0.7 * predicted < largest < predicted
