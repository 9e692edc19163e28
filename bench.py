#!/usr/bin/env python3
"""Measure training steps and sampling: time, images per second, memory, and share of the rate of matrix products.

The step is that of `main.py`, on random images. Matrix products (2048 x 2048 on a CPU, 8192 on a GPU, in the precision
of the networks) run between the steps, because their rate drifts. MFU counts the multiply-adds of the networks only:
once forward and twice backward for a step, once for a sample. Recomputation does not count as useful work.
"""

import copy
import gc
import re
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import args as flags
from data.batches import Batches
from flow.jacobian import PASSES, derivative, receptive_fields
from flow.load import build, load_trained
from flow.preprocess import Loss, bits_per_dim, to_model
from layers.fold import folded_together
from utils.cli import count, flag_error, number_list, positive, script
from utils.distributed import Peers
from utils.graphs import WARMUP
from utils.logging import RunLog
from utils.optim import Descent, why_not_compiled
from utils.random import generator
from utils.results import about, save, table
from utils.timing import spread, synchronize, timed

STEP = "batch_size lr weight_decay clip_grad seed compile amp grad_checkpoint"  # flags of a training step
COLUMNS = {
    "batch": "batch_size",
    "L": "L",
    "ms/step": "ms_per_step",
    "images/s": "train_images_per_s",
    "MFU": "train_mfu",
    "samples/s": "samples_per_s",
    "MFU sampling": "sample_mfu",
    "data %": "data_percent",
    "log %": "log_percent",
    "optimizer %": "optimizer_percent",
    "GFLOP/s": "matrix_gflop_per_s",
    "step x fp32": "step_times_fp32_gflop",
    "MiB": "peak_memory_mib",
}


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Peak MiB on the GPU, or of the process, since `reset_peak_memory`; None where the system does not count."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    return None


class Steps:
    """Training steps on random images. A call does one and returns the gradient norm. seconds: times of its parts."""

    def __init__(self, args):
        self.args, self.device, self.step = args, torch.device(args.cuda), 0
        shape = 2 * args.batch_size, args.nchannels, args.L, args.L
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.flow = build(vars(args)).to(self.device)
        self.dtype = next(self.flow.parameters()).dtype
        flags.accelerate(self.flow, args)
        graph = args.compile and self.device.type == "cuda"
        self.descent = Descent(Loss(self.flow), args.weight_decay, args.clip_grad, Peers(self.device), graph)
        batches = Batches(images, args.batch_size, self.device, args.seed, False, self.dtype)
        self.seconds = {"data": [], "optimizer": []}
        self.batches = timed(batches, self.device, self.seconds["data"])
        if self.device.type == "cpu":  # on a GPU it is part of one graph
            self.descent.move = timed(self.descent.move, self.device, self.seconds["optimizer"])

    def __call__(self):
        norm = self.descent(self.step, self.args.lr, *self.batches(self.step))
        self.step += 1
        return norm

    def report(self, log, norm):
        """What main.py logs of a step."""
        bpd = self.descent.window[0].item()
        log.text(f"step {self.step} bpd {bpd:.4f} grad_norm {norm:.4g}")
        log.record(kind="train", step=self.step, bpd=bpd, grad_norm=norm)


