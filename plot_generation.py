#!/usr/bin/env python3
"""Draw how samples are generated, from the highest level down to the image (figure 5 (a))."""

import torch
from tqdm import tqdm

import args as flags
from flow.preprocess import to_image
from utils import cli
from utils.plotting import grid_figure, save_figure
from utils.random import generator


@torch.no_grad()
def generation(flow, z):
    """x^(h) in [0, 1] for h = h_L … 0, with pixels as large as they are at their level: a list of (B, C, L, L)."""
    steps = flow.generate(z, lambda bijector, blocks: bijector.inverse(blocks)[0])
    progress = tqdm(steps, desc="generate", unit="level", total=flow.num_levels, leave=False, disable=None)
    return [torch.nn.functional.interpolate(to_image(x).cpu(), flow.L) for x in progress]


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True)
    add = parser.add_argument_group("generation").add_argument
    cli.add_temperature(add)
    add("--samples", type=cli.panels, default=3, metavar="N", help="number of samples, one per row")
    args = flags.parse(parser, argv)
    flow, config, trained = flags.load_flow(args)
    if not flow.layers():
        raise cli.UserError(f"{trained['weights']}: a {config['model']}, only rgflow generates level by level")
    temperatures = cli.check_temperature(args.temperature, flow)
    z = flow.sample_prior(args.samples, temperatures, generator(args.draw_seed, "samples", 0, args.cuda))
    images = torch.stack(generation(flow, z), 1).flatten(0, 1)
    levels = range(flow.num_levels - 1, -1, -1)
    columns = [f"$h = {h}$" if h else "$h = 0$, the image" for h in levels]
    figure, text = grid_figure(images, flow.num_levels, columns=columns), cli.listing(args.temperature)
    save_figure(figure, flags.picture_path(args, config, trained, "generation"))
    edges = ", ".join(f"{flow.L >> h}x{flow.L >> h} at h = {h}" for h in levels)
    print(f"x^(h) of {args.samples} samples of {trained['weights']} at T = {text}, seed {args.draw_seed}: {edges}")


if __name__ == "__main__":
    cli.script(main)
