#!/usr/bin/env python3
"""Take an image of your own to its latents and back, and edit it level by level on the way.

python plot_reconstruct.py --weights saved_model/…/10.state --file photo.png --resize
python plot_reconstruct.py --weights … --file a.png --swap 3 --other b.png
python plot_reconstruct.py --weights … --file a.png --scale 0=0.5 --zero 1 --set 3:0:8:1=2.5
"""

import sys
from pathlib import Path

import torch

import args as flags
from data.images import load_single
from flow.latents import at_levels, decode, encode
from flow.preprocess import to_bytes
from utils import cli
from utils.cli import flag_error
from utils.plotting import COLUMN, grid_figure, save_figure, save_pixels
from utils.results import about, save


def edited(flow, z, other=None, swap=(), scale=(), values=()):
    """Latents (B, C, L, L) with levels of `swap` taken from `other`, then each level of `scale`, pairs (h, factor),
    multiplied by its factor, then each of `values`, pairs ((c, i, j), value), set."""
    if swap:
        z = torch.where(at_levels(flow, swap), other, z)
    z = z.clone()
    for h, factor in scale:
        z[:, flow.level_map == h] *= factor
    for latent, value in values:
        z[(..., *latent)] = value
    return z


def energies(flow, z):
    """Of latents (B, C, L, L), per level: number per image, mean square, and mean -log p(z) in nats, a dict each."""
    return [
        {
            "level": h,
            "latents": int((flow.level_map == h).sum()),
            "mean_square": z[:, flow.level_map == h].square().mean().item(),
            "nats_per_latent": -flow.prior.log_prob(z[:, flow.level_map == h]).mean().item(),
        }
        for h in range(flow.num_levels)
    ]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = flags.get_args(argv, reconstruct_parser())
    if bool(args.swap) != bool(args.other):
        raise flag_error("--swap", cli.listing(args.swap) or "missing", "goes together with --other")
    flow, config, trained = flags.load_flow(args)
    scale = [*args.scale, *((h, 0.0) for h in args.zero)]
    for flag, levels in (("--swap", args.swap), ("--scale", [h for h, _ in args.scale]), ("--zero", args.zero)):
        cli.check_range(flag, levels, flow.num_levels)
    latents = cli.check_latents([name for name, _ in args.set], flow, "--set")
    values = list(zip(latents, [value for _, value in args.set], strict=True))

    files = [args.file, *([args.other] if args.other else [])]
    shape = config["nchannels"], config["L"], args.resize
    images = torch.stack([torch.from_numpy(load_single(file, *shape).copy()) for file in files])
    z = encode(flow, images)
    panels = [images[:1] / 255, decode(flow, z[:1])]
    labels = ["image", "reconstruction"]
    error = (to_bytes(panels[1]).int() - images[:1].int()).abs()
    results = {
        "file": args.file,
        "largest_error": error.max().item(),
        "pixel_values_off": (error > 0).sum().item(),
        "energies": energies(flow, z[:1]),
    }
    print(f"{args.file}: largest error {error.max().item()} of 255, {results['pixel_values_off']} pixel values off")
    for energy in results["energies"]:
        print(
            "level {level}: {latents} latents, mean square {mean_square:.3f} (1 under the prior), -log p"
            " {nats_per_latent:.3f} nats per latent".format(**energy)
        )
    name = f"reconstruct_{Path(args.file).stem}"
    if scale or values or args.swap:
        if args.other:
            panels.append(images[1:] / 255)
            labels.append("other")
        panels.append(decode(flow, edited(flow, z[:1], z[1:], args.swap, scale, values)))
        labels.append("edited")
        name += edit_name(args)
    path = flags.picture_path(args, config, name)
    figure = grid_figure(torch.cat(panels), len(panels), COLUMN * len(panels) / 4, columns=labels)
    for picture in (*save_figure(figure, path), save_pixels(to_bytes(panels[-1])[0], f"{path}_pixels")):
        print(picture)
    print(f"{', '.join(labels)}: {args.file}, {trained['weights']}; {labels[-1]} alone in the last file")
    if args.json:
        record = {"kind": "reconstruction", **about(__file__, argv, args.cuda), **trained, "config": config}
        save(args.json, {**record, "results": results})


def edit_name(args):
    """The edits as a part of a file's name."""
    edits = {
        "swap": args.swap,
        "scale": [f"{h}={factor:g}" for h, factor in args.scale],
        "zero": args.zero,
        "set": [f"{'-'.join(map(str, latent))}={value:g}" for latent, value in args.set],
    }
    return "".join(f"_{edit}{cli.listing(values)}" for edit, values in edits.items() if values)


def reconstruct_parser():
    parser = flags.build_parser(
        "Take an image of your own to its latents and back, and edit it level by level on the way.",
        needs_weights=True,
        pictures=True,
        numbers=True,
    )
    group = parser.add_argument_group("image and edits, in the order in which they are made")
    group.add_argument("--file", required=True, metavar="FILE", help="image file")
    group.add_argument("--other", metavar="FILE", help="a second one, for --swap")
    group.add_argument(
        "--resize", action="store_true", help="bring files of another size to the flow's: the central square, resized"
    )
    levels = cli.number_list(cli.count)
    group.add_argument("--swap", type=levels, default=(), metavar="H[,…]", help="levels to take from the other image")
    group.add_argument(
        "--scale",
        type=cli.number_list(cli.assignment(cli.count, cli.finite)),
        default=(),
        metavar="H=FACTOR[,…]",
        help="multiply the latents of a level by a factor",
    )
    group.add_argument("--zero", type=levels, default=(), metavar="H[,…]", help="levels whose latents become 0")
    group.add_argument(
        "--set",
        type=cli.number_list(cli.assignment(cli.latent_name, cli.finite)),
        default=(),
        metavar="H:I:J:C=VALUE[,…]",
        help="give single latents, level:row:column:channel, a value",
    )
    return parser


if __name__ == "__main__":
    cli.script(main)
