"""Any folder of images as a data set (`--data folder --data_path DIR`).

Folders `train/` and `test/` inside are the splits. Without them, an image is a test image if the first eight bytes of
the SHA-256 of its relative path, as an integer, are a multiple of 10: about one in ten.
"""

import hashlib
import os
from functools import partial

from utils.cli import UserError

from .arrays import FOLDER, Preparation
from .images import BROKEN, load_image, resize, write_split


def prepare(data_path, nchannels, L):
    """The Preparation of the images below `data_path`, at any depth, hidden ones left out; `resize` makes them square.
    Raises UserError for a `data_path` that is no folder, nchannels other than 1 or 3, L below 1."""
    if nchannels not in (1, 3):
        raise UserError(f"--nchannels {nchannels}: must be 1 (grey) or 3 (RGB) for a folder of images")
    if L < 1:
        raise UserError(f"--L {L}: must be at least 1")
    if not data_path.is_dir():
        raise UserError(f"--data_path {data_path}: not a folder")
    files = sorted(_list(data_path, "", ()))
    listing = "".join(f"{name}\0{size}\0{time}\0" for name, size, time in files)
    source = {"listing": hashlib.sha256(os.fsencode(listing)).hexdigest()} if files else None
    recipe = {"name": "folder", "version": 1, "nchannels": nchannels, "L": L, "filter": "bicubic"}
    return Preparation(recipe, source, partial(_build, data_path, [name for name, *_ in files], nchannels, L))


def _list(folder, prefix, parents):
    """Yield (path below data_path, size, time of change) of every file. A link back to a parent is not followed."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == FOLDER:
                continue
            if entry.is_dir():
                yield from _list(entry.path, f"{prefix}{entry.name}/", (*parents, real))
            elif entry.is_file():
                yield f"{prefix}{entry.name}", entry.stat().st_size, entry.stat().st_mtime_ns
            elif entry.is_symlink() and not os.path.exists(entry.path):
                yield f"{prefix}{entry.name}", 0, 0  # broken link: to be named among the skipped


def _build(root, names, nchannels, L, folder):
    skipped, warnings = [], []

    def load(name):
        try:
            return resize(load_image(root / name, nchannels), L)
        except BROKEN:
            skipped.append(name)

    folders = [split for split in ("train", "test") if (root / split).is_dir()]
    splits = {"train": [], "test": []}
    for name in names:
        number = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
        split = name.partition("/")[0] if len(folders) == 2 else "train" if number % 10 else "test"
        splits.get(split, []).append(name)  # beside the two folders: left out
    if len(folders) == 1:
        warnings.append(f"{root}: only {folders[0]}/ is there, so all images are split 90/10 by a hash of the path")

    if not names:
        raise UserError(f"--data_path {root}: holds no files, must be a folder of images")
    for split, part in splits.items():
        if not write_split(folder / f"{split}.npy", load, part, (nchannels, L, L), f"folder {split}"):
            rule = f"no image for the {split} split among its {len(names)} files, make folders train/ and test/ there"
            raise UserError(f"--data_path {root}: {rule}")
    if skipped:
        shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in sorted(skipped)[:10]]
        listed = ", ".join(shown) + (f" and {len(skipped) - 10} more" if len(skipped) > 10 else "")
        warnings.append(f"{root}: skipped {len(skipped)} of {len(names)} files, no readable images: {listed}")
    return warnings
