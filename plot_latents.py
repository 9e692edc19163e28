#!/usr/bin/env python3
"""Draw the receptive field of latents beside two samples in which they are varied (figures 4 and 6).

python plot_latents.py --weights saved_model/…/10.state --latents 3:0:8:1,1:4:2:0
python plot_latents.py --weights saved_model/…/10.state --levels 3 --strongest 6
"""

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import args as flags
from flow.latents import decode, sweep
from plot_mix_temperature import add_temperatures, listing, mixed_temperatures
from plot_receptive_fields import add_flags, get_fields, get_levels, pictures
from plot_walk import add_range, check_two, papers_range
from utils import cli
from utils.memory import keep_freed_memory
from utils.plotting import COLUMN, COLUMN_LABEL, PAGE, add_image, save_figure, style
from utils.random import generator


def vary(flow, z, latent, values):
    """Samples z (B, C, L, L) with a latent, (channel, row, column), set to each of n values: images in [0, 1],
    (n, B, C, L, L)."""
    varied = sweep(z, latent, values)
    return decode(flow, varied.flatten(0, 1)).unflatten(0, varied.shape[:2])


def draw(groups):
    """A figure of groups: a receptive field on the left, beside it a row per sample and a column per value.

    groups: of each latent its name, its field (3, L, L), the values (n,) and images (n, B, C, L, L)
    """
    n, B = groups[0][3].shape[:2]
    side_by_side = 1 if len(groups) <= 4 else 2
    gap, between = 0.04, 0.15  # inches
    tall = min(B, 2)  # rows that a field takes
    total = COLUMN if side_by_side == 1 else (PAGE - between) / 2
    size = (total + gap) / (n + tall) - gap
    height = B * (size + gap) - gap + COLUMN_LABEL + 0.08
    width = COLUMN if side_by_side == 1 else PAGE
    figure = Figure(figsize=(width, -(-len(groups) // side_by_side) * height))
    with style():
        for g, (name, field, values, images) in enumerate(groups):
            left = g % side_by_side * (total + between)
            top = g // side_by_side * height + COLUMN_LABEL
            add_image(figure, field, left, top, tall * (size + gap) - gap, name)
            for k in range(n):
                for b in range(B):
                    label = "" if b else f"{'z = ' * (k == 0)}{values[k]:.4g}"
                    x = left + (tall + k) * (size + gap)
                    add_image(figure, images[k, b], x, top + b * (size + gap), size, label)
    return figure


def latents_parser():
    parser = flags.build_parser(
        "Draw the receptive field of latents beside two samples in which they are varied (figures 4 and 6).",
        needs_weights=True,
        pictures=True,
    )
    group = parser.add_argument_group("latents")
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--latents",
        type=cli.number_list(cli.latent_name),
        metavar="H:I:J:C[,…]",
        help="vary these, level:row:column:channel (default: the strongest of each level)",
    )
    which.add_argument("--strongest", type=cli.positive, default=1, metavar="N", help="the N strongest of each level")
    add_range(group)
    group.add_argument("--steps", type=cli.several, default=5, metavar="N", help="values of the latent")
    group.add_argument("--samples", type=cli.positive, default=2, metavar="N", help="number of samples, a row each")
    add_temperatures(group)
    add_flags(group)
    return parser


def main(argv=None):
    args = flags.get_args(argv, latents_parser())
    keep_freed_memory()
    flow, config, trained = flags.load_flow(args)
    temperatures = mixed_temperatures(args, flow)
    levels = get_levels(args, flow)
    check_two(args)
    fields = get_fields(args, flow, config)
    if args.latents:
        chosen = torch.arange(len(fields.levels))
    else:
        chosen = torch.cat([fields.strongest(h, args.strongest) for h in levels])
    z = flow.sample_prior(args.samples, temperatures, generator(args.draw_seed, "samples", 0, args.cuda))
    groups = []
    for k in tqdm(chosen, desc="vary", unit="latent", disable=None):
        low, high = args.range or papers_range(int(fields.levels[k]))
        values = torch.linspace(low, high, args.steps, dtype=torch.float64)
        images = vary(flow, z, tuple(fields.latents[k].tolist()), values)
        groups.append((fields.name(k), pictures(fields.fields[k][None])[0], values, images))
    name = "latents" + ("_chosen" if args.latents else f"_h{cli.listing(args.levels)}" if args.levels else "")
    for picture in save_figure(draw(groups), flags.picture_path(args, config, name)):
        print(picture)
    named = ", ".join(f"{fields.name(k)} (strength {fields.strengths[k]:.2g})" for k in chosen)
    print(
        f"{'chosen' if args.latents else 'strongest'} latents {named}, each in {args.samples} samples with"
        f" {listing(temperatures)}, seed {args.draw_seed}: {trained['weights']}"
    )


if __name__ == "__main__":
    cli.script(main)