def measure(args):
    """Time training steps and matrix products in turn, then samplings and products; a dict of results."""
    steps, device, repeats = Steps(args), torch.device(args.cuda), args.repeats
    seconds = {name: [] for name in ("step", "log", "sample", "matrix", "float32")} | steps.seconds
    step, log = timed(steps, device, seconds["step"]), timed(steps.report, device, seconds["log"])
    sample = timed(steps.flow.sample, device, seconds["sample"])
    reset_peak_memory(device)
    for _ in range(WARMUP + 2):
        step()
    memory = peak_memory(device)
    in_a_row = max(1, round(0.3 / seconds["step"][-1]))  # small networks run several, with caches as in training

    size = 8192 if device.type == "cuda" else 2048
    networks = torch.bfloat16 if args.amp == "bf16" else steps.dtype
    factors = {dtype: torch.randn(2, size, size, device=device, dtype=dtype) for dtype in {networks, torch.float32}}
    matrix = timed(lambda: torch.matmul(*factors[networks]), device, seconds["matrix"])
    float32 = timed(lambda: torch.matmul(*factors[torch.float32]), device, seconds["float32"])
    matrix()
    with tempfile.TemporaryDirectory() as folder:
        run_log = RunLog(Path(folder, "out"), stdout=False)
        for _ in range(repeats):
            for _ in range(in_a_row):
                norm = step()
            log(run_log, norm.item())
            matrix()
            float32()
    in_training = statistics.median(seconds["matrix"][-repeats:])
    if args.profile:
        with torch.profiler.profile() as result:
            steps()
            synchronize(device)
        order = f"self_{device.type}_time_total"
        print(result.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))
    steps.flow.eval()
    with torch.no_grad(), folded_together(steps.flow):
        for k in range(1 + repeats):
            for _ in range(in_a_row if k else 1):
                sample(args.batch_size)
            matrix()
    rows = dict.fromkeys(("step", "data", "optimizer", "sample"), repeats * in_a_row)
    seconds = {name: each[-rows.get(name, repeats) :] for name, each in seconds.items() if each}
    median = {name: statistics.median(each) for name, each in seconds.items()}
    forward, inverse = (2 * steps.flow.multiply_adds(inverse) * args.batch_size for inverse in (False, True))
    parts = ("data", "log", "optimizer")
    return {
        "batch_size": args.batch_size,
        "L": args.L,
        "parameters": sum(parameter.numel() for parameter in steps.flow.parameters()),
        "gflop_per_image": forward / args.batch_size / 1e9,
        "ms_per_step": 1e3 * median["step"],
        "step_spread": spread(seconds["step"]),
        "train_images_per_s": args.batch_size / median["step"],
        "train_mfu": 3 * forward / median["step"] * in_training / (2 * size**3),
        "executed_gflop_per_s": (3 + args.grad_checkpoint) * forward / median["step"] / 1e9,
        "samples_per_s": args.batch_size / median["sample"],
        "sample_spread": spread(seconds["sample"]),
        "sample_mfu": inverse / median["sample"] * median["matrix"] / (2 * size**3),
        **{f"{name}_percent": 100 * median[name] / median["step"] if name in median else None for name in parts},
        "matrix_gflop_per_s": 2 * size**3 / in_training / 1e9,
        "matrix_spread": spread(seconds["matrix"]),
        "step_times_fp32_gflop": median["step"] * 2 * size**3 / median["float32"] / 1e9,
        "peak_memory_mib": memory,
    }


def sweep(first, argv, parser):
    """Measure every batch size and edge that the flags `first`, parsed from `argv`, ask for; a list of results."""
    results, runs = [], []
    for edge, batch_size in product(first.edges or [first.L], first.batch_sizes or [first.batch_size]):
        own = f"--data folder --L {edge} --nchannels {first.nchannels} --batch_size {batch_size}"
        runs.append(flags.get_args([*argv, *own.split()], parser))
    print(row(COLUMNS))
    for args in runs:
        try:
            results.append(measure(args))
            values = (results[-1][key] for key in COLUMNS.values())
            print(row("-" if v is None else v if isinstance(v, int) else f"{v:.4g}" for v in values), flush=True)
        except torch.OutOfMemoryError:
            print(f"{args.batch_size:5} {args.L:2}  out of memory", flush=True)
        gc.collect()  # before the next one asks for memory
        if args.cuda != "cpu":
            torch.cuda.empty_cache()
    return results


def row(values):
    return "  ".join(f"{value:>{len(name)}}" for name, value in zip(COLUMNS, values, strict=True))


def time_fields(args, flow):
    """Time all receptive fields by the Jacobians of the layers, and compare with one pass per latent: [dict]. Only
    PASSES of these are timed, one at a time and all in one batch, and extrapolated to all latents and draws."""
    if not flow.layers():
        raise flag_error("--fields", args.fields, "only for rgflow, other flows have one pass per latent alone")
    device, seconds = torch.device(args.cuda), {"all": [], "single": [], "batch": []}
    single, batch = (timed(derivative, device, seconds[name]) for name in ("single", "batch"))
    z = flow.sample_prior(1, generator=generator(args.draw_seed, "fields", 0, device))
    units = torch.eye(z.numel(), dtype=z.dtype, device=device)[:PASSES].reshape(-1, *z.shape[1:])
    with torch.no_grad():
        derivative(flow.inverse, z, units[:1])  # a warm-up
        for unit in tqdm(units.split(1), desc="single passes", disable=None):
            single(flow.inverse, z, unit)
        batch(flow.inverse, z.repeat(PASSES, 1, 1, 1), units)
    reset_peak_memory(device)
    timed(lambda: receptive_fields(flow, args.fields, progress=True), device, seconds["all"])()
    one, passes = statistics.median(seconds["single"]), args.fields * z.numel()
    return [
        {
            "draws": args.fields,
            "latents": z.numel(),
            "seconds": seconds["all"][0],
            "ms_per_single_pass": 1e3 * one,
            "extrapolated_seconds_single": passes * one,
            "extrapolated_seconds_batched": passes * seconds["batch"][0] / PASSES,
            "peak_memory_mib": peak_memory(device),
        }
    ]


