#!/usr/bin/env python3
"""Measure training steps and sampling: time, images per second, memory, and share of the rate of matrix products.

The step is that of `main.py`, on random images. Matrix products (2048 x 2048 on a CPU, 8192 on a GPU, in the precision
of the networks) run between the steps, because their rate drifts. MFU counts the multiply-adds of the networks only:
once forward and twice backward for a step, once for a sample. Recomputation does not count as useful work.

--exact trains a small network of the flags in every precision and way of computing, and compares with the CPU.
"""

import copy
import gc
import math
import re
import statistics
import sys
import tempfile
import time
import warnings
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.nn.utils import parameters_to_vector
from tqdm import tqdm

import args as flags
from data.batches import Batches
from flow.jacobian import PASSES, derivative, receptive_fields
from flow.load import build, load_trained
from flow.preprocess import Loss, bits_per_dim, to_model
from layers.fold import folded_together
from utils.cli import UserError, count, flag_error, number_list, out_of_memory, positive, script
from utils.distributed import Peers
from utils.graphs import WARMUP, captured
from utils.logging import RunLog
from utils.optim import Descent, why_not_compiled
from utils.random import derived_seed, generator
from utils.results import about, entries, save, table, versions
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
# Ways to compute a training step, in words that `train` looks for; those with "graph" or "tf32" need a GPU.
WAYS = {"float64": ("plain", "graph", "graph grad_checkpoint")}
WAYS["float32"] = (*WAYS["float64"], "graph compile", "graph tf32", "graph bf16", "graph bf16 compile")
MARKS = 1, 10, 30, 100, 300, 1000  # steps after which they are compared, and after the last


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


def untrained(args, **changes):
    """The flow of the flags, or of others as `changes`: the same for the same seed."""
    torch.manual_seed(derived_seed(args.seed, "weights"))
    return build({**vars(args), **changes})


class Steps:
    """Training steps on random images. A call does one and returns the gradient norm. seconds: times of its parts."""

    def __init__(self, args):
        self.args, self.device, self.step = args, torch.device(args.cuda), 0
        shape = 2 * args.batch_size, args.nchannels, args.L, args.L
        images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        self.flow = untrained(args).to(self.device)
        self.dtype = next(self.flow.parameters()).dtype
        for obstacle in flags.accelerate(self.flow, args)[1]:
            warnings.warn(obstacle, stacklevel=2)
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
    draws = generator(args.seed, "bench", 0, device)  # the global one is lost where recording a CUDA graph has failed
    seconds = {name: [] for name in ("step", "log", "sample", "matrix", "float32")} | steps.seconds
    step, log = timed(steps, device, seconds["step"]), timed(steps.report, device, seconds["log"])
    inverse = captured(lambda z: steps.flow.inverse(z)[0], device)
    sample = timed(lambda: inverse(steps.flow.sample_prior(args.batch_size, 1.0, draws)), device, seconds["sample"])
    reset_peak_memory(device)
    for _ in range(WARMUP + 2):
        step()
    memory = peak_memory(device)
    in_a_row = max(1, round(0.3 / seconds["step"][-1]))  # small networks run several, with caches as in training

    size = 8192 if device.type == "cuda" else 2048
    networks = torch.bfloat16 if args.amp == "bf16" else steps.dtype
    shape = {"size": (2, size, size), "generator": draws, "device": device}
    factors = {dtype: torch.randn(**shape, dtype=dtype) for dtype in {networks, torch.float32}}
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
    kernels = profile(steps, device) if args.profile else {}
    steps.flow.eval()
    with torch.no_grad(), folded_together(steps.flow):
        for _ in range(WARMUP + 1):
            sample()
        for _ in range(repeats):
            for _ in range(in_a_row):
                sample()
            matrix()
    rows = dict.fromkeys(("step", "data", "optimizer", "sample"), repeats * in_a_row)
    seconds = {name: each[-rows.get(name, repeats) :] for name, each in seconds.items() if each}
    median = {name: statistics.median(each) for name, each in seconds.items()}
    forward, inverse = (2 * steps.flow.multiply_adds(inverse) * args.batch_size for inverse in (False, True))
    parts = ("data", "log", "optimizer")
    return {
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
        **kernels,
    }


def profile(steps, device):
    """Print where the time of a step goes. A dict: number of its kernels and copies on a GPU, also of a replayed graph,
    on a CPU of calls of operators, and the ten that take most time."""
    with torch.profiler.profile() as result:
        steps()
        synchronize(device)
    gpu, averages = device.type == "cuda", result.key_averages()
    order = f"self_{'device' if gpu else 'cpu'}_time_total"
    print(averages.table(sort_by=order, row_limit=20, max_name_column_width=50))
    own = [each for each in averages if each.device_type == (DeviceType.CUDA if gpu else DeviceType.CPU)]
    own = sorted((each for each in own if not each.is_user_annotation), key=lambda each: -getattr(each, order))
    largest = [{"name": each.key, "count": each.count, "ms": getattr(each, order) / 1e3} for each in own[:10]]
    return {"kernels_per_step": sum(each.count for each in own) or None, "largest_kernels": largest}  # None: no access


