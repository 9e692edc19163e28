#!/usr/bin/env python3
"""Draw the blocks of an RG-Flow and causal cones, level by level, and count them (figure 3 (b-d)). Needs no weights.

python plot_cones.py
python plot_cones.py --latents 3:16:16:0,0:5:7:0 --regions 0:0,11:11 --region_size 10
python plot_cones.py --L 64 --nchannels 1
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from flow.hierarchy import generation_cone, inference_cone, level_map, num_levels
from utils import cli
from utils.cli import flag_error
from utils.plotting import COLOURS, COLUMN_LABEL, FONT_SIZE, PAGE, save_figure, style

BLUE, ORANGE, GREEN, _, RED, _ = COLOURS
GOES_ON, LATENT = "#FFFFFF", "#D0D0D0"


def generation_sections(h, i, j, L, m):
    """The variables of x^(k) that a latent of level h in row i, column j affects, for k = 0 … h_L: (L / 2^k, L / 2^k)
    bool each, nothing above its level.

    The levels from k up are the whole hierarchy of an image of edge L / 2^k.
    """
    levels = range(num_levels(L, m))
    above = [np.zeros((L >> k, L >> k), dtype=bool) for k in levels[h + 1 :]]
    return [generation_cone(i >> k, j >> k, L >> k, m).numpy() for k in levels[: h + 1]] + above


def region(i, j, size, L):
    """The square of pixels that starts in row i, column j: (L, L) bool."""
    pixels = np.zeros((L, L), dtype=bool)
    pixels[i : i + size, j : j + size] = True
    return pixels


def inference_sections(pixels, m):
    """The latents of each level h that pixels (L, L) affect: (L / 2^h, L / 2^h) bool each."""
    cone = inference_cone(pixels, m).numpy()
    return [(cone[:: 2**h, :: 2**h] & latents) for h, latents in enumerate(latents_of_levels(len(pixels), m))]


def latents_of_levels(L, m):
    """Which of the variables alive at level h are its latents: (L / 2^h, L / 2^h) bool each."""
    levels = level_map(L, m).numpy()
    return [levels[:: 2**h, :: 2**h] == h for h in range(num_levels(L, m))]


def draw_section(axes, cells, latents, m, colour, title):
    """One level from above: its latents and what goes on, `cells` (l, l) bool among them in a colour, the blocks."""
    l = len(latents)
    picture = np.where(latents[..., None], to_rgb(LATENT), to_rgb(GOES_ON))
    picture[cells] = to_rgb(colour)
    axes.imshow(picture, extent=(0, l, l, 0), interpolation="nearest")
    width = min(0.8, 12 / l)
    for start, line, colour in ((0, "-", ORANGE), (m // 2, (0, (3, 1.5)), GREEN)):
        edges = np.arange(start, l + 1, m)
        for draw in (axes.hlines, axes.vlines):
            draw(edges, 0, l, colors=colour, linestyles=line, linewidth=width)
    axes.set(xticks=[], yticks=[], xlim=(0, l), ylim=(l, 0))
    axes.set_title(title, fontsize=FONT_SIZE, pad=2)


def draw(geometry, cones):
    """A figure with a column per level: the blocks, then a row per cone.

    cones: of each a label, a colour, its sections, the number of variables at each level that they are part of, and
        what to outline: level, row, column, size
    """
    latents = latents_of_levels(geometry.L, geometry.kernel_size)
    ncols, nrows = geometry.num_levels, 1 + len(cones)
    left, gap, bottom = 0.75, 0.06, 0.42  # inches
    size = min(1.6, (PAGE - left + gap) / ncols - gap)
    height = size + COLUMN_LABEL + 0.02
    figure = Figure(figsize=(width := left + ncols * (size + gap) - gap, nrows * height + bottom))
    with style():
        for row in range(nrows):
            label, colour, sections, totals, outlined = cones[row - 1] if row else ("blocks", LATENT, None, None, None)
            bottom_edge = 1 - (row + 1) * height / figure.get_figheight()
            y = bottom_edge + size / 2 / figure.get_figheight()
            figure.text((left - 0.08) / width, y, label, ha="right", va="center")
            for h in range(ncols):
                x = (left + h * (size + gap)) / width
                axes = figure.add_axes((x, bottom_edge, size / width, size / figure.get_figheight()))
                cells = sections[h] if row else np.zeros_like(latents[h])
                count = f"{geometry.nchannels * cells.sum()} of {totals[h]}" if row else f"$h = {h}$"
                draw_section(axes, cells, latents[h], geometry.kernel_size, colour, count)
                if row and outlined[0] == h:
                    _, i, j, edge = outlined
                    axes.add_patch(Rectangle((j, i), edge, edge, fill=False, linewidth=1.2, zorder=3))
        figure.legend(handles=legend(), loc="lower center", ncols=3, frameon=False, fontsize=FONT_SIZE, borderpad=0)
    return figure


def legend():
    edge = {"edgecolor": "#808080", "linewidth": 0.5}
    return [
        Patch(facecolor=LATENT, label="latent of the level", **edge),
        Patch(facecolor=GOES_ON, label="goes on to the next level", **edge),
        Line2D([], [], color=ORANGE, linewidth=0.8, label="blocks of the decimator"),
        Line2D([], [], color=GREEN, linewidth=0.8, linestyle=(0, (3, 1.5)), label="blocks of the disentangler"),
        Patch(facecolor=RED, label="generation cone of a latent"),
        Patch(facecolor=BLUE, label="inference cone of a region"),
    ]


def position(text):
    """An argparse type: row:column, as a tuple of numbers."""
    parts = text.split(":")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be row:column, counted from 0, as in 11:11")
    return tuple(map(int, parts))


def cones_parser():
    parser = cli.Parser("Draw the blocks of an RG-Flow and causal cones, level by level (figure 3 (b-d)).")
    parser.add_argument("--L", type=cli.positive, default=32, metavar="PIXELS", help="edge length of images")
    parser.add_argument("--kernel_size", type=cli.positive, default=4, metavar="PIXELS", help="edge length of a block")
    parser.add_argument("--nchannels", type=cli.positive, default=3, metavar="C", help="channels, which counts include")
    parser.add_argument(
        "--latents",
        type=cli.number_list(cli.latent_name),
        metavar="H:I:J:C[,…]",
        help="generation cones of these, level:row:column:channel (default: one of level 1 near the centre)",
    )
    parser.add_argument(
        "--regions",
        type=cli.number_list(position),
        metavar="I:J[,…]",
        help="inference cones of squares of pixels that start in these rows and columns (default: the centre)",
    )
    parser.add_argument(
        "--region_size", type=cli.positive, metavar="PIXELS", help="their edge length (default: 10, or L if smaller)"
    )
    parser.add_argument("--fig_dir", default="./figures", metavar="DIR", help="folder for pictures, PNG and PDF")
    return parser


def get_geometry(args, parser):
    """What `args.check_latents` asks of a flow, and the block's edge."""
    try:
        levels = level_map(args.L, args.kernel_size)
    except ValueError as error:
        parser.error(f"argument --{error}")
    return SimpleNamespace(
        L=args.L,
        kernel_size=args.kernel_size,
        nchannels=args.nchannels,
        num_levels=num_levels(args.L, args.kernel_size),
        level_map=levels.expand(args.nchannels, -1, -1),
    )


