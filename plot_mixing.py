#!/usr/bin/env python3
"""Mix the high levels of one image with the low levels of another (section 4.5, figure 7), or of many images."""

import torch

import args as flags
from flow.latents import decode, encode, interpolate, mix
from utils import cli
from utils.plotting import PAGE, grid_figure, save_figure


def pair_images(flow, images, linear):
    """uint8 images (2, C, L, L), A and B -> rows of images in [0, 1], (R, h_L + 4, C, L, L): A, B and mixtures at
    thresholds 0 … h_L + 1; B, A and mixtures; with `linear`, A, B and conventional mixtures."""
    a, b = encode(flow, images)
    n = flow.num_levels + 1
    rows = [torch.stack([mix(flow, *pair, theta) for theta in range(n)]) for pair in ((a, b), (b, a))]
    mixed = decode(flow, torch.stack(rows + [interpolate(a, b, n)] * linear))
    sources = images.to(mixed) / 255
    return torch.stack([torch.cat([sources.flip(0) if k == 1 else sources, row]) for k, row in enumerate(mixed)])


def pair_labels(flow, linear):
    """Labels of the rows and the columns of `pair_images`."""
    rows = ["A high, B low", "B high, A low", *["linear in $z$"] * linear]
    columns = [rf"$\Theta = {theta}$" for theta in range(flow.num_levels + 1)]
    if linear:
        weights = torch.linspace(1, 0, len(columns)).tolist()
        columns = [f"{column}\n$\\lambda = {weight:.3g}$" for column, weight in zip(columns, weights, strict=True)]
    return rows, ["high", "low", *columns]


def grid_images(flow, high, low, theta):
    """Figure 7 (c): uint8 images high (N, C, L, L) mixed with low (M, C, L, L) at one threshold -> images in [0, 1],
    (M + 1, N + 1, C, L, L): the first row is high, the first column low, the corner white."""
    z = encode(flow, torch.cat((high, low)))
    images = decode(flow, mix(flow, z[: len(high)], z[len(high) :, None], theta))  # (M, N, C, L, L)
    top = torch.cat((torch.ones_like(images[:1, :1]), high[None].to(images) / 255), 1)
    return torch.cat((top, torch.cat((low[:, None].to(images) / 255, images), 1)))


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, images=True, draws=False)
    group = parser.add_argument_group("mixing")
    add, which = group.add_argument, group.add_mutually_exclusive_group().add_argument
    images = "test images: A and B; with --grid, those of the high levels, then of the low levels (default: the first)"
    add("--images", type=cli.counts, metavar="N,N[,N…]", help=images)
    which("--linear", action="store_true", help="also the conventional mixing, lambda z_A + (1 - lambda) z_B")
    sizes, mixtures = cli.number_list(cli.panels, 2), "instead: HIGH x LOW images (figure 7 (c); alone: 7,4)"
    which("--grid", type=sizes, nargs="?", const=(7, 4), metavar="HIGH,LOW", help=mixtures)
    add("--theta", type=cli.count, metavar="LEVEL", help="lowest of the high levels in --grid (default: 3 or the top)")
    parser.restrict("theta", needs="grid")
    args = flags.parse(parser, argv)
    grid = args.grid
    number = sum(grid or (1, 1))
    numbers = args.images or tuple(range(number))
    if len(numbers) != number:
        raise cli.flag_error("--images", cli.listing(numbers), f"must be {number} numbers")
    flow, config, trained = flags.load_flow(args)
    theta = min(3, flow.num_levels - 1) if args.theta is None else args.theta  # the paper's is 3
    cli.check_range("--theta", [theta], flow.num_levels + 1)
    images = flags.load_images(config, args, numbers)
    flow = flags.exact(flow, images)
    if grid:
        panels = grid_images(flow, images[: grid[0]], images[grid[0] :], theta)
        top, left = rf"$h \geq {theta} \rightarrow$", rf"$h < {theta} \downarrow$"
        labels, width = ([top, *[""] * grid[1]], [left, *[""] * grid[0]]), 0.45
        high, low = cli.listing(numbers[: grid[0]]), cli.listing(numbers[grid[0] :])
        caption = f"levels h >= {theta} of {high} (top row), h < {theta} of {low} (left column)"
    else:
        panels = pair_images(flow, images, args.linear)
        labels, width = pair_labels(flow, args.linear), 0.8
        caption = f"A = {numbers[0]}, B = {numbers[1]}, levels h >= Theta of the first and h < Theta of the second"
        caption += "; linear in z: lambda z_A + (1 - lambda) z_B" if args.linear else ""
    figure = grid_figure(panels.flatten(0, 1), panels.shape[1], PAGE, *labels, width)
    save_figure(figure, flags.picture_path(args, config, trained, "mixing"))
    print(f"{caption}: test images of {config['data']}, {trained['weights']}")


if __name__ == "__main__":
    cli.script(main)
