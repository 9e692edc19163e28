"""Prepared data sets: one uint8 array per split, built once, checked at every opening and memory-mapped.

`prepared_arrays/{name}_{C}x{L}x{L}/` holds `train.npy` and `test.npy`, (N, C, L, L), any labels, and
`fingerprint.json`: the recipe, its source, and the SHA-256 of every array file.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from utils.cli import UserError
from utils.files import naming, sync_folder

FOLDER = "prepared_arrays"
SPLITS = "train.npy", "test.npy"


@dataclass(frozen=True)
class Preparation:
    recipe: dict  # all that determines the bytes, apart from the source: JSON, with `name`, `nchannels`, `L` and more
    source: dict | None  # what tells the raw files from others: JSON; None where they are gone or need no telling
    build: Callable[[Path], list[str]]  # folder -> warnings; writes train.npy, test.npy, any labels
    pillow: bool = True  # whether the bytes depend on Pillow's version
    own_name: str = ""  # of the arrays' folder, instead of the recipe's name, for files of the user's


@dataclass(frozen=True)
class Dataset:
    train: np.memmap  # uint8 (N, C, L, L), copy-on-write, as is `test`
    test: np.memmap
    fingerprint: str  # 16 hexadecimal digits, a function of recipe and content
    warnings: list[str]  # sentences to print
    path: Path  # the folder of the arrays


class _Unusable(Exception):
    """Why prepared arrays are not to be trusted."""


def open_arrays(place, preparation):
    """The prepared arrays in the folder `place`, built where they are missing, stale, foreign or damaged: a Dataset.
    Raises UserError for unusable source files, OSError where the arrays cannot be written."""
    recipe = preparation.recipe
    folder = place / "{}_{nchannels}x{L}x{L}".format(preparation.own_name or recipe["name"], **recipe)
    reason = None
    for _ in range(3):  # a second preparation only if another process replaces the folder meanwhile
        if os.path.lexists(folder):
            try:
                return _load(folder, preparation, reason)
            except _Unusable as error:
                reason = str(error)
        try:
            with naming(folder):
                _prepare(folder, preparation)
        except OSError as error:
            advice = "; --prepared_path names another folder" * (error.errno in (errno.EROFS, errno.EACCES))
            raise OSError(error.errno, f"{error.strerror}{advice}", error.filename) from error
        except UserError as error:
            if reason is None:
                raise
            raise UserError(f"{folder}: not usable, because {reason}, and cannot be prepared again. {error}") from error
    raise UserError(f"{folder}: not usable even when just prepared, because {reason}")


def write_rows(path, rows, shape):
    """Write `rows`, an iterable of uint8 arrays of the given shape, as one .npy file (N, *shape); returns N."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (0, *shape)}
    count = 0
    with open(path, "wb") as file:  # not a memmap, which on a full disk ends in a signal instead of an OSError
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            file.write(np.ascontiguousarray(row, np.uint8).data)
            count += 1
        file.seek(0)  # numpy pads the header, so that the number of rows can be changed in place
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (count, *shape)})
    return count


def cpu_count():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(folder, preparation, reason=None):
    """Check and map. reason: why the arrays had to be prepared again, or None. Raises _Unusable."""
    try:
        record = json.loads((folder / "fingerprint.json").read_text("utf-8"))
        recipe, source, files = record["recipe"], record["source"], record["files"]
        pillow, warnings = record["pillow"], list(record["warnings"])
        if recipe != preparation.recipe:
            raise _Unusable("it was made by another recipe")
        if preparation.source not in (None, source):
            raise _Unusable("the source files have changed since")
        for name in sorted({*SPLITS, *files}):
            if _sha256(folder / name) != files[name]:
                raise _Unusable(f"{name} is not the file that was prepared")
        splits = [np.load(folder / name, mmap_mode="c") for name in SPLITS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Unusable(f"a file is missing or unreadable ({type(error).__name__}: {error})") from error
    for name, array in zip(SPLITS, splits, strict=True):
        if array.dtype != np.uint8 or array.shape[1:] != (recipe["nchannels"], recipe["L"], recipe["L"]):
            raise _Unusable(f"{name} holds {array.dtype} {array.shape}")
    if preparation.pillow and pillow != PIL.__version__:
        warnings.append(f"{folder}: prepared with Pillow {pillow}, here is {PIL.__version__}; used as it is")
    if reason:
        warnings.append(f"{folder}: prepared again, because {reason}")
    fingerprint = hashlib.sha256(json.dumps([recipe, files], sort_keys=True).encode()).hexdigest()
    return Dataset(*splits, fingerprint[:16], warnings, folder)


def _prepare(folder, preparation):
    """Build in a temporary folder, then rename. Good arrays that another process has put at `folder` meanwhile stay."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".*.tmp"):  # of killed processes
        with suppress(FileNotFoundError):
            if max(path.stat().st_mtime for path in (leftover, *leftover.glob("new"))) < time.time() - 24 * 3600:
                shutil.rmtree(leftover, ignore_errors=True)
    place = ".tmp", f".{folder.name}.", folder.parent  # suffix, prefix and where
    with tempfile.TemporaryDirectory(*place, ignore_cleanup_errors=True) as temporary:
        new = Path(temporary) / "new"
        new.mkdir()
        warnings = preparation.build(new)
        files = {path.name: _sha256(path) for path in sorted(new.iterdir())}
        record = {"recipe": preparation.recipe, "source": preparation.source}
        record |= {"pillow": PIL.__version__ if preparation.pillow else None, "files": files, "warnings": warnings}
        (new / "fingerprint.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        for path in new.iterdir():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        with suppress(_Unusable):
            return _load(folder, preparation)
        with suppress(FileNotFoundError):
            os.rename(folder, f"{temporary}/old")
        try:
            os.rename(new, folder)
        except OSError:
            if not os.path.lexists(folder):  # otherwise it is of another process, and loaded next
                raise
    sync_folder(folder.parent)


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
