#!/usr/bin/env python3
"""Draw walks in the space of latents as an animated GIF, and frames of them side by side.

python plot_walk.py --weights saved_model/…/10.state --levels 3          random walk in the latents of a level
python plot_walk.py --weights saved_model/…/10.state --latents 3:0:8:1   a latent swept, in several samples
python plot_walk.py --weights saved_model/…/10.state --images 3,14       from one image to another
"""

import math

import torch
from tqdm import tqdm

import args as flags
from flow.latents import decode, encode, interpolate, random_walk, sweep
from utils import cli
from utils.cli import flag_error
from utils.plotting import PAGE, grid_figure, save_animation, save_figure, screen_width
from utils.random import generator

STRIP = 8  # frames side by side
SECONDS = 0.1  # per frame


def walk_images(flow, levels, args):
    """Frames (F, B, C, L, L) in [0, 1] of a closed random walk in the latents of `levels`; the others stay."""
    z, temperatures, draws = start(flow, args)
    return frames(flow, random_walk(flow, z, levels, args.stops, args.frames, temperatures, draws))


def sweep_images(flow, latent, values, args):
    """Frames (F, B, C, L, L) in [0, 1] of samples in which one latent, (c, i, j), takes each of the values (F,)."""
    return frames(flow, sweep(start(flow, args)[0], latent, values))


def interpolation_images(flow, images, n):
    """n frames (n, 1, C, L, L) in [0, 1] from one to the other of two uint8 images (2, C, L, L)."""
    return frames(flow, interpolate(*encode(flow, images), n)[:, None])


def start(flow, args):
    """Latents of the samples (B, C, L, L), their temperatures, and the generator for what follows."""
    draws = generator(args.draw_seed, "walk", 0, flow.level_map.device)
    temperatures = cli.check_temperature(args.temperature, flow)
    return flow.sample_prior(args.samples, temperatures, draws), temperatures, draws


def frames(flow, z):
    """Latents (F, B, C, L, L) -> images of the same shape."""
    return decode(flow, z.flatten(0, 1)).unflatten(0, z.shape[:2])


def papers_range(h):
    """What a latent of level h is varied over in figure 6 (Appendix D); level 0, which it leaves out, as level 1."""
    return (0.0, 6.0) if h <= 1 else (0.0, 1.5)


def add_range(group):
    """The flag --range, for `check_two`."""
    group.add_argument(
        "--range",
        type=cli.number_list(cli.finite),
        metavar="LOW,HIGH",
        help="of a latent (default: 0,6 at levels 0 and 1, 0,1.5 above, as in figure 6)",
    )


def check_two(args):
    """Raises UserError unless --range, if given, is two numbers."""
    if args.range and len(args.range) != 2:
        raise flag_error("--range", cli.listing(args.range), "must be two numbers")


def random_walks(flow, config, args):
    levels = args.levels or (flow.num_levels - 1,)
    cli.check_range("--levels", levels, flow.num_levels)
    text = cli.listing(levels)
    images = walk_images(flow, levels, args)
    labels = [f"$h = {text}$\nframe {k}" for k in range(len(images))]
    yield f"walk_level{text}", images, labels, f"random walk in the latents of level {text}"


def sweeps(flow, config, args):
    check_two(args)
    indices = cli.check_latents(args.latents, flow)
    for name, index in zip(args.latents, indices, strict=True):
        low, high = args.range or papers_range(name[0])
        values = torch.linspace(low, high, args.frames + 1, dtype=torch.float64)
        text = ":".join(map(str, name))
        labels = [f"{text}\n{value:.2f}" for value in values]
        images = sweep_images(flow, index, values, args)
        yield f"sweep_{text.replace(':', '-')}", images, labels, f"latent {text} from {low:g} to {high:g}"


def interpolations(flow, config, args):
    if len(args.images) != 2:
        raise flag_error("--images", cli.listing(args.images), "must be two numbers")
    images = interpolation_images(flow, flags.load_images(args, config, args.images), args.frames + 1)
    labels = [rf"$\lambda = {weight:.2f}$" for weight in torch.linspace(1, 0, len(images))]
    first, last = args.images
    caption = f"test images of {config['data']}, {first} (lambda = 1) to {last} (lambda = 0)"
    yield f"interpolation_{first},{last}", images, labels, caption


def draw(images, labels, path, closed):
    """Write frames (F, B, C, L, L) as a GIF and some of them side by side, a row per sample; returns the paths.

    labels: of each frame
    closed: whether the last frame leads back to the first; if not, the GIF goes there and back
    """
    n, ncols = len(images), math.ceil(images.shape[1] ** 0.5)
    width = screen_width(images[0], ncols)
    order = [*range(n), *([] if closed else range(n - 2, 0, -1))]
    progress = tqdm(order, desc="draw", unit="frame", leave=False, disable=None)
    figures = (grid_figure(images[k], ncols, width, columns=[labels[k]]) for k in progress)
    animation = save_animation(figures, path, SECONDS)
    shown = torch.linspace(0, n if closed else n - 1, STRIP + closed)[:STRIP].round().int().unique().tolist()
    strip = images[shown].transpose(0, 1).flatten(0, 1)
    figure = grid_figure(strip, len(shown), PAGE, columns=[labels[k] for k in shown])
    return [animation, *save_figure(figure, path)]


def main(argv=None):
    args = flags.get_args(argv, walk_parser())
    flow, config, trained = flags.load_flow(args)
    walks = interpolations if args.images else sweeps if args.latents else random_walks
    for name, images, labels, caption in walks(flow, config, args):
        if not args.images:
            temperature = cli.listing(args.temperature)
            name += f"_T{temperature}"
            caption += f", {args.samples} samples at T = {temperature}, seed {args.draw_seed}"
        path = flags.picture_path(args, config, name)
        for picture in draw(images, labels, path, closed=walks is random_walks):
            print(picture)
        print(f"{caption}: {trained['weights']}")


def walk_parser():
    parser = flags.build_parser(
        "Draw walks in the space of latents as an animated GIF, and frames of them side by side.",
        needs_weights=True,
        pictures=True,
    )
    group = parser.add_argument_group("walk")
    what = group.add_mutually_exclusive_group()
    what.add_argument(
        "--levels",
        type=cli.number_list(cli.count),
        metavar="H[,H…]",
        help="random walk in all latents of these levels (default: the top level)",
    )
    what.add_argument(
        "--latents",
        type=cli.number_list(cli.latent_name),
        metavar="H:I:J:C[,…]",
        help="sweep these latents, level:row:column:channel, a GIF each",
    )
    what.add_argument("--images", type=cli.number_list(cli.count), metavar="N,N", help="from one test image to another")
    cli.add_temperature(group)
    add_range(group)
    group.add_argument("--samples", type=cli.positive, default=4, metavar="N", help="samples that walk together")
    group.add_argument(
        "--stops", type=cli.several, default=4, metavar="N", help="draws of the prior that the random walk passes"
    )
    group.add_argument(
        "--frames", type=cli.positive, default=14, metavar="N", help="steps from one end, or draw, to the next"
    )
    return parser


if __name__ == "__main__":
    cli.script(main)
