"""Folders of images: splits, colour modes, sizes, and what is no image."""

import errno
import hashlib
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import sets
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sets import save

import data
from data.images import to_channels

opened, refused = partial(sets.opened, "folder", L=8), partial(sets.refused, "folder", L=8)


@pytest.fixture
def root(tmp_path):
    """One training and one test image."""
    for split in ("train", "test"):
        save(tmp_path / split / "a.png")
    return tmp_path


def alone(root, image, nchannels=3, L=8, name="a.png", **options):
    """The one training image of a folder, through the whole way."""
    (root / "train" / "a.png").unlink()
    image.save(root / "train" / name, **options)
    dataset = opened(root, nchannels, L=L)
    assert dataset.warnings == [] and dataset.train.shape == (1, nchannels, L, L)
    return dataset.train[0].astype(int)


def test_train_and_test_folders(tmp_path):
    for k in range(12):
        save(tmp_path / "train" / f"{k % 3}" / f"{k}.png", (k, 0, 0))
    save(tmp_path / "test" / "deep" / "er" / "x.png", (99, 0, 0))
    for left_out in ("elsewhere.png", "train/.hidden/x.png", "train/.hidden.png", "prepared_arrays/x.png"):
        save(tmp_path / left_out)
    dataset = opened(tmp_path)
    by_path = [0, 3, 6, 9, 1, 10, 4, 7, 11, 2, 5, 8]  # 1/1, 1/10, 1/4
    assert dataset.train[:, 0, 0, 0].tolist() == by_path
    line = f"{tmp_path}: 12 training and 1 test images, by the names of folders; left out: 1 files in no such folder"
    assert dataset.test[:, 0, 0, 0].tolist() == [99] and dataset.warnings == [line]
    (tmp_path / "elsewhere.png").unlink()
    plain = opened(tmp_path, L=4)
    assert plain.warnings == [] and len(plain.train) == 12


LAYOUTS = [  # files, their splits, and words
    ("Train/a Test/b", "train test", "1 training and 1 test images, by the names"),
    ("x/Training_set/a x/testing/b", "train test", "1 training and 1 test images, by the names"),
    ("trainA/a trainB/b testA/c testset/d", "train train test test", "2 training and 2 test images"),
    ("DIV2K_train_HR/a DIV2K_valid_HR/train/b", "train test", "1 training and 1 test images"),
    (
        "images/train2017/a images/val2017/b c",
        "train test -",
        "for validation as for test; left out: 1 files in no such",
    ),
    (
        "train/a dev/b Test/c d/e f",
        "train - test - -",
        "by the names of folders; left out: 1 files for validation; left out: 2 files in no such",
    ),
    ("constrained/a contest/b latest/c", None, "by a hash of the path"),  # parts of words
    ("train/a train/b bus/c", None, "by a hash of the path, for want of folders for test"),
    ("train/a train_masks/b test/c test2/d", "train - test -", "by the names of folders; left out: 2 files in no such"),
    ("traindata/a tests/b", "train test", "by the names of folders"),
    ("trainImages/a holdout/b evaluation/c", "train test -", "left out: 1 files for validation"),
    ("test/a val/b", None, "by a hash"),
]


@pytest.mark.parametrize("files, splits, words", LAYOUTS)
def test_folders_of_the_splits_in_any_spelling(tmp_path, files, splits, words):
    names = [f"{name}.png" for name in files.split()]
    if splits is None:
        names += [f"{name[:-4]}{k}.png" for name in names for k in range(30)]
    for k, name in enumerate(names):
        save(tmp_path / name, (k, 0, 0))
    dataset = opened(tmp_path)
    found = {int(image[0, 0, 0]): split for split in ("train", "test") for image in getattr(dataset, split)}
    hashed = ["train" if int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 10 else "test" for name in names]
    assert [found.get(k, "-") for k in range(len(names))] == (splits.split() if splits else hashed)
    assert len(dataset.warnings) == 1 and words in dataset.warnings[0]


def test_split_by_hash(tmp_path):
    names = sorted(f"{k % 7}/image {k} ä.png" for k in range(200))
    for k, name in enumerate(names):
        save(tmp_path / name, (k, 0, 0))
    dataset = opened(tmp_path)
    last = [int(hashlib.sha256(name.encode()).hexdigest()[:16], 16) % 10 for name in names]
    assert dataset.test[:, 0, 0, 0].tolist() == [k for k in range(200) if last[k] == 0]
    assert dataset.train[:, 0, 0, 0].tolist() == [k for k in range(200) if last[k] != 0]
    assert 8 <= len(dataset.test) <= 35 and len(dataset.warnings) == 1
    assert f"{len(dataset.train)} training and {len(dataset.test)} test images, by a hash" in dataset.warnings[0]


