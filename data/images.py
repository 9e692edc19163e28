"""From an image file to (C, L, L) bytes: what the loaders of image files share. Resizing is Pillow's, antialiased."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.cli import UserError

from .arrays import cpu_count

# What Pillow raises on files that are no image, cut, damaged or a decompression bomb.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, AttributeError)
BROKEN += (RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)


def to_channels(image, nchannels):
    """A Pillow image of any mode in mode L (1 channel) or RGB (3). Transparency is laid on white.

    Raises ValueError for a floating-point image, which has no known range, and for a conversion Pillow does not have.
    """
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


def centre_crop(image, edge):
    """The central edge x edge pixels. Raises ValueError for an image smaller than that."""
    width, height = image.size
    if min(width, height) < edge:
        raise ValueError(f"{width}x{height} pixels, smaller than the crop of {edge}")
    left, top = (width - edge) // 2, (height - edge) // 2
    return image.crop((left, top, left + edge, top + edge))


def resize(image, L, box=None):
    """Bicubic: an L or RGB image, or the box (left, top, right, bottom) in it -> uint8 (C, L, L)."""
    pixels = np.asarray(image.resize((L, L), Image.Resampling.BICUBIC, box))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def load_image(path, nchannels):
    """An image file as a Pillow image of mode L (1 channel) or RGB (3), turned as its EXIF tag says and laid on white
    where transparent. Raises one of `BROKEN` for a file that is no image."""
    with Image.open(path) as image:
        return to_channels(ImageOps.exif_transpose(image), nchannels)


def central_square(image):
    """The box (left, top, right, bottom) of the largest square in the middle."""
    width, height = image.size
    edge = min(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    return left, top, left + edge, top + edge


def load_square(path, nchannels, L):
    """As `load_image`, but uint8 (nchannels, L, L): the shorter side resized to L and the centre kept."""
    image = load_image(path, nchannels)
    return resize(image, L, central_square(image))  # looks beyond the box: resize, then crop


def load_single(path, nchannels, L, fit=False):
    """The image file that a user names as uint8 (nchannels, L, L); with `fit` as `load_square` makes it.

    Raises UserError for a file that is no image and, without `fit`, for an image of another size.
    """
    image = _load_named(path, nchannels, L, fit)
    return resize(image, L, central_square(image))


def load_mask(path, L, fit=False):
    """The pixels that are not 0 in an image file, (L, L) bool; with `fit` those that hold a part of one.

    Raises UserError as `load_single` does.
    """
    image = Image.fromarray(np.asarray(_load_named(path, 3, L, fit)).any(-1).astype(np.float32))  # bytes would round
    return np.asarray(image.resize((L, L), Image.Resampling.BOX, central_square(image))) > 0


def _load_named(path, nchannels, L, fit):
    try:
        image = load_image(path, nchannels)
    except BROKEN as error:
        raise UserError(f"{path}: no readable image ({getattr(error, 'strerror', None) or error})") from error
    width, height = image.size
    if not fit and (width, height) != (L, L):
        raise UserError(f"{path}: {width}x{height} pixels, must be {L}x{L}; --resize makes it so")
    return image


def decode(load, items, name, progress):
    """Yield load(item) for each item of a list, in order, on all processors (Pillow decodes without the GIL)."""
    bar = tqdm(total=len(items), desc=name, disable=None if progress else True)
    with ThreadPoolExecutor(cpu_count()) as pool, bar:
        for start in range(0, len(items), 512):
            for result in pool.map(load, items[start : start + 512]):
                yield result
                bar.update()
