#!/usr/bin/env python3
"""Measure training steps and sampling: time, images per second, memory, and the useful share of the matrix rate.

    python bench.py --batch_sizes 8,32                            the default configuration on the CPU
    python bench.py --cuda 0 --amp bf16 --batch_sizes 64,1024
    python bench.py @configs/msds1_cpu.args --profile
    python bench.py --edges 32,64,128 --nlayers 2 --nhidden 256 --nresblocks 1
    python bench.py @configs/msds1_cpu.args --compare 256 --weights saved_model/…/last.state
    python bench.py --fields 4

The step is the one of `main.py`, on random images. The matrix rate (2048 x 2048 products on a CPU, 8192 on a GPU, in
the precision of the networks) is measured between the steps, since it drifts. MFU counts the multiply-adds of the
networks alone, once forward and twice backward, once for a sample: recomputation is no useful work.
"""

import copy
import gc
import re
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import args as flags
from flow import RGFlow
from flow.jacobian import PASSES, derivative, receptive_fields
from flow.load import build
from flow.preprocess import bits_per_dim, to_model
from main import Run
from utils import cli
from utils.cli import flag_error
from utils.compilation import WARMUP, why_not_compiled
from utils.memory import keep_freed_memory
from utils.random import generator
from utils.results import about, save

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


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device, times):
    """`function`, made to append the seconds that each call takes on `device` to the list `times`."""

    def call(*arguments):
        synchronize(device)
        start = time.perf_counter()
        result = function(*arguments)
        synchronize(device)
        times.append(time.perf_counter() - start)
        return result

    return call


def spread(seconds):
    """Largest minus smallest over the median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


@contextmanager
def random_run(args):
    """A training run of `main.py` on random images, in a temporary folder."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * args.batch_size, args.nchannels, args.L, args.L), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as args.out_dir:
        run = Run(args, SimpleNamespace(train=images, test=images, fingerprint="", warnings=[]))
        yield run
        if run.lock:
            run.lock.close()


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Most bytes on the GPU, or most bytes of the process, since `reset_peak_memory`; None where nobody counts them."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    return None


def measure(run, repeats):
    """Time `repeats` training steps and matrix products in turn, then samplings and products; a dict of results."""
    args, device = run.args, run.device
    times = {name: [] for name in ("step", "data", "optimizer", "log", "sample", "matrix", "float32")}
    step = timed(run.train_step, device, times["step"])
    sample = timed(run.flow.sample, device, times["sample"])
    log = timed(run.report_training, device, times["log"])
    run.batch = timed(run.batch, device, times["data"])
    if device.type == "cpu":  # on a GPU it is part of one graph
        run.descent.move = timed(run.descent.move, device, times["optimizer"])
    reset_peak_memory(device)
    for _ in range(WARMUP + 2):
        step()
    memory = peak_memory(device)
    steps = max(1, round(0.3 / times["step"][-1]))  # small networks do several in a row, with caches as in training

    size = 8192 if device.type == "cuda" else 2048
    networks = torch.bfloat16 if args.amp == "bf16" else run.dtype
    factors = {dtype: torch.randn(2, size, size, device=device, dtype=dtype) for dtype in {networks, torch.float32}}
    matrix = timed(lambda: torch.matmul(*factors[networks]), device, times["matrix"])
    float32 = timed(lambda: torch.matmul(*factors[torch.float32]), device, times["float32"])
    matrix()
    bar = tqdm(disable=True)
    for _ in range(repeats):
        for _ in range(steps):
            norm = step()
        log(bar, norm.item(), 1.0)
        matrix()
        float32()
    with run.evaluation():
        for k in range(1 + repeats):
            for _ in range(steps if k else 1):
                sample(args.batch_size)
            matrix()
    rates = {"train": times["matrix"][: -1 - repeats], "sample": times["matrix"]}
    counts = dict.fromkeys(("step", "data", "optimizer", "sample"), repeats * steps)
    times = {name: seconds[-counts.get(name, repeats) :] for name, seconds in times.items() if seconds}
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    rates = {name: 2 * size**3 / statistics.median(seconds[-repeats:]) for name, seconds in rates.items()}
    forward, inverse = (2 * run.flow.multiply_adds(inverse) * args.batch_size for inverse in (False, True))
    return {
        "batch_size": args.batch_size,
        "L": args.L,
        "parameters": sum(parameter.numel() for parameter in run.flow.parameters()),
        "gflop_per_image": forward / args.batch_size / 1e9,
        "ms_per_step": 1e3 * median["step"],
        "step_spread": spread(times["step"]),
        "train_images_per_s": args.batch_size / median["step"],
        "train_mfu": 3 * forward / median["step"] / rates["train"],
        "executed_gflop_per_s": (3 + args.grad_checkpoint) * forward / median["step"] / 1e9,
        "samples_per_s": args.batch_size / median["sample"],
        "sample_spread": spread(times["sample"]),
        "sample_mfu": inverse / median["sample"] / rates["sample"],
        "data_percent": 100 * median["data"] / median["step"],
        "log_percent": 100 * median["log"] / median["step"],
        "optimizer_percent": 100 * median["optimizer"] / median["step"] if "optimizer" in median else None,
        "matrix_gflop_per_s": rates["train"] / 1e9,
        "matrix_spread": spread(times["matrix"]),
        "step_times_fp32_gflop": median["step"] * 2 * size**3 / median["float32"] / 1e9,
        "peak_memory_mib": memory and memory / 2**20,
    }


