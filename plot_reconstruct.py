#!/usr/bin/env python3
"""Encode an image, edit its latents level by level, and decode them."""

import torch

import args as flags
from flow.latents import decode, edited, energies, latents_of
from flow.preprocess import to_bytes
from utils import cli
from utils.plotting import COLUMN, grid_figure, save_figure, save_pixels
from utils.results import about, save, table


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, numbers=True, images=True, draws=False)
    add = parser.add_argument_group("image and edits, made in this order").add_argument
    file = "image file; or test:N, a test image; or sample:SEED, the first sample of plot_samples.py --draw_seed SEED"
    add("--file", type=cli.source, required=True, metavar="FILE|test:N|sample:SEED", help=file)
    add("--other", type=cli.source, metavar="FILE|test:N|sample:SEED", help="second image, for --swap")
    add("--resize", action="store_true", help="fit files of another size to the flow: central square, resized")
    cli.add_temperature(add)

    def add_edit(flag, kind, metavar, help):
        add(flag, type=cli.number_list(kind), default=(), metavar=f"{metavar}[,…]", help=help)

    add_edit("--swap", cli.count, "H", "levels to take from the other image (default: none)")
    add_edit("--scale", cli.assignment(cli.count, cli.finite), "H=FACTOR", "multiply a level's latents (default: none)")
    add_edit("--zero", cli.count, "H", "levels whose latents become 0 (default: none)")
    add_edit("--set", cli.assignment(cli.latent_name, cli.finite), "H:I:J:C=VALUE", "set a latent (default: none)")
    args = flags.parse(parser, argv)
    if bool(args.swap) != bool(args.other):
        raise cli.flag_error("--swap", cli.listing(args.swap) or "missing", "goes together with --other")
    sources = [args.file, *[args.other] * bool(args.other)]
    named = {"test": "test image", "sample": "sample", "file": "file"}
    for kind, own in (("test", "data data_path prepared_path"), ("sample", "temperature"), ("file", "resize")):
        for flag in own.split():
            if flag in args.typed and kind not in [each for each, _ in sources] and (args.weights or kind != "test"):
                raise cli.UserError(f"argument --{flag}: has no effect without a {named[kind]} in --file or --other", 2)
    flow, config, trained = flags.load_flow(args)
    temperatures = cli.check_temperature(args.temperature, flow)
    for flag, levels in (("--swap", args.swap), ("--scale", [h for h, _ in args.scale]), ("--zero", args.zero)):
        cli.check_range(flag, levels, flow.num_levels)
    factors = [*args.scale, *((h, 0.0) for h in args.zero)]
    latents = cli.check_latents([name for name, _ in args.set], flow.level_map, "--set")
    values = [(latent, value) for latent, (_, value) in zip(latents, args.set, strict=True)]
    images = [
        flags.load_source(each, config, args, flag) for each, flag in zip(sources, ("--file", "--other"), strict=False)
    ]
    if given := [image for image in images if image is not None]:
        flow = flags.exact(flow, torch.stack(given))
    z = torch.stack([latents_of(flow, *each, temperatures) for each in zip(sources, images, strict=True)])
    names, decoded = [":".join(map(str, each)).removeprefix("file:") for each in sources], decode(flow, z)
    panels, results = {"sample": decoded[:1]}, {"file": names[0], "energies": energies(flow, z[:1])}
    if images[0] is not None:
        panels = {"image": images[0][None] / 255, "reconstruction": decoded[:1]}
        error = (to_bytes(decoded[0]).int() - images[0].int()).abs()
        results |= {"largest_error": error.max().item(), "pixel_values_off": (error > 0).sum().item()}
        print("{file}: largest error {largest_error} of 255, {pixel_values_off} pixel values off".format(**results))
    print(*table(results["energies"]), "mean_square is 1 under the prior, nats_per_latent is -log p", sep="\n")
    if args.other:
        panels["other"] = decoded[1:] if images[1] is None else images[1][None] / 255
    if factors or values or args.swap:
        panels["edited"] = decode(flow, edited(flow, z[:1], z[1:], args.swap, factors, values))
    path = flags.picture_path(args, config, trained, "reconstruct")
    grid, width = torch.cat(list(panels.values())), COLUMN * len(panels) / 4
    save_figure(grid_figure(grid, len(panels), width, columns=list(panels)), path)
    last = list(panels)[-1]
    save_pixels(to_bytes(panels[last])[0], f"{path}_pixels")
    print(f"{', '.join(panels)}: {names[0]}, {trained['weights']}; {last} alone in the last file")
    if args.json:
        record = {"kind": "reconstruction", **about(__file__, argv, args.cuda), **trained, "config": config}
        save(args.json, {**record, "results": results})


if __name__ == "__main__":
    cli.script(main)
