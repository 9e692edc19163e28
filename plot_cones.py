#!/usr/bin/env python3
"""Draw and count the patches and causal cones of an RG-Flow, level by level (figure 3 (b-d)). Needs no weights."""

import numpy as np

from flow.hierarchy import generation_cone, inference_cone, level_map, num_levels
from utils import cli, plotting

BLUE, ORANGE, GREEN, _, RED, _ = plotting.COLOURS
KEPT, LATENT = "#FFFFFF", "#D0D0D0"
DASHES = (0, (3, 1.5))


def generation_sections(h, i, j, L, m):
    """The variables of x^(k) that a latent of level h in row i, column j affects, for k = 0 … h_L, nothing for k > h:
    (L / 2^k, L / 2^k) bool each. The levels from k up are the whole hierarchy of an image of edge L / 2^k."""
    cones = [generation_cone(i >> k, j >> k, L >> k, m).numpy() for k in range(h + 1)]
    return cones + [np.zeros((L >> k, L >> k), dtype=bool) for k in range(h + 1, num_levels(L, m))]


def inference_sections(i, j, size, L, m):
    """The latents of each level h that a square of pixels from row i, column j on affects: (L / 2^h, L / 2^h) bool."""
    pixels = np.zeros((L, L), dtype=bool)
    pixels[i : i + size, j : j + size] = True
    cone = inference_cone(pixels, m).numpy()
    return [cone[:: 2**h, :: 2**h] & latents for h, latents in enumerate(latents_of_levels(L, m))]


def latents_of_levels(L, m):
    """Which of the variables alive at level h are its latents: (L / 2^h, L / 2^h) bool each."""
    levels = level_map(L, m).numpy()
    return [levels[:: 2**h, :: 2**h] == h for h in range(num_levels(L, m))]


