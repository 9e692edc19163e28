"""Small data sets in the layout of the real ones, and how tests open them."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import open_dataset
from utils.cli import UserError


def opened(name, path, nchannels=3, L=32):
    return open_dataset(name, path, nchannels, L, Path(path, "prepared_arrays"))


def refused(name, path, *pieces, nchannels=3, L=32, lines=1):
    """Opening is refused with a message of so many lines that holds the pieces."""
    with pytest.raises(UserError) as caught:
        opened(name, path, nchannels, L)
    message = str(caught.value)
    assert message.count("\n") == lines - 1
    for piece in pieces:
        assert str(piece) in message


def save(path, colour=(200, 100, 50), size=(8, 8), **options):
    """An image file of one colour, or of the given pixels (height, width, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(colour) if isinstance(colour, np.ndarray) else Image.new("RGB", size, colour)
    image.save(path, **options)


def save_celeba(path, colour):
    """178 x 218: one colour in the central 148 x 148, which is columns 15 to 162 and rows 35 to 182, white outside."""
    pixels = np.full((218, 178, 3), 255, np.uint8)
    pixels[35:183, 15:163] = colour
    save(path, pixels, quality=100, subsampling=0)


def pack(folder, archive, prefix="img_align_celeba/", compression=zipfile.ZIP_STORED):
    """Move the files of `folder` into an archive, which is returned."""
    with zipfile.ZipFile(archive, "w", compression) as file:
        for path in sorted(folder.iterdir()):
            file.write(path, prefix + path.name)
            path.unlink()
    folder.rmdir()
    return archive
