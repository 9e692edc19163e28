"""From an image file to (C, L, L) bytes, for all loaders of image files. Pillow resizes, antialiased."""

import io
import math
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import RLock

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from utils.cli import UserError

from .arrays import cpu_count, write_rows

# What Pillow raises on files that are no image, cut, damaged or a decompression bomb.
BROKEN = (OSError, ValueError, SyntaxError, EOFError, TypeError, LookupError, OverflowError, AttributeError)
BROKEN += (RuntimeError, struct.error, zlib.error, Image.DecompressionBombError)
PIXELS = 89_478_485  # images of more are decoded one at a time, JPEGs shrunk
LARGEST = 2**28  # pixels of an image once decoded: 1 GiB
FILLER = b"".join(b"\xb5" * 200 + bytes([255, 0xD0 + k]) for k in range(8))  # JPEG data, and each restart marker
MENDED = "{} of {} files are JPEGs without an end marker, read all the same"
_lock = RLock()


class LeftOut(ValueError):
    """An image that is no image of a data set; why, in words that fit many."""


@contextmanager
def _any_size():
    """Without Pillow's limit of pixels, which is global: one thread at a time, and restored afterwards."""
    with _lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def opened(file, mended=None):
    """The decoded image of a file, a path or BytesIO. Raises one of `BROKEN`, such as LeftOut for more than LARGEST
    pixels. mended: called for a JPEG that lacks its end marker alone, which raises OSError without it"""
    with _any_size():
        image = Image.open(file)
    with image, _any_size() if math.prod(image.size) > PIXELS else nullcontext():
        if math.prod(image.size) > PIXELS and "progressive" not in image.info:
            image.draft(None, (4096, 4096))  # to 1/2, 1/4 or 1/8
        if math.prod(image.size) > LARGEST:
            raise LeftOut(f"more than {LARGEST:,} pixels")
        stored = str(image.tile[0][3]) if image.tile else ""
        try:
            image.load()
        except OSError:
            if mended is None or image.format not in ("JPEG", "MPO"):
                raise
            image.fp.seek(0)
            content = image.fp.read().rstrip(b"\xff")
            ends = (io.BytesIO(content + filler + b"\xff\xd9") for filler in (b"", FILLER))
            with opened(next(ends)) as image, opened(next(ends)) as other:
                if image.tobytes() != other.tobytes():  # pixels are missing, for which the filler stands
                    raise
            mended()
        yield _eight_bits(image, stored)


def _eight_bits(image, stored):
    """The image with numbers of 8 bits; stored: Pillow's name of those of the file. Raises LeftOut if it is unclear
    which of them is white."""
    unknown = LeftOut("numbers of unknown range: rescale to 8 bits, or to all 16")
    if not image.mode.startswith(("I", "F")):
        if (
            ";16" in stored and "BGR" not in stored and 0 < np.max(image.getextrema()[:3]) < 64
        ):  # the upper 8 bits of 16
            raise unknown
        return image
    values = np.asarray(image)
    low, high, declared = values.min(), values.max(), stored.startswith("('L'")  # a PGM, whose header names white
    if image.mode == "F" or low < 0 or high > 65535 or (0 < high < 2**14 and not declared):
        raise unknown
    values = values.astype(np.uint32)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF: 0 is white
        values = 65535 - values
    scaled = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    scaled.info = {key: value for key, value in image.info.items() if key != "transparency"}  # such as its orientation
    return scaled


def to_channels(image, nchannels, background="white"):
    """A Pillow image of 8 bits in mode L (1 channel) or RGB (3), laid on `background` where transparent. Raises
    ValueError for a conversion that Pillow does not have."""
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("L" if nchannels == 1 else "RGB")


def load_crop(file, edge, L=32, mended=None):
    """The central edge x edge pixels of an image file as uint8 (3, L, L). Raises one of `BROKEN`, also if smaller."""
    with opened(file, mended) as image:
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


def load_image(path, nchannels, background="white", mended=lambda: None, own=True):
    """An image file as a Pillow image of mode L (1 channel) or RGB (3), turned as its EXIF tag says and laid on
    `background` where transparent. Raises one of `BROKEN` for a file that is no image, without `own` LeftOut for a
    picture of a script of this program. mended: see `opened`"""
    with opened(path, mended) as image:
        if not own and (image.info.get("Software") == "RG-Flow" or image.info.get("comment") == b"RG-Flow"):
            raise LeftOut("pictures that this program has drawn")
        ImageOps.exif_transpose(image, in_place=True)
        return to_channels(image, nchannels, background)


def load_single(path, nchannels, L, fit=False):
    """The image file that a user names as uint8 (nchannels, L, L). Raises UserError for a file that is no image and,
    without `fit`, which makes it fit, for an image of another size."""
    return resize(_load_named(path, nchannels, L, fit), L)


def load_mask(path, L, fit=False):
    """The pixels of an image file whose largest channel is above half of the range, (L, L) bool, on black where it is
    transparent; with `fit` those that hold a part of one. Raises UserError as `load_single`, and for all or none."""
    bright = np.asarray(_load_named(path, 3, L, fit, "black")).max(-1) > 127
    mask = resize(Image.fromarray(bright.astype(np.float32)), L, Image.Resampling.BOX)[0] > 0  # bytes would round
    if mask.all() or not mask.any():
        number, part = "every" if mask.all() else "no", " of the central square" if fit else ""
        raise UserError(f"{path}: {number} pixel{part} is corrupted (brighter than half of the range)")
    return mask


def _load_named(path, nchannels, L, fit, background="white"):
    try:
        image = load_image(path, nchannels, background)
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
