"""Scores of how far images have the structure of MSDS1 or MSDS2 (Appendix B), from the pixels alone.

The oval of an 8 x 8 cell is the best match, in squared error, of a colour times one of the grey ovals drawn at each
angle and shift of the data sets. These overshoot like the data, by the same bicubic rotation, so the colour is that of
the fill. Ovals reach into other cells, so a second pass matches each cell without its neighbours of the first pass.

The spread S of a factor is the root-mean-square distance of an image's ovals from their mean. The factor is what all
ovals of an image share: colour (MSDS1), or orientation (MSDS2) as (cos 2a, sin 2a). S_shuffled is the spread of 16
ovals from 16 different images of the scored set:

    score = (S_shuffled - S) / (S_shuffled - S_real):    1 for real images, 0 for independent ovals.
"""

from functools import cache

import numpy as np

from .msds import doubled, draw_ovals

ANGLES = np.arange(0, 226, 3)  # degrees; the centre of a turned ellipse moves, so a and a + 180 are two drawings
SHIFTS = (-1, 0, 1)  # pixels
MARGIN = 1  # pixels of the neighbours around a cell that are looked at
WINDOW = 8 + 2 * MARGIN
CHUNK = 200  # images at a time: 25 MB of intermediate results
MIN_LEVEL = 16  # of the brightest channel; darker ovals are not counted
MIN_EXPLAINED = 0.5  # share of the window's squared values; of 999 in 1,000 real ovals more than 0.8
MIN_SHARE = 0.5  # of the real images' share of cells with an oval; below, there is no score
MIN_VARIANCE = 0.5  # of the real images' variance of the factor over the whole set; below, there is no score


def structure_scores(images, variant, real_images):
    """How far `images` have the structure of `real_images`, those of MSDS1 or MSDS2 (variant 1 or 2); a dict.

    images, real_images: uint8 (N, 3, 32, 32), at least 2
    score: see above, over cells with an oval; None for a set with hardly any ovals or whose factor varies little, as in
    a collapsed one; failure: then says so, a sentence
    share, share_real: of cells with an oval
    spread, spread_real, spread_shuffled: S, in levels of colour (distance in RGB) or as length in (cos 2a, sin 2a)
    between: standard deviation of the global factor between images, relative to that of the real ones
    Raises ValueError for another variant, type or shape. A few images, repeated, can score high; FID sees those.
    """
    if variant not in (1, 2):
        raise ValueError(f"variant {variant}: must be 1 or 2")
    readings = [find_ovals(each) for each in (images, real_images)]
    (factor, found), real = ((colours if variant == 1 else doubled(a), ovals) for colours, a, ovals in readings)
    order = np.random.default_rng(0).permuted(np.tile(np.arange(len(found)), (16, 1)), axis=1).T, np.arange(16)
    (within, between), (within_shuffled, _) = variances(factor, found), variances(factor[order], found[order])
    within_real, between_real = variances(*real)
    share, share_real = found.mean(), real[1].mean()
    spread, spread_real, spread_shuffled = np.sqrt([within, within_real, within_shuffled])
    failure, score, whole = None, None, (within + between) / (within_real + between_real)
    if share < MIN_SHARE * share_real:
        failure = f"ovals in {share:.1%} of the cells only, in real images in {share_real:.1%}"
    elif whole < MIN_VARIANCE:
        name = ("colour", "orientation")[variant - 1]
        failure = f"the {name} of all ovals of the set varies little: {whole:.1%} of the variance in real images"
    else:
        score = (spread_shuffled - spread) / (spread_shuffled - spread_real)
    numbers = {"score": score, "share": share, "share_real": share_real, "spread": spread, "spread_real": spread_real}
    numbers |= {"spread_shuffled": spread_shuffled, "between": np.sqrt(max(between, 0) / between_real)}
    numbers = {name: None if each is None or not np.isfinite(each) else float(each) for name, each in numbers.items()}
    return {"score": numbers["score"], "failure": failure, **numbers}


def calibration(images, ovals):
    """How well `find_ovals` measures drawn images, uint8 (N, 3, 32, 32), with labels (N, 16, 6); a dict.

    share: of cells with an oval that was found; over these, degrees: root-mean-square error of the orientation
    levels, levels_bias: root-mean-square and mean error of a colour channel, in 0 … 255
    """
    colours, angles, found = find_ovals(images)
    turn = (angles - ovals[:, :, 2] + 90) % 180 - 90
    error = (colours - ovals[:, :, 3:])[found]
    degrees, levels = (float(np.sqrt(np.square(each).mean())) for each in (turn[found], error))
    return {"share": float(found.mean()), "degrees": degrees, "levels": levels, "levels_bias": float(error.mean())}


