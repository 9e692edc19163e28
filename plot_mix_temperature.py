#!/usr/bin/env python3
"""Draw samples with one temperature per level (Appendix D, the basis of figure 6)."""

import args as flags
from flow.latents import decode
from utils import cli
from utils.plotting import grid_figure, save_figure
from utils.random import generator


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True)
    add = parser.add_argument_group("mixed temperatures").add_argument
    cli.add_temperature(add, mixed=True)
    add("--grid", type=cli.panels, default=4, metavar="N", help="samples per row and column")
    args = flags.parse(parser, argv)
    flow, config, trained = flags.load_flow(args)
    temperatures = cli.check_temperatures(args.temperatures, flow)
    z = flow.sample_prior(args.grid**2, temperatures, generator(args.draw_seed, "mix", 0, args.cuda))
    text = cli.listing(temperatures)
    save_figure(grid_figure(decode(flow, z), args.grid), flags.picture_path(args, config, trained, "mix_temperature"))
    print(f"{args.grid**2} samples of {trained['weights']} at T = {text}, seed {args.draw_seed}")


if __name__ == "__main__":
    cli.script(main)