def plain(mode, colour, size=(8, 8), corner=None):
    image = Image.new(mode, size, colour)
    if mode == "P":
        image.putpalette([9, 9, 9, *BROWN])
    image.putpixel((0, 0), colour if corner is None else corner)
    return image


WHITE, BROWN = [255] * 3, [200, 100, 50]
MODES = [  # image, options, corner, middle, tolerance
    (plain("RGBA", (200, 100, 50, 127)), {}, [228, 178, 153], [228, 178, 153], 1),  # transparency is laid on white
    (plain("LA", (0, 51)), {}, [204], [204], 1),
    (plain("P", 1), {}, BROWN, BROWN, 0),
    (plain("P", 1, corner=0), {"transparency": 0}, WHITE, BROWN, 0),
    (plain("RGB", (200, 100, 50), corner=(1, 2, 3)), {"transparency": (1, 2, 3)}, WHITE, BROWN, 0),
    (plain("L", 77), {}, [77], [77], 0),
    (plain("RGB", (200, 100, 50)), {"nchannels": 1}, [124.2], [124.2], 1),  # 0.299 R + 0.587 G + 0.114 B
    (plain("1", 1), {"nchannels": 1}, [255], [255], 0),
    (plain("CMYK", (255, 0, 0, 0)), {"name": "a.jpg"}, [0, 255, 255], [0, 255, 255], 3),
    (plain("RGB", (9, 8, 7), (3, 2)), {"L": 16}, [9, 8, 7], [9, 8, 7], 0),  # small images are enlarged
]


@pytest.mark.parametrize("image, options, corner, middle, tolerance", MODES)
def test_modes(root, image, options, corner, middle, tolerance):
    pixels = alone(root, image, **options)
    assert abs(pixels[:, 0, 0] - corner).max() <= tolerance and abs(pixels[:, 4, 4] - middle).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGBA", "La", "RGBa"])
def test_other_modes_with_alpha(mode):
    image = plain("LA", (100, 51)).convert(mode if mode == "La" else "RGBA").convert(mode)
    assert abs(np.asarray(to_channels(image, 3)).astype(int) - (255 - 155 * 0.2)).max() <= 2


