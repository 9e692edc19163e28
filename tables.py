#!/usr/bin/env python3
"""Turn results (--json files of other scripts) and logs of runs into the paper's tables and more, in Markdown.

    python tables.py results
    python tables.py results weights --out docs/results.md

Beside each number of the paper stands ours, with the number in brackets of a line in the list below the table, which
tells how it was trained (in the seconds of that run alone, without those before an --init) and measured. A cell without
a measurement stays empty. Where several results belong in one cell, it shows the one with most seconds of training, of
equals the one with most steps, then the one whose file name comes last; the list has them all. Data sets and priors
that a table of the paper lacks get columns and rows at its end.

A further table is one more entry of `TABLES`, with a function from a record to the entries that it makes. Logs
(`.jsonl`) make the last table: what runs had reached after 1,000 steps, 2,000, 5,000 and so on.

Prose in the file of --out stays: what is above its line `<!-- tables.py writes what follows -->`.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import args as flags
from data.msds import VARIANTS
from utils import cli
from utils.files import replacing
from utils.logging import read_bpds, run_name
from utils.results import in_words

DATA_NAMES = {
    "msds1": "MSDS1",
    "msds2": "MSDS2",
    "celeba32": "CelebA",
    "cifar10": "CIFAR-10",
    "chair600": "3D Chairs",
    "mnist32": "MNIST",
}
MODELS = {"rgflow": "RG-Flow", "realnvp": "Real NVP"}
PRIORS = {"laplace": "Laplacian", "gaussian": "Gaussian"}
INPAINTERS = {"rgflow": "RG-Flow", "realnvp_constrained": "Constrained Real NVP", "realnvp": "Real NVP"}
LIST = (
    "",
    "measured",
    "network",
    "parameters",
    "steps",
    "training time",
    "trained on",
    "measured on",
    "commit",
    "command",
)
MARKER = "<!-- tables.py writes what follows -->"
CHANGES = {"ovals": 1, "most": 1, "common": 2}  # of moved latents: numbers in a cell, and their decimals
MALFORMED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # what a strange file may raise


@dataclass(frozen=True)
class Source:
    """Where a number comes from. rank: of several for one cell the largest counts; line: cells for the list below"""

    rank: tuple
    line: tuple


@dataclass(frozen=True)
class Entry:
    """A number of ours: its row and column, what stands in the cell, and what the list below says of it."""

    row: str
    column: str
    text: str
    details: str
    source: Source


@dataclass(frozen=True)
class Table:
    """paper: {row: {column: number as printed there}}, in the paper's order; empty for tables that it lacks
    entries: what a record adds to the table, nothing if it does not belong there; MALFORMED if it cannot be read
    """

    title: str
    paper: dict
    entries: Callable[[dict], Iterable[Entry]]


def number(value):
    """A finite number of a record. Raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no finite number")
    return value


def number_or_none(value):
    return None if value is None else number(value)


def source(record, config):
    """The Source of a record; config: of the training, None where the record does not tell."""
    seconds, step = record.get("train_seconds"), number(record.get("step", 0))
    network = f"`{record['weights']}`" if "weights" in record else ""
    if config:
        name = flags.network_name(SimpleNamespace(**{"model": "rgflow", **config}))
        network = f"{name}, batch {config['batch_size']}, lr {config['lr']:g}, seed {config['seed']}; {network}"
    line = (
        network,
        f"{number(record['parameters']):,}" if "parameters" in record else "",
        f"{step:,}" if step else "",
        "" if seconds is None else timedelta(seconds=round(number(seconds))),
        record.get("trained_on") or "",
        record["machine"],
        record["commit"] or "",
        f"`{record['command']}`",
    )
    return Source((seconds or 0, step, record["file"]), tuple(map(str, line)))


def evaluation(record, row):
    """The entries of an evaluation, in the row of that name: BPD, FID."""
    results, config = record["results"], record["config"]
    notes = "".join(f"; warning: {warning}" for warning in results.get("warnings", ()))
    name, where = DATA_NAMES.get(config["data"], config["data"]), source(record, config)
    if "bpd" in results:
        bpd, stderr = number(results["bpd"]), number(results["bpd_stderr"])
        details = (
            f"BPD {bpd:.4f} ± {stderr:.4f}, {number(results['images']):,} images, {len(results['bpd_draws'])} draws"
        )
        yield Entry(row, f"{name} BPD", f"{bpd:.3f}", details + notes, where)
    if "fid" in results:
        fid, kid, kid_std, precision, recall = (
            number(results[key]) for key in ("fid", "kid_mean", "kid_std", "precision", "recall")
        )
        settings = results["fid_settings"]
        details = (
            f"FID {fid:.4g}, KID {kid:.4g} ± {kid_std:.2g}, precision {precision:.3f}, recall {recall:.3f},"
            f" {number(settings['samples']):,} samples at T = {settings['temperature']} against the {settings['split']}"
            f" split, {settings['library']} {settings['version']}, {settings['feature_weights']}"
        )
        yield Entry(row, f"{name} FID", f"{fid:.3g}", details + notes, where)


