#!/usr/bin/env python3
"""Draw receptive fields of latents by level, or histograms of their strengths (figures 5 (b, c), C1, H1-H4).

python plot_receptive_fields.py --weights saved_model/…/10.state                random latents of every level
python plot_receptive_fields.py --weights … --levels 3 --number 40 --strongest  the strongest of level 3
python plot_receptive_fields.py --weights … --latents 3:0:8:1,0:5:7:2
python plot_receptive_fields.py --weights … --histogram

The receptive field of a latent is the mean of |dG / dz_l| over draws of z, summed over colours, G the generator with
images in model space; its strength is the mean over pixels (sections 3.4 and 4.4). All latents of an RG-Flow are
computed at once; Real NVP takes one pass per latent, so that a random subset has to do. The fields are kept in
--fig_dir and computed again only when weights, draws, seed or latents change.
"""

import inspect
import sys
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

import args as flags
from flow import RGFlow
from flow.jacobian import receptive_fields
from utils import cli
from utils.cache import cached, digest
from utils.cli import UserError, flag_error
from utils.memory import keep_freed_memory
from utils.plotting import COLOURS, COLUMN, COLUMN_LABEL, PAGE, add_image, save_figure, style
from utils.random import generator
from utils.results import about, save

VISIBLE = 1.0  # the strength above which the paper calls a latent visible
PAPER_VISIBLE = 30  # at the top level, on CelebA (section 4.4)
BINS = 40
COLOUR_MAP = "magma"
MOST_ENTRIES = 2**28  # of fields computed unless asked for, 1 GiB in float32
SUBSET = 16  # latents per level where all are too many


@dataclass
class Fields:
    """Receptive fields of S latents, on the CPU."""

    latents: torch.Tensor  # (S, 3) integers: channel, row, column
    levels: torch.Tensor  # (S,) integers
    fields: torch.Tensor  # (S, L, L)
    totals: list  # latents that the flow has at each level

    @property
    def strengths(self):
        """The mean of each field over the pixels: (S,)."""
        return self.fields.mean((1, 2))

    def name(self, k):
        c, i, j = self.latents[k].tolist()
        return f"{self.levels[k]}:{i}:{j}:{c}"

    def of_level(self, h):
        """The numbers of the fields of a level: (s,)."""
        return (self.levels == h).nonzero()[:, 0]

    def strongest(self, h, number):
        """The numbers of the strongest fields of level h, in falling order."""
        at_level = self.of_level(h)
        return at_level[self.strengths[at_level].argsort(descending=True, stable=True)[:number]]

    def random(self, h, number, seed):
        """The numbers of fields of level h drawn at random."""
        at_level = self.of_level(h)
        return at_level[torch.randperm(len(at_level), generator=generator(seed, "drawn fields", h))[:number]]

    def visible(self, h):
        """The numbers of the fields of level h stronger than VISIBLE, in falling order."""
        falling = self.strongest(h, len(self.levels))
        return falling[self.strengths[falling] > VISIBLE]

    def histogram(self, logarithmic=False):
        """Edges of bins (BINS + 1,), the same at all levels, and numbers of latents in them (num_levels, BINS)."""
        strengths = self.strengths.double().numpy()
        if logarithmic:
            edges = np.geomspace(0.99 * strengths.min(), 1.01 * strengths.max(), BINS + 1)
        else:
            edges = np.linspace(0, strengths.max(), BINS + 1)
        counts = [np.histogram(strengths[self.levels == h], edges)[0] for h in range(len(self.totals))]
        return edges, np.stack(counts)


def choose_latents(flow, per_level, seed):
    """Latents (S, 3), channel, row, column, level by level: `per_level` random ones of each, all if None."""
    level_map = flow.level_map.cpu()
    chosen = []
    for h in range(flow.num_levels):
        latents = (level_map == h).nonzero()
        if per_level is not None:
            order = torch.randperm(len(latents), generator=generator(seed, "computed fields", h))
            latents = latents[order[:per_level].sort().values]
        chosen.append(latents)
    return torch.cat(chosen)


def add_flags(group):
    """The flags that `get_fields` and `get_levels` need, but for --latents."""
    group.add_argument(
        "--levels", type=cli.number_list(cli.count), metavar="H[,H…]", help="draw only these levels (default: all)"
    )
    group.add_argument(
        "--draws", type=cli.positive, default=16, metavar="N", help="draws of z that receptive fields are the mean of"
    )
    group.add_argument(
        "--per_level",
        type=cli.positive,
        metavar="N",
        help="compute the fields of N random latents of each level, and find the strongest among these (default: all of"
        f" rgflow up to {MOST_ENTRIES * 4 // 2**30} GiB; otherwise {SUBSET})",
    )


