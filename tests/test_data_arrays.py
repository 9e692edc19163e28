"""Prepared arrays: trusted only when whole, current and ours; written atomically. The registry's refusals."""

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sets import refused

from data import DATASETS
from data.arrays import Preparation, open_arrays, write_rows
from utils.cli import UserError

RECIPE = {"name": "toy", "version": 1, "nchannels": 3, "L": 2}
TRAIN = np.arange(60, dtype=np.uint8).reshape(5, 3, 2, 2)
TEST = TRAIN[:2] + 100


class Toy:
    """A preparation that counts how often it builds."""

    def __init__(self, source=None, **changes):
        self.built, self.preparation = 0, Preparation({**RECIPE, **changes}, source, self.build)

    def build(self, folder):
        self.built += 1
        for name, array in {"train": TRAIN, "test": TEST, "train_labels": np.ones(5, np.float32)}.items():
            np.save(folder / f"{name}.npy", array)
        return []

    def open(self, path, **changes):
        dataset = open_arrays(path / "prepared_arrays", replace(self.preparation, **changes))
        assert (dataset.train == TRAIN).all() and (dataset.test == TEST).all()
        return dataset


def names(path):
    return [each.name for each in (path / "prepared_arrays").iterdir()]


def test_built_once_then_mapped_copy_on_write(tmp_path):
    toy, place = Toy(), tmp_path / "new" / "folder"
    first, second = toy.open(place), toy.open(place)
    assert toy.built == 1 and first.fingerprint == second.fingerprint and second.warnings == []
    assert first.path == place / "prepared_arrays" / "toy_3x2x2"
    for array in (second.train, second.test):
        assert isinstance(array, np.memmap) and array.dtype == np.uint8
        array[0] = 255 - array[0]  # stays in memory
    assert toy.open(place).warnings == [] and toy.built == 1  # opening compares the content


def truncate(folder):
    os.truncate(folder / "train.npy", 150)


def edit(**changes):
    def change(folder):
        record = json.loads((folder / "fingerprint.json").read_text())
        (folder / "fingerprint.json").write_text(json.dumps({**record, **changes}))

    return change


def write(content):
    return lambda folder: (folder / "fingerprint.json").write_bytes(content)


def replace_by(make):
    return lambda folder: (shutil.rmtree(folder), make(folder))


def wrong_shape_well_signed(folder):
    np.save(folder / "train.npy", np.zeros((5, 3, 4, 4), np.uint8))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.npy")}
    edit(files=files)(folder)


UNREADABLE = [
    *(lambda folder: (folder / "test.npy").unlink(), lambda folder: (folder / "fingerprint.json").unlink()),
    *map(write, (b'{"recipe": {', b"[1]", b"\xff\xfe\x00")),
    *(edit(files={}), edit(files=3), replace_by(Path.mkdir), replace_by(lambda folder: folder.symlink_to("nowhere"))),
    replace_by(lambda folder: folder.write_text("not a folder")),
]
DAMAGE = [
    *(("a file is missing or unreadable", damage) for damage in UNREADABLE),
    ("train.npy is not the file", truncate),
    ("test.npy is not the file", lambda folder: np.save(folder / "test.npy", TEST ^ (TEST == 111))),  # one bit
    ("train_labels.npy is not the file", lambda folder: np.save(folder / "train_labels.npy", np.zeros(5))),
    ("another recipe", edit(recipe={**RECIPE, "version": 0})),
    ("another recipe", replace_by(lambda folder: Toy(name="other").open(folder.parents[1]).path.rename(folder))),
    ("train.npy holds uint8 (5, 3, 4, 4)", wrong_shape_well_signed),
]


@pytest.mark.parametrize("reason, damage", DAMAGE)
def test_damaged_or_foreign_arrays_are_rebuilt(reason, damage, tmp_path):
    toy = Toy()
    good = toy.open(tmp_path)
    damage(good.path)
    again = toy.open(tmp_path)
    assert toy.built == 2 and again.fingerprint == good.fingerprint
    assert len(again.warnings) == 1 and reason in again.warnings[0]
    assert names(tmp_path) == ["toy_3x2x2"]
    assert toy.open(tmp_path).warnings == [] and toy.built == 2


def test_changed_source_is_rebuilt_a_vanished_one_is_not(tmp_path):
    toy = Toy(source={"listing": "a"})
    assert toy.open(tmp_path).warnings == toy.open(tmp_path, source=None).warnings == [] and toy.built == 1
    changed = toy.open(tmp_path, source={"listing": "b"})
    assert toy.built == 2 and "source files have changed" in changed.warnings[0]


