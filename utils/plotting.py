"""Figures: one style, written as PNG and PDF."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .files import replacing

LABEL_WIDTH, LABEL_SIZE = 0.8, 7  # inches, points


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


def grid_figure(images, ncols, width=3.4, labels=()):
    """A figure of a grid of images, `width` inches wide (one column of a paper), with `labels` left of its rows."""
    grid = image_grid(images, ncols)
    margin = LABEL_WIDTH if labels else 0
    height = (width - margin) * grid.shape[0] / grid.shape[1]
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((margin / width, 0, 1 - margin / width, 1))
    axes.imshow(grid, interpolation="nearest")
    axes.set_axis_off()
    for row, label in enumerate(labels):
        y = 1 - (row + 0.5) / len(labels)
        figure.text((margin - 0.05) / width, y, label, ha="right", va="center", fontsize=LABEL_SIZE)
    return figure


def save_figure(figure, path, endings=(".png", ".pdf")):
    """Write a figure to `path` plus each ending; returns the paths."""
    paths = [Path(f"{path}{ending}") for ending in endings]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for each in paths:
        with replacing(each) as file:
            figure.savefig(file, format=each.suffix[1:], dpi=300)
    return paths