def get_levels(args, flow):
    """The levels to draw, from the top. Raises UserError."""
    if args.levels and args.latents:
        raise flag_error("--levels", cli.listing(args.levels), "must not be given with --latents")
    levels = args.levels or range(flow.num_levels)
    cli.check_range("--levels", levels, flow.num_levels)
    return sorted(set(levels), reverse=True)


def get_fields(args, flow, config, temperatures=None):
    """The receptive fields that the flags --latents, --draws, --per_level and --draw_seed ask for, from --fig_dir if
    they are there; temperatures: of the draws, one per level, or None for 1."""
    temperatures = temperatures or (1.0,) * flow.num_levels
    if args.latents:
        latents = torch.tensor(cli.check_latents(args.latents, flow))
    else:
        pixels = flow.L**2
        few = isinstance(flow, RGFlow) and flow.nchannels * pixels**2 <= MOST_ENTRIES
        latents = choose_latents(flow, args.per_level or (None if few else SUBSET), args.draw_seed)
    # A flow's type and sizes say what its parameters mean, the device which numbers a seed gives.
    settings = {name: config[name] for name in ("model", "dtype", *inspect.signature(type(flow)).parameters)}
    device = flow.level_map.device
    key = digest(flow.state_dict(), settings, latents, args.draws, args.draw_seed, temperatures, device.type)

    def compute():
        draws = generator(args.draw_seed, "receptive fields", 0, device)
        return receptive_fields(flow, args.draws, latents, temperatures, draws, progress=True)

    path = flags.picture_path(args, config, "receptive_fields")
    fields = cached(path.with_name(f"{path.name}_{key}.cache"), compute)
    if not fields.isfinite().all():
        raise UserError("the receptive fields of these weights are not finite")
    level_map = flow.level_map.cpu()
    return Fields(latents, level_map[latents.unbind(1)], fields, level_map.flatten().bincount().tolist())


def choose_rows(fields, levels, way, args):
    """(level, numbers of the fields to draw) for each level: the strongest, the chosen ones or random ones."""
    if way == "chosen":
        return [(h, fields.of_level(h)) for h in levels if h in fields.levels]
    if way == "strongest":
        return [(h, fields.strongest(h, args.number)) for h in levels]
    return [(h, fields.random(h, args.number, args.draw_seed)) for h in levels]


def pictures(fields):
    """Fields (S, L, L), each divided by its largest value, in colours: (S, 3, L, L) in [0, 1]."""
    shares = fields / fields.amax((1, 2), keepdim=True).clamp_min(torch.finfo(fields.dtype).tiny)
    return colormaps[COLOUR_MAP](shares.numpy())[..., :3].transpose(0, 3, 1, 2)


def draw_fields(fields, rows):
    """A figure of fields, each under its latent's name; rows: (level, numbers of fields) each, wrapped where too
    long."""
    longest = max(len(numbers) for _, numbers in rows)
    full, ncols = (COLUMN, 5) if longest <= 5 else (PAGE, 10)
    left, gap, bottom = 0.42, 0.05, 0.34  # inches
    size = (full - left + gap) / ncols - gap
    height = size + COLUMN_LABEL
    lines = [(h, part) for h, numbers in rows for part in numbers.split(ncols)]
    width = left + max(2, min(longest, ncols)) * (size + gap) - gap  # the scale takes two
    figure = Figure(figsize=(width, len(lines) * height + bottom))
    with style():
        for row, (h, part) in enumerate(lines):
            top = row * height + COLUMN_LABEL
            for column, (k, image) in enumerate(zip(part, pictures(fields.fields[part]), strict=True)):
                add_image(figure, image, left + column * (size + gap), top, size, fields.name(k))
            if row == 0 or lines[row - 1][0] != h:
                y = 1 - (top + size / 2) / figure.get_figheight()
                figure.text((left - 0.06) / width, y, f"$h = {h}$", ha="right", va="center")
        add_scale(figure, left, bottom)
    return figure


def add_scale(figure, left, bottom):
    """The scale of colours, centred in the `bottom` inches of a figure, under what is to the right of `left`."""
    width, height = figure.get_size_inches()
    length = min(1.3, width - left - 0.1)
    start = (left + width - length) / 2
    axes = figure.add_axes((start / width, (bottom - 0.14) / height, length / width, 0.06 / height))
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=COLOUR_MAP, aspect="auto", extent=(0, 1, 0, 1))
    axes.set(yticks=[], xticks=[0, 1])
    axes.tick_params(pad=1, length=2)
    axes.set_xlabel(r"$|\partial G / \partial z_l|$ / maximum", labelpad=-6)


