"""Figures: one style, written as PNG and PDF, or one after the other as an animated GIF.

Matplotlib is imported here alone. Pictures are files, for which no backend is chosen.
"""

import io
import os
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .cli import UserError
from .files import replacing

new, backend = "matplotlib" not in sys.modules, os.environ.pop("MPLBACKEND", None)
import matplotlib  # would fail if MPLBACKEND names what is not installed, as in the scripts that a notebook starts
from matplotlib.cm import ScalarMappable
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator

if backend:
    os.environ["MPLBACKEND"] = backend
    with suppress(ValueError):
        matplotlib.rcParams.update({"backend": backend} if new else {})

# For the scripts, beside what follows.
__all__ = ["Figure", "Line2D", "LogLocator", "Patch", "Rectangle", "ScalarMappable", "to_rgb"]

NAME = "RG-Flow"  # a mark in every picture
METADATA = {".png": {"Software": NAME}, ".pdf": {"Creator": NAME, "Producer": NAME}}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")  # told apart by colour-blind readers too
COLOUR_MAP = "magma"  # of receptive fields
COLUMN, PAGE = 3.4, 7.0  # inches: widths of one column and of a page of a paper
FONT_SIZE = 7  # points
ROW_LABEL, COLUMN_LABEL = 0.55, 0.16  # inches
DPI = 300  # pixels per inch, or so: see `pixels_per_inch`
SCREEN_DPI, SCREEN = 150, 2.2  # of animations: pixels per inch, or so, and width in inches
LONGEST_EDGE, MOST_PIXELS = 2**16 - 1, 2**28  # of a picture


@contextmanager
def style():
    """A context, or decorator, for all that makes figures: text as small, and lines as thin, as a paper's; fonts as
    journals want them. It starts from Matplotlib's own settings, whatever those of the user are."""
    thin = dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.5)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.size": FONT_SIZE, "axes.titlesize": FONT_SIZE, "pdf.fonttype": 42, **thin})
        yield


class Pixels(AxesImage):
    """An image in axes of its own shape. Each pixel becomes a square of the picture, all of the same whole number of
    pixels: as many as fit, in the middle of the axes. Resampling would lose lines of one pixel."""

    def make_image(self, renderer, magnification=1.0, unsampled=False):
        box, image = self.axes.bbox, self.to_rgba(self._A, bytes=True)[::-1]
        sizes = box.size * magnification
        times = max(1, int(sizes[0] / image.shape[1] + 1e-3))
        image = image.repeat(times, 0).repeat(times, 1)
        corner = np.round(box.p0 * magnification + (sizes - image.shape[1::-1]) / 2 - 1e-3)
        return image, *(corner / magnification), None


def add_pixels(axes, image):
    """Draw an array (H, W, 3) in [0, 1] in axes as `Pixels`, with a unit per pixel and the origin above."""
    height, width, _ = image.shape
    drawn = axes.add_image(Pixels(axes, extent=(0, width, height, 0)))
    drawn.set_data(image)
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal")


def pixels_per_inch(figure, least=DPI):
    """`least` or so, with which the finest `Pixels` of a figure fill their axes; its edges become whole pixels. Raises
    UserError for a picture of too many."""
    sizes = [(each.get_array().shape[1], axes.bbox.width / figure.dpi) for axes in figure.axes for each in axes.images]
    if sizes:
        columns, inches = max(sizes, key=lambda size: size[0] / size[1])
        least = max(1, round(least * inches / columns)) * columns / inches
    edges = np.ceil(figure.get_size_inches() * least - 1e-3)
    if edges.max() > LONGEST_EDGE or edges.prod() > MOST_PIXELS:
        size, most = "{:.0f} x {:.0f}".format(*edges), f"{LONGEST_EDGE:,} along an edge and {MOST_PIXELS:,} in all"
        raise UserError(f"a picture of {size} pixels is too large, at most {most} can be written: draw fewer images")
    figure.set_size_inches((edges + 1e-3) / least)
    return least


