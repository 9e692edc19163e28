#!/usr/bin/env python3
"""Inpaint images (sections 3.5 and 4.6, Appendix F: figure 8, table F1), or measure how its cost grows."""

import statistics
import time
from functools import partial
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

import args as flags
from data.images import load_mask, load_single
from flow.hierarchy import inference_cone
from flow.inpaint import CausalCone, WholeFlow, climber, inpaint, natural_problem, random_latents
from flow.load import build
from layers.fold import folded_together
from utils import cli
from utils.cli import UserError, flag_error
from utils.graphs import WARMUP
from utils.plotting import COLOURS, PAGE, Figure, grid_figure, save_figure, save_pixels, style
from utils.random import generator
from utils.results import about, inpainting_rows, save
from utils.timing import timed

METHODS = {"rgflow": ("rgflow",), "realnvp": ("realnvp_constrained", "realnvp")}  # of each model
LABELS = {"rgflow": "RG-Flow", "realnvp_constrained": "constrained\nReal NVP", "realnvp": "Real NVP"}
RED, COLUMNS = (0.85, 0.1, 0.1), 15  # of the figure
PER_IMAGE = "psnr_image", "psnr_region", "free_latents", "log_prob_best_draw", "log_prob", "log_prob_truth"
BENCH_FLAGS = {*flags.NETWORK.split()} - {"model", "L"}  # of main.py
PLACES = "origin", "centre"
BENCH_REGION, BENCH_IMAGES = 10, 15  # pixels, images
BENCH_BLOCKS = 11_000  # of images taken together by the whole flow: 3 GB with --nlayers 2 --nhidden 256
LINE = "{label}: PSNR {psnr_region:.2f} dB in the region, {psnr_image:.2f} dB of the image, "
LINE += "{free_latents:.0f} free latents of {total}, {seconds:.0f} s"
SPEED_LINE = "L {L}, {place}: cone {cone_seconds:.3g} s per step, {cone_blocks} blocks, {free_latents} latents;"
SPEED_LINE += " whole flow {whole_seconds:.3g} s, {whole_blocks} blocks"


def main(argv=None):
    parser = inpaint_parser()
    args = flags.parse(parser, argv)
    record = {"kind": "inpainting_speed" if args.bench else "inpainting", **about(__file__, argv, args.cuda)}
    results, draw = bench(args, parser.parse_known_args(argv)[1]) if args.bench else inpaint_all(args)
    if args.json:
        save(args.json, {**record, **results}, inpainting_rows)
    draw()


def image_numbers(text):
    """An argparse type: "15" is the first 15 images, "3,14" are these two, "3," is this one."""
    return cli.counts(text.removesuffix(",")) if "," in text else range(cli.positive(text))


def inpaint_parser():
    parser = flags.weights_parser(__doc__, pictures=True, numbers=True, images=True)
    add = parser.add_argument_group("inpainting").add_argument
    add("--realnvp", metavar="FILE", help="checkpoint of a Real NVP of the same image size, to compare")
    add("--split", choices=["train", "test"], default="test", help="split that the images are from")
    images = "one number: the first N images of the split; several numbers, or one and a comma: these images, from 0"
    add("--images", type=image_numbers, default=range(15), metavar="N[,N…]", help=f"{images} (default: 15)")
    add("--files", nargs="+", metavar="FILE", help="instead: inpaint image files, and write each result")
    region = "corrupted rectangle in pixels; without row and column, at a random place in each image (default: 10,10)"
    add("--region", type=cli.counts, default=(10, 10), metavar="[ROW,COLUMN,]HEIGHT,WIDTH", help=region)
    add("--mask", metavar="FILE", help="instead: image file whose pixels above half of the brightness are corrupted")
    add("--resize", action="store_true", help="fit files of another size to the flow: central square, resized")
    add("--batch_size", type=cli.positive, default=64, metavar="IMAGES", help="images that are optimised together")
    add("--rate", type=cli.above_zero, default=0.1, metavar="RATE", help="learning rate of Adam")
    add("--steps", type=cli.count, default=300, metavar="N", help="steps of Adam")
    add("--draws", type=cli.positive, default=200, metavar="N", help="draws; Adam starts from the most likely draw")

    add = parser.add_argument_group("speed").add_argument
    speed = "instead: seconds per step of an untrained RG-Flow, with the causal cone and with the whole flow; takes the"
    add("--bench", action="store_true", help=f"{speed} network flags of main.py, not --weights")
    edges = "edges of the images (default: 32,64,128,256)"
    add("--edges", type=cli.number_list(cli.positive), default=(32, 64, 128, 256), metavar="L[,L…]", help=edges)
    add("--repeats", type=cli.positive, default=5, metavar="N", help="measurements, after a warm-up")
    parser.restrict("weights realnvp data_path prepared_path split images files region mask resize", excludes="bench")
    parser.restrict("batch_size rate steps draws", excludes="bench")
    parser.restrict("edges repeats", needs="bench")
    parser.restrict("region", excludes="mask")
    parser.restrict("split images data_path prepared_path", excludes="files")
    parser.restrict("resize", needs="files mask")
    return parser


