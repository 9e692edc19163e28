"""CelebA from small sets in the real layouts: folders, archive, both lists; and every way to be incomplete."""

import os
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sets

PARTS = [0, 0, 2, 1, 0, 2, 0]  # of 000001.jpg … 000007.jpg
COLOURS = [(20 * k, 250 - 30 * k, 100) for k in range(1, 8)]
COUNTS = "celeba32: 4 training and 2 test images here, 162,770 and 19,962 in the whole set"


@pytest.fixture
def celeba(tmp_path):
    return tmp_path / "celeba"


@pytest.fixture(autouse=True)
def images(celeba):
    for k, colour in enumerate(COLOURS, 1):
        sets.save_celeba(celeba / "img_align_celeba" / f"{k:06}.jpg", colour)
    return celeba / "img_align_celeba"


@pytest.fixture(autouse=True)
def partition(celeba, images):
    path = celeba / "list_eval_partition.txt"
    path.write_text("".join(f"{k:06}.jpg {part}\n" for k, part in enumerate(PARTS, 1)))
    return path


def pack(celeba, **prefix):
    return sets.pack(celeba / "img_align_celeba", celeba / "img_align_celeba.zip", **prefix)


def opened(celeba):
    dataset = sets.opened("celeba32", celeba.parent)
    assert dataset.train.shape == (4, 3, 32, 32) and dataset.test.shape == (2, 3, 32, 32)
    for array, numbers in ((dataset.train, (1, 2, 5, 7)), (dataset.test, (3, 6))):
        for image, number in zip(array, numbers, strict=True):
            assert abs(image.astype(int) - np.array(COLOURS[number - 1])[:, None, None]).max() <= 3, number
    return dataset


def refused(celeba, *pieces, lines=1):
    sets.refused("celeba32", celeba.parent, *pieces, lines=lines)


def test_all_layouts_give_the_same_bytes(celeba, images, partition):
    first = opened(celeba)
    assert first.warnings == [COUNTS]

    def again():
        (first.path / "fingerprint.json").unlink()
        dataset = opened(celeba)
        assert "prepared again" in dataset.warnings[0] and dataset.fingerprint == first.fingerprint

    images.rename(celeba / "inner")  # Kaggle's doubled folder and list
    images.mkdir()
    (celeba / "inner").rename(images / "img_align_celeba")
    (celeba / "list_eval_partition.csv").write_text("image_id,partition\n" + partition.read_text().replace(" ", ","))
    partition.unlink()
    again()
    archive = sets.pack(images / "img_align_celeba", celeba / "img_align_celeba.zip", prefix="")
    again()
    zipfile.ZipFile(archive).extractall(celeba.parent)  # JPEGs beside the list, everything in data_path itself
    archive.unlink()
    (celeba / "list_eval_partition.csv").rename(celeba.parent / "list_eval_partition.csv")
    again()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_lists_with_a_byte_order_mark_and_in_other_csv(celeba, partition, encoding):
    text = partition.read_text()
    for content in (text, "image_id,partition\r\n" + re.sub("(.*) (.*)\n", '"\\1","\\2"\r\n', text)):
        partition.write_bytes(content.encode(encoding))
        opened(celeba)


@pytest.mark.parametrize("name", ["archive.zip", "archive (1).zip", "celeba-dataset.zip"])
def test_the_archive_of_kaggle(celeba, partition, name):
    """Images and list in one, wherever in it; closed afterwards."""
    text = "image_id,partition\n" + partition.read_text().replace(" ", ",")
    partition.unlink()
    archive = pack(celeba, prefix="img_align_celeba/img_align_celeba/").rename(celeba.parent / name)
    sets.refused("celeba32", celeba.parent, "the list of the splits not found", lines=8)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("list_eval_partition.csv", text)
    opened(celeba)
    if os.path.exists("/proc/self/fd"):
        assert not [link for link in Path("/proc/self/fd").iterdir() if link.exists() and link.samefile(archive)]
    archive.write_bytes(archive.read_bytes()[:-300])
    (celeba.parent / "prepared_arrays" / "celeba32_3x32x32" / "train.npy").unlink()
    sets.refused("celeba32", celeba.parent, archive, "cut short or damaged")


def test_jpegs_that_lack_their_end_marker_are_counted(celeba, images):
    for k in (2, 3):
        path = images / f"{k:06}.jpg"
        path.write_bytes(path.read_bytes()[:-2])
    line = f"{images}: 2 of 6 files are JPEGs without an end marker, read all the same, such as 000002.jpg"
    assert opened(celeba).warnings == [line, COUNTS]


@pytest.mark.parametrize("prefix", ["", "../../", "/tmp/"])
def test_an_archive_is_never_unpacked(celeba, images, prefix):
    """Whatever folders its members name. It helps out a folder that was unpacked in part."""
    archive = pack(celeba, prefix=prefix)
    sets.save_celeba(images / "000001.jpg", COLOURS[0])
    before = {path for path in celeba.rglob("*") if path.is_file()}
    opened(celeba)
    assert archive in before and {path for path in celeba.rglob("*") if path.is_file()} == before