def find_ovals(images):
    """The oval of each cell of images, uint8 (N, 3, 32, 32), cells in the order of drawing (columns, then rows).

    Returns colours (N, 16, 3) in 0 … 255, angles (N, 16) in degrees, anticlockwise, of period 180, and whether there is
    an oval (N, 16). Raises ValueError for another type or shape.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (3, 32, 32):
        raise ValueError(f"images {images.dtype} {images.shape}: must be uint8 (N, 3, 32, 32)")
    parts = [_find(images[start : start + CHUNK]) for start in range(0, len(images), CHUNK)]
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def variances(factor, found):
    """Variance of a factor (N, 16, D) within images, and of its mean between images, summed over D.

    Over the ovals found (N, 16), in images with at least two; NaN where there are too few. What the ovals of an image
    differ by makes its mean uncertain; that is subtracted from the variance between.
    """
    several = found.sum(1) >= 2
    factor, found = factor[several], found[several]
    if len(factor) < 2:
        return np.nan, np.nan
    n = found.sum(1)
    mean = (factor * found[:, :, None]).sum(1) / n[:, None]
    within = np.square((factor - mean[:, None]) * found[:, :, None]).sum() / (n - 1).sum()
    return within, mean.var(0, ddof=1).sum() - within * (1 / n).mean()


def _find(images):
    """`find_ovals` for a few images."""
    drawings, angles = _drawings()
    pixels = np.pad(images, ((0, 0), (0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN))).astype(np.float32)
    best, colours = _match(_windows(pixels), drawings)
    fits = colours[..., None] * drawings[best][:, :, None]
    windows = _windows(pixels - _assemble(fits)) + fits
    best, colours = _match(windows, drawings)
    rest = np.square(windows - colours[..., None] * drawings[best][:, :, None]).sum((2, 3))
    explained = rest <= (1 - MIN_EXPLAINED) * np.square(windows).sum((2, 3))
    return colours, angles[best] % 180, explained & (colours.max(2) >= MIN_LEVEL)


def _match(windows, drawings):
    """Windows (N, 16, 3, P) and drawings (T, P) -> the best drawing (N, 16) and its colour (N, 16, 3)."""
    products = np.maximum(windows @ drawings.T, 0)  # (N, 16, 3, T); a colour is not negative
    norms = np.square(drawings).sum(1)
    best = (np.square(products).sum(2) / norms).argmax(2)  # what a drawing takes from the squared error
    return best, np.take_along_axis(products, best[..., None, None], 3)[..., 0] / norms[best][..., None]


def _windows(pixels):
    """(N, 3, 34, 34) -> the window of each cell, flattened, (N, 16, 3, P)."""
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (WINDOW, WINDOW), (2, 3))[:, :, ::8, ::8]
    return windows.transpose(0, 3, 2, 1, 4, 5).reshape(len(pixels), 16, 3, WINDOW**2)


def _assemble(windows):
    """Windows (N, 16, 3, P), added up where they overlap, (N, 3, 34, 34)."""
    pixels = np.zeros((len(windows), 3, 32 + 2 * MARGIN, 32 + 2 * MARGIN), np.float32)
    for cell in range(16):
        x, y = 8 * (cell // 4), 8 * (cell % 4)
        pixels[:, :, y : y + WINDOW, x : x + WINDOW] += windows[:, cell].reshape(-1, 3, WINDOW, WINDOW)
    return pixels


@cache
def _drawings():
    """Drawings of white ovals, 1 where full, (T, P), and the angle of each (T,)."""
    grey = 128  # half of the range: what overshoots is not cut off
    ovals = np.array([[8 + x, 8 + y, angle, grey, grey, grey] for x in SHIFTS for y in SHIFTS for angle in ANGLES])
    pixels = np.stack([draw_ovals(oval[None])[0] for oval in ovals]).astype(np.float32) / grey
    cell = slice(8 - MARGIN, 16 + MARGIN)
    return pixels[:, cell, cell].reshape(len(ovals), -1), ovals[:, 2]
