#!/usr/bin/env python3
"""Mix two images in the scaling direction (section 4.5, figure 7), or many high levels with many low ones.

python plot_mixing.py --weights saved_model/…/10.state --images 3,14 --linear
python plot_mixing.py --weights saved_model/…/10.state --grid
"""

import torch

import args as flags
from flow.latents import decode, encode, interpolate, mix
from utils import cli
from utils.cli import flag_error
from utils.plotting import PAGE, grid_figure, save_figure

GRID = 7, 4  # images that give the high levels and that give the low ones in figure 7 (c)
PAPERS_THETA = 3


def hyperbolic(flow, z_high, z_low):
    """Latents (C, L, L) mixed at every threshold 0 … h_L + 1: (h_L + 2, C, L, L), from `z_high` to `z_low`."""
    return torch.stack([mix(flow, z_high, z_low, theta) for theta in range(flow.num_levels + 1)])


def pair_images(flow, images, linear):
    """Rows of images in [0, 1]: two uint8 images (2, C, L, L), mixed both ways and, with `linear`, conventionally.

    Returns (R, h_L + 4, C, L, L): A, B and mixtures; B, A and mixtures; A, B and linear mixtures.
    """
    a, b = encode(flow, images)
    latents = [hyperbolic(flow, a, b), hyperbolic(flow, b, a)]
    if linear:
        latents.append(interpolate(a, b, flow.num_levels + 1))
    mixed = decode(flow, torch.cat(latents)).unflatten(0, (len(latents), -1))
    sources = images.to(mixed) / 255
    return torch.stack([torch.cat([sources.flip(0) if k == 1 else sources, row]) for k, row in enumerate(mixed)])


def pair_labels(flow, linear):
    """Labels of the rows and the columns of `pair_images`."""
    rows = ["A high, B low", "B high, A low"]
    columns = ["high", "low", *[rf"$\Theta = {theta}$" for theta in range(flow.num_levels + 1)]]
    if linear:
        rows.append("linear in $z$")
        weights = torch.linspace(1, 0, flow.num_levels + 1).tolist()
        columns = [
            "high",
            "low",
            *[f"{theta}\n$\\lambda = {weight:.3g}$" for theta, weight in zip(columns[2:], weights, strict=True)],
        ]
    return rows, columns


def grid_images(flow, high, low, theta):
    """Images in [0, 1] of figure 7 (c): uint8 images high (N, C, L, L) mixed with low (M, C, L, L) at one threshold.

    Returns (M + 1, N + 1, C, L, L): the first row is high, the first column low, the corner white.
    """
    z = encode(flow, torch.cat((high, low)))
    mixed = mix(flow, z[: len(high)], z[len(high) :, None], theta)  # (M, N, C, L, L)
    images = decode(flow, mixed.flatten(0, 1)).unflatten(0, (len(low), len(high)))
    corner = torch.ones_like(images[:1, :1])
    top = torch.cat((corner, high[None].to(images) / 255), 1)
    return torch.cat((top, torch.cat((low[:, None].to(images) / 255, images), 1)))


def grid_labels(rows, columns):
    """Labels of the rows and the columns of `grid_images`."""
    return ["high", *[""] * rows], ["low", *[""] * columns]


def main(argv=None):
    args = flags.get_args(argv, mixing_parser())
    grid = args.grid
    if grid and len(grid) != 2:
        raise flag_error("--grid", cli.listing(grid), "must be two numbers")
    if args.theta is not None and not grid:
        raise flag_error("--theta", args.theta, "only with --grid, without it every threshold is drawn")
    number = sum(grid or (1, 1))
    numbers = args.images or tuple(range(number))
    if len(numbers) != number:
        raise flag_error("--images", cli.listing(numbers), f"must be {number} numbers")
    flow, config, trained = flags.load_flow(args)
    theta = min(PAPERS_THETA, flow.num_levels - 1) if args.theta is None else args.theta
    cli.check_range("--theta", [theta], flow.num_levels + 1)
    images = flags.load_images(args, config, numbers)
    if grid:
        panels = grid_images(flow, images[: grid[0]], images[grid[0] :], theta)
        labels, width = grid_labels(grid[1], grid[0]), 0.3
        name = f"mixing_grid_theta{theta}"
        high, low = cli.listing(numbers[: grid[0]]), cli.listing(numbers[grid[0] :])
        caption = f"levels h >= {theta} of {high} (top row), h < {theta} of {low} (left column)"
    else:
        panels = pair_images(flow, images, args.linear)
        labels, width = pair_labels(flow, args.linear), 0.8
        name = "mixing_linear" if args.linear else "mixing"
        caption = f"A = {numbers[0]}, B = {numbers[1]}, levels h >= Theta of the one and h < Theta of the other"
        caption += "; linear in z: lambda z_A + (1 - lambda) z_B" if args.linear else ""
    name += f"_{cli.listing(args.images)}" if args.images else ""
    figure = grid_figure(panels.flatten(0, 1), panels.shape[1], PAGE, *labels, width)
    for picture in save_figure(figure, flags.picture_path(args, config, name)):
        print(picture)
    print(f"{caption}: test images of {config['data']}, {trained['weights']}")


def mixing_parser():
    parser = flags.build_parser(
        "Mix two images in the scaling direction (section 4.5, figure 7), or many high levels with many low ones.",
        needs_weights=True,
        pictures=True,
    )
    group = parser.add_argument_group("mixing")
    group.add_argument(
        "--images",
        type=cli.number_list(cli.count),
        metavar="N,N[,N…]",
        help="test images, counted from 0: A and B; with --grid those of the high, then those of the low levels"
        " (default: the first ones)",
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--linear", action="store_true", help="also the conventional mixing, lambda z_A + (1 - lambda) z_B"
    )
    which.add_argument(
        "--grid",
        type=cli.number_list(cli.positive),
        nargs="?",
        const=GRID,
        metavar="HIGH,LOW",
        help="every mixture of so many images with so many, 7,4 if no numbers follow (figure 7 (c))",
    )
    group.add_argument(
        "--theta",
        type=cli.count,
        metavar="LEVEL",
        help="threshold of --grid: levels from it on are of the one, below it of the other"
        f" (default: {PAPERS_THETA}, or the top level if that is lower)",
    )
    return parser


if __name__ == "__main__":
    cli.script(main)