def test_raw_files_may_go_afterwards_a_new_list_counts(celeba, partition):
    first = opened(celeba)
    partition.write_text(partition.read_text().replace("000004.jpg 1", "000004.jpg 0"))
    changed = sets.opened("celeba32", celeba.parent)
    assert len(changed.train) == 5 and "source files have changed" in changed.warnings[0]
    assert changed.fingerprint != first.fingerprint
    pack(celeba).unlink()
    assert sets.opened("celeba32", celeba.parent).fingerprint == changed.fingerprint


def test_half_red_half_blue(celeba, images):
    pixels = np.zeros((218, 178, 3), np.uint8)
    pixels[:, :89, 0] = pixels[:, 89:, 2] = 255  # the middle column of the picture is that of the crop
    pixels[109:] //= 2
    sets.save(images / "000001.jpg", pixels, quality=100, subsampling=0)
    image = sets.opened("celeba32", celeba.parent).train[0].astype(int)
    assert abs(image[:, :14, :14] - [[[255]], [[0]], [[0]]]).max() <= 3
    assert abs(image[:, 18:, 18:] - [[[0]], [[0]], [[127]]]).max() <= 3
    assert abs(image[0, :14] - image[2, :14, ::-1]).max() <= 6  # the edge lies in the middle exactly


def test_what_is_missing_is_listed_with_where_to_get_it(celeba, partition):
    text = partition.read_text()
    partition.unlink()
    refused(celeba, "celeba32: the list of the splits not found", lines=8)
    archive = pack(celeba)
    archive.unlink()
    places = [archive, celeba / "img_align_celeba" / "000001.jpg", partition, "list_eval_partition.csv"]
    sources = "00d2c5bc6d35e252742224ab0c1e8fcb d32c9cbf5e040fd4025c592c306e6668 0B7EVK8r0v71pZjFTYXZWM3FlRnM"
    sources += " 0B7EVK8r0v71pY0NSMzRuSXJEVkk http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
    refused(celeba, "the images and the list of the splits not found", *places, *sources.split(), lines=8)
    partition.write_text(text)
    refused(celeba, "celeba32: the images not found", lines=8)


def test_missing_jpeg(celeba, images, partition):
    (images / "000005.jpg").unlink()
    refused(celeba, images, "1 of 6 images", partition, "000005.jpg")
    refused(celeba, "missing", pack(celeba))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("damage", [lambda jpeg: b"", lambda jpeg: b"no image", lambda jpeg: jpeg[:1000], None])
def test_corrupt_jpeg_is_named(celeba, images, damage, zipped):
    path = images / "000006.jpg"
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        sets.save(path, size=(178, 147))
    place = pack(celeba) if zipped else images
    refused(celeba, place / "000006.jpg", "not a readable image" if damage else "178x147")


def test_damaged_archive(celeba):
    archive = pack(celeba)
    content, page = archive.read_bytes(), b"<!DOCTYPE html><html><title>Google Drive - Quota exceeded</title></html>"
    place = content.index(b"\xff\xd8") + 300  # in the first JPEG
    flipped = content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
    for damaged, *words in (
        (b"\n" + page, ".zip: a web page"),
        (b"\xef\xbb\xbf\n" + page, ".zip: a web page"),
        (content[:-200], ".zip: cut short or damaged"),
        (flipped, ".zip/000001.jpg", "CRC"),
    ):
        archive.write_bytes(damaged)
        refused(celeba, *words)


LISTS = [("<html>quota</html>", "a web page"), ("1.jpg 0\n2.jpg 3\n", "line 2 is '2.jpg 3', expected an image's name")]
LISTS += [("000001.jpg\n", "line 1"), ("../../secret.jpg 0\n", "line 1")]
LISTS += [("000001.jpg 0\n", "no test images"), ("", "no train images")]


@pytest.mark.parametrize("text, words", LISTS)
def test_bad_list(celeba, partition, text, words):
    partition.write_text(text)
    refused(celeba, partition, words)


@pytest.mark.parametrize("declared", [None, 10])
def test_archive_bomb(celeba, declared):
    """200 MB of zeros in 200 kB, with the true size or a small one in the directory: refused, never held in memory."""
    archive, bomb = pack(celeba), celeba / "bomb.zip"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            with new.open(name, "w") as member:
                for _ in range(200 if name.endswith("000003.jpg") else 0):
                    member.write(bytes(10**6))
                member.write(old.read(name))
    content = bytearray(bomb.read_bytes())
    if declared is not None:
        position = content.rindex(b"000003.jpg") - len("img_align_celeba/") - 46  # of its entry in the directory
        content[position + 24 : position + 28] = declared.to_bytes(4, "little")
    archive.write_bytes(content)
    tracemalloc.start()
    refused(celeba, archive / "000003.jpg", "not a readable image")
    assert tracemalloc.get_traced_memory()[1] < 50 * 10**6
    tracemalloc.stop()
