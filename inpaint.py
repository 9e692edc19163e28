#!/usr/bin/env python3
"""Inpaint images (sections 3.5 and 4.6, Appendix F: figure 8, table F1), or measure how its cost grows with the image.

python inpaint.py --weights saved_model/…/10.state --realnvp saved_model/…/10.state
python inpaint.py --weights … --images 3,14,15 --region 4,8,10,10
python inpaint.py --weights … --files photo.png --mask scratches.png
python inpaint.py --bench --nlayers 2 --nhidden 256
"""

import copy
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import args as flags
from bench import timed
from data.images import load_mask, load_single
from flow import RGFlow
from flow.hierarchy import cone_blocks, inference_cone
from flow.inpaint import CausalCone, WholeFlow, climb, maximise, psnr, random_latents
from flow.load import build
from flow.preprocess import to_image, to_model, to_uint8
from utils import cli
from utils.cli import UserError
from utils.memory import keep_freed_memory
from utils.plotting import COLOURS, PAGE, grid_figure, save_figure, save_pixels, style
from utils.random import generator
from utils.results import about, inpainting_rows, save

LABELS = {"rgflow": "RG-Flow", "realnvp_constrained": "constrained\nReal NVP", "realnvp": "Real NVP"}
RED = (0.85, 0.1, 0.1)
COLUMNS = 15  # of the figure
MID_GREY = 0.0  # in model space
PLACES = ("origin", "centre")
BENCH_REGION, BENCH_IMAGES = 10, 15  # pixels, images
# The whole flow is measured on as many images at a time as have this many blocks: 0.75 GB of activations with 2 layers
# of width 256 and one residual block, 3 GB with four.
BENCH_BLOCKS = 11_000


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = inpaint_parser()
    args = flags.get_args(argv, parser)
    keep_freed_memory()
    record = {"kind": "inpainting_speed" if args.bench else "inpainting", **about(__file__, argv, args.cuda)}
    results, draw = bench(argv, parser, args) if args.bench else inpaint_all(args, parser)
    if args.json:
        save(args.json, {**record, **results}, inpainting_rows)
    draw()


def image_numbers(text):
    """An argparse type: "15" is the first 15 images, "3,14" are these two, "3," is this one."""
    numbers = cli.number_list(cli.count)(text.removesuffix(","))
    return numbers if "," in text else range(*numbers)


def inpaint_parser():
    parser = flags.build_parser(__doc__.split("\n")[0], needs_weights=True, pictures=True, numbers=True)
    group = parser.add_argument_group("inpainting")
    group.add_argument("--realnvp", metavar="FILE", help="checkpoint of a Real NVP of the same image size, to compare")
    group.add_argument("--split", choices=["train", "test"], default="test", help="split that the images are from")
    group.add_argument(
        "--images",
        type=image_numbers,
        default=range(15),
        metavar="N[,N…]",
        help="one number: so many images from the split's start; several, or one and a comma: these images, counted"
        " from 0 (default: 15)",
    )
    group.add_argument("--files", nargs="+", metavar="FILE", help="image files instead; also writes each result")
    group.add_argument(
        "--region",
        type=cli.number_list(cli.count),
        default=(10, 10),
        metavar="[ROW,COLUMN,]HEIGHT,WIDTH",
        help="corrupted rectangle, in pixels; without row and column, somewhere else in each image (default: 10,10)",
    )
    group.add_argument(
        "--mask", metavar="FILE", help="image file whose non-zero pixels are the corrupted ones, instead"
    )
    group.add_argument(
        "--resize", action="store_true", help="bring files of another size to the flow's: the central square, resized"
    )
    group.add_argument("--rate", type=cli.above_zero, default=0.1, metavar="RATE", help="learning rate of Adam")
    group.add_argument("--steps", type=cli.count, default=300, metavar="N", help="steps of Adam")
    group.add_argument("--draws", type=cli.positive, default=200, metavar="N", help="draws to start from the best of")

    group = parser.add_argument_group("speed")
    group.add_argument(
        "--bench",
        action="store_true",
        help="instead: seconds per step of an untrained RG-Flow, evaluating the causal cone or the whole flow",
    )
    sizes = cli.number_list(cli.positive)
    group.add_argument(
        "--edges", type=sizes, default=(32, 64, 128, 256), metavar="L[,L…]", help="edges (default: 32,64,128,256)"
    )
    group.add_argument("--repeats", type=cli.positive, default=5, metavar="N", help="measurements, after a warm-up")
    return parser


