#!/usr/bin/env python3
"""Mix the high levels of an image or sample with the low levels of another (section 4.5, figure 7), or of many."""

import torch

import args as flags
from flow.latents import decode, encode, interpolate, mix
from utils import cli
from utils.plotting import FONT_SIZE, PAGE, grid_figure, save_figure
from utils.random import generator


def pair_images(flow, images, z, linear):
    """Images in [0, 1] and their latents z, both (2, C, L, L), A and B -> rows of images, (R, h_L + 4, C, L, L): A, B
    and mixtures at thresholds 0 … h_L + 1; B, A and mixtures; with `linear`, A, B and conventional mixtures."""
    (a, b), n = z, flow.num_levels + 1
    rows = [torch.stack([mix(flow, *pair, theta) for theta in range(n)]) for pair in ((a, b), (b, a))]
    mixed = decode(flow, torch.stack(rows + [interpolate(a, b, n)] * linear))
    sources = images.to(mixed)
    return torch.stack([torch.cat([sources.flip(0) if k == 1 else sources, row]) for k, row in enumerate(mixed)])


def pair_labels(flow, linear):
    """Labels of the rows and the columns of `pair_images`."""
    rows = ["A high, B low", "B high, A low", *["linear in $z$"] * linear]
    columns = [rf"$\Theta = {theta}$" for theta in range(flow.num_levels + 1)]
    if linear:
        weights = torch.linspace(1, 0, len(columns)).tolist()
        columns = [f"{column}\n$\\lambda = {weight:.3g}$" for column, weight in zip(columns, weights, strict=True)]
    return rows, ["high", "low", *columns]


def grid_images(flow, images, z, n, theta):
    """Figure 7 (c): images in [0, 1] and their latents z, both (n + m, C, L, L), the first n, high, mixed with the m
    others, low, at one threshold -> images (m + 1, n + 1, C, L, L): the first row is high, the first column low, the
    corner white."""
    mixed = decode(flow, mix(flow, z[:n], z[n:, None], theta))  # (m, n, C, L, L)
    high, low = images[None, :n].to(mixed), images[n:, None].to(mixed)
    return torch.cat((torch.cat((torch.ones_like(mixed[:1, :1]), high), 1), torch.cat((low, mixed), 1)))


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, images=True)
    group = parser.add_argument_group("mixing")
    add, which = group.add_argument, group.add_mutually_exclusive_group().add_argument
    of = group.add_mutually_exclusive_group().add_argument
    images = "test images: A and B; with --grid, those of the high levels, then of the low levels (default: the first)"
    of("--images", type=cli.counts, metavar="N,N[,N…]", help=images)
    of("--samples", type=cli.counts, metavar="N,N[,N…]", help="instead: samples, numbered as by plot_samples.py")
    cli.add_temperature(add)
    which("--linear", action="store_true", help="also the conventional mixing, lambda z_A + (1 - lambda) z_B")
    sizes, mixtures = cli.number_list(cli.panels, 2), "instead: HIGH x LOW images (figure 7 (c); alone: 7,4)"
    which("--grid", type=sizes, nargs="?", const=(7, 4), metavar="HIGH,LOW", help=mixtures)
    add("--theta", type=cli.count, metavar="LEVEL", help="lowest of the high levels in --grid (default: 3 or the top)")
    parser.restrict("theta", needs="grid")
    parser.restrict("temperature draw_seed", needs="samples")
    parser.restrict("data data_path prepared_path", excludes="samples")
    args = flags.parse(parser, argv)
    grid = args.grid
    number = sum(grid or (1, 1))
    numbers = args.samples or args.images or tuple(range(number))
    if len(numbers) != number:
        flag = "--samples" if args.samples else "--images"
        how = ", {} for the high levels, then {} for the low".format(*grid) if grid else ", more with --grid"
        raise cli.flag_error(flag, cli.listing(numbers), f"must be {number} numbers{how}")
    flow, config, trained = flags.load_flow(args)
    theta = min(3, flow.num_levels - 1) if args.theta is None else args.theta  # the paper's is 3
    cli.check_range("--theta", [theta], flow.num_levels + 1)
    if args.samples:
        temperatures = cli.check_temperature(args.temperature, flow)
        own = generator(args.draw_seed, "samples", 0, args.cuda)
        z = flow.sample_prior(max(numbers) + 1, temperatures, own)[list(numbers)]
        images, of = decode(flow, z), f"samples at T = {cli.listing(args.temperature)}, seed {args.draw_seed}"
    else:
        images, of = flags.load_images(config, args, numbers), f"test images of {config['data']}"
        flow = flags.exact(flow, images)
        images, z = images / 255, encode(flow, images)
    if grid:
        panels = grid_images(flow, images, z, grid[0], theta)
        figure = grid_figure(panels.flatten(0, 1), panels.shape[1], PAGE)
        down, across = (1 / n for n in panels.shape[:2])  # sizes of a panel; the labels are in the white one
        figure.text(0.9 * across, 1 - 0.4 * down, rf"$h \geq {theta} \rightarrow$", ha="right", fontsize=FONT_SIZE)
        figure.text(0.5 * across, 1 - 0.9 * down, rf"$h < {theta} \downarrow$", ha="center", fontsize=FONT_SIZE)
        high, low = cli.listing(numbers[: grid[0]]), cli.listing(numbers[grid[0] :])
        caption = f"levels h >= {theta} of {high} (top row), h < {theta} of {low} (left column)"
    else:
        panels = pair_images(flow, images, z, args.linear)
        figure = grid_figure(panels.flatten(0, 1), panels.shape[1], PAGE, *pair_labels(flow, args.linear), 0.8)
        caption = f"A = {numbers[0]}, B = {numbers[1]}, levels h >= Theta of the first and h < Theta of the second"
        caption += "; linear in z: lambda z_A + (1 - lambda) z_B" if args.linear else ""
    save_figure(figure, flags.picture_path(args, config, trained, "mixing"))
    print(f"{caption}: {of}, {trained['weights']}")


if __name__ == "__main__":
    cli.script(main)
