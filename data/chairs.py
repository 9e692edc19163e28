"""3D Chairs (Appendix G), here `chair600`: 86,366 renderings of 600 x 600, as unpacked from the authors' archive.

Sorted by path, centre crop 300, resized to 32, split 77,730 to 8,636 by a permutation with seed 0. Renderings are
split, so both splits show the same chairs.
"""

import hashlib
from functools import partial

import numpy as np

from utils.cli import UserError

from .arrays import Preparation
from .images import BROKEN, load_crop, write_split

MISSING = """{}: no renderings there. The chair600 set needs
  {}/<chair>/renders/*.png  (86,366 images)
Fetch https://www.di.ens.fr/willow/research/seeing3Dchairs/data/rendered_chairs.tar and unpack it in {}."""


def prepare(data_path, nchannels, L):
    """The Preparation of chair600."""
    root = data_path / "rendered_chairs"
    names = sorted(path.relative_to(root).as_posix() for path in root.glob("*/renders/*.png"))
    source = {"listing": hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()}
    recipe = {"name": "chair600", "version": 1, "nchannels": 3, "L": 32, "crop": 300, "filter": "bicubic", "seed": 0}
    return Preparation(recipe, source if names else None, partial(_build, root, names))


def _build(root, names, folder):
    if not names:
        raise UserError(MISSING.format(root, root, root.parent))

    def load(name):
        try:
            return load_crop(root / name, 300)
        except BROKEN as error:
            raise UserError(f"{root / name}: not a readable rendering ({error})") from error

    order = np.random.default_rng(0).permutation(len(names))
    parts = np.split(order, [len(names) * 77_730 // 86_366])
    for split, part in zip(("train", "test"), parts, strict=True):
        paths = [names[k] for k in np.sort(part)]
        write_split(folder / f"{split}.npy", load, paths, (3, 32, 32), f"chair600 {split}")
    return []