def draw_section(axes, cells, latents, m, colour):
    """One level from above: its latents, `cells` (l, l) bool in a colour, and the edges of the blocks."""
    l = len(latents)
    picture = np.where(latents[..., None], plotting.to_rgb(LATENT), plotting.to_rgb(KEPT))
    picture[cells] = plotting.to_rgb(colour)
    plotting.add_pixels(axes, picture)
    for start, line, colour in ((0, "-", ORANGE), (m // 2, DASHES, GREEN)):
        edges = np.arange(start, l + 1, m)
        for draw_lines in (axes.hlines, axes.vlines):
            draw_lines(edges, 0, l, colors=colour, linestyles=line, linewidth=min(0.8, 12 / l))
    axes.set(xticks=[], yticks=[])


def draw(L, m, cones):
    """A figure with a column per level: the blocks, then a row per cone: its label, colour, sections, their titles, and
    (level, (column, row), width, height) of what to outline."""
    latents = latents_of_levels(L, m)
    left, gap, down, bottom = 0.75, 0.06, plotting.COLUMN_LABEL + 0.02, 0.42  # inches
    size = min(1.6, (plotting.PAGE - left + gap) / len(latents) - gap)
    none = [np.zeros_like(each) for each in latents]
    rows = [("blocks", LATENT, none, [f"$h = {h}$" for h in range(len(none))], (-1,)), *cones]
    with plotting.style():
        figure = plotting.Figure(figsize=(left + len(none) * (size + gap) - gap, len(rows) * (size + down) + bottom))
        panels = plotting.squares(figure, len(rows), len(none), size, left, down, gap, down).subplots(squeeze=False)
        for own, (label, colour, sections, titles, (level, *square)) in zip(panels, rows, strict=True):
            own[0].set_ylabel(label, rotation=0, ha="right", va="center")
            for h, axes in enumerate(own):
                draw_section(axes, sections[h], latents[h], m, colour)
                axes.set_title(titles[h], pad=2)
                if h == level:
                    axes.add_patch(plotting.Rectangle(*square, fill=False, linewidth=1.2, zorder=3))
        legend = {
            "latent of the level": plotting.Patch(facecolor=LATENT, edgecolor="#808080", linewidth=0.5),
            "goes on to the next level": plotting.Patch(facecolor=KEPT, edgecolor="#808080", linewidth=0.5),
            "blocks of the decimator": plotting.Line2D([], [], color=ORANGE, linewidth=0.8),
            "blocks of the disentangler": plotting.Line2D([], [], color=GREEN, linewidth=0.8, linestyle=DASHES),
            "generation cone of a latent": plotting.Patch(facecolor=RED),
            "inference cone of a region": plotting.Patch(facecolor=BLUE),
        }
        figure.legend(legend.values(), legend.keys(), loc="lower center", ncols=3, frameon=False, borderpad=0)
    return figure


def main(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--L", type=cli.positive, default=32, metavar="PIXELS", help="edge length of images")
    add("--kernel_size", type=cli.positive, default=4, metavar="PIXELS", help="edge length of a patch")
    add("--nchannels", type=cli.positive, default=3, metavar="C", help="number of channels")
    latents = "generation cones of these latents, level:row:column:channel (default: one of level 1 near the centre)"
    add("--latents", type=cli.latent_names, metavar="H:I:J:C[,…]", help=latents)
    regions = "inference cones of squares with these upper left corners, row:column (default: the centre)"
    add("--regions", type=cli.number_list(cli.indices("row:column", "11:11")), metavar="I:J[,…]", help=regions)
    add("--region_size", type=cli.positive, metavar="PIXELS", help="edge of the squares (default: 10, or L if smaller)")
    add("--fig_dir", default="./figures", metavar="DIR", help="folder for pictures, PNG and PDF")
    args = parser.parse_args(argv)
    L, m, C = args.L, args.kernel_size, args.nchannels
    try:
        levels = level_map(L, m).expand(C, -1, -1)
    except ValueError as error:
        parser.error(f"argument --{error}")
    size = args.region_size or min(10, L)
    if size > L:
        raise cli.flag_error("--region_size", size, f"must be at most L, {L}")
    h = min(1, int(levels.max()))
    names = args.latents or [(h, L // 2 - 2**h, L // 2 - 2**h, 0)]
    cli.check_latents(names, levels)
    regions = args.regions or [((L - size) // 2, (L - size) // 2)]
    for i, j in regions:
        if max(i, j) > L - size:
            where = f"row and column of a {size} x {size} region must be in 0..{L - size}"
            raise cli.flag_error("--regions", f"{i}:{j}", where)
    cones, captions = [], []
    for h, i, j, c in names:
        sections, name = generation_sections(h, i, j, L, m), f"{h}:{i}:{j}:{c}"
        titles = [f"{C * cells.sum()} of {C * cells.size}" for cells in sections]
        cones.append((f"generation\ncone of\n{name}:\nvariables", RED, sections, titles, (h, (j >> h, i >> h), 1, 1)))
        captions.append(f"latent {name} affects {sections[0].sum()} of {L**2} pixels")
    totals = [C * latents.sum() for latents in latents_of_levels(L, m)]
    for i, j in regions:
        sections = inference_sections(i, j, size, L, m)
        counts = [C * cells.sum() for cells in sections]
        titles = [f"{count} of {total}" for count, total in zip(counts, totals, strict=True)]
        label, square = f"inference\ncone of\n{size} × {size}\nat {i}:{j}:\nlatents", (0, (j, i), size, size)
        cones.append((label, BLUE, sections, titles, square))
        listed = ", ".join(f"{count} at h = {h}" for h, count in enumerate(counts))
        captions.append(f"the {size} x {size} pixels at {i}:{j} affect {sum(counts)} of {C * L**2} latents ({listed})")
    plotting.save_figure(draw(L, m, cones), cli.picture_path(args, "cones"))
    print(*captions, sep="\n")


if __name__ == "__main__":
    cli.script(main)