def main(argv=None):
    parser = cones_parser()
    args = parser.parse_args(argv)
    geometry = get_geometry(args, parser)
    L, m, C = args.L, args.kernel_size, args.nchannels
    size = args.region_size or min(10, L)
    if size > L:
        raise flag_error("--region_size", size, f"must be at most L, {L}")
    h = min(1, geometry.num_levels - 1)
    names = args.latents or [(h, L // 2 - 2**h, L // 2 - 2**h, 0)]
    cli.check_latents(names, geometry)
    for i, j in args.regions or ():
        if max(i, j) > L - size:
            rule = f"row and column of a {size} x {size} region must be in 0..{L - size}"
            raise flag_error("--regions", f"{i}:{j}", rule)
    cones, captions = [], []
    for h, i, j, c in names:
        sections = generation_sections(h, i, j, L, m)
        name = f"{h}:{i}:{j}:{c}"
        label = f"generation\ncone of\n{name}"
        cones.append((label, RED, sections, [C * cells.size for cells in sections], (h, i >> h, j >> h, 1)))
        captions.append(f"latent {name} affects {sections[0].sum()} of {L**2} pixels")
    for i, j in args.regions or [((L - size) // 2, (L - size) // 2)]:
        sections = inference_sections(region(i, j, size, L), m)
        totals = [C * int(latents.sum()) for latents in latents_of_levels(L, m)]
        label = f"inference\ncone of\n{size} × {size}\nat {i}:{j}"
        cones.append((label, BLUE, sections, totals, (0, i, j, size)))
        counts = [C * int(cells.sum()) for cells in sections]
        listed = ", ".join(f"{count} at h = {h}" for h, count in enumerate(counts))
        captions.append(f"the {size} x {size} pixels at {i}:{j} affect {sum(counts)} of {C * L**2} latents ({listed})")
    for picture in save_figure(draw(geometry, cones), Path(args.fig_dir) / f"cones_{C}x{L}x{L}_ks{m}"):
        print(picture)
    for caption in captions:
        print(caption)


if __name__ == "__main__":
    cli.script(main)