def flow_names(config):
    """Name of the model, with its coupling unless that is the paper's, and of the model with its prior."""
    model, subnet = MODELS[config.get("model", "rgflow")], config.get("subnet", "rnvp")
    model += "" if subnet == "rnvp" else f" with {subnet}"
    return model, f"{model}, {PRIORS[config['prior']]} prior"


def b1_entries(record):
    """Evaluations of both MSDS sets; the row names the prior of RG-Flow."""
    if record["kind"] == "evaluation" and record["config"]["data"] in VARIANTS:
        model, with_prior = flow_names(record["config"])
        yield from evaluation(record, model if model == MODELS["realnvp"] else with_prior)


def g1_entries(record):
    """Evaluations of all other sets; the paper's RG-Flow has a Laplacian prior."""
    if record["kind"] == "evaluation" and record["config"]["data"] not in VARIANTS:
        model, with_prior = flow_names(record["config"])
        gaussian_rgflow = model != MODELS["realnvp"] and record["config"]["prior"] == "gaussian"
        yield from evaluation(record, with_prior if gaussian_rgflow else model)


def f1_entries(record):
    """Inpainting of a data set's images, one result per method; the paper's are of CelebA. Most images count first."""
    for result in record["results"] if record["kind"] == "inpainting" else ():
        if any(isinstance(name, str) for name in result["names"]):  # a user's files
            continue
        config, data = result["config"], result["config"]["data"]
        where = source({**record, **result}, config)
        where = replace(where, rank=(number(result["images"]), *where.rank))
        row = flow_names(config)[0] if result["method"] == "rgflow" else INPAINTERS[result["method"]]
        row += "" if data == "celeba32" else f", {DATA_NAMES.get(data, data)}"
        image, region, free = (number(result[key]) for key in ("psnr_image", "psnr_region", "free_latents"))
        regions = "a mask"
        if isinstance(result["region"], list):
            regions = " and ".join(sorted({f"{height} x {width}" for _, _, height, width in result["region"]}))
        details = (
            f"{INPAINTERS[result['method']]}: PSNR {image:.2f} dB, {region:.2f} dB in the region, {free:g} free"
            f" latents; {result['images']} images, {regions}, lr {number(result['lr']):g}, {result['steps']} steps,"
            f" {result['draws']} draws"
        )
        yield Entry(row, "PSNR", f"{image:.1f}", details, where)
        yield Entry(row, "PSNR of the region", f"{region:.1f}", "", where)
        yield Entry(row, "free latents", f"{free:,.0f}", "", where)


def structure_entries(record):
    """Structure scores of evaluations."""
    scores = record["results"].get("structure") if record["kind"] == "evaluation" else None
    if scores:
        config, (_, row) = record["config"], flow_names(record["config"])
        where, name = source(record, config), DATA_NAMES[config["data"]]
        score = "none" if scores["score"] is None else f"{number(scores['score']):.3f}"
        failure, errors = scores["failure"] or f"score {score}", scores["calibration"]
        details = (
            f"{failure}, {number(scores['samples']):,} samples at T = {scores['temperature']}; off by"
            f" {number(errors['degrees']):.1f}° and {number(errors['levels']):.1f} of 256 levels on labelled images"
        )
        yield Entry(row, f"{name} score", score, details, where)
        for key, column in (("share", "cells with an oval"), ("share_real", "of real images")):
            yield Entry(row, f"{name} {column}", f"{number(scores[key]):.1%}", "", where)
        if scores["between"] is not None:
            yield Entry(row, f"{name} spread between images / real", f"{number(scores['between']):.2f}", "", where)


def round_trip_entries(record):
    """Largest round-trip errors of evaluations, over data and samples."""
    round_trip = record["results"].get("round_trip", {}) if record["kind"] == "evaluation" else {}
    for dtype, sources in round_trip.items():
        config, (_, row) = record["config"], flow_names(record["config"])
        row = f"{DATA_NAMES.get(config['data'], config['data'])}: {row}"
        errors = {
            "images": [each["image"] for each in sources.values()],
            "latents": [error for each in sources.values() for error in each["levels"]],
        }
        details = f"{dtype}, {number(record['results']['round_trip_images']):,} test images and samples"
        for name, values in errors.items():
            text = "not finite" if None in values else f"{max(map(number, values)):.1e}"
            yield Entry(row, f"{dtype}, {name}", text, details, source(record, config))


