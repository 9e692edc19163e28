"""Folders of images: splits, colour modes, sizes, and what is no image."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import open_dataset
from data.images import to_channels
from utils.cli import UserError


def save(path, colour=(200, 100, 50), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def opened(path, nchannels=3, L=8):
    return open_dataset("folder", path, nchannels, L, progress=False)


def alone(path, image, nchannels=3, L=8, **options):
    """The one training image of a folder, through the whole way."""
    save(path / "test" / "a.png")
    (path / "train").mkdir()
    image.save(path / "train" / options.pop("name", "a.png"), **options)
    dataset = opened(path, nchannels, L)
    assert dataset.warnings == [] and dataset.train.shape == (1, nchannels, L, L)
    return dataset.train[0]


def test_train_and_test_folders(tmp_path):
    for k in range(12):
        save(tmp_path / "train" / f"{k % 3}" / f"{k}.png", (k, 0, 0))
    save(tmp_path / "test" / "deep" / "er" / "x.png", (99, 0, 0))
    save(tmp_path / "elsewhere.png", (1, 2, 3))
    save(tmp_path / "train" / ".hidden" / "x.png")
    save(tmp_path / "train" / ".hidden.png")
    save(tmp_path / "prepared_arrays" / "x.png")
    dataset = opened(tmp_path)
    assert dataset.train[:, 0, 0, 0].tolist() == [
        0,
        3,
        6,
        9,
        1,
        10,
        4,
        7,
        11,
        2,
        5,
        8,
    ]  # sorted by path: 1/1, 1/10, 1/4
    assert dataset.test[:, 0, 0, 0].tolist() == [99] and dataset.warnings == []
    assert dataset.path == tmp_path / "prepared_arrays" / "folder_3x8x8"


def test_split_by_hash(tmp_path):
    names = sorted(f"{k % 7}/image {k} ä.png" for k in range(200))
    for k, name in enumerate(names):
        save(tmp_path / name, (k, 0, 0))
    dataset = opened(tmp_path)
    last = [int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 10 for name in names]
    assert dataset.test[:, 0, 0, 0].tolist() == [k for k in range(200) if last[k] == 0]
    assert dataset.train[:, 0, 0, 0].tolist() == [k for k in range(200) if last[k] != 0]
    assert 8 <= len(dataset.test) <= 35
    (tmp_path / "train").mkdir()
    assert dataset.warnings == []
    save(tmp_path / "new.png")
    (warning,) = [text for text in opened(tmp_path).warnings if "anew" not in text]
    assert "train/ without test/" in warning


def test_transparency_is_laid_on_white(tmp_path):
    image = alone(tmp_path, Image.new("RGBA", (8, 8), (200, 100, 50, 127)))
    assert abs(image[:, 4, 4].astype(int) - [228, 178, 153]).max() <= 1


def test_la(tmp_path):
    assert abs(int(alone(tmp_path, Image.new("LA", (8, 8), (0, 51)))[0, 0, 0]) - 204) <= 1


def palette_image():
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 200, 100, 50])
    return image


def test_palette(tmp_path):
    assert alone(tmp_path, palette_image())[:, 3, 3].tolist() == [200, 100, 50]


def test_palette_with_transparency(tmp_path):
    image = palette_image()
    image.putpixel((0, 0), 0)
    pixels = alone(tmp_path, image, transparency=0)
    assert pixels[:, 0, 0].tolist() == [255] * 3 and pixels[:, 4, 4].tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "La"])
def test_other_modes_with_alpha(mode):
    image = Image.new("LA", (1, 1), (100, 51)).convert("RGBA").convert(mode if mode != "La" else "LA")
    image = image.convert("La") if mode == "La" else image
    assert abs(np.asarray(to_channels(image, 3)).astype(int) - (255 - 155 * 0.2)).max() <= 2


def test_transparent_colour_of_an_rgb_image(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    image.putpixel((7, 7), (1, 2, 3))
    pixels = alone(tmp_path, image, transparency=(1, 2, 3))
    assert pixels[:, 7, 7].tolist() == [255] * 3 and pixels[:, 0, 0].tolist() == [200, 100, 50]


def test_grey_becomes_rgb(tmp_path):
    assert (alone(tmp_path, Image.new("L", (8, 8), 77)) == 77).all()


def test_rgb_becomes_grey(tmp_path):
    pixels = alone(tmp_path, Image.new("RGB", (8, 8), (200, 100, 50)), nchannels=1)
    assert abs(int(pixels[0, 0, 0]) - (0.299 * 200 + 0.587 * 100 + 0.114 * 50)) <= 1


def test_black_and_white(tmp_path):
    assert (alone(tmp_path, Image.new("1", (8, 8), 1), nchannels=1) == 255).all()


def test_cmyk(tmp_path):
    pixels = alone(tmp_path, Image.new("CMYK", (8, 8), (255, 0, 0, 0)), name="a.jpg")
    assert abs(pixels[:, 0, 0].astype(int) - [0, 255, 255]).max() <= 3


@pytest.mark.parametrize("nchannels", [1, 3])
def test_sixteen_bits(tmp_path, nchannels):
    values = np.tile(np.array([0, 257, 128 * 257, 65535], np.uint16).repeat(2), (8, 1))
    pixels = alone(tmp_path, Image.fromarray(values), nchannels)
    assert (pixels == np.array([0, 1, 128, 255], np.uint8).repeat(2)).all()


def test_big_endian_and_32_bit_grey():
    values = np.array([[0, 257, 65535]])
    for image in (
        Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes()),
        Image.fromarray(values.astype(np.int32)),
    ):
        assert np.asarray(to_channels(image, 1)).tolist() == [[0, 1, 255]]


def test_exif_orientation(tmp_path):
    image = Image.new("RGB", (8, 8), (10, 10, 10))
    image.paste((250, 250, 250), (0, 0, 8, 4))  # bright above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise: bright on the right
    pixels = alone(tmp_path, image, exif=exif)
    assert (pixels[:, :, 4:] == 250).all() and (pixels[:, :, :4] == 10).all()


@pytest.mark.parametrize("turned", [False, True])
def test_shorter_side_is_resized_and_the_centre_kept(tmp_path, turned):
    """Twice 4 x as large as needed: whole sizes, so that resizing all and cropping afterwards is the same."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 96, 3), dtype=np.uint8)
    pixels = pixels.transpose(1, 0, 2) if turned else pixels
    whole = Image.fromarray(pixels).resize((8, 24) if turned else (24, 8), Image.BICUBIC)
    expected = np.asarray(whole.crop((0, 8, 8, 16) if turned else (8, 0, 16, 8))).transpose(2, 0, 1)
    assert (alone(tmp_path, Image.fromarray(pixels)) == expected).all()