def inpaint_all(args):
    """Inpaint the images that the flags name by each method: the results for the record, and a function that draws."""
    flow, config, trained = flags.load_flow(args)
    flows = [(flow, config, trained)]
    if args.realnvp:
        if config["model"] == "realnvp":
            raise UserError(f"--realnvp {args.realnvp}: {trained['weights']} is a Real NVP itself")
        other, its_config, its_trained = flags.load_flow(args, args.realnvp)
        if its_config["model"] != "realnvp":
            raise UserError(f"--realnvp {args.realnvp}: must be a Real NVP, is an RG-Flow")
        if (other.nchannels, other.L) != (flow.nchannels, flow.L):
            raise UserError(f"--realnvp {args.realnvp}: its images have another shape than those of --weights")
        if its_config["data"] != config["data"]:
            rule = f"trained on {its_config['data']}, must be {config['data']} as for --weights, or see --data"
            raise UserError(f"--realnvp {args.realnvp}: {rule}")
        flows.append((other, its_config, its_trained))
    names, images, warnings = load_images(args, *(each for _, each, _ in flows))
    regions, rectangles = load_regions(args, names, flow.L)
    source = args.mask or f"--region {cli.listing(args.region)}"
    print(f"{source}: {int(regions[0].sum())} of {regions[0].numel()} pixels corrupted")
    images, regions, results, inpainted = images.to(args.cuda), regions.to(args.cuda), [], {}
    corrupted = images.masked_fill(regions[:, None], 128)  # mid-grey
    for flow, its_config, its_trained in flows:
        flow = flags.exact(flow, torch.cat((images, corrupted)))
        for method in METHODS[its_config["model"]]:
            start, label = time.perf_counter(), LABELS[method].replace("\n", " ")
            problem_of = partial(make_problem, method, flow, config["kernel_size"], args.draw_seed)
            try:
                inpainted[method], per_image = inpaint_batches(flow, problem_of, images, regions, names, args, label)
            except FloatingPointError as error:
                raise UserError(f"{its_trained['weights']}: {error}") from error
            means = {key: statistics.fmean(per_image[key]) for key in PER_IMAGE[:3]}
            settings = {"lr": args.rate, "steps": args.steps, "draws": args.draws, "region": args.mask or rectangles}
            own = {"seconds": time.perf_counter() - start, "names": names, "per_image": per_image, "config": its_config}
            own["folder"] = Path(args.data_path).absolute().name if config["data"] == "folder" else None
            own["dtype"] = str(next(flow.parameters()).dtype)[6:]
            results.append({"method": method, **means, "images": len(names), **settings, **own, **its_trained})
            print(LINE.format(label=label, total=images[0].numel(), **results[-1]))
    draw = partial(write_pictures, args, config, trained, images, regions, inpainted)
    return {**trained, "config": config, "warnings": warnings, "results": results}, draw


def make_problem(method, flow, kernel_size, seed, names, x, regions):
    """What `method` maximises; kernel_size: of the RG-Flow whose number of free latents a constrained Real NVP gets."""
    if method != "realnvp_constrained":
        return natural_problem(flow, x, regions)
    counts = [x.shape[1] * int(inference_cone(region, kernel_size).sum()) for region in regions]
    generators = [generator(seed, "free latents", name) for name in names]
    return WholeFlow(flow, x, regions, random_latents(counts, x[0].numel(), generators).to(x.device))