def factor_entries(record):
    """Probes: R² of all latents of a level, and what the best single latent reaches of it, a mean over seeds."""
    networks = {}
    for result in record["results"] if record["kind"] == "factors" else ():
        networks.setdefault(result["network"], []).append(result)
    for results in networks.values():
        where = source({**record, **results[0]}, results[0]["config"])
        name, (_, flow) = DATA_NAMES[record["data"]], flow_names(results[0]["config"])
        seeds = f"seed{'s' * (len(results) > 1)} {', '.join(str(result['seed']) for result in results)},"
        seeds += f" {number(record['images']):,} training and {number(record['held_out']):,} test images"
        for rows in zip(*(result["levels"] for result in results), strict=True):
            factor, level = rows[0]["factor"], rows[0]["level"]
            probe, ratio = (in_words([number_or_none(row[key]) for row in rows], 2) for key in ("probe", "ratio"))
            yield Entry(f"{name} {factor}, {flow}", f"h = {level}", f"{probe} / {ratio}", seeds, where)


def effects_of_networks(record):
    """Of each network in a record of effects: its name in rows, all its results (of several seeds), what the list says
    of them, the source."""
    networks = {}
    for result in record["results"] if record["kind"] == "effects" else ():
        networks.setdefault((result["data"], result["network"]), []).append(result)
    for (data, _), results in networks.items():
        (_, flow), seeds = flow_names(results[0]["config"]), ", ".join(str(result["seed"]) for result in results)
        where = source({**record, **results[0]}, results[0]["config"])
        yield f"{DATA_NAMES[data]} {{}}, {flow}", results, f"seed{'s' * (len(results) > 1)} {seeds}", where


def change_entries(record):
    """Moved latents: how many ovals change, how far alike, and what the strongest of these latents changes."""
    for row, results, seeds, where in effects_of_networks(record):
        low, high = map(number, record["range"])
        details = f"{seeds}, moved from {low:g} to {high:g} in {number(record['images']):,} test images;"
        details += f" changed: by more than {number(record['thresholds']['colour']):g} of 256 levels or"
        details += f" {number(record['thresholds']['orientation']):g}°"
        for levels in zip(*(result["levels"] for result in results), strict=True):
            latents = f"{details}; {levels[0]['latents']} latents a level"
            for factor in ("colour", "orientation"):
                text = " / ".join(
                    in_words([number_or_none(level[factor][name]) for level in levels], digits)
                    for name, digits in CHANGES.items()
                )
                yield Entry(row.format(factor), f"h = {levels[0]['level']}", text, latents, where)


def mixing_entries(record):
    """Mixed images: the weights of both images in the global and the local factor, and whether ovals are left."""
    for row, results, seeds, where in effects_of_networks(record):
        details = f"{seeds}, {number(record['pairs']):,} pairs of test images"
        for rows in zip(*(result["mixing"] for result in results), strict=True):
            column = f"Θ = {rows[0]['theta']}"
            for factor in ("global", "local"):
                weights = [[number_or_none(each[factor][name]) for each in rows] for name in ("high", "low")]
                text = " / ".join(map(in_words, weights, (2, 2)))
                yield Entry(row.format(f"{factor} factor"), column, text, details, where)
            text = in_words([number_or_none(each["score"]) for each in rows], 2)
            yield Entry(row.format("structure score"), column, text, details, where)
            text = in_words([100 * number(each["found"]) for each in rows], 1)
            yield Entry(row.format("cells with an oval, %"), column, text, details, where)


def pinwheel_entries(record):
    """Accuracy of sectors of the plane, mean and deviation over seeds."""
    results = record["results"] if record["kind"] == "pinwheel" else ()
    for prior in dict.fromkeys(result["prior"] for result in results):
        own = [result for result in results if result["prior"] == prior]
        details = f"{len(own)} seeds, {number(record['config']['steps']):,} steps each"
        columns = {"quadrants": "quadrants", "axes": "sectors about the axes", "best": "best of all turned quadrants"}
        for key, column in columns.items():
            text = in_words([number(result[key]) for result in own])
            yield Entry(f"{PRIORS[prior]} prior", column, text, details, source(record, None))


