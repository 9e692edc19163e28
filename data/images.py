"""From an image file to (C, L, L) bytes: what the loaders of image files share. Resizing is Pillow's, antialiased."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm import tqdm

from .arrays import cpu_count

# What Pillow raises on files that are no image, cut, damaged or a decompression bomb.
BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    TypeError,
    LookupError,
    OverflowError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


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


def decode(load, items, name, progress):
    """Yield load(item) for each item of a list, in order, on all processors (Pillow decodes without the GIL)."""
    with (
        ThreadPoolExecutor(cpu_count()) as pool,
        tqdm(total=len(items), desc=name, disable=None if progress else True) as bar,
    ):
        for start in range(0, len(items), 512):
            for result in pool.map(load, items[start : start + 512]):
                yield result
                bar.update()
