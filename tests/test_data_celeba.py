"""CelebA from small sets in the real layouts: folders, archive, both lists; and every way to be incomplete."""

import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from data import open_dataset
from utils.cli import UserError

PARTS = [0, 0, 2, 1, 0, 2, 0]  # of 000001.jpg … 000007.jpg
COLOURS = [(20 * k, 250 - 30 * k, 100) for k in range(1, 8)]


def jpeg(path, colour):
    """178 x 218: one colour in the central 148 x 148, which is columns 15 to 162 and rows 35 to 182, white outside."""
    pixels = np.full((218, 178, 3), 255, np.uint8)
    pixels[35:183, 15:163] = colour
    Image.fromarray(pixels).save(path, quality=100, subsampling=0)


@pytest.fixture
def root(tmp_path):
    images = tmp_path / "celeba" / "img_align_celeba"
    images.mkdir(parents=True)
    for k, colour in enumerate(COLOURS, 1):
        jpeg(images / f"{k:06}.jpg", colour)
    lines = [f"{k:06}.jpg {part}\n" for k, part in enumerate(PARTS, 1)]
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("".join(lines))
    return tmp_path


def pack(root, prefix="img_align_celeba/"):
    images = root / "celeba" / "img_align_celeba"
    with zipfile.ZipFile(root / "celeba" / "img_align_celeba.zip", "w") as archive:
        for path in sorted(images.iterdir()):
            archive.write(path, prefix + path.name)
            path.unlink()
    images.rmdir()
    return root / "celeba" / "img_align_celeba.zip"


def opened(root):
    dataset = open_dataset("celeba32", root, 3, 32, progress=False)
    assert dataset.train.shape == (4, 3, 32, 32) and dataset.test.shape == (2, 3, 32, 32)
    for array, numbers in ((dataset.train, (1, 2, 5, 7)), (dataset.test, (3, 6))):
        for image, number in zip(array, numbers, strict=True):
            assert abs(image.astype(int) - np.array(COLOURS[number - 1])[:, None, None]).max() <= 3, number
    return dataset


def refused(root):
    with pytest.raises(UserError) as caught:
        open_dataset("celeba32", root, 3, 32, progress=False)
    return str(caught.value)


def test_folder(root):
    dataset = opened(root)
    assert dataset.warnings == ["celeba32: 4 training and 2 test images here, 162,770 and 19,962 in the whole set"]


def test_all_layouts_give_the_same_bytes(root):
    celeba = root / "celeba"
    fingerprints = {opened(root).fingerprint}

    def again():
        (root / "prepared_arrays" / "celeba32_3x32x32" / "fingerprint.json").unlink()
        dataset = opened(root)
        assert "prepared anew" in dataset.warnings[0]
        fingerprints.add(dataset.fingerprint)

    inner = celeba / "img_align_celeba"
    inner.rename(celeba / "inner")  # Kaggle's doubled folder and list
    inner.mkdir()
    (celeba / "inner").rename(inner / "img_align_celeba")
    lines = (celeba / "list_eval_partition.txt").read_text()
    (celeba / "list_eval_partition.txt").unlink()
    (celeba / "list_eval_partition.csv").write_text("image_id,partition\n" + lines.replace(" ", ","))
    again()
    for path in (inner / "img_align_celeba").iterdir():  # bare JPEGs beside the list, everything in data_path itself
        path.rename(root / path.name)
    (celeba / "list_eval_partition.csv").rename(root / "list_eval_partition.csv")
    again()
    inner.joinpath("img_align_celeba").rmdir()
    for path in root.glob("*.jpg"):
        path.rename(inner / path.name)
    pack(root)
    again()
    assert len(fingerprints) == 1


def test_archive_helps_out_a_folder_unpacked_in_part(root):
    pack(root)
    (root / "celeba" / "img_align_celeba").mkdir()
    jpeg(root / "celeba" / "img_align_celeba" / "000001.jpg", COLOURS[0])
    opened(root)


def test_raw_files_may_go_afterwards_a_new_list_counts(root):
    first = opened(root)
    partition = root / "celeba" / "list_eval_partition.txt"
    text = partition.read_text()
    partition.write_text(text.replace("000004.jpg 1", "000004.jpg 0"))
    changed = open_dataset("celeba32", root, 3, 32, progress=False)
    assert len(changed.train) == 5 and "source files have changed" in changed.warnings[0]
    assert changed.fingerprint != first.fingerprint
    pack(root).unlink()
    assert open_dataset("celeba32", root, 3, 32, progress=False).fingerprint == changed.fingerprint


def test_half_red_half_blue(root):
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[:, :89, 0] = pixels[:, 89:, 2] = 255  # the middle column of the picture is that of the crop
    pixels[109:] //= 2
    Image.fromarray(pixels).save(root / "celeba" / "img_align_celeba" / "000001.jpg", quality=100, subsampling=0)
    image = open_dataset("celeba32", root, 3, 32, progress=False).train[0].astype(int)
    assert abs(image[:, :14, :14] - [[[255]], [[0]], [[0]]]).max() <= 3
    assert abs(image[:, 18:, 18:] - [[[0]], [[0]], [[127]]]).max() <= 3
    assert abs(image[0, :14] - image[2, :14, ::-1]).max() <= 6  # the edge lies in the middle exactly


