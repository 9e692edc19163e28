"""Results as JSON: the numbers, and what it takes to measure them again."""

import json
import math
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from .files import replacing


def machine(device):
    """What the numbers were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []:
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {threads}"
    return f"{platform.processor()}, {threads}"


def commit():
    """The commit of the code, or None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None


def about(script, argv, device):
    """The command, machine, versions and date of a measurement, a dict; `script` is its file, argv its flags."""
    return {
        "command": shlex.join(["python", Path(script).name, *(sys.argv[1:] if argv is None else argv)]),
        "machine": machine(torch.device(device)),
        "torch": torch.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def mean_and_deviation(values):
    """Mean and standard deviation (n - 1) of a list of numbers; the deviation of one number is None."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def in_words(values, digits=3):
    """Mean and standard deviation of a list of numbers; a dash where one of them is None."""
    if None in values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation is not None else "")


def save(path, record):
    """Write a dict as JSON, null for numbers that are not finite. Raises OSError."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(finite(record), indent=1, allow_nan=False) + "\n").encode())


def finite(value):
    """A value as JSON can hold it: None for floats that are not finite, in dicts and sequences too."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
