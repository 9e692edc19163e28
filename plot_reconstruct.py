#!/usr/bin/env python3
"""Encode your own image, edit its latents level by level, and decode them."""

import torch

import args as flags
from data.images import load_single
from flow.latents import at_levels, decode, encode
from flow.preprocess import to_bytes
from utils import cli
from utils.plotting import COLUMN, grid_figure, save_figure, save_pixels
from utils.results import about, save, table


def edited(flow, z, other=None, swap=(), scale=(), values=()):
    """Latents (B, C, L, L) with levels of `swap` taken from `other`, then each level of `scale`, pairs (h, factor),
    multiplied by its factor, then each of `values`, pairs ((c, i, j), value), set."""
    z = torch.where(at_levels(flow, swap), other, z) if swap else z.clone()
    for h, factor in scale:
        z[:, flow.level_map == h] *= factor
    for latent, value in values:
        z[(..., *latent)] = value
    return z


def energies(flow, z):
    """Of latents (B, C, L, L), per level: number per image, mean square, and mean -log p(z) in nats, a dict each."""
    rows = []
    for h in range(flow.num_levels):
        own = z[:, flow.level_map == h]
        row = {"level": h, "latents": own.shape[1], "mean_square": own.square().mean().item()}
        rows.append({**row, "nats_per_latent": -flow.prior.log_prob(own).mean().item()})
    return rows


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, numbers=True, draws=False)
    add = parser.add_argument_group("image and edits, made in this order").add_argument
    add("--file", required=True, metavar="FILE", help="image file")
    add("--other", metavar="FILE", help="second image file, for --swap")
    add("--resize", action="store_true", help="fit files of another size to the flow: central square, resized")

    def add_edit(flag, kind, metavar, help):
        add(flag, type=cli.number_list(kind), default=(), metavar=f"{metavar}[,…]", help=help)

    add_edit("--swap", cli.count, "H", "levels to take from the other image (default: none)")
    add_edit("--scale", cli.assignment(cli.count, cli.finite), "H=FACTOR", "multiply a level's latents (default: none)")
    add_edit("--zero", cli.count, "H", "levels whose latents become 0 (default: none)")
    add_edit("--set", cli.assignment(cli.latent_name, cli.finite), "H:I:J:C=VALUE", "set a latent (default: none)")
    args = flags.parse(parser, argv)
    if bool(args.swap) != bool(args.other):
        raise cli.flag_error("--swap", cli.listing(args.swap) or "missing", "goes together with --other")
    flow, config, trained = flags.load_flow(args)
    for flag, levels in (("--swap", args.swap), ("--scale", [h for h, _ in args.scale]), ("--zero", args.zero)):
        cli.check_range(flag, levels, flow.num_levels)
    factors = [*args.scale, *((h, 0.0) for h in args.zero)]
    latents = cli.check_latents([name for name, _ in args.set], flow.level_map, "--set")
    values = [(latent, value) for latent, (_, value) in zip(latents, args.set, strict=True)]
    files, shape = [args.file, *[args.other] * bool(args.other)], (config["nchannels"], config["L"], args.resize)
    images = torch.stack([torch.from_numpy(load_single(file, *shape).copy()) for file in files])
    flow = flags.exact(flow, images)
    z = encode(flow, images)
    panels = {"image": images[:1] / 255, "reconstruction": decode(flow, z[:1])}
    error = (to_bytes(panels["reconstruction"]).int() - images[:1].int()).abs()
    results = {"file": args.file, "largest_error": error.max().item(), "pixel_values_off": (error > 0).sum().item()}
    results["energies"] = energies(flow, z[:1])
    print("{file}: largest error {largest_error} of 255, {pixel_values_off} pixel values off".format(**results))
    print(*table(results["energies"]), "mean_square is 1 under the prior, nats_per_latent is -log p", sep="\n")
    if args.other:
        panels["other"] = images[1:] / 255
    if factors or values or args.swap:
        panels["edited"] = decode(flow, edited(flow, z[:1], z[1:], args.swap, factors, values))
    path = flags.picture_path(args, config, trained, "reconstruct")
    grid, width = torch.cat(list(panels.values())), COLUMN * len(panels) / 4
    save_figure(grid_figure(grid, len(panels), width, columns=list(panels)), path)
    last = list(panels)[-1]
    save_pixels(to_bytes(panels[last])[0], f"{path}_pixels")
    print(f"{', '.join(panels)}: {args.file}, {trained['weights']}; {last} alone in the last file")
    if args.json:
        record = {"kind": "reconstruction", **about(__file__, argv, args.cuda), **trained, "config": config}
        save(args.json, {**record, "results": results})


if __name__ == "__main__":
    cli.script(main)