def test_nothing_there_lists_every_file_and_where_to_get_it(tmp_path):
    message = refused(tmp_path)
    for piece in (
        "the images and the list of the splits are missing",
        f"{tmp_path}/celeba/img_align_celeba.zip",
        "00d2c5bc6d35e252742224ab0c1e8fcb",
        f"{tmp_path}/celeba/img_align_celeba/000001.jpg",
        f"{tmp_path}/celeba/list_eval_partition.txt",
        "d32c9cbf5e040fd4025c592c306e6668",
        "list_eval_partition.csv",
        "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        "0B7EVK8r0v71pZjFTYXZWM3FlRnM",
        "0B7EVK8r0v71pY0NSMzRuSXJEVkk",
    ):
        assert piece in message


def test_one_piece_missing(root):
    partition = root / "celeba" / "list_eval_partition.txt"
    text = partition.read_text()
    partition.unlink()
    assert "the list of the splits is missing" in refused(root)
    partition.write_text(text)
    pack(root).unlink()
    assert "the images are missing" in refused(root)


def sentence(root, *pieces):
    message = refused(root)
    assert "\n" not in message
    for piece in pieces:
        assert str(piece) in message


def test_missing_jpeg(root):
    (root / "celeba" / "img_align_celeba" / "000005.jpg").unlink()
    sentence(root, "1 of 6 images", "list_eval_partition.txt", "000005.jpg", root / "celeba" / "img_align_celeba")
    sentence(root, "missing", pack(root))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("content", [b"", b"no image", "half", "small"])
def test_corrupt_jpeg_is_named(root, content, zipped):
    path = root / "celeba" / "img_align_celeba" / "000006.jpg"
    if content == "small":
        Image.new("RGB", (178, 147)).save(path)
    else:
        path.write_bytes(path.read_bytes()[:1000] if content == "half" else content)
    place = pack(root) if zipped else path.parent
    sentence(root, place / "000006.jpg", "178x147" if content == "small" else "not a readable image")


def test_quota_page_saved_as_the_archive(root):
    archive = pack(root)
    archive.write_text("\n<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>")
    sentence(root, archive, "a web page")


def test_cut_archive(root):
    archive = pack(root)
    archive.write_bytes(archive.read_bytes()[:-200])
    sentence(root, archive, "cut short or damaged")


def test_damaged_archive(root):
    archive = pack(root)
    content = bytearray(archive.read_bytes())
    content[content.index(b"\xff\xd8") + 300] ^= 255  # in the first JPEG: its check sum is wrong
    archive.write_bytes(content)
    sentence(root, archive / "000001.jpg", "CRC")


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("<html>quota</html>", ["a web page"]),
        ("000001.jpg 0\n000002.jpg 3\n", ["line 2 is '000002.jpg 3'", "0, 1 or 2"]),
        ("000001.jpg\n", ["line 1"]),
        ("../../secret.jpg 0\n", ["line 1"]),
        ("000001.jpg 0\n", ["no test images"]),
        ("", ["no training images"]),
    ],
)
def test_bad_list(root, text, pieces):
    path = root / "celeba" / "list_eval_partition.txt"
    path.write_text(text)
    sentence(root, path, *pieces)


@pytest.mark.parametrize("member", ["../../000001.jpg", "/tmp/000001.jpg", "img_align_celeba/../../evil.txt"])
def test_archive_that_leads_outside(root, member):
    archive = pack(root)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr(member, b"x")
    sentence(root, archive, member, "leads out of a folder")
    assert {path.name for path in root.rglob("*") if path.is_file()} == {archive.name, "list_eval_partition.txt"}


@pytest.mark.parametrize("declared", [None, 10])
def test_archive_bomb(root, declared):
    """200 MB of zeros in 200 kB, with the true size or a small one in the directory: refused, never held in memory."""
    archive = pack(root)
    bomb = root / "bomb.zip"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w") as member:
                for _ in range(200 if name.endswith("000003.jpg") else 0):
                    member.write(bytes(10**6))
                member.write(old.read(name))
    if declared is not None:
        content = bytearray(bomb.read_bytes())
        position = content.rindex(b"000003.jpg") - len("img_align_celeba/") - 46  # of its entry in the directory
        content[position + 24 : position + 28] = declared.to_bytes(4, "little")
        bomb.write_bytes(content)
    bomb.replace(archive)
    tracemalloc.start()
    sentence(root, archive / "000003.jpg", "not a readable image")
    assert tracemalloc.get_traced_memory()[1] < 50 * 10**6
    tracemalloc.stop()


def test_quota_page_with_a_byte_order_mark(root):
    archive = pack(root)
    archive.write_bytes(b"\xef\xbb\xbf<html>Quota exceeded</html>")
    sentence(root, archive, "a web page")
