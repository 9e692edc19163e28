#!/usr/bin/env python3
"""Measure training steps and sampling: time, images per second, memory, and the useful share of the matrix rate.

    python bench.py --batch_sizes 8,32                     the default configuration on the CPU
    python bench.py @configs/msds1_cpu.args --profile
    python bench.py --edges 32,64,128 --nlayers 2 --nhidden 256 --nresblocks 1

The step is the one of `main.py`, on random images. The matrix rate (2048 x 2048 products on a CPU, 8192 on a GPU, in
float32 or the type of the run) is measured between the steps, since it drifts. MFU counts the multiply-adds of the
networks alone, once forward and twice backward, once for a sample.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import args as flags
from main import Run
from utils.memory import keep_freed_memory

WARMUP = 2


def timed(function, device):
    """Seconds that `function` takes on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def summary(seconds):
    """Median and spread (largest minus smallest over the median) of a list of times."""
    median = statistics.median(seconds)
    return median, (max(seconds) - min(seconds)) / median


def measure(args, repeats):
    """Time `repeats` training steps, samplings and matrix products in turn; a dict of results."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2 * args.batch_size, args.nchannels, args.L, args.L), dtype=np.uint8)
    run = Run(args, SimpleNamespace(train=images, test=images, fingerprint="", warnings=[]))
    device, dtype = run.device, next(run.flow.parameters()).dtype
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    tasks = {
        "train": run.train_step,
        "sample": lambda: run.flow.sample(args.batch_size),
        "matrix": lambda: left @ right,
    }
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = {name: [] for name in tasks}
    for k in range(WARMUP + repeats):
        for name, task in tasks.items():
            seconds = timed(task, device)
            if k >= WARMUP:
                times[name].append(seconds)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    (train, train_spread), (sample, sample_spread), (matrix, matrix_spread) = map(summary, times.values())
    rate = 2 * size**3 / matrix
    operations = 2 * run.flow.multiply_adds()  # per image, forward
    return {
        "batch_size": args.batch_size,
        "L": args.L,
        "nlayers": list(args.nlayers),
        "parameters": sum(parameter.numel() for parameter in run.flow.parameters()),
        "gflop_per_image": operations / 1e9,
        "ms_per_step": 1e3 * train,
        "step_spread": train_spread,
        "train_images_per_s": args.batch_size / train,
        "sample_images_per_s": args.batch_size / sample,
        "sample_spread": sample_spread,
        "matrix_gflop_per_s": rate / 1e9,
        "matrix_spread": matrix_spread,
        "train_mfu": 3 * operations * args.batch_size / train / rate,
        "sample_mfu": operations * args.batch_size / sample / rate,
        "peak_memory_mib": memory / 2**20,
    }


def profile(args):
    """Print where the time of training steps goes."""
    images = np.zeros((args.batch_size, args.nchannels, args.L, args.L), np.uint8)
    run = Run(args, SimpleNamespace(train=images, test=images, fingerprint="", warnings=[]))
    for _ in range(WARMUP):
        run.train_step()
    with torch.profiler.profile() as result:
        run.train_step()
    order = "self_cuda_time_total" if run.device.type == "cuda" else "self_cpu_time_total"
    print(result.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=50))


def machine(device):
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor()}, {torch.get_num_threads()} threads"


def commit():
    """The commit of the code, or None outside a checkout."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or None


def main(argv=None):
    parser = flags.build_parser(__doc__.split("\n")[0])
    group = parser.add_argument_group("what to measure")
    sizes = flags.number_list(flags.positive)
    group.add_argument("--batch_sizes", type=sizes, metavar="N[,N…]", help="sweep over these (default: --batch_size)")
    group.add_argument("--edges", type=sizes, metavar="L[,L…]", help="sweep over these edge lengths (default: --L)")
    group.add_argument("--repeats", type=flags.positive, default=7, metavar="N", help="measurements, after a warm-up")
    group.add_argument("--profile", action="store_true", help="also print where the time of a step goes")
    group.add_argument("--json", metavar="FILE", help="write the results there")
    argv = sys.argv[1:] if argv is None else list(argv)
    first = flags.get_args(argv, parser)
    keep_freed_memory()
    results = []
    for edge in first.edges or [first.L]:
        for batch_size in first.batch_sizes or [first.batch_size]:
            own = ["--data", "folder", "--L", str(edge), "--nchannels", str(first.nchannels)]
            own += ["--batch_size", str(batch_size), "--out_dir", "", "--no_stdout"]
            args = flags.get_args([*argv, *own], parser)
            results.append(measure(args, first.repeats))
            print(
                ", ".join(
                    f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in results[-1].items()
                ),
                flush=True,
            )
            if first.profile:
                profile(args)
    if first.json:
        about = {"machine": machine(torch.device(first.device)), "torch": torch.__version__, "commit": commit()}
        about["command"] = " ".join(["python", "bench.py", *argv])
        Path(first.json).write_text(json.dumps({**about, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.script(main)
