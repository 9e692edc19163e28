"""Prepared arrays: trusted only when whole, current and ours; written atomically. The registry's refusals."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data import DATASETS, arrays, open_dataset
from data.arrays import Preparation, open_arrays, write_rows
from utils.cli import UserError

ROOT = Path(__file__).parents[1]
RECIPE = {"name": "toy", "version": 1, "nchannels": 3, "L": 2}
TRAIN = np.arange(60, dtype=np.uint8).reshape(5, 3, 2, 2)
TEST = TRAIN[:2] + 100


class Toy:
    """A preparation that counts how often it builds."""

    def __init__(self, source=None, **changes):
        self.built, self.source, self.recipe = 0, source, {**RECIPE, **changes}

    def build(self, folder, progress):
        self.built += 1
        np.save(folder / "train.npy", TRAIN)
        np.save(folder / "test.npy", TEST)
        np.save(folder / "train_labels.npy", np.ones(5, np.float32))
        return []

    def open(self, path, **changes):
        preparation = Preparation(self.recipe, self.source, self.build)
        dataset = open_arrays(path, Preparation(**{**vars(preparation), **changes}), progress=False)
        assert (dataset.train == TRAIN).all() and (dataset.test == TEST).all()
        return dataset


def test_built_once_then_mapped_copy_on_write(tmp_path):
    toy = Toy()
    first, second = toy.open(tmp_path / "new" / "folder"), toy.open(tmp_path / "new" / "folder")
    assert toy.built == 1 and first.fingerprint == second.fingerprint and second.warnings == []
    assert first.path == tmp_path / "new" / "folder" / "prepared_arrays" / "toy_3x2x2"
    for array in (second.train, second.test):
        assert isinstance(array, np.memmap) and array.dtype == np.uint8
        array[0] = 255 - array[0]  # stays in memory
    third = toy.open(tmp_path / "new" / "folder")
    assert toy.built == 1 and third.warnings == []
    assert not np.array_equal(third.train[0], second.train[0])


def truncate(folder):
    os.truncate(folder / "train.npy", 150)


def flip_one_bit(folder):
    content = bytearray((folder / "test.npy").read_bytes())
    content[-3] ^= 4
    (folder / "test.npy").write_bytes(content)


def damage_labels(folder):
    np.save(folder / "train_labels.npy", np.zeros(5, np.float32))


def edit(**changes):
    def change(folder):
        record = json.loads((folder / "fingerprint.json").read_text())
        (folder / "fingerprint.json").write_text(json.dumps({**record, **changes}))

    return change


def replace_by_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def wrong_shape_well_signed(folder):
    np.save(folder / "train.npy", np.zeros((5, 3, 4, 4), np.uint8))
    record = json.loads((folder / "fingerprint.json").read_text())
    record["files"]["train.npy"] = arrays._sha256(folder / "train.npy")
    (folder / "fingerprint.json").write_text(json.dumps(record))


DAMAGE = {
    "truncated": (truncate, "train.npy is not the file"),
    "bit flipped": (flip_one_bit, "test.npy is not the file"),
    "labels": (damage_labels, "train_labels.npy is not the file"),
    "array missing": (lambda folder: (folder / "test.npy").unlink(), "missing or unreadable"),
    "json missing": (lambda folder: (folder / "fingerprint.json").unlink(), "missing or unreadable"),
    "json cut": (lambda folder: os.truncate(folder / "fingerprint.json", 40), "missing or unreadable"),
    "json of other kind": (lambda folder: (folder / "fingerprint.json").write_text("[1]"), "missing or unreadable"),
    "json not text": (lambda folder: (folder / "fingerprint.json").write_bytes(b"\xff\xfe\x00"), "unreadable"),
    "files not listed": (edit(files={}), "missing or unreadable"),
    "files no table": (edit(files=3), "missing or unreadable"),
    "empty folder": (lambda folder: [path.unlink() for path in folder.iterdir()], "missing or unreadable"),
    "no folder": (replace_by_file, "missing or unreadable"),
    "other recipe": (edit(recipe={**RECIPE, "version": 0}), "another recipe"),
    "wrong shape": (wrong_shape_well_signed, "train.npy holds uint8 (5, 3, 4, 4)"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_or_foreign_arrays_are_rebuilt(kind, tmp_path):
    toy = Toy()
    good = toy.open(tmp_path)
    damage, reason = DAMAGE[kind]
    damage(good.path)
    again = toy.open(tmp_path)
    assert toy.built == 2 and again.fingerprint == good.fingerprint
    assert len(again.warnings) == 1 and reason in again.warnings[0]
    assert [path.name for path in good.path.parent.iterdir()] == ["toy_3x2x2"]
    assert toy.open(tmp_path).warnings == [] and toy.built == 2


def test_arrays_of_another_set_are_rebuilt(tmp_path):
    other = Toy(name="other").open(tmp_path)
    shutil.move(other.path, tmp_path / "prepared_arrays" / "toy_3x2x2")
    toy = Toy()
    assert "another recipe" in toy.open(tmp_path).warnings[0] and toy.built == 1


def test_changed_source_is_rebuilt_a_vanished_one_is_not(tmp_path):
    toy = Toy(source={"listing": "a"})
    toy.open(tmp_path)
    gone = toy.open(tmp_path, source=None)
    assert toy.built == 1 and gone.warnings == []
    changed = toy.open(tmp_path, source={"listing": "b"})
    assert toy.built == 2 and "source files have changed" in changed.warnings[0]


def test_unusable_arrays_without_source_are_refused_with_both_reasons(tmp_path):
    truncate(Toy().open(tmp_path).path)

    def build(folder, progress):
        raise UserError("nowhere: no images.")

    with pytest.raises(UserError, match=r"not usable, because train.npy is not the file.*nowhere: no images."):
        Toy().open(tmp_path, build=build)


def test_another_pillow_is_one_warning(tmp_path):
    toy = Toy()
    folder = toy.open(tmp_path).path
    edit(pillow="9.1.0")(folder)
    dataset = toy.open(tmp_path)
    assert toy.built == 1 and len(dataset.warnings) == 1 and "prepared with Pillow 9.1.0" in dataset.warnings[0]
    assert toy.open(tmp_path, pillow=False).warnings == []


def test_warnings_of_the_preparation_come_again(tmp_path):
    def build(folder, progress):
        Toy().build(folder, progress)
        return ["two files skipped"]

    assert [Toy().open(tmp_path, build=build).warnings for _ in range(2)] == [["two files skipped"]] * 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), UserError("bad"), KeyboardInterrupt()])
def test_failed_build_leaves_nothing(error, tmp_path):
    def build(folder, progress):
        np.save(folder / "train.npy", TRAIN)
        raise error

    with pytest.raises(type(error)):
        Toy().open(tmp_path, build=build)
    assert list((tmp_path / "prepared_arrays").iterdir()) == []
    assert Toy().open(tmp_path).warnings == []


def test_killed_process_does_not_disturb(tmp_path):
    code = f"""