def inpaint_all(args, parser):
    """Inpaint the images that the flags ask for by each method; what the record says of it, and a function that draws
    it."""
    flow, config, trained = flags.load_flow(args)
    flows = [(flow, config, trained)]
    if args.realnvp:
        if not isinstance(flow, RGFlow):
            raise UserError(f"--realnvp {args.realnvp}: {trained['weights']} is a Real NVP itself")
        second = copy.copy(args)
        second.weights, second.given_data = args.realnvp, config["data"]
        other, its_config, its_trained = flags.load_flow(second)
        if isinstance(other, RGFlow):
            raise UserError(f"--realnvp {args.realnvp}: must be a Real NVP, is an RG-Flow")
        if (other.nchannels, other.L) != (flow.nchannels, flow.L):
            raise UserError(f"--realnvp {args.realnvp}: its images have another shape than those of --weights")
        flows.append((other, its_config, its_trained))
    names, images, warnings = load_images(args, parser, config)
    regions, rectangles = load_regions(args, parser, names, flow.L)
    images, regions = images.to(args.cuda), regions.to(args.cuda)

    results, inpainted = [], {}
    methods = [(method, *each) for each in flows for method in methods_of(each[0])]
    for method, flow, its_config, its_trained in methods:
        inpaint = Inpainting(method, flow, config["kernel_size"], args)
        start = time.perf_counter()
        try:
            inpainted[method], per_image = inpaint(images, regions, names)
        except FloatingPointError as error:
            raise UserError(f"{its_trained['weights']}: {error}") from error
        seconds = time.perf_counter() - start
        means = {key: statistics.fmean(per_image[key]) for key in ("psnr_image", "psnr_region", "free_latents")}
        settings = {"lr": args.rate, "steps": args.steps, "draws": args.draws, "region": args.mask or rectangles}
        results.append({"method": method, **means, "images": len(names), **settings, "seconds": seconds})
        results[-1].update(names=names, per_image=per_image, config=its_config, **its_trained)
        print(
            f"{name_of(method)}: PSNR {means['psnr_region']:.2f} dB in the region, {means['psnr_image']:.2f} dB of the"
            f" image, {means['free_latents']:.0f} free latents of {images[0].numel()}, {seconds:.0f} s"
        )
    pictures = partial(write_pictures, args, config, images, regions, inpainted)
    return {**trained, "config": config, "warnings": warnings, "results": results}, pictures


def methods_of(flow):
    return ["rgflow"] if isinstance(flow, RGFlow) else ["realnvp_constrained", "realnvp"]


def name_of(method):
    return LABELS[method].replace("\n", " ")


class Inpainting:
    """One method with one flow; calling it inpaints images.

    kernel_size: of the RG-Flow whose number of free latents a constrained Real NVP gets
    """

    def __init__(self, method, flow, kernel_size, args):
        self.method, self.flow, self.kernel_size, self.args = method, flow.requires_grad_(False), kernel_size, args

    def __call__(self, images, regions, names):
        """uint8 images (N, C, L, L), regions (N, L, L) bool -> inpainted images, a dict of lists with what came out.

        The images of a batch are optimised together.
        """
        filled, lists = [], {}
        total = len(images) * (self.args.draws + self.args.steps + 1)
        with tqdm(total=total, desc=name_of(self.method), unit="image steps", disable=None) as bar:
            for start in range(0, len(images), self.args.batch_size):
                part = slice(start, start + self.args.batch_size)
                batch, numbers = self.inpaint_batch(images[part], regions[part], names[part], bar)
                filled.append(batch)
                for key, values in numbers.items():
                    lists.setdefault(key, []).extend(values.tolist())
        return torch.cat(filled), lists

    def inpaint_batch(self, images, regions, names, bar):
        args, dtype = self.args, next(self.flow.parameters()).dtype
        whole, _ = to_model(images, noise=0.5, dtype=dtype)
        problem = self.problem(whole.masked_fill(regions[:, None], MID_GREY), regions, names)
        draws = generator(args.draw_seed, "inpaint", names[0], args.cuda)
        best = maximise(problem, args.rate, args.steps, args.draws, draws, lambda: bar.update(len(images)))
        values, log_prob, log_prob_start = best
        x = problem.paste(values)
        truth, outcome = to_image(whole), to_image(x)
        return torch.where(regions[:, None], to_uint8(x), images), {
            "psnr_image": psnr(outcome, truth),
            "psnr_region": psnr(outcome, truth, regions),
            "free_latents": problem.image.bincount(minlength=len(images)),
            "log_prob_best_draw": log_prob_start,
            "log_prob": log_prob,
            "log_prob_truth": self.flow.log_prob(whole),
        }

    def problem(self, x, regions, names):
        if self.method == "rgflow":
            return CausalCone(self.flow, x, regions)
        size = x[0].numel()
        if self.method == "realnvp":
            return WholeFlow(self.flow, x, regions, torch.arange(x.numel(), device=x.device))
        counts = [x.shape[1] * int(inference_cone(region, self.kernel_size).sum()) for region in regions]
        draws = [generator(self.args.draw_seed, "free latents", name) for name in names]
        return WholeFlow(self.flow, x, regions, random_latents(counts, size, draws).to(x.device))