TABLES = [
    Table(
        "Table B1: synthetic data",
        {
            "RG-Flow, Laplacian prior": {
                "MSDS1 BPD": "0.906",
                "MSDS2 BPD": "1.01",
                "MSDS1 FID": "1.16",
                "MSDS2 FID": "2.61",
            },
            "RG-Flow, Gaussian prior": {
                "MSDS1 BPD": "1.60",
                "MSDS2 BPD": "1.53",
                "MSDS1 FID": "7.42",
                "MSDS2 FID": "7.16",
            },
            "Real NVP": {"MSDS1 BPD": "1.07", "MSDS2 BPD": "1.14", "MSDS1 FID": "50.4", "MSDS2 FID": "78.0"},
        },
        b1_entries,
    ),
    Table(
        "Table G1: real images",
        {
            "RG-Flow": {
                "CelebA BPD": "3.47",
                "CIFAR-10 BPD": "3.35",
                "3D Chairs BPD": "0.930",
                "CelebA FID": "31.3",
                "CIFAR-10 FID": "98.5",
                "3D Chairs FID": "36.2",
            },
            "Real NVP": {
                "CelebA BPD": "3.36",
                "CIFAR-10 BPD": "3.61",
                "3D Chairs BPD": "0.933",
                "CelebA FID": "11.1",
                "CIFAR-10 FID": "126",
                "3D Chairs FID": "73.8",
            },
        },
        g1_entries,
    ),
    Table(
        "Table F1: inpainting, dB",
        {
            "RG-Flow": {"PSNR": "38.7", "Inception-PSNR": "24.9"},
            "Constrained Real NVP": {"PSNR": "23.2", "Inception-PSNR": "15.7"},
            "Real NVP": {"PSNR": "37.0", "Inception-PSNR": "24.8"},
        },
        f1_entries,
    ),
    Table("Structure of MSDS samples: 1 for real images, 0 for ovals that share nothing", {}, structure_entries),
    Table("Factors of MSDS: R² of the probe / ratio of the best single latent, per level", {}, factor_entries),
    Table(
        "Latents of MSDS that are moved: of 16 ovals, how many change, mean of the strongest latents / by the one that"
        " changes most / how far all ovals change alike, 1 for the same, 0 for one alone",
        {},
        change_entries,
    ),
    Table(
        "Mixing of MSDS: weight of the image that gives levels h ≥ Θ / of the one that gives h < Θ; global are the"
        " colour of MSDS1 and the orientation of MSDS2, local the other one",
        {},
        mixing_entries,
    ),
    Table("Pinwheel (figure E1): share of draws in the leg of their sector", {}, pinwheel_entries),
    Table("Largest round-trip errors, model space", {}, round_trip_entries),
]


