#!/usr/bin/env python3
"""Draw samples at a temperature of their own per level (Appendix D, the basis of figure 6).

python plot_mix_temperature.py --weights saved_model/…/10.state
python plot_mix_temperature.py --data celeba32 --temperatures 0.2,0.6,0.6,0.6
"""

import args as flags
from flow.latents import decode
from utils import cli
from utils.plotting import grid_figure, save_figure
from utils.random import generator

LOWEST, HIGHER = 0.2, 0.6


def add_temperatures(group):
    """The flag --temperatures; its value is for `mixed_temperatures`."""
    group.add_argument(
        "--temperatures",
        type=cli.number_list(cli.non_negative),
        metavar="T[,T…]",
        help="one for all levels or one per level from h = 0 up, comma separated"
        f" (default: {LOWEST} at h = 0, {HIGHER} above)",
    )


def mixed_temperatures(args, flow):
    """The temperature of each level that --temperatures asks for, a tuple. Raises UserError."""
    temperatures = args.temperatures or (LOWEST, *[HIGHER] * (flow.num_levels - 1))
    return cli.check_temperature(temperatures, flow, "--temperatures")


def listing(temperatures):
    return ", ".join(f"T_{h} = {T:g}" for h, T in enumerate(temperatures))


def main(argv=None):
    parser = flags.build_parser(
        "Draw samples at a temperature of their own per level (Appendix D).", needs_weights=True, pictures=True
    )
    group = parser.add_argument_group("mixed temperatures")
    add_temperatures(group)
    group.add_argument("--grid", type=cli.positive, default=4, metavar="N", help="samples per row and column")
    args = flags.get_args(argv, parser)
    flow, config, trained = flags.load_flow(args)
    temperatures = mixed_temperatures(args, flow)
    images = decode(flow, flow.sample_prior(args.grid**2, temperatures, generator(args.draw_seed, "mix", 0, args.cuda)))
    path = flags.picture_path(args, config, f"mix_temperature_T{cli.listing(temperatures)}")
    for picture in save_figure(grid_figure(images, args.grid), path):
        print(picture)
    print(f"{args.grid**2} samples of {trained['weights']} with {listing(temperatures)}")


if __name__ == "__main__":
    cli.script(main)