def load_images(args, parser, config):
    """Numbers in the split or names of files, uint8 images (N, C, L, L), and sentences that the result must carry."""
    nchannels, L = config["nchannels"], config["L"]
    if args.files:
        arrays = [torch.tensor(load_single(file, nchannels, L, args.resize)) for file in args.files]
        return args.files, torch.stack(arrays), []
    data, warnings = flags.open_data(args, config)
    array = getattr(data, args.split)
    if not args.images:
        parser.error("argument --images: 0: must be at least one image")
    last = args.images[-1] if isinstance(args.images, range) else max(args.images)
    if last >= len(array):
        parser.error(f"argument --images: no image {last}, the {args.split} split has {len(array)}, counted from 0")
    numbers = list(args.images)
    return numbers, torch.from_numpy(array[numbers]), warnings


def load_regions(args, parser, names, L):
    """The corrupted pixels of each image, (N, L, L) bool, and, but for a mask, [row, column, height, width]s."""
    if args.mask:
        mask = torch.tensor(load_mask(args.mask, L, args.resize))
        if not mask.any():
            part = " of the central square" if args.resize else ""
            raise UserError(f"--mask {args.mask}: no pixel{part} is corrupted, all are 0")
        return mask.repeat(len(names), 1, 1), None
    text = ",".join(map(str, args.region))
    if len(args.region) not in (2, 4):
        parser.error(f"argument --region: {text}: must be height,width or row,column,height,width")
    *corner, height, width = args.region
    if not height or not width:
        parser.error(f"argument --region: {text}: no pixel is corrupted, height and width must be at least 1")
    if any(start + edge > L for start, edge in zip(corner or (0, 0), (height, width), strict=True)):
        parser.error(f"argument --region: {text}: must lie inside the image of {L}x{L} pixels")
    regions, rectangles = torch.zeros(len(names), L, L, dtype=torch.bool), []
    for name, region in zip(names, regions, strict=True):
        draws = generator(args.draw_seed, "region", name)
        drawn = [int(torch.randint(L - edge + 1, (), generator=draws)) for edge in (height, width)]
        row, column = corner or drawn
        region[row : row + height, column : column + width] = True
        rectangles.append([row, column, height, width])
    return regions, rectangles


def write_pictures(args, config, images, regions, inpainted):
    """The figure (rows: truth, corrupted, each method; columns: images) and the results of --files; prints paths."""
    shown = slice(0, COLUMNS)
    red = torch.tensor(RED, device=images.device)[:, None, None]
    truth = images[shown].expand(-1, 3, -1, -1) / 255
    rows = [truth, torch.where(regions[shown, None], red, truth)]
    rows += [filled[shown].expand(-1, 3, -1, -1) / 255 for filled in inpainted.values()]
    labels = ["given" if args.files else "ground truth", "corrupted", *(LABELS[method] for method in inpainted)]
    figure = grid_figure(torch.cat(rows).cpu(), len(truth), 0.8 + 0.42 * len(truth), labels, row_label=0.8)
    name = flags.picture_path(args, config, "inpaint_files" if args.files else "inpaint")
    for picture in save_figure(figure, name):
        print(picture)
    for method, filled in inpainted.items() if args.files else ():
        for k, (file, image) in enumerate(zip(args.files, filled.cpu(), strict=True)):
            print(save_pixels(image, f"{name}_{method}_{k}_{Path(file).stem}"))


