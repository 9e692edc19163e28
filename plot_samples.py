#!/usr/bin/env python3
"""Draw a grid of samples or of images of the data set (figures B1, B2, G1-G3).

python plot_samples.py --weights saved_model/…/10.state --temperature 0.9
python plot_samples.py --data msds1 --real
"""

import torch

import args as flags
from flow.latents import decode
from utils import cli
from utils.cli import flag_error
from utils.plotting import grid_figure, save_figure
from utils.random import generator


def samples(flow, n, temperatures, seed):
    """n samples, (n, C, L, L) in [0, 1]; temperatures: one per level."""
    return decode(flow, flow.sample_prior(n, temperatures, generator(seed, "samples", 0, flow.level_map.device)))


def choose(size, n, seed):
    """n different numbers of 0 … size - 1, drawn at random."""
    return torch.randperm(size, generator=generator(seed, "data"))[:n]


def main(argv=None):
    parser = flags.build_parser(
        "Draw a grid of samples or of images of the data set (figures B1, B2, G1-G3).",
        needs_weights=True,
        pictures=True,
    )
    group = parser.add_argument_group("samples")
    cli.add_temperature(group)
    group.add_argument(
        "--real", action="store_true", help="images of the test split instead; needs no weights, only --data"
    )
    group.add_argument("--grid", type=cli.positive, default=8, metavar="N", help="images per row and column")
    args = flags.get_args(argv, parser)
    n = args.grid**2
    if args.real:
        config = flags.load_flow(args)[1] if args.weights else vars(args)
        dataset = flags.open_data(args, config)[0].test
        if n > len(dataset):
            raise flag_error("--grid", args.grid, f"{n} images, but the test split has {len(dataset)}")
        numbers = choose(len(dataset), n, args.draw_seed)
        images, name, caption = torch.from_numpy(dataset[numbers]) / 255, "real", f"test images of {config['data']}"
    else:
        flow, config, trained = flags.load_flow(args)
        temperatures = cli.check_temperature(args.temperature, flow)
        images = samples(flow, n, temperatures, args.draw_seed)
        text = cli.listing(args.temperature)
        name, caption = f"samples_T{text}", f"samples of {trained['weights']} at T = {text}"
    for picture in save_figure(grid_figure(images, args.grid), flags.picture_path(args, config, name)):
        print(picture)
    print(f"{n} {caption}, seed {args.draw_seed}")


if __name__ == "__main__":
    cli.script(main)