@pytest.mark.parametrize("nchannels", [1, 3])
@pytest.mark.parametrize("mode, dtype", [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_grey_of_16_and_32_bits(root, nchannels, mode, dtype):
    values = np.tile(np.array([0, 257, 128 * 257, 65535]).repeat(2), (8, 1))
    image = Image.frombytes(mode, (8, 8), values.astype(dtype).tobytes())
    assert (alone(root, image, nchannels, name="a.tiff") == np.array([0, 1, 128, 255]).repeat(2)).all()


@pytest.mark.parametrize("turned", [False, True])
def test_shorter_side_is_resized_and_the_centre_kept(root, turned):
    """Whole multiples of 8 pixels, so that resizing all and cropping afterwards is the same. EXIF turns the image."""
    pixels, exif = np.random.default_rng(0).integers(0, 256, (32, 96, 3), dtype=np.uint8), Image.Exif()
    exif[0x0112] = 6 if turned else 1  # 6: to be turned by 90 degrees clockwise
    seen = np.rot90(pixels, -turned)
    whole = np.asarray(Image.fromarray(np.ascontiguousarray(seen)).resize((24, 8)[:: 1 - 2 * turned], Image.BICUBIC))
    expected = whole[8:16] if turned else whole[:, 8:16]
    assert (alone(root, Image.fromarray(pixels), exif=exif) == expected.transpose(2, 0, 1)).all()


def test_no_images_are_skipped_counted_and_named(tmp_path):
    for k in range(6):
        save(tmp_path / ("train", "test")[k % 2] / f"{k // 2}.png", (k // 2, 0, 0))
    (tmp_path / "train" / "0a.txt").write_text("labels")
    (tmp_path / "train" / "1a.jpg").write_bytes(b"")
    (tmp_path / "test" / "cut.png").write_bytes((tmp_path / "test" / "0.png").read_bytes()[:45])
    (tmp_path / "test" / "broken link.png").symlink_to("nowhere.png")
    plain("F", 0).save(tmp_path / "test" / "float.tiff")
    (tmp_path / "test" / "bomb.ppm").write_bytes(b"P6 30000 30000 255 ")
    dataset = opened(tmp_path)
    assert dataset.train[:, 0, 0, 0].tolist() == dataset.test[:, 0, 0, 0].tolist() == [0, 1, 2]
    names = "test/broken link.png, test/cut.png, train/0a.txt, train/1a.jpg"
    lines = ["1 of 12 files, more than 268,435,456 pixels: test/bomb.ppm"]
    lines += ["1 of 12 files, numbers of unknown range: rescale to 8 bits, or to all 16: test/float.tiff"]
    lines += [f"4 of 12 files, no readable images: {names}"]
    assert sorted(dataset.warnings) == [f"{tmp_path}: skipped {line}" for line in lines]
    assert opened(tmp_path).warnings == dataset.warnings


def test_only_ten_names_are_given_and_some_are_no_text(root):
    for k in range(13):
        (root / "test" / f"{k:02}.csv").write_text("x")
    (warning,) = opened(root).warnings
    assert "13 of 15 files" in warning and "test/09.csv and 3 more" in warning and "10.csv" not in warning
    try:
        Path(os.fsdecode(bytes(root / "test") + b"/-\xff.txt")).write_text("x")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    assert "-\\xff.txt" in opened(root).warnings[0].encode().decode()


def test_what_a_run_wrote_is_left_out(root):
    """Pictures and prepared arrays among the user's images change nothing, neither at once nor at the next start."""
    first = opened(root)
    run = root / "train" / "saved_model" / "laplace"
    (run / "out_b_save").mkdir(parents=True)
    (run / "out_b.lock").touch()
    for path in (run / "out_b_samples" / "epoch1.png", root / "train" / "prepared_arrays" / "b.png"):
        save(path)
    for _ in range(2):
        assert data.open_dataset("folder", root, 3, 8, root / "cache").warnings == []
    assert opened(root).fingerprint == first.fingerprint and opened(root).warnings == []
    marked = PngInfo()
    marked.add_text("Software", "RG-Flow")
    save(root / "train" / "walk.gif", comment="RG-Flow")
    save(root / "train" / "figure.png", pnginfo=marked)
    second = opened(root)
    listed = "skipped 2 of 4 files, pictures that this program has drawn: train/figure.png, train/walk.gif"
    assert [line for line in second.warnings if "again" not in line] == [f"{root}: {listed}"]
    assert second.fingerprint == first.fingerprint


def test_arrays_of_a_folder_do_not_lie_in_it(root, monkeypatch, tmp_path_factory):
    elsewhere, before = tmp_path_factory.mktemp("elsewhere"), set(root.rglob("*"))
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(data, "PREPARED", Path("datasets/prepared_arrays"))
    first = data.open_dataset("folder", root, 3, 8)
    code = hashlib.sha256(bytes(root.resolve())).hexdigest()[:8]
    assert first.path == Path("datasets", "prepared_arrays", f"folder_{root.name}_{code}_3x8x8")
    assert data.open_dataset("folder", root, 3, 8, elsewhere / "x").path == elsewhere / "x" / first.path.name
    assert set(root.rglob("*")) == before

    def refuse(path, *options, **named):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"Read-only file system; --prepared_path names another folder: .*read_only"):
        data.open_dataset("folder", root, 3, 8, elsewhere / "read_only")


def test_links(root, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    save(outside / "pool" / "a.png")
    for name, target in (("pool", outside / "pool"), ("b.png", outside / "pool" / "a.png"), ("loop", root)):
        (root / "train" / name).symlink_to(target)
    dataset = opened(root)
    assert (len(dataset.train), len(dataset.test)) == (3, 1) and dataset.warnings == []


def test_changes_are_noticed_and_vanished_images_forgiven(root):
    first = opened(root)
    save(root / "train" / "b.png")
    second = opened(root)
    assert len(second.train) == 2 and "source files have changed" in second.warnings[0]
    os.utime(root / "train" / "b.png", ns=(1, 1))
    third = opened(root)
    assert "changed" in third.warnings[0] and third.fingerprint == second.fingerprint != first.fingerprint
    (root / "train").rename(root / ".hidden")
    (root / "test" / "a.png").unlink()
    assert opened(root).fingerprint == second.fingerprint
    refused(root, "holds no files", L=4)


def test_an_empty_split(tmp_path):
    refused(tmp_path, f"--data_path {tmp_path}: holds no files")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path, "among its 1 files", "train/ and test/")
    refused(tmp_path / "notes.txt", f"{tmp_path / 'notes.txt'}: not a folder")
    save(tmp_path / "a.png")  # one image is in one split
    refused(tmp_path, "no image for the ")
    save(tmp_path / "train" / "a.png")
    (tmp_path / "test").mkdir()
    refused(tmp_path, "no image for the test split")