def test_small_images_are_enlarged(tmp_path):
    image = Image.new("RGB", (3, 2), (9, 8, 7))
    assert alone(tmp_path, image, L=16)[:, 8, 8].tolist() == [9, 8, 7]


def test_same_size_is_untouched(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert (alone(tmp_path, Image.fromarray(pixels)) == pixels.transpose(2, 0, 1)).all()


def test_no_images_are_skipped_counted_and_named(tmp_path, monkeypatch):
    for split in ("train", "test"):
        for k in range(3):
            save(tmp_path / split / f"{k}.png", (k, 0, 0))
    (tmp_path / "train" / "0a.txt").write_text("labels")
    (tmp_path / "train" / "1a.jpg").write_bytes(b"")
    (tmp_path / "test" / "cut.png").write_bytes((tmp_path / "test" / "0.png").read_bytes()[:45])
    (tmp_path / "test" / "broken link.png").symlink_to("nowhere.png")
    Image.new("F", (8, 8)).save(tmp_path / "test" / "float.tiff")
    save(tmp_path / "test" / "bomb.png", size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    dataset = opened(tmp_path)
    assert dataset.train[:, 0, 0, 0].tolist() == dataset.test[:, 0, 0, 0].tolist() == [0, 1, 2]
    (warning,) = dataset.warnings
    names = "test/bomb.png, test/broken link.png, test/cut.png, test/float.tiff, train/0a.txt, train/1a.jpg"
    assert warning == f"{tmp_path}: skipped 6 of 12 files, no readable images: {names}"
    assert opened(tmp_path).warnings == [warning]


def test_only_ten_names_are_given(tmp_path):
    save(tmp_path / "train" / "a.png")
    save(tmp_path / "test" / "a.png")
    for k in range(13):
        (tmp_path / "test" / f"{k:02}.csv").write_text("x")
    (warning,) = opened(tmp_path).warnings
    assert "13 of 15 files" in warning and "test/09.csv and 3 more" in warning and "10.csv" not in warning


def test_names_that_are_no_text(tmp_path):
    save(tmp_path / "train" / "a.png")
    save(tmp_path / "test" / "a.png")
    try:
        Path(os.fsdecode(bytes(tmp_path / "test") + b"/\xff.txt")).write_text("x")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    (warning,) = opened(tmp_path).warnings
    assert warning.encode() and "\\xff.txt" in warning


def test_links(tmp_path):
    save(tmp_path / "outside" / "pool" / "a.png")
    save(tmp_path / "outside" / "b.png")
    images = tmp_path / "images"
    for split in ("train", "test"):
        (images / split).mkdir(parents=True)
        (images / split / "pool").symlink_to(tmp_path / "outside" / "pool")
        (images / split / "b.png").symlink_to(tmp_path / "outside" / "b.png")
        (images / split / "loop").symlink_to(images)
    dataset = opened(images)
    assert len(dataset.train) == len(dataset.test) == 2 and dataset.warnings == []


def test_changes_are_noticed_and_vanished_images_forgiven(tmp_path):
    save(tmp_path / "train" / "a.png")
    save(tmp_path / "test" / "a.png")
    first = opened(tmp_path)
    save(tmp_path / "train" / "b.png")
    second = opened(tmp_path)
    assert len(second.train) == 2 and "source files have changed" in second.warnings[0]
    os.utime(tmp_path / "train" / "b.png", ns=(1, 1))
    third = opened(tmp_path)
    assert "changed" in third.warnings[0] and third.fingerprint == second.fingerprint != first.fingerprint
    for path in [*tmp_path.glob("t*/*.png")]:
        path.unlink()
    assert opened(tmp_path).fingerprint == second.fingerprint
    with pytest.raises(UserError, match="no image among its 0 files"):
        opened(tmp_path, L=4)


def refused(path, nchannels=3):
    with pytest.raises(UserError) as caught:
        opened(path, nchannels)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_no_images_at_all(tmp_path):
    assert "no image among its 0 files" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "no image among its 1 files" in refused(tmp_path)
    assert "not a folder" in refused(tmp_path / "notes.txt")


def test_one_empty_split(tmp_path):
    save(tmp_path / "a.png")  # one image is in one split
    message = refused(tmp_path)
    assert "no image for the" in message and "train/ and test/" in message
    save(tmp_path / "train" / "a.png")
    (tmp_path / "test").mkdir()
    assert "no image for the test split" in refused(tmp_path)