def test_warnings_of_the_preparation_and_of_another_pillow(tmp_path):
    def build(folder):
        Toy().build(folder)
        return ["two files skipped"]

    toy = Toy()
    assert [toy.open(tmp_path, build=build).warnings for _ in range(2)] == [["two files skipped"]] * 2
    edit(pillow="9.1.0")(tmp_path / "prepared_arrays" / "toy_3x2x2")
    first, second = toy.open(tmp_path).warnings
    assert toy.built == 0 and first == "two files skipped" and "prepared with Pillow 9.1.0" in second
    assert toy.open(tmp_path, pillow=False).warnings == [first]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), UserError("bad"), KeyboardInterrupt()])
@pytest.mark.parametrize("damaged", [False, True])
def test_failed_build_leaves_what_was_there(error, damaged, tmp_path):
    if damaged:
        truncate(Toy().open(tmp_path).path)

    def build(folder):
        np.save(folder / "train.npy", TRAIN)
        raise error

    both = r"not usable, because train.npy is not the file.*cannot be prepared again. bad"
    with pytest.raises(type(error), match=both if damaged and isinstance(error, UserError) else None):
        Toy().open(tmp_path, build=build)
    assert names(tmp_path) == ["toy_3x2x2"] * damaged
    assert len(Toy().open(tmp_path).warnings) == damaged


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_process_does_not_disturb(tmp_path):
    def die(folder):
        (folder / "train.npy").write_bytes(b"half")
        os._exit(9)

    child = os.fork()
    if child == 0:
        Toy().open(tmp_path, build=die)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (leftover,) = (tmp_path / "prepared_arrays").iterdir()
    assert leftover.suffix == ".tmp"
    toy = Toy()
    assert toy.open(tmp_path).warnings == [] and toy.built == 1 and leftover.exists()
    for folder in (leftover, leftover / "new"):
        os.utime(folder, (time.time() - 2 * 24 * 3600,) * 2)
    truncate(tmp_path / "prepared_arrays" / "toy_3x2x2")
    toy.open(tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("stale", [False, True])
def test_two_at_the_same_time_end_well(stale, tmp_path):
    """Who is second finds good arrays and throws its own away."""
    if stale:
        truncate(Toy().open(tmp_path).path)
    barrier = threading.Barrier(2)

    def build(folder):
        barrier.wait(10)  # both have found nothing good and are building
        return Toy().build(folder)

    with ThreadPoolExecutor(2) as pool:
        opened = [pool.submit(Toy().open, tmp_path, build=build) for _ in range(2)]
    fingerprints, toy = {future.result(20).fingerprint for future in opened}, Toy()
    assert fingerprints == {toy.open(tmp_path).fingerprint} and toy.built == 0
    assert names(tmp_path) == ["toy_3x2x2"]


def test_winner_stays(tmp_path):
    winners = []

    def build(folder):
        winners.append((Toy().open(tmp_path).path / "train.npy").stat().st_ino)
        return Toy().build(folder)

    assert [(Toy().open(tmp_path, build=build).path / "train.npy").stat().st_ino] == winners
    assert names(tmp_path) == ["toy_3x2x2"]


def test_rows_are_written_as_they_come(tmp_path):
    for rows in (TRAIN, TRAIN[:0], TRAIN.transpose(0, 2, 3, 1)):  # the last ones not contiguous
        assert write_rows(tmp_path / "a.npy", iter(rows), rows.shape[1:]) == len(rows)
        for mode in (None, "r"):
            loaded = np.load(tmp_path / "a.npy", mmap_mode=mode)
            assert loaded.shape == rows.shape and loaded.dtype == np.uint8 and (loaded == rows).all()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_full_disk_is_an_oserror():
    with pytest.raises(OSError, match="No space left"):
        write_rows("/dev/full", [np.zeros(100_000, np.uint8)], (100_000,))


def test_registry():
    for name, spec in DATASETS.items():
        assert (spec.nchannels, spec.L) == ((1, 32) if name == "mnist32" else (3, 32))
        assert spec.flips == (name in ("celeba32", "chair600")) and spec.fixed_shape == (name != "folder")
    assert set(DATASETS) == {"celeba32", "mnist32", "cifar10", "chair600", "msds1", "msds2", "folder"}


def test_bad_input_is_one_sentence():
    refused("lsun", ".", "--data lsun: must be one of celeba32, mnist32")
    refused("mnist32", ".", "--nchannels 3: must be 1 for mnist32")
    refused("msds1", ".", "--L 64: must be 32 for msds1", L=64)
    refused("folder", ".", "--nchannels 2: must be 1", nchannels=2)
    refused("folder", ".", "--L 0: must be at least 1", L=0)
    refused("folder", "/does/not/exist", "--data_path /does/not/exist: not a folder")
