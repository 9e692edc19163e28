"""Checkpoint files: one dict of tensors, numbers and strings, written atomically, verified before they are read.

A run folder holds `{e}.state` after e finished epochs and `last.state` for a save inside an epoch.
"""

import os
import zipfile
from pathlib import Path

import torch

FORMAT = 1
LAST = "last.state"


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence for the user."""


def save(path, state):
    """Write the dict `state` to `path`, replacing it only when the new file is complete on disk. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Make renames in a folder last through a power cut, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path, device="cpu"):
    """The dict that `save` wrote, tensors on `device`. Never runs code from the file.

    Raises CheckpointError if the file is missing, damaged (its checksums are verified) or of another kind or format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"bad checksum of {damaged}")
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever reading a damaged file raises, it means damage
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"checkpoint {path}: damaged, or not a checkpoint of this program ({cause})") from error
    if not isinstance(state, dict) or not {"format", "config"} <= state.keys():
        raise CheckpointError(
            f"checkpoint {path}: not of this program (those of other RG-Flow code are not interchangeable)"
        )
    if state["format"] != FORMAT:
        raise CheckpointError(f"checkpoint {path}: format {state['format']}, this program reads format {FORMAT}")
    if not {"epoch", "step", "model"} <= state.keys():
        raise CheckpointError(f"checkpoint {path}: incomplete, it must hold epoch, step and model")
    return state


def newest(folder):
    """(path, state) of the checkpoint with most steps in a run folder, or None if there is none.

    Raises CheckpointError if a candidate cannot be read.
    """
    numbered = sorted(epoch_files(folder).items())
    paths = [path for _, path in numbered[-1:]] + [path for path in [Path(folder) / LAST] if path.exists()]
    states = [(path, read(path)) for path in paths]
    return max(states, key=lambda item: item[1]["step"], default=None)


def epoch_files(folder):
    """{finished epochs: path} of the `{e}.state` files in a folder."""
    return {int(path.stem): path for path in Path(folder).glob("*.state") if path.stem.isdecimal()}


def save_run(folder, state, keep_epoch):
    """Save `state` under its name in a run folder, then remove the file it replaces. Returns the path.

    state["epoch"] finished epochs and state["mid_epoch"] give the name. When `{e}.state` is written, the one before it
    goes unless its epoch is a multiple of `keep_epoch` (0 keeps all), and `last.state` goes.
    """
    folder = Path(folder)
    if state["mid_epoch"]:
        save(folder / LAST, state)
        return folder / LAST
    path = folder / f"{state['epoch']}.state"
    save(path, state)
    previous = max((epoch for epoch in epoch_files(folder) if epoch < state["epoch"]), default=None)
    if previous is not None and keep_epoch and previous % keep_epoch:
        (folder / f"{previous}.state").unlink(missing_ok=True)
    (folder / LAST).unlink(missing_ok=True)
    return path
