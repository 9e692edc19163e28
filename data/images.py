"""From an image file to (C, L, L) bytes, for all loaders of image files. Pillow resizes, antialiased."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.cli import UserError

from .arrays import cpu_count, write_rows

# What Pillow raises on files that are no image, cut, damaged or a decompression bomb.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, AttributeError)
BROKEN += (RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)


def to_channels(image, nchannels):
    """A Pillow image of any mode in mode L (1 channel) or RGB (3), laid on white where transparent. Raises ValueError
    for a floating-point image, which has no known range, and for a conversion that Pillow does not have."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits, perhaps in a 32-bit image; Pillow's own conversion clips at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("L" if nchannels == 1 else "RGB")


def load_crop(file, edge, L=32):
    """The central edge x edge pixels of an image file as uint8 (3, L, L). Raises one of `BROKEN`, also if smaller."""
    with Image.open(file) as image:
        width, height = image.size
        if min(width, height) < edge:
            raise ValueError(f"{width}x{height} pixels, smaller than the crop of {edge}")
        left, top = (width - edge) // 2, (height - edge) // 2
        return resize(to_channels(image.crop((left, top, left + edge, top + edge)), 3), L)


def resize(image, L, method=Image.Resampling.BICUBIC):
    """The largest central square of an image -> (C, L, L). Equal to resizing the whole image and then cropping."""
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    pixels = np.asarray(image.resize((L, L), method, (left, top, left + edge, top + edge)))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def load_image(path, nchannels):
    """An image file as a Pillow image of mode L (1 channel) or RGB (3), turned as its EXIF tag says and laid on white
    where transparent. Raises one of `BROKEN` for a file that is no image."""
    with Image.open(path) as image:
        return to_channels(ImageOps.exif_transpose(image), nchannels)


def load_single(path, nchannels, L, fit=False):
    """The image file that a user names as uint8 (nchannels, L, L). Raises UserError for a file that is no image and,
    without `fit`, which makes it fit, for an image of another size."""
    return resize(_load_named(path, nchannels, L, fit), L)


def load_mask(path, L, fit=False):
    """The pixels that are not 0 in an image file, (L, L) bool; with `fit` those that hold a part of one. Raises
    UserError as `load_single` does."""
    image = Image.fromarray(np.asarray(_load_named(path, 3, L, fit)).any(-1).astype(np.float32))  # bytes would round
    return resize(image, L, Image.Resampling.BOX)[0] > 0


def _load_named(path, nchannels, L, fit):
    try:
        image = load_image(path, nchannels)
    except BROKEN as error:
        raise UserError(f"{path}: no readable image ({getattr(error, 'strerror', None) or error})") from error
    width, height = image.size
    if not fit and (width, height) != (L, L):
        raise UserError(f"{path}: {width}x{height} pixels, must be {L}x{L}; --resize makes it so")
    return image


def write_split(path, load, items, shape, name):
    """Write load(item) of each item of a list, in order, without None, as an .npy file (N, *shape); returns N. Loads
    on all processors (Pillow decodes without the GIL)."""

    def rows():
        with ThreadPoolExecutor(cpu_count()) as pool:
            for start in range(0, len(items), 512):
                yield from pool.map(load, items[start : start + 512])

    bar = tqdm(rows(), name, len(items), disable=None)
    return write_rows(path, (row for row in bar if row is not None), shape)
