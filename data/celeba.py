"""CelebA, aligned (section 4.1), here `celeba32`: centre crop 148, resized to 32, the official training and test split.

Needs the images, as a folder or as the archive of the authors' site, and the list of the splits, nothing else. Images
keep the order of that list; its validation part is left out.
"""

import hashlib
import io
import os
import zipfile
from functools import partial

from PIL import Image

from utils.cli import UserError

from .arrays import Preparation, write_rows
from .images import BROKEN, centre_crop, decode, resize, to_channels

MISSING = """celeba32: {} missing. The set needs
  {base}/img_align_celeba.zip  (MD5 00d2c5bc6d35e252742224ab0c1e8fcb; read as it is, no need to unpack)
    or the unpacked images {base}/img_align_celeba/000001.jpg to 202599.jpg
  {base}/list_eval_partition.txt  (MD5 d32c9cbf5e040fd4025c592c306e6668)
    or Kaggle's {base}/list_eval_partition.csv
Both are on http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html ("Align&Cropped Images", "Train/Val/Test Partitions") and,
as named in torchvision, on Google Drive: img_align_celeba.zip has the id 0B7EVK8r0v71pZjFTYXZWM3FlRnM,
list_eval_partition.txt the id 0B7EVK8r0v71pY0NSMzRuSXJEVkk."""


LARGEST = 10**6  # bytes of an image; those of CelebA have up to some 30,000


def prepare(data_path, nchannels, L):
    """The Preparation of celeba32, from files in `data_path`/celeba, as torchvision has them, or `data_path` itself."""
    bases = [data_path / "celeba", data_path]
    inner = ["img_align_celeba/img_align_celeba", "img_align_celeba", "."]  # the first is Kaggle's
    partition = _first(base / f"list_eval_partition.{kind}" for base in bases for kind in ("txt", "csv"))
    archive = _first(base / "img_align_celeba.zip" for base in bases)
    images = next((path for base in bases for path in map(base.joinpath, inner) if _holds_jpegs(path)), None)
    source = None
    if partition and (images or archive):
        source = {"partition": hashlib.sha256(partition.read_bytes()).hexdigest()}
    recipe = {"name": "celeba32", "version": 1, "nchannels": 3, "L": 32, "crop": 148, "filter": "bicubic"}
    return Preparation(recipe, source, partial(_build, bases[0], partition, images, archive))


def _first(paths):
    return next((path for path in paths if path.is_file()), None)


def _holds_jpegs(path):
    if not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return any(entry.name.endswith(".jpg") for entry in entries)


def _build(base, partition, images, archive, folder, progress):
    lacking = ["the images"] * (not images and not archive) + ["the list of the splits"] * (not partition)
    if lacking:
        raise UserError(
            MISSING.format(" and ".join(lacking) + (" are" if lacking[0] == "the images" else " is"), base=base)
        )
    splits = _read_partition(partition)
    wanted = splits["train"] + splits["test"]

    entries = dict.fromkeys(os.listdir(images)) if images else {}
    zipped = None
    if archive and not all(name in entries for name in wanted):  # no folder, or one that was unpacked in part
        _refuse_web_page(archive)
        try:
            zipped = zipfile.ZipFile(archive)
        except (*BROKEN, zipfile.BadZipFile) as error:
            raise UserError(f"{archive}: cut short or damaged, fetch it again ({error})") from error
        outside = [path for path in zipped.namelist() if path.startswith("/") or ".." in path.split("/")]
        if outside:
            raise UserError(f"{archive}: its member {outside[0][:80]!r} leads out of a folder, fetch it again")
        entries = {path.rpartition("/")[2]: path for path in zipped.namelist()}
    place = archive if zipped else images
    absent = [name for name in wanted if name not in entries]
    if absent:
        raise UserError(
            f"{place}: {len(absent)} of {len(wanted)} images that {partition} lists are missing, such as {absent[0]}"
        )

    def load(name):
        try:
            with zipped.open(entries[name]) if zipped else open(images / name, "rb") as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ValueError(f"more than {LARGEST:,} bytes")
            with Image.open(io.BytesIO(content)) as image:
                return resize(to_channels(centre_crop(image, 148), 3), 32)
        except (*BROKEN, zipfile.BadZipFile) as error:
            raise UserError(f"{place / name}: not a readable image of CelebA, fetch it again ({error})") from error

    for split, names in splits.items():
        write_rows(folder / f"{split}.npy", decode(load, names, f"celeba32 {split}", progress), (3, 32, 32))
    return []


def _read_partition(path):
    """The names of the training (0) and test (2) images, in the order of the list. Raises UserError."""
    _refuse_web_page(path)
    parts = {"0": [], "1": [], "2": []}
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        fields = line.replace(",", " ").split()
        if fields in ([], ["image_id", "partition"]):  # the second is the first line of Kaggle's CSV
            continue
        if len(fields) != 2 or fields[1] not in parts or "/" in fields[0]:
            raise UserError(f"{path}: line {number} is {line[:80]!r}, expected an image's name and 0, 1 or 2")
        parts[fields[1]].append(fields[0])
    for split, part in (("training", "0"), ("test", "2")):
        if not parts[part]:
            raise UserError(f"{path}: no {split} images ({part}) listed, the file is cut short")
    return {"train": parts["0"], "test": parts["2"]}


def _refuse_web_page(path):
    with open(path, "rb") as file:
        if file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):  # the first three: a byte order mark
            raise UserError(
                f"{path}: a web page, such as Google Drive's quota notice, saved in place of the file; fetch it again"
            )
