"""Results as JSON: the numbers, what it takes to measure them again, and their rows in the tables of `tables.py`."""

import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from torch.utils import collect_env

from .files import replacing

DATA_NAMES = {"msds1": "MSDS1", "msds2": "MSDS2", "celeba32": "CelebA", "cifar10": "CIFAR-10"}
DATA_NAMES |= {"chair600": "3D Chairs", "mnist32": "MNIST"}
MODEL_NAMES = {"rgflow": "RG-Flow", "realnvp": "Real NVP", "realnvp_constrained": "Constrained Real NVP"}
PRIOR_NAMES = {"gaussian": "Gaussian prior", "laplace": "Laplacian prior"}


def machine(device, processes=1):
    """What the numbers were measured on."""
    if processes > 1:
        return f"{processes} x {machine(device)}"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    names, threads = re.findall(r"^model name\s*: (.*\S)", text, re.M), torch.get_num_threads()
    return f"{[*names, platform.processor()][0]}, {threads} thread{'s' * (threads > 1)}"


def about(script, argv, device):
    """The command, machine, versions and date of a measurement, a dict; argv: None for those of the process."""
    command = shlex.join(["python", Path(script).name, *(sys.argv[1:] if argv is None else argv)])
    origin = {"command": command, "machine": machine(torch.device(device)), "torch": torch.__version__}
    describe, folder = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    try:
        commit = subprocess.run(describe, cwd=folder, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        commit = None
    return {**origin, "commit": commit, "date": time.strftime("%Y-%m-%d")}


def versions(device):
    """What else speed depends on: versions, processor, and memory and driver of a GPU; a dict, None for what is not
    there."""
    found = {"python": platform.python_version(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    found["triton"] = next((each.version for each in metadata.distributions(name="triton")), None)
    found |= {"cpu": machine(torch.device("cpu")), "cores": os.cpu_count()}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {"capability": f"{gpu.major}.{gpu.minor}", "memory_gib": gpu.total_memory / 2**30}
        found["driver"] = collect_env.get_nvidia_driver_version(collect_env.run)
    return found


def mean_and_deviation(values):
    """Mean and standard deviation (n - 1) of a list of numbers; the deviation of one number is None."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def in_words(values, digits=3):
    """Mean and standard deviation of a list of numbers; a dash where one of them is None."""
    if None in values:
        return "–"
    return " ± ".join(f"{each:.{digits}f}" for each in mean_and_deviation(values) if each is not None)


def means(results, **digits):
    """`in_words` for some entries of dicts, with so many digits each."""
    return " / ".join(in_words([each[name] for each in results], digits[name]) for name in digits)


def table(results):
    """Lines that show dicts with the same keys: a column for each, a line for each entry."""
    columns = [dict(entries(result)) for result in results]
    lines = [[name, *(column[name] for column in columns)] for name in columns[0]]
    first, *widths = (max(map(len, cells)) for cells in zip(*lines, strict=True))
    return ["  ".join((name.ljust(first), *map(str.rjust, cells, widths))) for name, *cells in lines]


def entries(value, name=""):
    """The entries of a dict, also of dicts within, as pairs of name and text."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from entries(each, f"{name} {key}".lstrip())
    elif isinstance(value, (list, tuple)):
        yield name, ", ".join(text for each in value for _, text in entries(each))
    else:
        yield name, "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def data_name(data, path=None):
    """A data set in words; path: of the images, if they are of a folder."""
    if data == "folder":
        return f"folder {Path(path).absolute().name}" if path else "a folder of images"
    return DATA_NAMES.get(data, data)


def training_name(config, weights):
    """The data set that the flow of a file was trained on, in words; older exports do not name a folder of images."""
    path = config.get("folder") or config.get("data_path") or f"of {Path(weights).stem}"
    return data_name(config["data"], path)


def elsewhere(config):
    """What a flow was trained on in words, if the images are of another data set (`args.with_data`), otherwise ""."""
    return f" (trained on {config['trained_data']})" if "trained_data" in config else ""


def flow_names(config):
    """The model, with what is not the paper's of its coupling and patches, and the model with its prior, in words."""
    model = MODEL_NAMES[config["model"]] + ("" if config["subnet"] == "rnvp" else f" with {config['subnet']}")
    if config["model"] == "rgflow":
        model += "" if (m := config["kernel_size"]) == 4 else f", {m} x {m} patches"
        model += ", shared levels" if config["share_levels"] else ""
    model += elsewhere(config)
    return model, f"{model}, {PRIOR_NAMES[config['prior']]}"


def by_network(results):
    """For each network among results of several flows: index of its first, its results (a seed each), and in words the
    data set, the flow and the seeds."""
    groups = {}
    for k, result in enumerate(results):
        groups.setdefault((result["data"], result["network"]), (k, []))[1].append(result)
    for (data, _), (first, own) in groups.items():
        seeds = f"seed{'s' * (len(own) > 1)} {', '.join(str(result['seed']) for result in own)}"
        yield first, own, DATA_NAMES[data], flow_names(own[0]["config"])[1], seeds


def row(table, name, cells, details, result=None, weight=0):
    """A row for a table of `tables.py`.

    table: a key of `tables.TITLES`; cells: column -> text; details: for the list below the table
    result: index in record["results"] of what says how the flow was trained, None if the record itself does
    weight: of several rows of this name the heaviest is shown
    """
    return {"table": table, "row": name, "cells": cells, "details": details, "result": result, "weight": weight}


def inpainting_rows(record):
    """A row per method, not for a user's own files and measurements of speed; the paper's images are of CelebA."""
    for k, result in enumerate(record["results"] if record["kind"] == "inpainting" else ()):
        if any(isinstance(name, str) for name in result["names"]):
            continue
        data, method, regions = result["config"]["data"], MODEL_NAMES[result["method"]], "a mask"
        trained = elsewhere(result["config"])
        name = flow_names(result["config"])[0] if result["method"] == "rgflow" else method + trained
        if isinstance(result["region"], list):
            regions = " and ".join(sorted({f"{height} x {width}" for _, _, height, width in result["region"]}))
        words = "{0}: PSNR {psnr_image:.2f} dB, {psnr_region:.2f} dB in the region, {free_latents:g} free latents;"
        words += " {images} images, {1}, lr {lr:g}, {steps} steps, {draws} draws"
        cells = {"PSNR": f"{result['psnr_image']:.1f}", "PSNR of the region": f"{result['psnr_region']:.1f}"}
        cells["free latents"] = f"{result['free_latents']:,.0f}"
        name += "" if data == "celeba32" else f", {data_name(data, result.get('folder'))}"
        yield row("F1", name, cells, words.format(method + trained, regions, **result), k, result["images"])


def save(path, record, rows=None):
    """Write a dict as JSON, null for numbers that are not finite, and rows(record) as its "rows". Raises OSError."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    written = json.loads(json.dumps(record), parse_constant=lambda _: None)
    with replacing(path) as file:
        file.write((json.dumps(written, indent=1) + "\n").encode())
    if rows:  # the numbers are safe by now
        save(path, {**record, "rows": list(rows(record))})
