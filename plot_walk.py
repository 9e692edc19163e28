#!/usr/bin/env python3
"""Draw walks through the latents as an animated GIF, and some of its frames side by side."""

import math

import torch
from tqdm import tqdm

import args as flags
from flow.latents import decode, encode, interpolate, papers_range, random_walk, vary
from utils import cli
from utils.plotting import PAGE, SCREEN, grid_figure, save_animation, save_figure
from utils.random import generator

STRIP = 8  # frames side by side
SECONDS = 0.1  # per frame


def walks(flow, config, args):
    """(name, images (F, B, C, L, L), labels, caption) of each walk: between images, sweeps, or a random one."""
    if args.images:
        first, last = args.images
        images = flags.load_images(config, args, args.images)
        flow = flags.exact(flow, images)
        z = interpolate(*encode(flow, images), args.frames + 1)[:, None]
        labels = [rf"$\lambda = {weight:.2f}$" for weight in torch.linspace(1, 0, len(z))]
        caption = f"test images of {config['data']}, {first} (lambda = 1) to {last} (lambda = 0)"
        yield "interpolation", decode(flow, z), labels, caption
        return
    levels, latents = args.levels or (flow.num_levels - 1,), args.latents or ()
    cli.check_range("--levels", levels, flow.num_levels)
    indices, temperatures = cli.check_latents(latents, flow.level_map), cli.check_temperature(args.temperature, flow)
    own, text = generator(args.draw_seed, "walk", 0, args.cuda), cli.listing(args.temperature)
    z = flow.sample_prior(args.samples, temperatures, own)
    samples = f"{args.samples} samples at T = {text}, seed {args.draw_seed}"
    for name, latent in zip(latents, indices, strict=True):
        low, high = args.range or papers_range(name[0])
        values = torch.linspace(low, high, args.frames + 1, dtype=torch.float64)
        labels = [f"{':'.join(map(str, name))}\n{value:.2f}" for value in values]
        caption = f"latent {':'.join(map(str, name))} from {low:g} to {high:g}, {samples}"
        yield f"sweep_{'-'.join(map(str, name))}", vary(flow, z, latent, values), labels, caption
    if not latents:
        walk, named = random_walk(flow, z, levels, args.stops, args.frames, temperatures, own), cli.listing(levels)
        labels = [f"$h = {named}$\nframe {k}" for k in range(len(walk))]
        caption = f"random walk in the latents of level {named}, {samples}"
        yield "walk", decode(flow, walk), labels, caption


def draw(images, labels, path, closed):
    """Write labelled frames (F, B, C, L, L) as a GIF, there and back unless closed, and some of them side by side."""
    n, ncols = len(images), math.ceil(images.shape[1] ** 0.5)
    order = [*range(n), *([] if closed else range(n - 2, 0, -1))]
    progress = tqdm(order, desc="draw", unit="frame", leave=False, disable=None)
    figures = (grid_figure(images[k], ncols, SCREEN, columns=[labels[k]]) for k in progress)
    save_animation(figures, path, SECONDS)
    shown = torch.linspace(0, n if closed else n - 1, STRIP + closed)[:STRIP].round().int().clamp(max=n - 1).unique()
    strip = images[shown].transpose(0, 1).flatten(0, 1)
    save_figure(grid_figure(strip, len(shown), PAGE, columns=[labels[k] for k in shown]), path)


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, images=True)
    group = parser.add_argument_group("walk")
    add, which = group.add_argument, group.add_mutually_exclusive_group().add_argument
    which("--levels", type=cli.counts, metavar="H[,H…]", help="random walk in these levels (default: the top level)")
    which("--latents", type=cli.latent_names, metavar="H:I:J:C[,…]", help="sweep level:row:column:channel, a GIF each")
    which("--images", type=cli.number_list(cli.count, 2), metavar="N,N", help="walk from one test image to another")
    cli.add_temperature(add)
    cli.add_range(add)
    add("--samples", type=cli.panels, default=4, metavar="N", help="samples that walk together")
    add("--stops", type=cli.several, default=4, metavar="N", help="draws of the prior on the random walk")
    add("--frames", type=cli.positive, default=14, metavar="N", help="frames from one draw, or end, to the next")
    parser.restrict("range", needs="latents")
    parser.restrict("stops", excludes="latents images")
    parser.restrict("temperature samples draw_seed", excludes="images")
    parser.restrict("data data_path prepared_path", needs="images")
    args = flags.parse(parser, argv)
    flow, config, trained = flags.load_flow(args)
    for name, images, labels, caption in walks(flow, config, args):
        draw(images, labels, flags.picture_path(args, config, trained, name), closed=not (args.images or args.latents))
        print(f"{caption}: {trained['weights']}")


if __name__ == "__main__":
    cli.script(main)
