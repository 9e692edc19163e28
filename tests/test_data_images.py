"""Image files whose numbers, size or end are unusual, and masks."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from data import images
from data.images import LeftOut, load_image, load_mask, load_single
from utils.cli import UserError

RAMP = np.arange(64).reshape(8, 8)


def png(values, colour=0):
    """A PNG of 16 bits, (H, W) or (H, W, 3)."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head, rows = struct.pack(">IIBBBBB", 8, 8, 16, colour, 0, 0, 0), values.astype(">u2").reshape(8, -1)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b""))


def tiff(values, edit=lambda content: content):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    return io.BytesIO(edit(file.getvalue()))


def pgm(top):
    return io.BytesIO(b"P5 8 8 %d\n" % top + RAMP.astype(">u2").tobytes())


def white_is_zero(content):
    """Photometric interpretation 0 instead of 1."""
    old = struct.pack("<HHIH", 262, 3, 1, 1)
    assert content.count(old) == 1
    return content.replace(old, struct.pack("<HHIH", 262, 3, 1, 0))


KNOWN = [  # a file, its levels of 256
    (lambda: png(RAMP * 1040), RAMP * 1040 / 257),
    (lambda: png(RAMP * 0), RAMP * 0),
    (lambda: png(np.stack([RAMP * 1040] * 3, -1), colour=2), RAMP * 1040 / 257),
    (lambda: tiff((RAMP * 1040).astype(np.int32)), RAMP * 1040 / 257),
    (lambda: tiff((RAMP * 1040).astype(np.uint16), white_is_zero), 255 - RAMP * 1040 / 257),
    (lambda: pgm(4095), RAMP * 255 / 4095),  # dark
]
UNKNOWN = [
    *(lambda factor=factor: png(RAMP * factor) for factor in (1, 4, 16, 65, 260)),  # of 6, 8, 10, 12, 14 bits
    lambda: png(np.stack([RAMP * 65] * 3, -1), colour=2),
    *(lambda factor=factor: tiff((RAMP * factor).astype(np.int32)) for factor in (65, 1041, -1040, 10**6)),
    lambda: tiff(RAMP.astype(np.float32)),
    lambda: pgm(65535),
]


@pytest.mark.parametrize("file, levels", KNOWN)
def test_numbers_of_a_known_range(file, levels):
    assert abs(np.asarray(load_image(file(), 1)) - levels).max() <= 1


@pytest.mark.parametrize("file", UNKNOWN)
def test_numbers_of_an_unknown_range_are_refused(file):
    with pytest.raises(LeftOut, match="numbers of unknown range: rescale to 8 bits"):
        load_image(file(), 3)


MODES = [("1", 1), ("L", 200), ("P", 1), ("LA", (200, 255)), ("PA", (1, 255)), ("RGBX", (200, 200, 200, 0))]
MODES += [("CMYK", (0, 0, 0, 55)), ("YCbCr", (200, 128, 128)), ("HSV", (0, 0, 200)), ("LAB", (206, 128, 128))]


@pytest.mark.parametrize("mode, colour", MODES)
def test_all_modes(mode, colour):
    image = Image.new(mode, (8, 8), colour)
    if "P" in mode:
        image.putpalette([0, 0, 0, 200, 200, 200])
    expected = 255 if mode == "1" else 200
    for C in (1, 3):
        assert abs(np.asarray(images.to_channels(image, C)).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"quality": 100}])
def test_a_jpeg_that_lacks_its_end_marker_alone_is_read(options):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), np.uint8)
    file, mended = io.BytesIO(), []
    Image.fromarray(pixels).save(file, "JPEG", **options)
    whole, content = np.asarray(Image.open(file)), file.getvalue()
    for cut in (1, 2):
        image = load_image(io.BytesIO(content[:-cut]), 3, mended=lambda: mended.append(1))
        assert (np.asarray(image) == whole).all() and len(mended) == cut
    restarts = [place for place in range(len(content)) if content[place] == 255 and 0xD0 <= content[place + 1] <= 0xD7]
    for end in (*range(700, len(content) - 4, 50), *restarts):
        if not options.get("progressive"):  # its first scans hold all rows
            with pytest.raises(OSError):
                load_image(io.BytesIO(content[:end]), 3)


@pytest.mark.parametrize("mode, form", [("RGB", "PNG"), ("RGBA", "TIFF"), ("P", "PNG"), ("L", "JPEG"), ("RGB", "JPEG")])
def test_large_images_are_read_without_a_limit_or_a_warning(mode, form, monkeypatch):
    """Here 2,000 pixels are large; a picture is black at the left and white at the right."""
    monkeypatch.setattr(images, "PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    limit, file = Image.MAX_IMAGE_PIXELS, io.BytesIO()
    picture = Image.new("L", (96, 64))
    picture.paste(255, (48, 0, 96, 64))
    picture.convert(mode).save(file, form)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_single(file, 3, 8, fit=True).astype(int)
    assert abs(pixels[:, :, :3]).max() <= 25 and abs(pixels[:, :, 5:] - 255).max() <= 25
    assert limit == Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(images, "LARGEST", 6000)
    with pytest.raises(UserError, match="more than 6,000 pixels"):
        load_single(file, 3, 8, fit=True)


WHITE = np.zeros((16, 16), np.uint8)
WHITE[4:9, 2:8] = 255
ALPHA = np.stack([np.full((16, 16), 255), WHITE], -1).astype(np.uint8)
RED = np.stack([WHITE, 0 * WHITE, 0 * WHITE], -1)
MASKS = [WHITE, np.maximum(WHITE, 3), WHITE // 2 + 1, ALPHA, RED, WHITE * np.uint16(257), WHITE > 0]


@pytest.mark.parametrize("array", MASKS)
@pytest.mark.parametrize("scale", [1, 3])
def test_masks_are_the_bright_pixels(tmp_path, array, scale):
    Image.fromarray(array.repeat(scale, 0).repeat(scale, 1)).save(tmp_path / "mask.png")
    assert (load_mask(tmp_path / "mask.png", 16, fit=scale > 1) == (WHITE > 0)).all()


def test_masks_with_blurred_edges_and_without_any(tmp_path):
    Image.fromarray(WHITE.repeat(2, 0).repeat(2, 1)).save(tmp_path / "mask.jpg", quality=75)
    assert (load_mask(tmp_path / "mask.jpg", 16, fit=True) == (WHITE > 0)).all()
    for level, words in ((0, "no pixel is"), (1, "no pixel is"), (255, "every pixel is")):
        Image.new("L", (16, 16), level).save(tmp_path / "mask.png")
        with pytest.raises(UserError, match=f"mask.png: {words} corrupted"):
            load_mask(tmp_path / "mask.png", 16)