def read(path):
    """The record of a results file, with the file's name as "file". Raises OSError, ValueError if it is none."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ValueError("no results of this program")
    return {**record, "file": path.name}


def collect(paths):
    """({title: entries}, warnings): what the files add to each of `TABLES`, and a sentence for each that is skipped."""
    found, warnings = {table.title: [] for table in TABLES}, []
    for path in paths:
        try:
            record = read(path)
            entries = [(table.title, list(table.entries(record))) for table in TABLES]
        except KeyError as error:
            warnings.append(f"{path}: skipped, {error.args[0]!r} is missing or not known")
            continue
        except (OSError, *MALFORMED) as error:
            warnings.append(f"{path}: skipped, {' '.join(str(error).split())}")
            continue
        if not any(part for _, part in entries):
            warnings.append(f"{path}: skipped, nothing in it of kind {record['kind']!r} belongs in a table")
        for title, part in entries:
            found[title] += part
    return found, warnings


def render(table, entries):
    """A table and the list of its sources as lines of Markdown."""
    rows = dict.fromkeys([*table.paper, *(entry.row for entry in entries)])
    printed = dict.fromkeys([column for line in table.paper.values() for column in line])
    columns = {**printed, **dict.fromkeys(entry.column for entry in entries)}
    numbers = {where: n for n, where in enumerate(dict.fromkeys(entry.source for entry in entries), 1)}
    best = {}
    for entry in sorted(entries, key=lambda entry: entry.source.rank):
        best[entry.row, entry.column] = f"{entry.text} [{numbers[entry.source]}]"

    yield f"## {table.title}"
    yield ""
    if not rows:
        yield "Not measured yet."
        yield ""
        return
    names = [[f"{column}, paper", "ours"] if column in printed else [column] for column in columns]
    yield from heading(["", *chain(*names)])
    for row in rows:
        paper = table.paper.get(row, {})
        cells = [[paper.get(column, "")] * (column in printed) + [best.get((row, column), "")] for column in columns]
        yield line([row, *chain(*cells)])
    yield ""
    if numbers:
        yield from heading(LIST)
        for where, n in numbers.items():
            details = "; ".join(
                dict.fromkeys(entry.details for entry in entries if entry.source == where and entry.details)
            )
            yield line([f"[{n}]", details, *where.line])
        yield ""


def read_logs(paths):
    """({path: what `read_bpds` gives}, warnings): a sentence for each log that is skipped."""
    logs, warnings = {}, []
    for path in paths:
        try:
            logs[path] = read_bpds(path)
        except (OSError, ValueError) as error:
            warnings.append(f"{path}: skipped, {' '.join(str(error).split())}")
    return logs, warnings


def render_logs(logs):
    """The table of what runs had reached on the way, one per row, as lines of Markdown; logs: of `read_logs`."""
    yield "## Am I on track?"
    yield ""
    if not logs:
        yield "Not measured yet."
        yield ""
        return
    records = {path: {each["step"]: each for each in [*log["train"], *log["test"]]} for path, log in logs.items()}
    marks = sorted(step for step in set().union(*records.values()) if is_mark(step))
    columns = [f"{step:,} steps" for step in marks] + ["time up to there"] * bool(marks)
    yield from heading(["run", *columns, "end of the run", "BPD", "time"])
    for path, of_step in records.items():
        reached, end = [step for step in marks if step in of_step], max(of_step)
        cells = [bpd_of(of_step.get(step)) for step in marks]
        cells += [time_of(of_step[max(reached)]) if reached else ""] * bool(marks)
        yield line([run_name(path), *cells, f"{end:,} steps", bpd_of(of_step[end]), time_of(of_step[end])])
    yield ""
    yield (
        "Bits per dimension of the test images; *in italics*, where there was no test, of the training images, a mean"
        " over the steps since the log's line before. Times are of training, without tests. With `--lr_schedule cosine`"
        " the learning rate falls to 0 at the end of a run, so near the end a run with other `--max_steps` does not"
        " compare. A log of your own is held against one of these with"
    )
    yield ""
    yield f"    python plot_log.py saved_model/…/out.jsonl --against {next(iter(logs))}"
    yield ""


def is_mark(step):
    """Whether a step is 1,000, 2,000, 5,000, 10,000 and so on."""
    return step >= 1000 and str(step).rstrip("0") in ("1", "2", "5")


def bpd_of(record):
    """The cell of a record of a log, empty for None."""
    if record is None:
        return ""
    return f"{record['bpd']:.3f}" if record["kind"] == "test" else f"*{record['bpd']:.3f}*"


def time_of(record):
    """Hours, minutes and seconds of training up to a record of a log, empty where it does not say."""
    return str(timedelta(seconds=round(record["seconds"]))) if "seconds" in record else ""


def heading(names):
    yield line(names)
    yield "|" + "---|" * len(names)


def line(cells):
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def files_of(path):
    """The results and logs of a folder, at any depth, or a file as it is."""
    return sorted([*path.rglob("*.json"), *path.rglob("*.jsonl")]) if path.is_dir() else [path]


def prose(path):
    """What stands in a file, if there is one, up to the line `MARKER`, with an empty line after it; bytes."""
    lines = Path(path).read_bytes().splitlines(keepends=True) if Path(path).exists() else []
    for n, each in enumerate(lines):
        if each.strip() == MARKER.encode():
            return b"".join(lines[:n]) + f"{MARKER}\n\n".encode()
    return b""


def main(argv=None):
    parser = cli.Parser(__doc__.split("\n")[0])
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="PATH",
        help="results (.json) or the log of a run (.jsonl), or a folder of them, searched at any depth",
    )
    parser.add_argument(
        "--out", metavar="FILE", help=f"write the tables there, below its line {MARKER} if any (default: to stdout)"
    )
    args = parser.parse_args(argv)
    for path in args.paths:
        if not path.exists():
            parser.error(f"argument PATH: {path}: no such file or folder")
    cli.check_output(parser, args)
    files = {path: files_of(path) for path in args.paths}
    paths = list(dict.fromkeys(chain(*files.values())))
    found, warnings = collect(path for path in paths if path.suffix != ".jsonl")
    logs, more = read_logs(path for path in paths if path.suffix == ".jsonl")
    warnings += more + [f"{path}: holds no .json or .jsonl file" for path, within in files.items() if not within]
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    lines = chain(*(render(table, found[table.title]) for table in TABLES), render_logs(logs))
    text = "\n".join(lines)
    if not args.out:
        print(text)
        return
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    kept = prose(args.out)
    with replacing(args.out) as file:
        file.write(kept + (text + "\n").encode())
    print(args.out)


if __name__ == "__main__":
    cli.script(main)
