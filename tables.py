#!/usr/bin/env python3
"""Turn results (--json files of other scripts) and logs of runs into the paper's tables and more, in Markdown.

    python tables.py results weights --out docs/results.md

Our numbers stand beside the paper's. The number in brackets is that of a line in the list below the table, which says
how the flow was trained (the seconds of that run alone, without those before an --init) and measured. A cell shows the
result with most seconds of training; of equals, that with most steps, then the last file name. The entry "rows" of a
results file has its rows, see `utils.results.row`. Logs (`.jsonl`) make the last table: what runs had reached after
1,000 steps, 2,000, 5,000 and so on.
"""

import json
import re
import sys
from argparse import Namespace
from datetime import timedelta
from itertools import chain
from pathlib import Path

import args as flags
from utils import cli
from utils.files import replacing
from utils.logging import read_bpds, run_name

# Numbers as the paper prints them; names of columns in the first line, of rows in the first column.
B1 = """                  | MSDS1 BPD | MSDS2 BPD | MSDS1 FID | MSDS2 FID
RG-Flow, Laplacian prior |     0.906 |      1.01 |      1.16 |      2.61
RG-Flow, Gaussian prior  |      1.60 |      1.53 |      7.42 |      7.16
Real NVP                 |      1.07 |      1.14 |      50.4 |      78.0"""
G1 = """  | CelebA BPD | CIFAR-10 BPD | 3D Chairs BPD | CelebA FID | CIFAR-10 FID | 3D Chairs FID
RG-Flow  |       3.47 |         3.35 |         0.930 |       31.3 |         98.5 |          36.2
Real NVP |       3.36 |         3.61 |         0.933 |       11.1 |          126 |          73.8"""
F1 = """              | PSNR | Inception-PSNR
RG-Flow              | 38.7 |           24.9
Constrained Real NVP | 23.2 |           15.7
Real NVP             | 37.0 |           24.8"""
PAPER = {"B1": B1, "G1": G1, "F1": F1}
TITLES = {
    "B1": "Table B1: synthetic data",
    "G1": "Table G1: real images",
    "F1": "Table F1: inpainting, dB",
    "structure": "Structure of MSDS samples: 1 for real images, 0 for ovals that share nothing",
    "factors": "Factors of MSDS: R² of the probe / ratio of the best single latent, per level",
    "moved": "Latents of MSDS that are moved: of 16 ovals, how many change, mean of the strongest latents / by the one"
    " that changes most / how far all ovals change alike, 1 for the same, 0 for one alone",
    "mixing": "Mixing of MSDS: weight of the image that gives levels h ≥ Θ / of the one that gives h < Θ; global are"
    " the colour of MSDS1 and the orientation of MSDS2, local the other one",
    "fields": "Receptive fields: mean reach in pixels / latents visible (strength above 1) of those computed,"
    " all or random ones, per level",
    "pinwheel": "Pinwheel (figure E1): share of draws in the leg of their sector",
    "round trip": "Largest round-trip errors, model space",
    "speed": "Speed, measured by `gpu_report.py`",
    "exactness": "Training compared with the CPU, measured by `gpu_report.py`: largest difference of losses, nats per"
    " dimension, and of weights",
}
KINDS = "evaluation", "inpainting", "factors", "effects", "receptive fields", "pinwheel"  # of results that have rows
LIST = "measured", "network", "parameters", "steps", "training time", "trained on", "measured on", "commit", "command"
MARKER = "<!-- tables.py writes what follows -->"
NOTHING = "Not measured yet.", ""


def read_rows(path):
    """[(title, row, cells, details, source)] of a results file; source: its rank among rows of the same name, and the
    cells of its line in the list. Raises whatever a strange file brings about."""
    try:
        record = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(record, dict) or not record.get("rows"):
        old = isinstance(record, dict) and record.get("kind") in KINDS and "rows" not in record
        raise ValueError("written by an older version, measure again" if old else "nothing in it belongs in a table")
    found = []
    for row in record["rows"]:
        flow = record if row["result"] is None else {**record, **record["results"][row["result"]]}
        network, seconds, step = "", flow.get("train_seconds"), flow.get("step", 0)
        if "weights" in flow:
            config = flow["config"]
            start = f", from {Path(config['init']).name}" if config.get("init") else ""
            network = f"{flags.network_name(Namespace(**config))}, batch {config['batch_size']}, lr {config['lr']:g},"
            network += f" seed {config['seed']}{start}; `{flow['weights']}`"
        parameters = f"{flow['parameters']:,}" if "parameters" in flow else ""
        line = network, parameters, f"{step:,}" if step else "", "" if seconds is None else clock(seconds)
        line += flow.get("trained_on") or "", flow["machine"], flow["commit"] or "", f"`{flow['command']}`"
        rank = float(row["weight"]), float(seconds or 0), float(step), path.name
        cells = {str(column): str(text) for column, text in row["cells"].items()}
        found.append((TITLES[row["table"]], str(row["row"]), cells, str(row["details"]), (rank, tuple(map(str, line)))))
    return found


def clock(seconds):
    return str(timedelta(seconds=round(seconds)))


