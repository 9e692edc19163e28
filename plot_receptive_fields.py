#!/usr/bin/env python3
"""Draw receptive fields of latents by level, or histograms of their strengths (figures 5 (b, c), C1, H1-H4)."""

import math

import numpy as np
import torch

import args as flags
from flow.fields import get_fields
from utils import cli, plotting
from utils.random import generator
from utils.results import about, flow_names, in_words, row, save, training_name

VISIBLE = 1.0  # the strength above which the paper calls a latent visible
PAPER_VISIBLE = 30  # at the top level, on CelebA (section 4.4)
BINS = 40


def choose_rows(fields, levels, way, number, seed):
    """(level, numbers of the fields to draw) for each level that has any: the strongest, random ones or all."""
    for h in levels:
        numbers = fields.strongest(h, number) if way == "strongest" else fields.of_level(h)
        if way == "random":
            numbers = numbers[torch.randperm(len(numbers), generator=generator(seed, "drawn fields", h))[:number]]
        if len(numbers):
            yield h, numbers


def draw_fields(fields, rows):
    """A figure of fields, each under its latent's name; rows: (level, numbers of fields), wrapped where too long."""
    longest = max(len(numbers) for _, numbers in rows)
    full, ncols = (plotting.COLUMN, 5) if longest <= 5 else (plotting.PAGE, 10)
    left, gap, down, bottom = 0.42, 0.05, plotting.COLUMN_LABEL, 0.34  # inches
    size = (full - left + gap) / ncols - gap
    lines = [(k, h, part) for h, numbers in rows for k, part in enumerate(numbers.split(ncols))]
    width = left + max(2, min(longest, ncols)) * (size + gap) - gap  # the scale takes two
    height = len(lines) * (size + down) + bottom
    length = min(1.3, width - left - 0.1)  # of the scale of colours
    with plotting.style():
        figure = plotting.Figure(figsize=(width, height))
        grid = plotting.squares(figure, len(lines), ncols, size, left, down, gap, down)
        for row, (k, h, part) in enumerate(lines):
            panels = [figure.add_subplot(grid[row, column]) for column in range(len(part))]
            for axes, number, image in zip(panels, part, plotting.field_pictures(fields.fields[part]), strict=True):
                plotting.show(axes, image, fields.name(number))
            panels[0].set_ylabel("" if k else f"$h = {h}$", rotation=0, ha="right", va="center")
        place = figure.add_axes(((left + width - length) / 2 / width, 0.2 / height, length / width, 0.06 / height))
        colours = plotting.ScalarMappable(cmap=plotting.COLOUR_MAP)
        bar = figure.colorbar(colours, place, orientation="horizontal", ticks=[0, 1])
        bar.ax.tick_params(pad=1, length=2)
        bar.set_label(r"$|\partial G / \partial z_l|$ / maximum", labelpad=-6)
    return figure