import os, pathlib
from data.arrays import Preparation, open_arrays
def build(folder, progress):
    (folder / "train.npy").write_bytes(b"half")
    os._exit(9)
open_arrays(pathlib.Path({str(tmp_path)!r}), Preparation({RECIPE!r}, None, build))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 9
    (leftover,) = (tmp_path / "prepared_arrays").iterdir()
    assert leftover.suffix == ".tmp"
    toy = Toy()
    assert toy.open(tmp_path).warnings == [] and toy.built == 1 and leftover.exists()
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(leftover, (long_ago, long_ago))
    flip_one_bit(tmp_path / "prepared_arrays" / "toy_3x2x2")
    toy.open(tmp_path)
    assert not leftover.exists()


@pytest.mark.parametrize("stale", [False, True])
def test_two_at_the_same_time_end_well(stale, tmp_path):
    if stale:
        truncate(Toy().open(tmp_path).path)
    barrier, results, toy = threading.Barrier(2), [], Toy()

    def build(folder, progress):
        barrier.wait(10)  # both have found nothing good and are building
        return Toy().build(folder, progress)

    def work():
        dataset = open_arrays(tmp_path, Preparation(RECIPE, None, build), progress=False)
        results.append((dataset.fingerprint, np.array(dataset.train)))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    expected = toy.open(tmp_path)
    assert toy.built == 0 and len(results) == 2
    assert all(fingerprint == expected.fingerprint and (train == TRAIN).all() for fingerprint, train in results)
    assert [path.name for path in (tmp_path / "prepared_arrays").iterdir()] == ["toy_3x2x2"]


def test_winner_stays(tmp_path):
    """Who is second finds good arrays and throws its own away."""

    def build(folder, progress):
        winner = Toy().open(tmp_path).path / "train.npy"
        inode.append(winner.stat().st_ino)
        return Toy().build(folder, progress)

    inode = []
    folder = open_arrays(tmp_path, Preparation(RECIPE, None, build), progress=False).path
    assert (folder / "train.npy").stat().st_ino == inode[0]
    assert [path.name for path in folder.parent.iterdir()] == ["toy_3x2x2"]


def test_rows_are_written_as_they_come(tmp_path):
    for rows in (TRAIN, TRAIN[:0]):
        assert write_rows(tmp_path / "a.npy", iter(rows), (3, 2, 2)) == len(rows)
        loaded = np.load(tmp_path / "a.npy")
        assert loaded.shape == rows.shape and loaded.dtype == np.uint8 and (loaded == rows).all()
    write_rows(tmp_path / "b.npy", (row.transpose(1, 2, 0) for row in TRAIN), (2, 2, 3))  # not contiguous
    assert (np.load(tmp_path / "b.npy") == TRAIN.transpose(0, 2, 3, 1)).all()
    assert (np.load(tmp_path / "b.npy", mmap_mode="r")[3] == TRAIN[3].transpose(1, 2, 0)).all()


def test_full_disk_is_an_oserror(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_rows("/dev/full", [np.zeros(100_000, np.uint8)], (100_000,))


def test_registry():
    for name in ("celeba32", "mnist32", "cifar10", "chair600", "msds1", "msds2", "folder"):
        spec = DATASETS[name]
        assert (spec.nchannels, spec.L) == ((1, 32) if name == "mnist32" else (3, 32))
        assert spec.flips == (name in ("celeba32", "chair600")) and spec.fixed_shape == (name != "folder")
    assert DATASETS["chair600"].sizes == (77_730, 86_366 - 77_730)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("lsun", ".", 3, 32), "--data lsun: must be one of celeba32, mnist32"),
        (("mnist32", ".", 3, 32), "--nchannels 3: must be 1 for mnist32"),
        (("msds1", ".", 3, 64), "--L 64: must be 32 for msds1"),
        (("folder", ".", 2, 32), "--nchannels 2: must be 1"),
        (("folder", ".", 3, 0), "--L 0: must be at least 1"),
        (("folder", "/does/not/exist", 3, 32), "--data_path /does/not/exist: not a folder"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(*arguments, progress=False)
    assert "\n" not in str(caught.value)
    assert issubclass(UserError, Exception)