def markdown(header, rows):
    """The lines of a table, with an empty one at its end."""
    for n, cells in enumerate([header, *rows]):
        yield "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
        if n == 0:
            yield "|" + "---|" * len(header)
    yield ""


def render(table, rows):
    """A table and the list of its sources as lines of Markdown; rows: of `read_rows`, without the title."""
    paper = PAPER.get(table, " ").splitlines()
    (_, *printed), *lines = ([cell.strip() for cell in line.split("|")] for line in paper)
    pairs = {f"{column}, paper": column for column in printed}
    columns = [*dict.fromkeys([*chain(*pairs.items()), *chain(*(cells for _, cells, _, _ in rows))])]
    shown = {name: dict(zip(pairs, cells, strict=True)) for name, *cells in lines}  # row -> column -> text
    sources = {}
    for name, _, details, where in rows:
        shown.setdefault(name, {})
        sources.setdefault(where, {})[details] = None
    numbers = {where: n for n, where in enumerate(sources, 1)}
    for name, cells, _, where in sorted(rows, key=lambda row: row[-1][0]):
        shown[name] |= {column: f"{text} [{numbers[where]}]" for column, text in cells.items()}

    yield from (f"## {TITLES[table]}", "", *([] if shown else NOTHING))
    if shown:
        header = ["", *("ours" if column in printed else column for column in columns)]
        body = ([name, *(own.get(column, "") for column in columns)] for name, own in shown.items())
        yield from markdown(header, body)
    if numbers:
        lines = ([f"[{n}]", "; ".join(sources[where]), *where[1]] for where, n in numbers.items())
        yield from markdown(["", *LIST], lines)


def render_logs(logs):
    """The table of what runs had reached on the way, one per row, as lines of Markdown; logs: {path: `read_bpds`}."""
    yield from ("## Am I on track?", "")
    if not logs:
        yield from NOTHING
        return
    reached = {path: {} for path in logs}  # path -> step -> BPD, in italics without a test, and time
    for path, log in logs.items():
        for each in [*log["train"], *log["test"]]:
            bpd = f"{each['bpd']:.3f}" if each["kind"] == "test" else f"*{each['bpd']:.3f}*"
            reached[path][each["step"]] = bpd, clock(each["seconds"]) if "seconds" in each else ""
    marks = sorted(step for step in set().union(*reached.values()) if re.fullmatch("[125]0{3,}", str(step)))
    rows = []
    for path, cells in reached.items():
        end = max(cells)
        times = ["", *(cells[step][1] for step in marks if step in cells)]
        on_the_way = [*(cells.get(step, [""])[0] for step in marks), *times[-1:] * bool(marks)]
        rows.append([run_name(path), *on_the_way, f"{end:,} steps", *cells[end]])
    columns = [f"{step:,} steps" for step in marks] + ["time up to there"] * bool(marks)
    yield from markdown(["run", *columns, "end of the run", "BPD", "time"], rows)
    yield (
        "Bits per dimension of the test images; *in italics*, where there was no test, of the training images, a mean"
        " over the steps since the log's line before. Times are of training, without tests. With `--lr_schedule cosine`"
        " the learning rate falls to 0 at the end of a run, so near the end a run with other `--max_steps` does not"
        " compare. Compare a log of your own with one of these by"
    )
    yield from ("", f"    python plot_log.py saved_model/…/out.jsonl --against {next(iter(logs))}", "")


def main(argv=None):
    parser = cli.Parser(__doc__)
    add, paths = parser.add_argument, "results (.json), logs of runs (.jsonl), or folders of them, at any depth"
    add("paths", nargs="+", metavar="PATH", help=paths)
    add("--out", metavar="FILE", help=f"write the tables there, below its line {MARKER} (default: to stdout)")
    args = parser.parse_args(argv)
    given = [Path(path) for path in args.paths]
    for path in given:
        if not path.exists():
            parser.error(f"argument PATH: {path}: no such file or folder")
    cli.check_output(parser, args)
    within = {path: sorted([*path.rglob("*.json"), *path.rglob("*.jsonl")]) for path in given if path.is_dir()}
    results, logs, warnings = [], {}, [f"{path}: holds no .json or .jsonl file" for path in within if not within[path]]
    for path in dict.fromkeys(chain(*(within.get(path, [path]) for path in given))):
        try:
            if path.suffix == ".jsonl":
                logs[path] = read_bpds(path)
            else:
                results += read_rows(path)
        except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
            words = f"{error} is missing or not known" if isinstance(error, KeyError) else str(error)
            warnings.append(f"{path}: skipped, {' '.join(words.split())}")
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    tables = (render(key, [row for title, *row in results if title == TITLES[key]]) for key in TITLES)
    text = "\n".join(chain(*tables, render_logs(logs)))
    if not args.out:
        return print(text)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    old = Path(args.out).read_bytes() if Path(args.out).exists() else b""
    line = re.search(rf"^[ \t]*{MARKER}\s*$".encode(), old, re.M)
    if old.strip() and not line:
        raise cli.flag_error("--out", args.out, f"is there and has no line {MARKER}, below which the tables could go")
    with replacing(args.out) as file:
        file.write(old[: line.start() if line else 0] + f"{MARKER}\n\n{text}\n".encode())
    print(args.out)


if __name__ == "__main__":
    cli.script(main)