def draw_histogram(fields, levels, logarithmic=False):
    """A figure of the histograms of strengths at levels, with the same bins, a panel each, downwards."""
    strengths = fields.strengths.double().numpy()
    ends = np.array([0.99 * strengths.min(), 1.01 * strengths.max()])
    edges = np.geomspace(*ends, BINS + 1) if logarithmic else np.linspace(0, strengths.max(), BINS + 1)
    counts = [np.histogram(strengths[fields.levels == h], edges)[0] for h in range(len(fields.totals))]
    with plotting.style():
        figure = plotting.Figure(figsize=(plotting.COLUMN, 0.75 * len(levels) + 0.4), layout="constrained")
        panels = figure.subplots(len(levels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for h, axes in zip(levels, panels, strict=True):
            axes.stairs(counts[h], edges, baseline=0.5, fill=True, color=plotting.COLOURS[0])
            axes.set(xscale="log" if logarithmic else "linear", yscale="log", ylim=(0.5, 6 * np.max(counts)))
            axes.axvline(VISIBLE, color=plotting.COLOURS[4], linestyle="--", linewidth=0.8)
            own = fields.strengths[fields.of_level(h)]
            text = f"$h = {h}$: {(own > VISIBLE).sum()} of {len(own):,} above {VISIBLE:g}"
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            axes.text(0.98, 0.93, text, transform=axes.transAxes, ha="right", va="top", bbox=behind)
        panels[-1].set_xlabel("strength of the receptive field")
        figure.supylabel("latents", fontsize="medium")
    return figure


def report(fields):
    """Print which latents are visible, a line per level, and return the same as a list of dicts."""
    results, reaches = [], fields.reaches
    for h in sorted(set(fields.levels.tolist()), reverse=True):
        numbers = fields.strongest(h, len(fields.levels))
        strengths = fields.strengths[numbers]
        named = {fields.name(k): fields.strengths[k].item() for k in numbers[strengths > VISIBLE]}
        reach = reaches[numbers].nanmean().item()
        reach = None if math.isnan(reach) else reach
        paper = PAPER_VISIBLE if h == len(fields.totals) - 1 else None
        line = f"h = {h}: {len(named)} of {len(strengths)} latents with strength above {VISIBLE:g}"
        line += f" (the paper's RG-Flow on CelebA: {paper})" if paper else ""
        line += f", mean reach {in_words([reach], 1)} pixels, strengths {strengths.min():.2g} to {strengths.max():.2g}"
        print(line, *(f"{name} {strength:.3g}" for name, strength in named.items()), sep=", ")
        result = {"level": h, "latents": fields.totals[h], "computed": len(strengths)}
        result |= {"mean_strength": strengths.mean().item(), "largest_strength": strengths.max().item()}
        results.append({**result, "mean_reach": reach, "visible": named, "paper_visible_celeba": paper})
    return results


def rows(record):
    """What `tables.py` shows of a record: a row, unless the latents were chosen, see `utils.results.row`."""
    if record["latents"] is None:
        cells, results = {}, record["results"]
        for each in reversed(results):
            visible = f"{len(each['visible']):,} of {each['computed']:,}"
            cells[f"h = {each['level']}"] = f"{in_words([each['mean_reach']], 1)} / {visible}"
        name = f"{training_name(record['config'], record['weights'])}: {flow_names(record['config'])[1]}"
        yield row("fields", name, cells, record["measured"], weight=sum(each["computed"] for each in results))


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, numbers=True)
    group = parser.add_argument_group("receptive fields")
    add, which = group.add_argument, group.add_mutually_exclusive_group().add_argument
    latents = "draw these latents, level:row:column:channel (default: random latents)"
    which("--latents", type=cli.latent_names, metavar="H:I:J:C[,…]", help=latents)
    which("--strongest", action="store_true", help="draw the strongest latents of each level")
    which("--histogram", action="store_true", help="instead: histograms of the strengths at each level")
    add("--log_strength", action="store_true", help="with --histogram: bins of equal width in the logarithm")
    add("--number", type=cli.positive, default=5, metavar="N", help="latents per level")
    cli.add_field_flags(add)
    cli.add_temperature(add)
    parser.restrict("log_strength", needs="histogram")
    parser.restrict("number", excludes="latents histogram")
    parser.restrict("levels per_level", excludes="latents")
    args = flags.parse(parser, argv)
    flow, config, trained = flags.load_flow(args)
    temperatures = cli.check_temperature(args.temperature, flow)
    levels = cli.check_levels(args.levels, flow)
    latents = args.latents and cli.check_latents(args.latents, flow.level_map)
    given = temperatures, latents, args.per_level, trained["weights"]
    fields = get_fields(flow, config, args.fig_dir, args.draws, args.draw_seed, *given)
    if args.histogram:
        figure, kind = draw_histogram(fields, levels, args.log_strength), "strengths"
        caption = "histograms of strengths"
    else:
        way = "strongest" if args.strongest else "chosen" if args.latents else "random"
        drawn = list(choose_rows(fields, levels, way, args.number, args.draw_seed))
        figure, kind = draw_fields(fields, drawn), "receptive_fields"
        number = sum(len(numbers) for _, numbers in drawn)
        caption = f"receptive fields, each divided by its largest value, of {number} {way} latents"
    plotting.save_figure(figure, flags.picture_path(args, config, trained, kind))
    measured = f"{len(fields.levels):,} of {sum(fields.totals):,} computed, mean of {args.draws} draws at"
    measured += f" T = {cli.listing(args.temperature)}, seed {args.draw_seed}"
    print(f"{caption}, {measured}: {trained['weights']}")
    record = {"kind": "receptive fields", **about(__file__, argv, args.cuda), **trained, "config": config}
    record |= {"draws": args.draws, "temperature": temperatures, "latents": latents}
    record |= {"measured": measured, "results": report(fields)}
    if args.json:
        save(args.json, record, rows)


if __name__ == "__main__":
    cli.script(main)