def inpaint_batches(flow, problem_of, images, regions, names, args, label):
    """uint8 images (N, C, L, L), regions (N, L, L) bool -> inpainted images, {each of PER_IMAGE: a list}."""
    flow.requires_grad_(False)
    found, total = [], len(images) * (args.draws + args.steps + 1)
    with tqdm(total=total, desc=label, unit="image steps", disable=None) as bar:
        for start in range(0, len(images), args.batch_size):
            batch, region, own = (each[start : start + args.batch_size] for each in (images, regions, names))
            source, advance = generator(args.draw_seed, "inpaint", own[0], args.cuda), partial(bar.update, len(batch))
            given = partial(problem_of, own), args.rate, args.steps, args.draws, source, advance
            found.append(inpaint(flow, batch, region, *given))
    filled, *numbers = (torch.cat(parts) for parts in zip(*found, strict=True))
    return filled, dict(zip(PER_IMAGE, (each.tolist() for each in numbers), strict=True))


def load_images(args, config, *others):
    """Numbers in the split or names of files, uint8 images (N, C, L, L), and sentences that the result must carry."""
    if args.files:
        shape = config["nchannels"], config["L"], args.resize
        return args.files, torch.stack([torch.tensor(load_single(file, *shape)) for file in args.files]), []
    dataset, warnings = flags.open_data(config, args, *others)
    array, numbers = getattr(dataset, args.split), list(args.images)
    if max(numbers) >= len(array):
        raise flag_error("--images", max(numbers), f"the {args.split} split has {len(array)} images, counted from 0")
    return numbers, torch.from_numpy(array[numbers]), warnings


def load_regions(args, names, L):
    """The corrupted pixels of each image, (N, L, L) bool, and [row, column, height, width] of each, None for a mask."""
    if args.mask:
        mask = torch.tensor(load_mask(args.mask, L, args.resize))
        return mask.repeat(len(names), 1, 1), None
    refuse = partial(flag_error, "--region", cli.listing(args.region))
    if len(args.region) not in (2, 4):
        raise refuse("must be height,width or row,column,height,width")
    *corner, height, width = args.region
    if not height or not width:
        raise refuse("no pixel is corrupted, height and width must be at least 1")
    if any(start + edge > L for start, edge in zip(corner or (0, 0), (height, width), strict=True)):
        raise refuse(f"must lie inside the image of {L}x{L} pixels")
    regions, rectangles = torch.zeros(len(names), L, L, dtype=torch.bool), []
    for region, name in zip(regions, names, strict=True):
        source = generator(args.draw_seed, "region", name)
        drawn = [int(torch.randint(L - edge + 1, (), generator=source)) for edge in (height, width)]
        row, column = corner or drawn
        region[row : row + height, column : column + width] = True
        rectangles.append([row, column, height, width])
    return regions, rectangles


def write_pictures(args, config, trained, images, regions, inpainted):
    """The figure (rows: truth, corrupted, each method; columns: images) and the results of --files; prints paths."""
    red = torch.tensor(RED, device=images.device)[:, None, None]
    truth, *filled = (each[:COLUMNS].expand(-1, 3, -1, -1) / 255 for each in (images, *inpainted.values()))
    rows = torch.cat([truth, torch.where(regions[:COLUMNS, None], red, truth), *filled])
    labels = ["given" if args.files else "ground truth", "corrupted", *(LABELS[method] for method in inpainted)]
    figure = grid_figure(rows.cpu(), len(truth), 0.8 + 0.42 * len(truth), labels, row_label=0.8)
    name = flags.picture_path(args, config, trained, "inpaint")
    save_figure(figure, name)
    for method, filled in inpainted.items() if args.files else ():
        for k, (file, image) in enumerate(zip(args.files, filled.cpu(), strict=True)):
            save_pixels(image, f"{name}_{method}_{k}_{cli.file_name(Path(file).stem)}")


