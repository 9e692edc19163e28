"""Figures: one style, written as PNG and PDF."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .files import replacing

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # told apart by colour-blind readers too


def style():
    """A context for figures with axes: text as small, and lines as thin, as a paper's."""
    thin = {f"{name}.width": 0.5 for name in ("xtick.major", "ytick.major")}
    return matplotlib.rc_context(
        {"font.size": 7, "axes.titlesize": 7, "axes.linewidth": 0.5, "pdf.fonttype": 42, **thin}
    )


def image_grid(images, ncols):
    """Images (N, C, L, L) in [0, 1], C = 1 drawn grey or 3, as one array (H, W, 3) with a white line between them."""
    images = np.asarray(images).transpose(0, 2, 3, 1)  # (N, L, L, C)
    N, L = images.shape[:2]
    nrows, gap = -(-N // ncols), max(1, L // 16)
    grid = np.ones((nrows * (L + gap) - gap, ncols * (L + gap) - gap, 3))
    for n, image in enumerate(images):
        i, j = divmod(n, ncols)
        grid[i * (L + gap) : i * (L + gap) + L, j * (L + gap) : j * (L + gap) + L] = image
    return grid


def grid_figure(images, ncols, width=3.4):
    """A figure, `width` inches wide (one column of a paper), of a grid of images."""
    grid = image_grid(images, ncols)
    figure = Figure(figsize=(width, width * grid.shape[0] / grid.shape[1]))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid, interpolation="nearest")
    axes.set_axis_off()
    return figure


def save_figure(figure, path, endings=(".png", ".pdf")):
    """Write a figure to `path` plus each ending; returns the paths."""
    paths = [Path(f"{path}{ending}") for ending in endings]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for each in paths:
        with replacing(each) as file:
            figure.savefig(file, format=each.suffix[1:], dpi=300)
    return paths