def bench(argv, parser, first):
    """Seconds per step of Adam by the causal cone and by the whole flow of an untrained RG-Flow, for each edge and
    place of the region; prints a line for each; what the record says, and a function that draws the figure."""
    results, runs = [], []
    for L in first.edges:
        own = ["--data", "folder", "--L", str(L), "--nchannels", str(first.nchannels), "--model", "rgflow"]
        runs.append(flags.get_args([*argv, *own], parser))
        if L < BENCH_REGION:
            parser.error(f"argument --edges: {L}: must be at least {BENCH_REGION}")
    for L, args in zip(first.edges, runs, strict=True):
        whole = {}
        for place in PLACES:
            results.append({"L": L, "place": place, **measure(args, place, whole)})
            print(
                "L {L}, {place}: cone {cone_seconds:.3g} s per step, {cone_blocks} blocks, {free_latents} latents;"
                " whole flow {whole_seconds:.3g} s, {whole_blocks} blocks".format(**results[-1]),
                flush=True,
            )
    counts = [
        {"L": L, "place": place, "free_latents": count_latents(first, L, place), "latents": first.nchannels * L**2}
        for L in (first.edges[0] * 2**k for k in range(6))
        for place in PLACES
    ]
    name = Path(first.fig_dir) / "inpaint_speed"
    return {"network": flags.network_name(args), "results": results, "latents": counts}, partial(
        write_speed, name, results, counts
    )


def write_speed(name, results, counts):
    with style():
        print(*save_figure(speed_figure(results, counts), name), sep="\n")


def bench_region(L, place):
    region = torch.zeros(L, L, dtype=torch.bool)
    start = 0 if place == "origin" else (L - BENCH_REGION) // 2
    region[start : start + BENCH_REGION, start : start + BENCH_REGION] = True
    return region


def count_latents(args, L, place):
    return args.nchannels * int(inference_cone(bench_region(L, place), args.kernel_size).sum())


def measure(args, place, whole):
    """A dict of results. The whole flow, whose time does not depend on the place, is measured if `whole` is empty."""
    torch.manual_seed(args.draw_seed)
    flow = build(vars(args)).to(args.cuda).eval().requires_grad_(False)
    x = torch.randn(BENCH_IMAGES, args.nchannels, args.L, args.L, device=args.cuda).to(getattr(torch, args.dtype))
    region = bench_region(args.L, place)
    regions, cone = region.repeat(len(x), 1, 1).to(args.cuda), inference_cone(region, args.kernel_size).to(args.cuda)
    if not whole:
        blocks = sum(len(chosen) for level in cone_blocks(region[None], args.kernel_size) for chosen in level)
        together = min(BENCH_IMAGES, max(1, BENCH_BLOCKS // blocks))
        problems = [
            WholeFlow(flow, part, regions[: len(part)], cone.expand_as(part).flatten().nonzero()[:, 0])
            for part in x.split(together)
        ]
        seconds = seconds_per_step(problems, args)
        whole.update(whole_seconds=seconds, whole_blocks=blocks, whole_images_together=together)
        del problems
    problem = CausalCone(flow, x, regions)
    return {
        "images": BENCH_IMAGES,
        "free_latents": len(problem.free) // BENCH_IMAGES,
        "cone_blocks": problem.num_blocks // BENCH_IMAGES,
        "cone_seconds": seconds_per_step([problem], args),
        **whole,
    }


def seconds_per_step(problems, args):
    """Median over repeats of the time of one step for all of `problems`, one after the other."""
    parts, times = [], []
    for problem in problems:
        values = problem.flow.prior.sample(problem.x.new_empty(problem.free.shape)).requires_grad_()
        parts.append((problem, values, torch.optim.Adam([values], args.rate)))
    climb(*parts[0])  # warm-up
    step = timed(lambda: [climb(*part) for part in parts], torch.device(args.cuda), times)
    for _ in range(args.repeats):
        step()
    return statistics.median(times)


def speed_figure(results, counts):
    """Time per step and number of free latents against the edge of the image."""
    figure = Figure(figsize=(PAGE, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    panels = (
        (left, results, "cone_seconds", "whole_seconds", "time per step in s"),
        (right, counts, "free_latents", "latents", "latents per image"),
    )
    for axes, rows, cone, whole, label in panels:
        edges = [row["L"] for row in rows[:: len(PLACES)]]
        axes.plot(edges, [row[whole] for row in rows[:: len(PLACES)]], "^-", color=COLOURS[0], label="whole flow")
        for k, place in reversed(list(enumerate(PLACES))):
            values, name = [row[cone] for row in rows[k :: len(PLACES)]], f"causal cone, region at the {place}"
            axes.plot(edges, values, "o-", color=COLOURS[k + 1], label=name)
        axes.set(xlabel="edge $L$ of the image", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(edges, edges)
        axes.minorticks_off()
        axes.legend()
    return figure


if __name__ == "__main__":
    cli.script(main)
