"""Prepared data sets: one uint8 array per split, built once, checked at every opening and memory-mapped.

`{data_path}/prepared_arrays/{name}_{C}x{L}x{L}/` holds `train.npy` and `test.npy`, (N, C, L, L), further arrays such as
labels, and `fingerprint.json`: the recipe, what it was made from, and the SHA-256 of every array file.
"""

import hashlib
import json
import os
import secrets
import shutil
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


@dataclass(frozen=True)
class Preparation:
    """recipe: all that determines the bytes, apart from the source: a JSON dict with `name`, `nchannels`, `L` and more
    source: what tells the raw files from others, a JSON dict; None where they are gone or need no telling
    build: (folder, progress) -> warnings; writes train.npy, test.npy and any labels into `folder`
    pillow: whether the bytes depend on Pillow's version
    """

    recipe: dict
    source: dict | None
    build: Callable[[Path, bool], list[str]]
    pillow: bool = True


@dataclass(frozen=True)
class Dataset:
    """train, test: copy-on-write uint8 memmaps (N, C, L, L)
    fingerprint: 16 hexadecimal digits, a function of recipe and content
    warnings: sentences to print
    path: the folder of the arrays
    """

    train: np.memmap
    test: np.memmap
    fingerprint: str
    warnings: list[str]
    path: Path


class _Unusable(Exception):
    """Why prepared arrays are not to be trusted."""


def open_arrays(data_path, preparation, progress=True):
    """The prepared arrays below `data_path`, built where they are missing, stale, foreign or damaged: a Dataset.

    Raises UserError where the source will not do, OSError where the arrays cannot be written.
    """
    recipe = preparation.recipe
    folder = data_path / FOLDER / f"{recipe['name']}_{recipe['nchannels']}x{recipe['L']}x{recipe['L']}"
    reason = None
    for _ in range(3):  # again only where another process replaces the folder under our eyes
        if os.path.lexists(folder):
            try:
                return _load(folder, preparation, reason)
            except _Unusable as error:
                reason = str(error)
        try:
            with naming(folder):
                _prepare(folder, preparation, progress)
        except UserError as error:
            if reason is None:
                raise
            raise UserError(f"{folder}: not usable, because {reason}, and cannot be prepared anew. {error}") from error
    raise UserError(f"{folder}: not usable even when just prepared, because {reason}")


def write_rows(path, rows, shape):
    """Write `rows`, an iterable of uint8 arrays of the given shape, as one .npy file (N, *shape); returns N.

    Plain writes, because a memmap on a full disk ends in a signal instead of an OSError.
    """
    with open(path, "wb") as file:
        count = _write_header(file, 0, shape)
        for row in rows:
            file.write(np.ascontiguousarray(row, np.uint8).data)
            count += 1
        file.seek(0)
        _write_header(file, count, shape)  # numpy pads the header, so that the number of rows can be changed in place
    return count


def _write_header(file, count, shape):
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
    return count


def cpu_count():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _load(folder, preparation, reason):
    """Check and map; `reason`: why the arrays had to be prepared anew, or None. Raises _Unusable."""
    try:
        record = json.loads((folder / "fingerprint.json").read_text("utf-8"))
        recipe, source, files = record["recipe"], record["source"], record["files"]
        pillow, warnings = record["pillow"], list(record["warnings"])
        if recipe != preparation.recipe:
            raise _Unusable("it was made by another recipe")
        if preparation.source not in (None, source):
            raise _Unusable("the source files have changed since")
        for name in sorted({"train.npy", "test.npy", *files}):
            if _sha256(folder / name) != files[name]:
                raise _Unusable(f"{name} is not the file that was prepared")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _Unusable(f"a file is missing or unreadable ({type(error).__name__}: {error})") from error

    splits = []
    for name in ("train.npy", "test.npy"):
        try:
            array = np.load(folder / name, mmap_mode="c")
        except (OSError, ValueError) as error:
            raise _Unusable(f"{name} is no array ({error})") from error
        if array.dtype != np.uint8 or array.shape[1:] != (recipe["nchannels"], recipe["L"], recipe["L"]):
            raise _Unusable(f"{name} holds {array.dtype} {array.shape}")
        splits.append(array)

    if preparation.pillow and pillow != PIL.__version__:
        warnings.append(f"{folder}: prepared with Pillow {pillow}, here is {PIL.__version__}; used as it is")
    if reason:
        warnings.append(f"{folder}: prepared anew, because {reason}")
    fingerprint = hashlib.sha256(json.dumps([recipe, files], sort_keys=True).encode()).hexdigest()[:16]
    return Dataset(*splits, fingerprint, warnings, folder)


def _prepare(folder, preparation, progress):
    """Build in a temporary folder beside `folder` and rename it. Raises UserError, OSError."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(".*.tmp"):  # of killed processes
        with suppress(FileNotFoundError):
            if leftover.stat().st_mtime < time.time() - 24 * 3600:
                shutil.rmtree(leftover, ignore_errors=True)
    temporary = _beside(folder)
    temporary.mkdir()
    try:
        warnings = preparation.build(temporary, progress)
        record = {
            "recipe": preparation.recipe,
            "source": preparation.source,
            "pillow": PIL.__version__ if preparation.pillow else None,
            "files": {path.name: _sha256(path) for path in sorted(temporary.iterdir())},
            "warnings": warnings,
        }
        (temporary / "fingerprint.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
        for path in temporary.iterdir():
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        _publish(temporary, folder, preparation)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only after an error, or when another process was first


def _publish(temporary, folder, preparation):
    """Rename `temporary` to `folder`. Good arrays that another process has put there meanwhile stay."""
    for _ in range(10):
        try:
            os.rename(temporary, folder)
        except OSError:
            if not os.path.lexists(folder):
                raise
        else:
            break
        try:
            _load(folder, preparation, None)
            return
        except _Unusable:
            if folder.is_symlink() or folder.is_file():
                folder.unlink(missing_ok=True)
                continue
            old = _beside(folder)
            try:
                os.rename(folder, old)
            except FileNotFoundError:
                continue  # another process moved it
            shutil.rmtree(old, ignore_errors=True)
    sync_folder(folder.parent)


def _beside(folder):
    return folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
