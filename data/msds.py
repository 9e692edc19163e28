"""Multi-scale data sets MSDS1 and MSDS2 (Appendix B): 4 x 4 coloured ovals on black, 32 x 32, drawn with Pillow.

The ovals of an MSDS1 image share a base colour, those of an MSDS2 image a base angle; the rest varies freely. An image
is a function of (seed, variant, index) alone. Nothing here imports torch, so that worker processes start fast.
"""

import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from multiprocessing import get_context
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from utils.cli import UserError

from .arrays import Preparation, cpu_count

VARIANTS = {"msds1": 1, "msds2": 2}
SIZES = 90_000, 10_000  # train, test
CHUNK = 500  # images per task of a worker process
CORNERS = [(8 * i, 8 * j) for i in range(4) for j in range(4)]  # x, y of the tiles, columns first: the drawing order


def prepare(variant, data_path, nchannels, L):
    """The Preparation of MSDS1 (variant 1) or MSDS2 (variant 2), with seed 0. Labels, as `draw_image` gives them, lie
    beside the images: `{split}_ovals.npy`, `{split}_base.npy`."""
    name, (train, test) = f"msds{variant}", SIZES
    recipe = {"name": name, "version": 1, "nchannels": 3, "L": 32, "seed": 0, "train": train, "test": test}
    return Preparation(recipe, None, partial(_build, variant, train, test))


def draw_image(variant, rng):
    """One image of MSDS1 or MSDS2 (variant 1 or 2) with numpy's Generator `rng`: image, ovals, base.

    image: uint8 (3, 32, 32)
    ovals: float32 (16, 6), in the order of drawing (columns, then rows): x, y, angle, r, g, b, where x, y is the
        corner of the oval's 8 x 8 tile and the angle is anticlockwise in degrees
    base: float32, the base colour (3,) of MSDS1 or the base angle (1,) of MSDS2. Raises ValueError for another variant.
    """
    if variant not in (1, 2):
        raise ValueError(f"variant {variant}: must be 1 or 2")
    corners = CORNERS + rng.integers(-1, 2, (16, 2))
    if variant == 1:
        base = rng.integers(32, 224, 3)
        colours = base + rng.integers(-32, 33, (16, 3))
        angles = rng.uniform(0, 180, (16, 1))
    else:
        base = rng.uniform(0, 180, 1)
        colours = rng.integers(0, 256, (16, 3))
        angles = base + rng.uniform(0, 45, (16, 1))
    ovals = np.concatenate([corners, angles, colours], 1).astype(np.float32)
    return draw_ovals(ovals), ovals, base.astype(np.float32)


def draw_ovals(ovals):
    """The uint8 image (3, 32, 32) of ovals (n, 6), as `draw_image` gives them, later ones over earlier ones."""
    image = Image.new("RGB", (32, 32))
    for x, y, angle, r, g, b in ovals.tolist():  # the float32 angle, so that the label is what was drawn
        tile = Image.new("RGBa", (8, 8))  # premultiplied, as Pillow rotates; a fifth faster than going there and back
        tile.paste((int(r), int(g), int(b), 255), mask=_ellipse())
        tile = tile.rotate(angle, Image.Resampling.BICUBIC).convert("RGBA")
        image.paste(tile, (int(x), int(y)), mask=tile)
    return np.asarray(image).transpose(2, 0, 1)


def factors(variant, ovals, base):
    """What varies in images with labels as `draw_image` gives them, ovals (N, 16, 6) and base (N, 3) or (N, 1).

    By name: the global factor, (N, D), and what is local to each oval, (N, 16, D), with angles a as (cos 2a, sin 2a).
    MSDS1: `global` base colour; `local` the oval's angle; `deviation` its colour minus the base colour
    MSDS2: `global` mean angle of ovals, 22.5 degrees from the base angle; `local` the oval's colour; `deviation` its
        angle minus the base angle
    """
    angles, colours = ovals[:, :, 2], ovals[:, :, 3:]
    if variant == 1:
        return {"global": base, "local": doubled(angles), "deviation": colours - base[:, None]}
    return {"global": doubled(base[:, 0] + 22.5), "local": colours, "deviation": (angles - base)[:, :, None]}


def read_labels(folder, split, number):
    """Ovals and base of the first `number` images of a split, "train" or "test", from the folder of a prepared set."""
    return [np.load(folder / f"{split}_{kind}.npy", mmap_mode="c")[:number] for kind in ("ovals", "base")]


def doubled(degrees):
    """(cos 2a, sin 2a) of angles, which have period 180."""
    return np.stack((np.cos(np.radians(2 * degrees)), np.sin(np.radians(2 * degrees))), -1)


def generate(variant, seed, start, stop, processes=None):
    """Images start … stop - 1 of the endless sequence that (variant, seed) determines: images, ovals, base, as
    `draw_image` gives each one, with N in front. Raises UserError if a worker process dies.

    processes: None for one per available processor
    """
    tasks = [(variant, seed, first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK)]
    processes = min(processes or cpu_count(), len(tasks))
    parts = _parallel(tasks, processes) if processes > 1 else (_draw_range(*task) for task in tasks)
    bar = tqdm(parts, f"msds{variant}", len(tasks), unit="img", unit_scale=CHUNK, disable=None)
    return tuple(map(np.concatenate, zip(*bar, strict=True)))


@cache
def _ellipse():
    mask = Image.new("1", (8, 8))
    ImageDraw.Draw(mask).ellipse((1, 3, 7, 5), fill=1)
    return mask


def _build(variant, train, test, folder):
    arrays = generate(variant, 0, 0, train + test)
    for array, kind in zip(arrays, ("", "_ovals", "_base"), strict=True):
        np.save(folder / f"train{kind}.npy", array[:train])
        np.save(folder / f"test{kind}.npy", array[train:])
    return []


def _draw_range(variant, seed, start, stop):
    generators = (np.random.default_rng([seed, variant, index]) for index in range(start, stop))
    return tuple(map(np.stack, zip(*(draw_image(variant, each) for each in generators), strict=True)))


def _parallel(tasks, processes):
    # "spawn", because forking is not safe once torch has started threads, and is missing on Windows.
    ignored = signal.SIGINT, signal.SIG_IGN  # Ctrl-C is for the parent
    with ProcessPoolExecutor(processes, get_context("spawn"), signal.signal, ignored) as pool:
        main = sys.modules["__main__"]
        try:
            # A spawned process imports the parent's main module again, which may be slow (torch), without an
            # `if __name__` guard, or no file at all. It needs nothing of it: show it an empty one.
            sys.modules["__main__"] = ModuleType("__main__")
            parts = pool.map(_draw_range, *zip(*tasks, strict=True))
            sys.modules["__main__"] = main
            yield from parts
        except BrokenProcessPool as error:
            raise UserError(f"msds{tasks[0][0]}: a worker process died while drawing, perhaps out of memory") from error
        finally:
            sys.modules["__main__"] = main
            pool.shutdown(cancel_futures=True)
