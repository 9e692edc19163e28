"""Figures: one style, written as PNG and PDF."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .files import replacing

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # told apart by colour-blind readers too
COLUMN, PAGE = 3.4, 7.0  # inches: widths of one column and of a page of a paper
FONT_SIZE = 7  # points
ROW_LABEL, COLUMN_LABEL = 0.55, 0.16  # inches


def style():
    """A context for figures with axes: text as small, and lines as thin, as a paper's."""
    thin = {f"{name}.width": 0.5 for name in ("xtick.major", "ytick.major")}
    sizes = {"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE, "axes.linewidth": 0.5, "pdf.fonttype": 42}
    return matplotlib.rc_context({**sizes, **thin})


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


def grid_figure(images, ncols, width=COLUMN, rows=(), columns=(), row_label=ROW_LABEL):
    """A figure of a grid of images, `width` inches wide.

    rows, columns: labels to the left of the rows and above the columns, none if empty
    row_label: inches that the labels of rows take
    """
    grid = image_grid(images, ncols)
    left, top = row_label if rows else 0, COLUMN_LABEL if columns else 0
    panel = (width - left) * grid.shape[0] / grid.shape[1]  # height
    height = panel + top
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, 0, 1 - left / width, panel / height))
    axes.imshow(grid, interpolation="nearest")
    axes.set_axis_off()
    for k, label in enumerate(rows):
        y = (1 - (k + 0.5) / len(rows)) * panel / height
        figure.text((left - 0.05) / width, y, label, ha="right", va="center", fontsize=FONT_SIZE)
    for k, label in enumerate(columns):
        x = (left + (k + 0.5) / len(columns) * (width - left)) / width
        figure.text(x, 1 - top / height / 2, label, ha="center", va="center", fontsize=FONT_SIZE)
    return figure


def save_figure(figure, path, endings=(".png", ".pdf")):
    """Write a figure to `path` plus each ending; returns the paths."""
    paths = [Path(f"{path}{ending}") for ending in endings]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for each in paths:
        with replacing(each) as file:
            figure.savefig(file, format=each.suffix[1:], dpi=300)
    return paths