def profile(run):
    """Print where the time of a training step goes."""
    with torch.profiler.profile() as result:
        run.train_step()
        synchronize(run.device)
    order = "self_cuda_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
    print(result.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))


def sweep(first, argv, parser):
    """Measure every batch size and edge that the flags `first`, parsed from `argv`, ask for; a list of results."""
    results, runs = [], []
    for edge in first.edges or [first.L]:
        for batch_size in first.batch_sizes or [first.batch_size]:
            own = ["--data", "folder", "--L", str(edge), "--nchannels", str(first.nchannels), "--no_stdout"]
            runs.append(flags.get_args([*argv, *own, "--batch_size", str(batch_size)], parser))
    print(row(COLUMNS))
    for args in runs:
        try:
            with random_run(args) as run:
                results.append(measure(run, first.repeats))
                values = (results[-1][key] for key in COLUMNS.values())
                print(row("-" if v is None else v if isinstance(v, int) else f"{v:.4g}" for v in values), flush=True)
                if first.profile:
                    profile(run)
        except torch.OutOfMemoryError:
            print(f"{args.batch_size:>5}  {args.L:>1}  out of memory", flush=True)
        run = None
        gc.collect()  # before the next one asks for memory
        if args.cuda != "cpu":
            torch.cuda.empty_cache()
    return results


def get_flow(args):
    """(flow, config) of --weights, or the untrained one of the flags, in evaluation mode."""
    if args.weights:
        flow, config, _ = flags.load_flow(args)
        return flow, config
    return build(vars(args)).to(args.cuda).eval(), vars(args)


def time_fields(args, draws):
    """Time all receptive fields, as the chain of the layers' Jacobians gives them, beside one pass per latent.

    Of those only PASSES are timed, one at a time and, which is as exact, all in one batch; the times for all latents
    and draws are extrapolated from them. Returns a list of one dict.
    """
    flow, _ = get_flow(args)
    if not isinstance(flow, RGFlow):
        raise flag_error("--fields", draws, "only for rgflow, other flows have one pass per latent alone")
    device, times = torch.device(args.cuda), {"all": [], "single": [], "batch": []}
    z = flow.sample_prior(1, generator=generator(args.draw_seed, "fields", 0, device))
    units = torch.eye(z.numel(), dtype=z.dtype, device=device)[:PASSES].reshape(-1, *z.shape[1:])
    single, batch = (timed(derivative, device, times[name]) for name in ("single", "batch"))
    with torch.no_grad():
        derivative(flow.inverse, z, units[:1])  # a warm-up
        for unit in tqdm(units.split(1), desc="single passes", disable=None):
            single(flow.inverse, z, unit)
        batch(flow.inverse, z.repeat(PASSES, 1, 1, 1), units)
    reset_peak_memory(device)
    timed(partial(receptive_fields, progress=True), device, times["all"])(flow, draws)
    memory = peak_memory(device)
    needed = draws * z.numel()
    result = {
        "draws": draws,
        "latents": z.numel(),
        "seconds": times["all"][0],
        "ms_per_single_pass": 1e3 * statistics.median(times["single"]),
        "extrapolated_seconds_single": needed * statistics.median(times["single"]),
        "extrapolated_seconds_batched": needed * times["batch"][0] / PASSES,
        "peak_memory_mib": memory and memory / 2**20,
    }
    print(
        f"receptive fields of {z.numel()} latents, {draws} draws: {result['seconds']:.1f} s"
        f" ({'memory not counted here' if memory is None else f'{memory / 2**20:.0f} MiB at most'})\n"
        f"one pass per latent, extrapolated from {PASSES}: {result['extrapolated_seconds_single']:.0f} s"
        f" one at a time, {result['extrapolated_seconds_batched']:.0f} s in batches of {PASSES}"
    )
    return [result]


