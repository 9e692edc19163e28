#!/usr/bin/env python3
"""Draw the receptive field of latents beside two samples in which they are varied (figures 4 and 6)."""

import torch
from tqdm import tqdm

import args as flags
from flow.fields import get_fields
from flow.latents import papers_range, vary
from utils import cli
from utils.plotting import COLUMN, COLUMN_LABEL, PAGE, Figure, field_pictures, save_figure, show, squares, style
from utils.random import generator


@style()
def draw(groups):
    """A figure of groups: a receptive field on the left, beside it a row per sample and a column per value. Of each: a
    name, the field (3, L, L), values (n,) and images (n, B, C, L, L)."""
    n, B = groups[0][3].shape[:2]
    gap, between = 0.04, 0.15  # inches
    ncols, width, total = (1, COLUMN, COLUMN) if len(groups) <= 4 else (2, PAGE, (PAGE - between) / 2)
    tall = min(B, 2)  # rows that a field takes
    size = (total + gap) / (n + tall) - gap
    height = B * (size + gap) - gap + COLUMN_LABEL + 0.08
    figure = Figure(figsize=(width, -(-len(groups) // ncols) * height))
    for g, (name, field, values, images) in enumerate(groups):
        left, top = g % ncols * (total + between), g // ncols * height + COLUMN_LABEL
        grid = squares(figure, B, tall + n, size, left, top, gap, gap)
        show(figure.add_subplot(grid[:tall, :tall]), field, name)
        for k in range(n):
            for b in range(B):
                label = "" if b else f"{'z = ' * (k == 0)}{values[k]:.4g}"
                show(figure.add_subplot(grid[b, tall + k]), images[k, b], label)
    return figure


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True)
    group = parser.add_argument_group("latents")
    add, which = group.add_argument, group.add_mutually_exclusive_group().add_argument
    latents = "vary these latents, level:row:column:channel (default: the strongest of each level)"
    which("--latents", type=cli.latent_names, metavar="H:I:J:C[,…]", help=latents)
    which("--strongest", type=cli.positive, default=1, metavar="N", help="vary the N strongest latents of each level")
    cli.add_range(add)
    add("--steps", type=cli.several, default=5, metavar="N", help="values of the latent")
    add("--samples", type=cli.panels, default=2, metavar="N", help="number of samples, one per row")
    cli.add_temperature(add, mixed=True)
    cli.add_field_flags(add)
    parser.restrict("levels per_level", excludes="latents")
    args = flags.parse(parser, argv)
    flow, config, trained = flags.load_flow(args)
    temperatures = cli.check_temperatures(args.temperatures, flow)
    levels = cli.check_levels(args.levels, flow)
    latents = args.latents and cli.check_latents(args.latents, flow.level_map)
    given = None, latents, args.per_level, trained["weights"]
    fields = get_fields(flow, config, args.fig_dir, args.draws, args.draw_seed, *given)
    chosen = range(len(latents)) if latents else torch.cat([fields.strongest(h, args.strongest) for h in levels])
    z = flow.sample_prior(args.samples, temperatures, generator(args.draw_seed, "samples", 0, args.cuda))
    groups = []
    for k in tqdm(chosen, desc="vary", unit="latent", disable=None):
        low, high = args.range or papers_range(int(fields.levels[k]))
        values = torch.linspace(low, high, args.steps, dtype=torch.float64)
        images = vary(flow, z, tuple(fields.latents[k].tolist()), values)
        groups.append((fields.name(k), field_pictures(fields.fields[k][None])[0], values, images))
    save_figure(draw(groups), flags.picture_path(args, config, trained, "latents"))
    named = ", ".join(f"{fields.name(k)} (strength {fields.strengths[k]:.2g})" for k in chosen)
    samples = f"{args.samples} samples at T = {cli.listing(temperatures)}, seed {args.draw_seed}"
    print(f"{'chosen' if latents else 'strongest'} latents {named}, each in {samples}: {trained['weights']}")


if __name__ == "__main__":
    cli.script(main)
