#!/usr/bin/env python3
"""Draw samples at a temperature of their own per level (Appendix D, the basis of figure 6).

python plot_mix_temperature.py --weights saved_model/…/10.state
python plot_mix_temperature.py --data celeba32 --temperatures 0.2,0.6,0.6,0.6
"""

import args as flags
from flow.preprocess import to_image
from utils.plotting import grid_figure, save_figure
from utils.random import generator

LOWEST, HIGHER = 0.2, 0.6


def main(argv=None):
    parser = flags.build_parser(
        "Draw samples at a temperature of their own per level (Appendix D).", needs_weights=True, pictures=True
    )
    group = parser.add_argument_group("mixed temperatures")
    group.add_argument(
        "--temperatures",
        type=flags.number_list(flags.non_negative),
        metavar="T[,T…]",
        help="one for all levels or one per level from h = 0 up, comma separated"
        f" (default: {LOWEST} at h = 0, {HIGHER} above)",
    )
    group.add_argument("--grid", type=flags.positive, default=4, metavar="N", help="samples per row and column")
    args = flags.get_args(argv, parser)
    flow, config, trained = flags.load_flow(args)
    temperatures = args.temperatures or (LOWEST, *[HIGHER] * (flow.num_levels - 1))
    if len(temperatures) == 1:
        temperatures *= flow.num_levels
    if len(temperatures) != flow.num_levels:
        parser.error(
            f"argument --temperatures: must be one number or {flow.num_levels}, one per level of {trained['weights']}"
        )
    images = to_image(flow.sample(args.grid**2, temperatures, generator(args.draw_seed, "mix", 0, args.cuda)))
    path = flags.picture_path(args, config, "mix_temperature")
    for picture in save_figure(grid_figure(images.cpu(), args.grid), path):
        print(picture)
    listing = ", ".join(f"T_{h} = {T:g}" for h, T in enumerate(temperatures))
    print(f"{args.grid**2} samples of {trained['weights']} with {listing}")


if __name__ == "__main__":
    flags.script(main)