def bench(args, network):
    """Seconds per step of Adam by the causal cone and by the whole flow of an untrained RG-Flow with the flags
    `network` of main.py, for each edge and place of the region: the results for the record, a drawing function."""
    for flag in args.typed:
        if flag in args.run.given and flag not in BENCH_FLAGS:
            raise flag_error(f"--{flag}", getattr(args.run, flag), "has no effect with --bench")
    if min(args.edges) < BENCH_REGION:
        raise flag_error("--edges", min(args.edges), f"must be at least {BENCH_REGION}")
    C, m, results, counts = args.run.nchannels, args.run.kernel_size, [], []
    own = ["--data=folder", "--model=rgflow", f"--nchannels={C}", f"--cuda={args.cuda.partition(':')[2]}"]
    own.append(f"--dtype={args.dtype or 'float32'}")
    runs = [flags.get_args([*network, *own, f"--L={L}"]) for L in args.edges]
    for run in runs:
        torch.manual_seed(args.draw_seed)
        flow = build(vars(run)).to(args.cuda).eval().requires_grad_(False)
        x = torch.randn(BENCH_IMAGES, C, run.L, run.L).to(args.cuda, getattr(torch, run.dtype))
        blocks = sum((l // m) ** 2 for _, l, _ in flow.layers())
        together, whole_seconds = min(BENCH_IMAGES, max(1, BENCH_BLOCKS // blocks)), None
        for place in PLACES:
            regions = bench_region(run.L, place).to(args.cuda).expand(BENCH_IMAGES, -1, -1)
            cone = CausalCone(flow, x, regions)
            if whole_seconds is None:  # the same for all places
                parts = [(part, regions[: len(part)], cone.free[cone.image < len(part)]) for part in x.split(together)]
                whole_seconds = seconds_per_step([WholeFlow(flow, *part) for part in parts], args)
            sizes = {"free_latents": len(cone.free) // BENCH_IMAGES, "cone_blocks": cone.num_blocks // BENCH_IMAGES}
            sizes |= {"cone_seconds": seconds_per_step([cone], args), "whole_seconds": whole_seconds}
            sizes |= {"whole_blocks": blocks, "whole_images_together": together}
            results.append({"L": run.L, "place": place, "images": BENCH_IMAGES, **sizes})
            print(SPEED_LINE.format(**results[-1]), flush=True)
    for L, place in product([args.edges[0] * 2**k for k in range(6)], PLACES):
        free = C * int(inference_cone(bench_region(L, place), m).sum())
        counts.append({"L": L, "place": place, "free_latents": free, "latents": C * L**2})
    draw = partial(write_speed, cli.picture_path(args, "inpaint_speed", key=vars(runs[-1])), results, counts)
    return {"network": flags.network_name(run), "results": results, "latents": counts}, draw


def bench_region(L, place):
    region, start = torch.zeros(L, L, dtype=torch.bool), 0 if place == "origin" else (L - BENCH_REGION) // 2
    region[start : start + BENCH_REGION, start : start + BENCH_REGION] = True
    return region


def seconds_per_step(problems, args):
    """Median over repeats of the time of one step for all of `problems`, one after the other."""
    steps, seconds, device = [], [], torch.device(args.cuda)
    draws = generator(args.draw_seed, "bench", 0, device)
    for problem in problems:
        values = problem.flow.prior.sample(problem.x.new_empty(problem.free.shape), 1.0, draws)
        steps.append(climber(problem, values, args.rate))
    together = timed(lambda: [step() for step in steps], device, seconds)
    with folded_together(problem.flow):
        for _ in range((WARMUP + 1 if device.type == "cuda" else 1) + args.repeats):
            together()
    return statistics.median(seconds[-args.repeats :])


def write_speed(name, results, counts):
    """Draw time per step and number of free latents against the edge of the image."""
    panels = [(results, "cone_seconds", "whole_seconds", "time per step in s")]
    panels += [(counts, "free_latents", "latents", "latents per image")]
    with style():
        figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
        for axes, (rows, cone, whole, label) in zip(figure.subplots(1, 2), panels, strict=True):
            for k, place in ((0, "origin"), (2, "centre"), (1, "origin")):
                key, text = (cone, f"causal cone, region at the {place}") if k else (whole, "whole flow")
                edges, values = zip(*[(row["L"], row[key]) for row in rows if row["place"] == place], strict=True)
                axes.plot(edges, values, "o-" if k else "^-", color=COLOURS[k], label=text)
            axes.set_xscale("log", base=2)
            axes.set(xlabel="edge $L$ of the image", ylabel=label, yscale="log", xticks=edges, xticklabels=edges)
            axes.minorticks_off()
            axes.legend()
        save_figure(figure, name)


if __name__ == "__main__":
    cli.script(main)
