"""CelebA, aligned (section 4.2, Appendix A), here `celeba32`: centre crop 148, resized to 32, the official splits.

Needs the images (a folder, or the authors' or Kaggle's archive, which is never unpacked) and the list of the splits.
Images keep the order of the list, whose validation part is left out.
"""

import hashlib
import io
import os
import re
import zipfile
from contextlib import contextmanager, nullcontext
from functools import partial

from utils.cli import UserError

from .arrays import Preparation
from .images import BROKEN, MENDED, load_crop, write_split

MISSING = """celeba32: {} not found. The set needs
  {base}/img_align_celeba.zip  (MD5 00d2c5bc6d35e252742224ab0c1e8fcb; read as it is, no need to unpack)
    or the unpacked images {base}/img_align_celeba/000001.jpg to 202599.jpg
  {base}/list_eval_partition.txt  (MD5 d32c9cbf5e040fd4025c592c306e6668)
    or Kaggle's {base}/list_eval_partition.csv, or all in Kaggle's {base}/archive.zip
Both are on http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html ("Align&Cropped Images", "Train/Val/Test Partitions") and,
as named in torchvision, on Google Drive: img_align_celeba.zip has the id 0B7EVK8r0v71pZjFTYXZWM3FlRnM,
list_eval_partition.txt the id 0B7EVK8r0v71pY0NSMzRuSXJEVkk."""
LISTS = "list_eval_partition.txt", "list_eval_partition.csv"
LARGEST = 10**6  # bytes of an image; those of CelebA have up to some 30,000
DAMAGED = *BROKEN, zipfile.BadZipFile


def prepare(data_path, nchannels, L):
    """The Preparation of celeba32, from files in `data_path`/celeba, as torchvision has them, or `data_path` itself."""
    bases = [data_path / each for each in ("celeba", "celeba/archive", "", "archive")]  # unpacked archive.zip

    def first(*patterns):
        return next((path for base in bases for pattern in patterns for path in base.glob(pattern)), None)

    partition = first(*LISTS)
    archive = first("img_align_celeba.zip", "archive*.zip", "celeba*.zip")  # Kaggle's site, Kaggle's command
    jpeg = first("img_align_celeba/img_align_celeba/*.jpg", "img_align_celeba/*.jpg", "*.jpg")  # the first is Kaggle's
    complete = partition and (jpeg or archive)
    source = {"partition": hashlib.sha256(partition.read_bytes()).hexdigest()} if complete else None
    recipe = {"name": "celeba32", "version": 1, "nchannels": 3, "L": 32, "crop": 148, "filter": "bicubic"}
    return Preparation(recipe, source, partial(_build, bases[0], partition, jpeg and jpeg.parent, archive))


def _build(base, partition, images, archive, folder):
    content, mended = partition and partition.read_bytes(), []
    if partition:
        _refuse_web_page(partition)
    elif archive:
        with _whole(archive), zipfile.ZipFile(archive) as zipped:
            inside = next((path for path in zipped.namelist() if path.rpartition("/")[2] in LISTS), None)
            if inside:
                with zipped.open(inside) as file:
                    partition, content = archive / inside, file.read(100 * LARGEST)
    lacking = ["the images"] * (not images and not archive) + ["the list of the splits"] * (not partition)
    if lacking:
        raise UserError(MISSING.format(" and ".join(lacking), base=base))
    train, test = _read_partition(partition, content)
    wanted = train + test
    entries, zipped, place = dict.fromkeys(os.listdir(images)) if images else {}, None, images
    if archive and not all(name in entries for name in wanted):  # no folder, or one that was unpacked in part
        with _whole(archive):
            zipped, place = zipfile.ZipFile(archive), archive
        entries = {path.rpartition("/")[2]: path for path in zipped.namelist()}

    def load(name):
        try:
            with zipped.open(entries[name]) if zipped else open(images / name, "rb") as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            return load_crop(io.BytesIO(content), 148, mended=lambda: mended.append(name))
        except DAMAGED as error:
            raise UserError(f"{place / name}: not a readable image of CelebA, fetch it again ({error})") from error

    with zipped or nullcontext():
        absent = [name for name in wanted if name not in entries]
        if absent:
            count = f"{len(absent)} of {len(wanted)} images"
            raise UserError(f"{place}: {count} that {partition} lists are missing, such as {absent[0]}")
        for split, names in (("train", train), ("test", test)):
            write_split(folder / f"{split}.npy", load, names, (3, 32, 32), f"celeba32 {split}")
    return [f"{place}: {MENDED.format(len(mended), len(wanted))}, such as {min(mended)}"] if mended else []


@contextmanager
def _whole(archive):
    """Turns the errors of a damaged archive into a UserError."""
    _refuse_web_page(archive)
    try:
        yield
    except DAMAGED as error:
        raise UserError(f"{archive}: cut short or damaged, fetch it again ({error})") from error


def _read_partition(path, content):
    """The names of the training (0) and test (2) images, in the order of the list. Raises UserError."""
    train, test = [], []
    parts = {"0": train, "1": [], "2": test}
    for number, line in enumerate(content.decode("utf-8-sig", "replace").splitlines(), 1):
        fields = re.sub('[,;"]', " ", line).split()
        if fields in ([], ["image_id", "partition"]):  # the second is the first line of Kaggle's CSV
            continue
        if len(fields) != 2 or fields[1] not in parts or "/" in fields[0]:
            raise UserError(f"{path}: line {number} is {line[:80]!r}, expected an image's name and 0, 1 or 2")
        parts[fields[1]].append(fields[0])
    if not train or not test:
        raise UserError(f"{path}: no {'test' if train else 'train'} images listed, the file is cut short")
    return train, test


def _refuse_web_page(path):
    with open(path, "rb") as file:
        if file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # the first three: a byte order mark
            raise UserError(f"{path}: a web page, such as Google Drive's quota notice, not the file; fetch it again")
