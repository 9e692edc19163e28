"""Checkpoint files: one dict of tensors, numbers and strings, written atomically, verified before it is read.

A run folder holds `{e}.state` after e finished epochs and `last.state` for a save inside an epoch. Training resumes
from full files. Slim files lack the optimiser's state, two thirds of the bytes; all but the newest are slim.
"""

import math
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from .cli import UserError
from .files import replacing

FORMAT = 2
LAST = "last.state"
TRAINING = ("optimizer", "window")  # not in slim files


def save(path, state):
    """Write the dict `state` to `path`, whose old content stays until the new one is on disk. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of the write; torch raises an error of its own instead
                raise error.__context__ from error
            raise


def slim(state):
    """A state without what only training needs."""
    return {name: value for name, value in state.items() if name not in TRAINING}


def is_full(state):
    return "optimizer" in state


def read(path, device="cpu"):
    """The dict that `save` wrote, tensors on `device`. Never runs code from the file. Raises UserError if the file is
    missing, damaged (its checksums are verified) or of another kind or format."""
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path}: {'not a file' if os.path.exists(path) else 'no such file'}")
    try:
        with open(path, "rb") as file:
            verify(file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # any error here means damage
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # whose words advise to run code from the file
            cause = "more than plain data"
        raise UserError(f"checkpoint {path}: damaged, or not a checkpoint of this program ({cause})") from error
    if not isinstance(state, dict) or "config" not in state or not isinstance(state.get("format"), int):
        raise UserError(f"checkpoint {path}: not of this program (those of other RG-Flow code are not interchangeable)")
    if state["format"] != FORMAT:
        raise UserError(f"checkpoint {path}: format {state['format']!r}, this program reads format {FORMAT}")
    kinds = {"config": dict, "epoch": int, "step": int, "model": dict}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()) or state["step"] < 0:
        raise UserError(f"checkpoint {path}: incomplete, it must hold config, epoch, step and model")
    state["config"].setdefault("model", "rgflow")  # missing in early files
    return state


def verify(file):
    """Raises zipfile.BadZipFile, or another error of zipfile, if a part of a torch.save archive is damaged."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # No checksum covers this: where an attribute bit makes a member a folder, torch reads nothing, silently.
        if any(info.external_attr or info.compress_type or info.file_size != info.compress_size for info in members):
            raise zipfile.BadZipFile("members are not stored as torch.save stores them")
        if len(set(archive.namelist())) < len(members):
            raise zipfile.BadZipFile("two members have the same name")
        if sum(info.file_size for info in members) > file.seek(0, 2):
            raise zipfile.BadZipFile("members overlap")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"bad checksum of {damaged}")


def newest(folder, full=False):
    """(path, state, warnings) of the checkpoint with most steps in a run folder, or None if it has no checkpoint.
    Unreadable files are passed over, with a warning. With `full`, slim files are passed over unless all are slim.
    Raises UserError if no file can be read."""
    folder, warnings, usable, slim_one = Path(folder), [], [], None
    last = [(math.inf, folder / LAST)] if (folder / LAST).exists() else []
    for epoch, path in last + sorted(epoch_files(folder).items(), reverse=True):
        if usable and usable[-1][1]["epoch"] >= epoch:  # finished epochs: `path` has no more steps
            break
        try:
            state = read(path)
        except UserError as error:
            if not os.path.lexists(path):  # a run in progress has replaced it
                return newest(folder, full)
            warnings.append(f"{error}; passed over")
            continue
        if not full or is_full(state):
            usable.append((path, state))
        else:
            slim_one = slim_one or (path, state)
    found = max(usable, key=lambda each: each[1]["step"], default=slim_one)
    if warnings and not found:
        raise UserError(f"{warnings[0].removesuffix('; passed over')}; no other file in {folder} can be used")
    return (*found, warnings) if found else None


def epoch_files(folder):
    """{finished epochs: path} of the `{e}.state` files in a folder."""
    return {int(path.stem): path for path in Path(folder).glob("*.state") if path.stem.isdecimal()}


def save_run(folder, state, keep_epoch):
    """Save `state` in a run folder as `last.state` with state["mid_epoch"], else as `{state["epoch"]}.state`; the path.
    The latter deletes `last.state` and slims the `{e}.state` before it, or deletes that too, unless e is a multiple of
    `keep_epoch` (0 keeps all)."""
    folder = Path(folder)
    path = folder / (LAST if state["mid_epoch"] else f"{state['epoch']}.state")
    save(path, state)  # complete before any other is touched
    if state["mid_epoch"]:
        return path
    (folder / LAST).unlink(missing_ok=True)
    earlier = {epoch: own for epoch, own in epoch_files(folder).items() if epoch < state["epoch"]}
    for epoch in sorted(earlier)[-1:]:
        if keep_epoch and epoch % keep_epoch:
            earlier[epoch].unlink()
        else:
            with suppress(UserError):  # damaged, which is for its next reader to report
                save(earlier[epoch], slim(read(earlier[epoch])))
    return path


def remove_leftovers(folder):
    """Delete the incomplete files of a process that was killed during a save."""
    for path in Path(folder).glob(".*.state*.tmp"):
        path.unlink(missing_ok=True)


def disk_space(weights, kept):
    """The most bytes that the files of a run take, from the bytes of all parameters and the number of kept files."""
    slim_size = weights + 2**20  # and configuration
    full_size = 2 * weights + slim_size  # AdamW has two moments per parameter
    return 3 * full_size + kept * slim_size  # the one before, last.state and the one being written; those kept