def draw_histogram(fields, levels, logarithmic=False):
    """A figure of the histograms of strengths at levels, a panel each, downwards."""
    edges, counts = fields.histogram(logarithmic)
    with style():
        figure = Figure(figsize=(COLUMN, 0.75 * len(levels) + 0.4), layout="constrained")
        panels = figure.subplots(len(levels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for h, axes in zip(levels, panels, strict=True):
            axes.stairs(counts[h], edges, baseline=0.5, fill=True, color=COLOURS[0])
            axes.set(yscale="log", ylim=(0.5, 6 * counts.max()))
            if logarithmic:
                axes.set_xscale("log")
            if edges[0] <= VISIBLE <= edges[-1]:
                axes.axvline(VISIBLE, color=COLOURS[4], linestyle="--", linewidth=0.8)
            visible = len(fields.visible(h))
            text = f"$h = {h}$: {visible} of {counts[h].sum():,} above {VISIBLE:g}"
            axes.text(0.98, 0.93, text, transform=axes.transAxes, ha="right", va="top")
        panels[-1].set_xlabel("strength of the receptive field")
        figure.supylabel("latents", fontsize="medium")
    return figure


def report(fields):
    """Print which latents are visible, a line per level, and return the same as a list of dicts."""
    results = []
    for h in sorted(set(fields.levels.tolist()), reverse=True):
        at_level, visible = fields.of_level(h), fields.visible(h)
        strengths = fields.strengths[at_level]
        named = {fields.name(k): fields.strengths[k].item() for k in visible}
        paper = f" (the paper's RG-Flow on CelebA: {PAPER_VISIBLE})" if h == len(fields.totals) - 1 else ""
        text = "".join(f", {name} {strength:.3g}" for name, strength in named.items())
        print(
            f"h = {h}: {len(visible)} of {len(at_level)} latents with strength above {VISIBLE:g}{paper},"
            f" strengths {strengths.min():.2g} to {strengths.max():.2g}{text}"
        )
        results.append(
            {
                "level": h,
                "latents": fields.totals[h],
                "computed": len(at_level),
                "mean_strength": strengths.mean().item(),
                "largest_strength": strengths.max().item(),
                "visible": named,
                "paper_visible_celeba": PAPER_VISIBLE if paper else None,
            }
        )
    return results


def fields_parser():
    parser = flags.build_parser(
        "Draw receptive fields of latents by level, or histograms of their strengths (figures 5 (b, c), C1, H1-H4).",
        needs_weights=True,
        pictures=True,
        numbers=True,
    )
    group = parser.add_argument_group("receptive fields")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--latents",
        type=cli.number_list(cli.latent_name),
        metavar="H:I:J:C[,…]",
        help="these, level:row:column:channel (default: random ones)",
    )
    which.add_argument("--strongest", action="store_true", help="the strongest of each level")
    which.add_argument("--histogram", action="store_true", help="instead: histograms of the strengths at each level")
    group.add_argument(
        "--log_strength", action="store_true", help="with --histogram: bins of equal width in the logarithm"
    )
    group.add_argument("--number", type=cli.positive, default=5, metavar="N", help="latents drawn per level")
    add_flags(group)
    cli.add_temperature(group)
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = flags.get_args(argv, fields_parser())
    keep_freed_memory()
    flow, config, trained = flags.load_flow(args)
    temperatures = cli.check_temperature(args.temperature, flow)
    levels = get_levels(args, flow)
    fields = get_fields(args, flow, config, temperatures)
    if args.histogram:
        figure, name = draw_histogram(fields, levels, args.log_strength), "strengths"
        drawn = "histograms of the strengths"
    else:
        way = "strongest" if args.strongest else "chosen" if args.latents else "random"
        rows = choose_rows(fields, levels, way, args)
        figure, name = draw_fields(fields, rows), "receptive_fields" + f"_{way}" * (way != "random")
        number = sum(len(numbers) for _, numbers in rows)
        drawn = f"receptive fields, each divided by its largest value, of {number} {way} latents"
    text = cli.listing(args.temperature)
    name += f"_h{cli.listing(args.levels)}" if args.levels else ""
    name += f"_T{text}" if text != "1" else ""
    for picture in save_figure(figure, flags.picture_path(args, config, name)):
        print(picture)
    print(
        f"{drawn}, {len(fields.levels)} of {sum(fields.totals)} computed, mean of {args.draws} draws at T = {text},"
        f" seed {args.draw_seed}: {trained['weights']}"
    )
    results = report(fields)
    if args.json:
        record = {"kind": "receptive fields", **about(__file__, argv, args.cuda), **trained, "config": config}
        save(args.json, {**record, "draws": args.draws, "temperature": temperatures, "results": results})


if __name__ == "__main__":
    cli.script(main)
