"""Any folder of images as a data set (`--data folder --data_path DIR`).

Folders for training and test inside, known by words of their names, are the splits. Without both, an image is a test
image if the first eight bytes of the SHA-256 of its relative path, as an integer, are a multiple of 10: one in ten.
"""

import hashlib
import os
import re
from collections import defaultdict
from functools import partial

from utils.cli import UserError, file_name

from .arrays import FOLDER, SPLITS, Preparation
from .images import BROKEN, MENDED, LeftOut, load_image, resize, write_split

WORDS = {"train": "train.*|trn", "test": "test.*|tst|holdout|heldout", "validation": "val|valid.*|dev|eval.*"}
LEFT = {"validation": "for validation", None: "in no such folder"}  # beside the two


def prepare(data_path, nchannels, L):
    """The Preparation of the images below `data_path`, at any depth, without hidden files and what runs wrote; `resize`
    makes them square. Raises UserError for a `data_path` that is no folder, nchannels other than 1 or 3, L below 1."""
    if nchannels not in (1, 3):
        raise UserError(f"--nchannels {nchannels}: must be 1 (grey) or 3 (RGB) for a folder of images")
    if L < 1:
        raise UserError(f"--L {L}: must be at least 1")
    if not data_path.is_dir():
        raise UserError(f"--data_path {data_path}: not a folder")
    files = sorted(_list(data_path, "", ()))
    listing = "".join(f"{name}\0{size}\0{time}\0" for name, size, time in files)
    source = {"listing": hashlib.sha256(os.fsencode(listing)).hexdigest()} if files else None
    real = os.path.realpath(data_path)
    own_name = f"folder_{file_name(os.path.basename(real))}_{hashlib.sha256(os.fsencode(real)).hexdigest()[:8]}"
    recipe = {"name": "folder", "version": 1, "nchannels": nchannels, "L": L, "filter": "bicubic"}
    build = partial(_build, data_path, [name for name, *_ in files], nchannels, L)
    return Preparation(recipe, source, build, own_name=own_name)


def _list(folder, prefix, parents):
    """Yield (path below data_path, size, time of change) of every file. A link back to a parent is not followed."""
    real = os.path.realpath(folder)
    if real in parents:
        return
    with os.scandir(folder) as entries:
        entries = {entry.name: entry for entry in entries}
        run = any(re.fullmatch(r"out.*\.lock", name) and f"{name[:-5]}_save" in entries for name in entries)
        if run or {"fingerprint.json", *SPLITS} <= entries.keys():  # of this program
            return
        for entry in entries.values():
            if entry.name.startswith(".") or entry.name == FOLDER:
                continue
            if entry.is_dir():
                yield from _list(entry.path, f"{prefix}{entry.name}/", (*parents, real))
            elif entry.is_file():
                yield f"{prefix}{entry.name}", entry.stat().st_size, entry.stat().st_mtime_ns
            elif entry.is_symlink() and not os.path.exists(entry.path):
                yield f"{prefix}{entry.name}", 0, 0  # broken link: to be named among the skipped


def _role(name):
    """The split that a folder on the path is for: "train", "test", "validation" or None."""
    words = re.split(r"[\W\d_]+|(?<=[a-z])(?=[A-Z])", name.rpartition("/")[0])
    roles = (role for word in words for role in WORDS if re.fullmatch(WORDS[role], word.casefold()))
    return next(roles, None)


def _build(root, names, nchannels, L, folder):
    found = defaultdict(list)

    def load(name):
        try:
            image = load_image(root / name, nchannels, mended=lambda: found[MENDED].append(name), own=False)
            return resize(image, L)
        except BROKEN as error:
            reason = error if isinstance(error, LeftOut) else "no readable images"
            found[f"skipped {{}} of {{}} files, {reason}"].append(name)

    if not names:
        raise UserError(f"--data_path {root}: holds no files, must be a folder of images")
    roles, way = [_role(name) for name in names], "the names of folders"
    plain = [split for split in ("train", "test") if (root / split).is_dir()]
    kinds = {*roles, *plain}
    if len(plain) == 2:  # then no other folder is meant, such as train_masks
        roles = [first if first in plain else None for first in (name.partition("/")[0] for name in names)]
    elif {"train", "validation"} <= kinds and "test" not in kinds:
        roles, way = ["test" if role == "validation" else role for role in roles], f"{way}, for validation as for test"
    elif not {"train", "test"} <= kinds:
        numbers = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") for name in names]
        roles = ["train" if number % 10 else "test" for number in numbers]
        missing = " and ".join(split for split in ("train", "test") if split not in kinds)
        way = f"a hash of the path, for want of folders for {missing}"
    counts, warnings = {}, []
    for split in ("train", "test"):
        part = [name for name, role in zip(names, roles, strict=True) if role == split]
        counts[split] = write_split(folder / f"{split}.npy", load, part, (nchannels, L, L), f"folder {split}")
    for kind, listed in found.items():
        shown = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in sorted(listed)[:10]]
        more = f" and {len(listed) - 10} more" if len(listed) > 10 else ""
        warnings.append(f"{kind.format(len(listed), len(names))}: {', '.join(shown)}{more}")
    for split, count in counts.items():
        if not count:
            rule = f"no image for the {split} split among its {len(names)} files, make folders train/ and test/ there"
            raise UserError(f"--data_path {root}: {'; '.join([rule, *warnings])}")
    if {name.partition("/")[0] for name in names} != {"train", "test"}:
        left = [f"; left out: {roles.count(role)} files {LEFT[role]}" for role in LEFT if role in roles]
        warnings.append("{train:,} training and {test:,} test images, by ".format(**counts) + way + "".join(left))
    return [f"{root}: {warning}" for warning in warnings]
