"""Results that take long, kept in files named by what they depend on."""

import hashlib
from pathlib import Path

import torch

from .checkpoint import verify
from .files import check_writable, replacing


def digest(*parts):
    """A name for values that lead to a result: strings, numbers, tensors, their dicts and sequences."""
    total = hashlib.sha256()
    update(total, parts)
    return total.hexdigest()[:32]


def update(total, value):
    if isinstance(value, torch.Tensor):
        update(total, f"{value.dtype} {tuple(value.shape)}")
        total.update(value.detach().cpu().contiguous().reshape(-1).numpy())
    elif isinstance(value, (list, tuple, dict)):
        total.update(f"{type(value).__name__} {len(value)};".encode())
        for item in value.items() if isinstance(value, dict) else value:
            update(total, item)
    else:
        total.update(f"{value!r};".encode())


def cached(path, compute):
    """The tensor in the file `path`, on the CPU; if there is none, or it is damaged, compute(), which is kept there.

    Raises OSError, before anything is computed, if the file cannot be written.
    """
    path = Path(path)
    found = read(path)
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_writable(path)
        found = compute().cpu()
        with replacing(path) as file:
            torch.save(found, file)
    return found


def read(path):
    """The tensor in a file, None if there is none or the file is damaged."""
    try:
        with open(path, "rb") as file:
            verify(file)
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever reading a damaged file raises
        return None
    return found if isinstance(found, torch.Tensor) else None
