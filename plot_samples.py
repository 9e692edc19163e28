#!/usr/bin/env python3
"""Draw a grid of samples or of images of the data set (figures B1, B2, G1-G3)."""

import torch

import args as flags
from flow.latents import decode
from utils import checkpoint, cli
from utils.plotting import grid_figure, save_figure
from utils.random import generator


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, images=True)
    add = parser.add_argument_group("samples").add_argument
    cli.add_temperature(add)
    add("--real", action="store_true", help="images of the test split instead; needs no weights, only --data")
    add("--grid", type=cli.panels, default=8, metavar="N", help="images per row and column")
    parser.restrict("temperature cuda dtype", excludes="real")
    parser.restrict("data data_path prepared_path", needs="real")
    args = flags.parse(parser, argv)
    n = args.grid**2
    if args.real:
        config = vars(args.run) if args.run else checkpoint.read(args.weights)["config"]
        config = flags.with_data(config, args, args.weights)
        data, _ = flags.open_data(config, args)
        dataset = data.test
        if n > len(dataset):
            raise cli.flag_error("--grid", args.grid, f"{n} images, but the test split has {len(dataset)}")
        numbers = torch.randperm(len(dataset), generator=generator(args.draw_seed, "data"))[:n].numpy()
        images, caption = torch.from_numpy(dataset[numbers]) / 255, f"test images of {config['data']}"
        path = cli.picture_path(args, "real", config["data"], key=data.fingerprint)
    else:
        flow, config, trained = flags.load_flow(args)
        temperatures = cli.check_temperature(args.temperature, flow)
        z = flow.sample_prior(n, temperatures, generator(args.draw_seed, "samples", 0, args.cuda))
        text = cli.listing(args.temperature)
        images, caption = decode(flow, z), f"samples of {trained['weights']} at T = {text}"
        path = flags.picture_path(args, config, trained, "samples")
    save_figure(grid_figure(images, args.grid), path)
    print(f"{n} {caption}, seed {args.draw_seed}")


if __name__ == "__main__":
    cli.script(main)
