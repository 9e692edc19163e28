"""Keep results that take long to compute in files, named by what they depend on."""

import hashlib
from contextlib import suppress
from pathlib import Path

import torch

from .checkpoint import verify
from .files import check_writable, replacing


def digest(*parts):
    """A name for values that lead to a result: strings, numbers, tensors, their dicts and sequences."""
    total = hashlib.sha256()

    def update(value):
        if isinstance(value, torch.Tensor):
            update(f"{value.dtype} {tuple(value.shape)}")
            total.update(value.detach().cpu().contiguous().reshape(-1).numpy())
        elif isinstance(value, (list, tuple, dict)):
            total.update(f"{type(value).__name__} {len(value)};".encode())
            for item in value.items() if isinstance(value, dict) else value:
                update(item)
        else:
            total.update(f"{value!r};".encode())

    update(parts)
    return total.hexdigest()[:32]


def cached(path, compute):
    """The tensor in the file `path`, on the CPU; if there is none, or it is damaged, compute(), which is kept there.
    Raises OSError, before anything is computed, if the file cannot be written."""
    path = Path(path)
    with suppress(Exception), open(path, "rb") as file:  # whatever reading a damaged file raises
        verify(file)
        file.seek(0)
        found = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(found, torch.Tensor):
            return found
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path)
    found = compute().cpu()
    with replacing(path) as file:
        torch.save(found, file)
    return found
