#!/usr/bin/env python3
"""Measure a GPU in six minutes: exactness, speed, memory and kernels of training. Needs no data set and no network.

    python gpu_report.py --cuda 0 --json results/my_gpu.json

Each part is a call of `bench.py` in a process of its own, with a time limit. Its results are in the file of --json as
soon as it ends; if it fails, the last lines of its output are, and the next part starts. `tables.py` makes a table.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

import args as flags
from utils import cli
from utils.results import about, entries, row, save

SMALL = "--L 16 --nlayers 2 --nresblocks 2 --nhidden 32 --batch_size 16 --lr 3e-3"
SPEED = "--amp bf16 --profile"
PARTS = {  # flags of bench.py and the most seconds; the most important part first, last splines: they compile longest
    "exactness": (f"--exact 200 {SMALL}", 180),
    "batch 64": (f"{SPEED} --batch_size 64", 150),
    "batch 1024, recomputed": (f"{SPEED} --batch_size 1024 --grad_checkpoint --repeats 3", 120),
    "batch 1024": (f"{SPEED} --batch_size 1024 --repeats 3", 60),
    "spline": (f"{SPEED} --batch_size 64 --subnet spline", 600),
}
CELLS = {  # column -> entry of a result, format
    "ms per step": ("ms_per_step", ".1f"),
    "images/s": ("train_images_per_s", ",.0f"),
    "MFU": ("train_mfu", ".2g"),
    "samples/s": ("samples_per_s", ",.0f"),
    "peak memory, MiB": ("peak_memory_mib", ",.0f"),
    "kernels per step": ("kernels_per_step", ","),
}
LINES = 15  # of the output of a part that failed


def run(command, seconds):
    """Run a command for at most so many seconds, then kill it and its children. Returns how it failed, in words and
    with the last lines of its output, or None."""
    with tempfile.TemporaryFile() as output:
        how = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **how)
        try:
            status = process.wait(seconds)
            failure = f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            failure = f"stopped after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError, AttributeError):  # none is left; Windows has no groups
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    return "\n".join([failure, *lines[-LINES:]]) if failure else None


def measure(passed_on, seconds):
    """What bench.py writes with these flags, a dict, with "command", "seconds", "error" if it failed, and "stopped" if
    the user has stopped it."""
    script, start, found = Path(__file__).with_name("bench.py"), time.monotonic(), {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "part.json")
        try:
            error = run([sys.executable, str(script), *passed_on, "--json", str(path)], seconds)
        except SystemExit as stop:
            error, found["stopped"] = "stopped", stop
        found |= json.loads(path.read_text("utf-8")) if path.exists() else {}
    found |= {"command": shlex.join(["python", script.name, *passed_on]), "seconds": time.monotonic() - start}
    return {**found, "error": error} if error else found


def rows(record):
    """A row for each network and batch whose speed was measured, and for each way of computing that was compared."""
    versions = ", ".join(f"{name} {text}" for name, text in entries(record.get("versions", {})))
    weight = int(record["date"].replace("-", ""))  # the newest wins
    for result in chain(*(part.get("results", ()) for part in record["parts"].values())):
        if result.get("way", "CPU") != "CPU":
            name = f"{record['machine']}: {result['dtype']} {result['way']}"
            keys = ("loss", "loss_difference"), ("weights", "weight_difference")
            cells = {column: format(result[key][-1], ".1e") for column, key in keys if key in result}
            cells |= {"loss": result["error"]} if "error" in result else {"steps": str(result["steps"][-1])}
            yield row("exactness", name, {**cells, "torch": record["torch"]}, versions, weight=weight)
        if "batch_size" in result:
            ways = {"compiled": result["compile"], "recomputed": result["grad_checkpoint"]}
            name = [result["network"], f"L = {result['L']}", result["amp"], *(way for way in ways if ways[way])]
            shown = ((column, result.get(key), form) for column, (key, form) in CELLS.items())
            cells = {column: format(value, form) for column, value, form in shown if value is not None}
            cells |= {"ms per step": result["error"]} if "error" in result else {}
            name = f"{record['machine']}: {', '.join(name)}, batch {result['batch_size']}"
            details = "; ".join([versions, *(f"warning: {each}" for each in result["warnings"])])
            yield row("speed", name, {**cells, "torch": record["torch"]}, details, weight=weight)


def main(argv=None):
    argv = ["--data", "folder", *(sys.argv[1:] if argv is None else argv)]
    parser, own = flags.build_parser(__doc__, f"{flags.NETWORK} batch_size compile"), cli.Parser("")
    for add in (parser.add_argument, own.add_argument):
        add("--json", metavar="FILE", required=True, help="write the results there")
        add("--minutes", type=cli.above_zero, default=6.0, metavar="T", help="for all parts together")
    parser.set_defaults(data="folder")
    parser.epilog = f"The flags of the network and --batch_size replace those of every part. {parser.epilog}"
    args, given = flags.get_args(argv, parser, several=False), own.parse_known_args(argv)[1]
    record = {"kind": "gpu_report", **about(__file__, argv[2:], "cpu"), "parts": {}}
    end = time.monotonic() + 60 * args.minutes
    for name, (part, limit) in PARTS.items():
        seconds = min(limit, end - time.monotonic())
        print(f"{name}: at most {max(0, seconds):.0f} s", flush=True)
        found = measure([*part.split(), *given], seconds) if seconds > 0 else {"error": "--minutes are over"}
        record |= {key: found.pop(key) for key in ("machine", "versions") if key in found}
        record["parts"][name] = {key: found[key] for key in ("command", "seconds", "error", "results") if key in found}
        save(args.json, record, rows)
        print(found.get("error") or f"{found['seconds']:.0f} s", flush=True)
        if "stopped" in found:
            raise found["stopped"]
    if not any(part.get("results") for part in record["parts"].values()):
        raise cli.UserError(f"{args.json}: no part has a result")
    print(args.json)


if __name__ == "__main__":
    cli.script(main)