def compare(args, flow, config):
    """How compiled kernels and lower precision change BPD and round trip of test images: a dict for each way.
    Differences are from float64."""
    device = torch.device(args.cuda)
    images = torch.from_numpy(flags.open_data(config, args)[0].test[: args.compare]).to(device)
    seeded = generator(args.draw_seed, "compare", 0, device)
    noise = torch.rand(images.shape, generator=seeded, dtype=torch.float64, device=device)
    ways = {"float64": {}, "float32": {}, "bf16": {"dtype": torch.bfloat16}}
    if not why_not_compiled(device):
        ways |= {f"{name} --compile": {**ways[name], "compile": True} for name in ("float32", "bf16")}
    exact, results = None, []
    for name, way in ways.items():
        dtype = torch.float64 if name == "float64" else torch.float32
        own = copy.deepcopy(flow).to(dtype)
        own.accelerate(**way)
        with torch.no_grad():
            bpd = bits_per_dim(own, images, noise=noise.to(dtype)).double()
            x, _ = to_model(images, noise=noise.to(dtype), dtype=dtype)
            error = (own.inverse(own(x)[0])[0] - x).abs()
        exact = bpd if exact is None else exact
        numbers = {
            "bpd": bpd.mean(),
            "mean_difference": (bpd - exact).mean(),
            "largest_difference": (bpd - exact).abs().max(),
            "largest_round_trip_error": error.max(),
            "median_round_trip_error": error.median(),
        }
        results.append({"networks": name, **{key: number.item() for key, number in numbers.items()}})
    return results


def main(argv=None):
    parser = flags.build_parser(__doc__, f"{flags.NETWORK} data_path prepared_path {STEP}")
    group = parser.add_argument_group("what to measure")
    add, instead = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--batch_sizes", type=number_list(positive), metavar="N[,N…]", help="sweep over these (default: --batch_size)")
    add("--edges", type=number_list(positive), metavar="L[,L…]", help="sweep over these edge lengths (default: --L)")
    add("--repeats", type=positive, default=7, metavar="N", help="measurements, after a warm-up")
    add("--profile", action="store_true", help="also print where the time of a step goes")
    ways = "instead: BPD and round trip of N test images (of the data set of --weights, or --data) in each precision"
    instead("--compare", type=positive, metavar="N", help=ways)
    fields = "instead: time of all receptive fields with N draws, compared with one pass per latent"
    instead("--fields", type=positive, metavar="N", help=fields)
    add("--weights", metavar="FILE", help="checkpoint for --compare and --fields (default: an untrained flow)")
    add("--draw_seed", type=count, default=0, metavar="N", help="seed of all draws")
    add("--json", metavar="FILE", help="write the results there")
    parser.restrict("weights draw_seed", needs="compare fields")
    parser.restrict("data_path prepared_path", needs="compare")
    parser.restrict(f"batch_sizes edges repeats profile {STEP}", excludes="compare fields")
    parser.restrict("dtype", excludes="compare")
    parser.restrict(flags.NETWORK.replace(" cuda", "").replace(" dtype", ""), excludes="weights")
    first = flags.get_args(argv, parser, several=False)
    for one, several in (("batch_size", "batch_sizes"), ("L", "edges")):
        if one in first.typed and getattr(first, several):
            parser.error(f"argument --{one}: has no effect with --{several}")
    origin = about(__file__, argv, first.cuda)  # at the start: the commit of the code that runs
    if first.compare or first.fields:
        if first.weights:
            dtype = first.dtype if "dtype" in first.given else None
            flow, config, _ = load_trained(first.weights, first.cuda, dtype=dtype)
        else:
            config = vars(first)
            flow = build(config).to(first.cuda).eval()
        results = compare(first, flow, config) if first.compare else time_fields(first, flow)
        print(*table(results), sep="\n")
    else:
        results = sweep(first, sys.argv[1:] if argv is None else argv, parser)
    if first.json:
        save(first.json, {"kind": "speed", **origin, "results": results})


if __name__ == "__main__":
    script(main)
