"""Checkpoint files: one dict of tensors, numbers and strings, written atomically, verified before they are read.

A run folder holds `{e}.state` after e finished epochs and `last.state` for a save inside an epoch. Full files hold all
that training needs to go on; slim ones lack the optimiser's state, two thirds of the bytes.
"""

import math
import os
import zipfile
from pathlib import Path

import torch

from .cli import UserError
from .files import replacing

FORMAT = 2
LAST = "last.state"
TRAINING = ("optimizer", "window")  # what a slim file lacks


def save(path, state):
    """Write the dict `state` to `path`, replacing it only when the new file is complete on disk. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as file:
        try:
            torch.save({"format": FORMAT, **state}, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of the write; torch hides it behind one of its own
                raise error.__context__ from error
            raise


def slim(state):
    """What a slim file holds of a state: weights and configuration."""
    return {name: value for name, value in state.items() if name not in TRAINING}


def is_full(state):
    return "optimizer" in state


def read(path, device="cpu"):
    """The dict that `save` wrote, tensors on `device`. Never runs code from the file.

    Raises UserError if the file is missing, damaged (its checksums are verified) or of another kind or format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with open(path, "rb") as file:
            verify(file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # whatever reading a damaged file raises, it means damage
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"checkpoint {path}: damaged, or not a checkpoint of this program ({cause})") from error
    if not isinstance(state, dict) or "config" not in state or not isinstance(state.get("format"), int):
        raise UserError(f"checkpoint {path}: not of this program (those of other RG-Flow code are not interchangeable)")
    if state["format"] != FORMAT:
        raise UserError(f"checkpoint {path}: format {state['format']!r}, this program reads format {FORMAT}")
    kinds = {"config": dict, "epoch": int, "step": int, "model": dict}
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()) or state["step"] < 0:
        raise UserError(f"checkpoint {path}: incomplete, it must hold config, epoch, step and model")
    state["config"].setdefault("model", "rgflow")  # files from before there was another
    return state


def verify(file):
    """Raises zipfile.BadZipFile, or whatever zipfile raises on damage, unless all of a torch.save archive is sound."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # What no checksum covers: where an attribute bit makes a member a folder, torch reads nothing and says nothing.
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
    """(path, state, warnings) of the checkpoint with most steps in a run folder, or None if it holds none.

    A file that cannot be read is passed over, with a warning. With `full`, so are slim files, unless there are only
    such. Raises UserError if there are files and none can be read.
    """
    folder, warnings, slim_ones, gone = Path(folder), [], [], []

    def attempt(path):
        try:
            state = read(path)
        except UserError as error:
            warnings.append(f"{error}; passed over")
            gone.extend([path] * (not os.path.lexists(path)))
            return None
        if full and not is_full(state):
            slim_ones[:] = slim_ones or [(path, state)]
            return None
        return path, state

    last = attempt(folder / LAST) if (folder / LAST).exists() else None
    found = None
    for epoch, path in sorted(epoch_files(folder).items(), reverse=True):
        if last and last[1]["epoch"] >= epoch:  # finished epochs: its step is beyond that of `path`, or the same
            break
        found = attempt(path)
        if found:
            break
    if gone:  # a run in progress has replaced them meanwhile
        return newest(folder, full)
    found = found or last or next(iter(slim_ones), None)
    if found:
        return *found, warnings
    if warnings:
        raise UserError(f"{warnings[0].removesuffix('; passed over')}; no other file in {folder} can be used")
    return None


def epoch_files(folder):
    """{finished epochs: path} of the `{e}.state` files in a folder."""
    return {int(path.stem): path for path in Path(folder).glob("*.state") if path.stem.isdecimal()}


def save_run(folder, state, keep_epoch):
    """Save `state` under its name in a run folder, then remove or slim what it replaces. Returns the path.

    state["epoch"] finished epochs and state["mid_epoch"] give the name. When `{e}.state` is written, the one before it
    goes unless its epoch is a multiple of `keep_epoch` (0 keeps all), and `last.state` goes. Of those that stay, the
    newest and, among the kept ones, the best by state["test_bpds"] ({finished epochs: bits per dimension}) are full.
    """
    folder = Path(folder)
    if state["mid_epoch"]:
        save(folder / LAST, state)
        return folder / LAST
    path = folder / f"{state['epoch']}.state"
    previous = max((epoch for epoch in epoch_files(folder) if epoch < state["epoch"]), default=None)
    replaces = previous if previous is not None and keep_epoch and previous % keep_epoch else -1
    state = {**state, "replaces": replaces}
    save(path, state)  # complete before any other is touched
    remove_replaced(folder, state)
    (folder / LAST).unlink(missing_ok=True)
    slim_down(folder, state, keep_epoch)
    return path


def remove_replaced(folder, state):
    """Remove the file whose place that of `state` has taken; again at a start, lest a process was killed before it."""
    (Path(folder) / f"{state.get('replaces', -1)}.state").unlink(missing_ok=True)


def slim_down(folder, state, keep_epoch):
    """Make the files of earlier epochs than that of `state` slim, but for the best of those that are kept."""
    earlier = {epoch: path for epoch, path in epoch_files(folder).items() if epoch < state["epoch"]}
    kept = [*earlier] if keep_epoch and state["epoch"] % keep_epoch else [*earlier, state["epoch"]]
    bpds = state.get("test_bpds", {})
    best = min(kept, key=lambda epoch: (bpds.get(epoch, math.inf), -epoch), default=None)
    for epoch, path in earlier.items():
        if epoch != best and holds_optimizer(path):
            try:
                save(path, slim(read(path)))
            except UserError:  # damaged: whoever reads it will say so
                continue


def holds_optimizer(path):
    """Whether a file looks full, without reading its tensors or verifying it."""
    try:
        return is_full(torch.load(path, mmap=True, map_location="cpu", weights_only=True))
    except Exception:  # whatever reading a damaged file raises
        return False


def remove_leftovers(folder):
    """Remove the incomplete files of a process that was killed during a save."""
    for path in Path(folder).glob(".*.state.tmp"):
        path.unlink(missing_ok=True)


def disk_space(weights, kept):
    """The most bytes that the files of a run take together.

    weights: bytes of all parameters
    kept: number of files that `save_run` keeps over the run
    """
    slim_size = weights + 2**20  # with what else is in a file
    full_size = 2 * weights + slim_size  # AdamW has two moments per parameter
    together = 3 + (kept > 0)  # the newest, last.state, the one being written, the best
    return together * full_size + max(0, kept - 1) * slim_size