def image_grid(images, ncols):
    """Images (N, C, L, L) in [0, 1], C = 1 drawn grey or 3, as one array (H, W, 3) with a white line between them.
    Raises FloatingPointError if they are not finite."""
    images = np.asarray(images)
    N, _, L, _ = images.shape
    nrows, gap = -(-N // ncols), max(1, L // 16)
    bad = ~np.isfinite(images).all((1, 2, 3))
    if bad.any():
        named = f"{bad.sum()} of {N} images hold values that are not finite, first number {bad.argmax()}"
        raise FloatingPointError(f"{named}: nothing is drawn")
    panels = np.ones((nrows * ncols, L + gap, L + gap, 3))
    panels[:N, :L, :L] = images.transpose(0, 2, 3, 1)
    rows = panels.reshape(nrows, ncols, L + gap, L + gap, 3).swapaxes(1, 2)
    return rows.reshape(nrows * (L + gap), ncols * (L + gap), 3)[:-gap, :-gap]


def field_pictures(fields):
    """Receptive fields (S, L, L), each divided by its largest value, in colours: (S, 3, L, L) in [0, 1]."""
    fields = np.asarray(fields)
    shares = fields / fields.max((1, 2), keepdims=True).clip(np.finfo(fields.dtype).tiny)
    return matplotlib.colormaps[COLOUR_MAP](shares)[..., :3].transpose(0, 3, 1, 2)


@style()
def grid_figure(images, ncols, width=COLUMN, rows=(), columns=(), row_label=ROW_LABEL):
    """A figure of a grid of images, `width` inches wide, of which `row_label` are for the labels of `rows`, if any;
    `columns`: labels above them."""
    grid = image_grid(images, ncols)
    left = row_label if rows else 0
    top = COLUMN_LABEL * max((label.count("\n") + 1 for label in columns), default=0)
    panel = (width - left) * grid.shape[0] / grid.shape[1]  # height
    height = panel + top
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, 0, 1 - left / width, panel / height))
    add_pixels(axes, grid)
    axes.set_axis_off()
    add_text = partial(figure.text, va="center", fontsize=FONT_SIZE)
    for k, label in enumerate(rows):
        add_text((left - 0.05) / width, (1 - (k + 0.5) / len(rows)) * panel / height, label, ha="right")
    for k, label in enumerate(columns):
        x = (left + (k + 0.5) / len(columns) * (width - left)) / width
        add_text(x, 1 - top / height / 2, label, ha="center")
    return figure


def squares(figure, nrows, ncols, size, left, top, across, down):
    """A GridSpec of squares, `across` and `down` apart, `left` and `top` from the figure's corner; all in inches."""
    width, height = figure.get_size_inches()
    right, bottom = left + ncols * (size + across) - across, top + nrows * (size + down) - down
    sides = {"left": left / width, "right": right / width, "top": 1 - top / height, "bottom": 1 - bottom / height}
    return figure.add_gridspec(nrows, ncols, wspace=across / size, hspace=down / size, **sides)


def show(axes, image, label=""):
    """Draw an image (C, L, L) in [0, 1], its label above, no wider."""
    add_pixels(axes, image_grid(image[None], 1))
    axes.set(xticks=[], yticks=[], frame_on=False)
    fitting = 72 * axes.bbox.width / axes.figure.dpi / max(1, 0.6 * len(label))  # a digit is 0.6 of its size wide
    axes.set_title(label, fontsize=min(FONT_SIZE, fitting), pad=2)


def write(path, save, parents=True, quiet=False):
    """Write a file by save(file), complete or not at all; print and return its path. parents: make its folders."""
    path = Path(path)
    path.parent.mkdir(parents=parents, exist_ok=True)
    with replacing(path) as file, style():
        save(file)
    if not quiet:
        print(path)
    return path


def save_figure(figure, path, endings=(".png", ".pdf"), **how):
    """Write a figure to `path` plus each ending; returns the paths. how: of `write`."""
    save = partial(figure.savefig, dpi=pixels_per_inch(figure))
    return [write(f"{path}{end}", partial(save, format=end[1:], metadata=METADATA.get(end)), **how) for end in endings]


def save_animation(figures, path, seconds, **how):
    """Write figures, each shown for `seconds`, as {path}.gif, which repeats; returns the path. how: of `write`."""
    frames = []
    for figure in figures:
        buffer = io.BytesIO()
        with style():
            figure.savefig(buffer, format="png", dpi=pixels_per_inch(figure, SCREEN_DPI))
        frames.append(Image.open(buffer).convert("RGB"))
    settings = {"append_images": frames[1:], "duration": round(1000 * seconds), "loop": 0, "comment": NAME.encode()}
    return write(f"{path}.gif", partial(frames[0].save, format="gif", save_all=True, **settings), **how)


def png(image, **texts):
    """An image (C, H, W), uint8, C = 1 or 3, as the bytes of a PNG file of its own pixels, which also holds `texts`
    under their names."""
    image, notes, buffer = np.asarray(image), PngInfo(), io.BytesIO()
    picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
    for name, text in {"Software": NAME, **texts}.items():
        notes.add_text(name, text)
    picture.save(buffer, "png", pnginfo=notes)
    return buffer.getvalue()


def save_pixels(image, path):
    """Write `png(image)` as {path}.png; returns the path."""
    return write(f"{path}.png", lambda file: file.write(png(image)))