def compare(args, count):
    """What compiled kernels and lower precision change: BPD and round trip of `count` test images, a dict for each.

    The flow is that of --weights, or the untrained one of the flags. Differences are from float64.
    """
    device = torch.device(args.cuda)
    flow, config = get_flow(args)
    data, _ = flags.open_data(args, config)
    images = torch.from_numpy(data.test[:count]).to(device)
    draws = generator(args.draw_seed, "compare", 0, device)
    noise = torch.rand(images.shape, generator=draws, dtype=torch.float64, device=device)
    ways = {"float64": {}, "float32": {}, "bf16": {"dtype": torch.bfloat16}}
    if not why_not_compiled(device):
        ways.update({f"{name} --compile": {**way, "compile": True} for name, way in ways.items() if name != "float64"})
    exact, results = None, []
    for name, way in ways.items():
        dtype = torch.float64 if name == "float64" else torch.float32
        own = copy.deepcopy(flow).to(dtype)
        own.accelerate(**way)
        with torch.no_grad():
            bpd = bits_per_dim(own, images, noise=noise.to(dtype)).double()
            x, _ = to_model(images, noise=noise.to(dtype), dtype=dtype)
            back, _ = own.inverse(own(x)[0])
        if name == "float64":
            exact = bpd
        difference = bpd - exact
        results.append(
            {
                "networks": name,
                "bpd": bpd.mean().item(),
                "mean_difference": difference.mean().item(),
                "largest_difference": difference.abs().max().item(),
                "largest_round_trip_error": (back - x).abs().max().item(),
                "median_round_trip_error": (back - x).abs().median().item(),
            }
        )
        print(
            ", ".join(f"{key} {value:.3g}" if key != "networks" else f"{value}:" for key, value in results[-1].items())
        )
    print(f"{len(images)} test images, {args.weights or 'untrained'}")
    return results


def row(values):
    return "  ".join(f"{value:>{len(name)}}" for name, value in zip(COLUMNS, values, strict=True))


def main(argv=None):
    parser = flags.build_parser(__doc__.split("\n")[0], needs_weights=True, numbers=True)
    group = parser.add_argument_group("what to measure")
    sizes = cli.number_list(cli.positive)
    group.add_argument("--batch_sizes", type=sizes, metavar="N[,N…]", help="sweep over these (default: --batch_size)")
    group.add_argument("--edges", type=sizes, metavar="L[,L…]", help="sweep over these edge lengths (default: --L)")
    group.add_argument("--repeats", type=cli.positive, default=7, metavar="N", help="measurements, after a warm-up")
    group.add_argument("--profile", action="store_true", help="also print where the time of a step goes")
    instead = group.add_mutually_exclusive_group()
    instead.add_argument(
        "--compare",
        type=cli.positive,
        metavar="N",
        help="instead: BPD and round trip of N test images of --data in --data_path with each way to compute, of the"
        " flow of --weights or, without it, an untrained one",
    )
    instead.add_argument(
        "--fields",
        type=cli.positive,
        metavar="N",
        help="instead: all receptive fields, N draws, beside one pass per latent, of the same flow",
    )
    argv = sys.argv[1:] if argv is None else list(argv)
    first = flags.get_args(argv, parser)
    keep_freed_memory()
    origin = about(__file__, argv, first.cuda)  # at the start: the commit of the code that runs
    if first.compare:
        results = compare(first, first.compare)
    elif first.fields:
        results = time_fields(first, first.fields)
    else:
        results = sweep(first, argv, parser)
    if first.json:
        save(first.json, {"kind": "speed", **origin, "results": results})


if __name__ == "__main__":
    cli.script(main)