def attempt(row, errors, function, *arguments):
    """`row`, a dict, with the entries of the dict function(*arguments), or an "error" in words, and "warnings". Raises
    an error that is not out of memory and none of `errors`. The function's memory is free for the next one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)  # also where an earlier row had it
        try:
            row |= function(*arguments)
        except Exception as error:
            if not (out_of_memory(error) or isinstance(error, errors)):
                raise
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            row["error"] = "out of memory" if out_of_memory(error) else words
    row["warnings"] = [*dict.fromkeys(str(each.message).strip().partition("\n")[0] for each in caught)]
    for line in row["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return row


def sweep(first, argv, parser):
    """Measure every batch size and edge that the flags `first`, parsed from `argv`, ask for; yields results."""
    runs = []
    for edge, batch_size in product(first.edges or [first.L], first.batch_sizes or [first.batch_size]):
        own = f"--data folder --L {edge} --nchannels {first.nchannels} --batch_size {batch_size}"
        runs.append(flags.get_args([*argv, *own.split()], parser))
    print(row(COLUMNS))
    for args in runs:
        named = {name: getattr(args, name) for name in ("batch_size", "L", "amp", "compile", "grad_checkpoint")}
        result = attempt({"network": flags.network_name(args), **named}, (), measure, args)
        if "error" in result:
            print(f"{args.batch_size:5} {args.L:2}  {result['error']}", flush=True)
        else:
            values = (result[key] for key in COLUMNS.values())
            print(row("-" if v is None else v if isinstance(v, int) else f"{v:.4g}" for v in values), flush=True)
        yield result


def row(values):
    return "  ".join(f"{value:>{len(name)}}" for name, value in zip(COLUMNS, values, strict=True))


def exactness(args):
    """Follow --exact steps of a training in each way of computing that the device has; yields a dict for each. For each
    type of numbers the CPU comes first, and the others are compared with it."""
    device, flow = torch.device(args.cuda), untrained(args, dtype="float64")
    marks = [*(mark for mark in MARKS if mark < args.exact), args.exact]
    for dtype, ways in WAYS.items():
        reference = train(args, marks, flow, dtype, "CPU", torch.device("cpu"))
        if device.type == "cpu":
            ways = [way.removeprefix("graph ") for way in ways if way not in ("plain", "graph", "graph tf32")]
        for way in ("CPU", *ways):
            if args.compile or "compile" not in way:
                how = args, marks, flow, dtype, way, device
                result = attempt({"dtype": dtype, "way": way, "steps": marks}, Exception, follow, reference, *how)
                print(*(f"{name} {text}" for name, text in entries(result) if text), sep="; ", flush=True)
                yield result


def follow(reference, args, marks, flow, dtype, way, device):
    """A dict: losses after the steps `marks`, largest differences of losses up to there and of weights there."""
    losses, weights, seconds = reference if way == "CPU" else train(args, marks, flow, dtype, way, device)
    at, apart = torch.tensor(marks) - 1, (losses - reference[0]).abs().cummax(0)[0]
    found = {"loss": losses[at], "loss_difference": apart[at]}
    found["weight_difference"] = (weights.double() - reference[1].double()).abs().amax(1)
    return {**{name: values.tolist() for name, values in found.items()}, "seconds": seconds}


def train(args, marks, flow, dtype, way, device):
    """Train a copy of the flow on images of large pixels, with images and noise drawn on the CPU: losses (steps,), nats
    per dimension, weights (marks, parameters), both on the CPU, and seconds."""
    start, way, dtype, edge = time.perf_counter(), way.split(), getattr(torch, dtype), math.ceil(args.L / 4)
    images = np.random.default_rng(0).integers(0, 200, (4 * args.batch_size, args.nchannels, edge, edge), np.uint8)
    images = images.repeat(4, 2).repeat(4, 3)[..., : args.L, : args.L]
    batches = Batches(images, args.batch_size, "cpu", args.seed, dtype=dtype)
    flow = copy.deepcopy(flow).to(device, dtype)
    flags.allow_tf32("tf32" in way)
    flow.accelerate("compile" in way, torch.bfloat16 if "bf16" in way else None, "grad_checkpoint" in way)
    descent = Descent(Loss(flow), args.weight_decay, args.clip_grad, Peers(device), "graph" in way)
    losses, weights = [], []
    for step in range(marks[-1]):
        descent.window.zero_()
        descent(step, args.lr, *(each.to(device) for each in batches(step)))
        losses.append(descent.window[0].item())
        if step + 1 in marks:
            weights.append(parameters_to_vector(flow.parameters()).detach().cpu())
    return torch.tensor(losses, dtype=torch.float64), torch.stack(weights), time.perf_counter() - start


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
    exact = "instead: train for N steps in each precision and way of computing, and compare with the CPU"
    instead("--exact", type=positive, metavar="N", help=exact)
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
    parser.restrict("batch_sizes edges repeats profile amp grad_checkpoint", excludes="exact")
    parser.restrict("dtype", excludes="compare exact")
    parser.restrict(flags.NETWORK.replace(" cuda", "").replace(" dtype", ""), excludes="weights")
    first = flags.get_args(argv, parser, several=False)
    for one, several in (("batch_size", "batch_sizes"), ("L", "edges")):
        if one in first.typed and getattr(first, several):
            parser.error(f"argument --{one}: has no effect with --{several}")
    origin = about(__file__, argv, first.cuda)  # at the start: the commit of the code that runs
    record = {"kind": "speed", **origin, "versions": versions(torch.device(first.cuda)), "results": []}
    if first.compare or first.fields:
        if first.weights:
            dtype = first.dtype if "dtype" in first.given else None
            flow, config, _ = load_trained(first.weights, first.cuda, dtype=dtype)
        else:
            config = vars(first)
            flow = untrained(first).to(first.cuda).eval()
        results = compare(first, flow, config) if first.compare else time_fields(first, flow)
        print(*table(results), sep="\n")
    else:
        results = exactness(first) if first.exact else sweep(first, sys.argv[1:] if argv is None else argv, parser)
    for result in results:
        record["results"].append(result)
        if first.json:  # after each one, in case a later one fails
            save(first.json, record)
    if all("error" in result for result in record["results"]):
        raise UserError(f"nothing could be measured: {record['results'][-1]['error']}")


if __name__ == "__main__":
    script(main)
