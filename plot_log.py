#!/usr/bin/env python3
"""Draw bits per dimension during training, of one run or of several (no weights needed).

python plot_log.py saved_model/msds1/*/out.jsonl
python plot_log.py a/out.jsonl b/out.jsonl --time --labels RG-Flow "Real NVP" --bpd 3,4
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import args as flags
from utils.logging import read_records
from utils.plotting import COLOURS, COLUMN, save_figure, style

POINTS = 200  # of a training curve: means over as many equal stretches


def curves(path, time=False):
    """Of a `.jsonl` file: train (2, n), at most `POINTS` means of steps and BPD, and test (3, n), step, BPD, error.

    time: hours of training instead of steps
    Raises RunError for a file with no BPD, or with no times.
    """
    axis, unit = ("seconds", 3600) if time else ("step", 1)
    rows = {"train": [], "test": []}
    for record in read_records(path):
        if record.get("kind") in rows and "bpd" in record:
            if axis not in record:
                raise flags.RunError(f"{path}: its records have no {axis}, written by an older version")
            rows[record["kind"]].append((record[axis] / unit, record["bpd"], record.get("bpd_stderr", 0)))
    if not any(rows.values()):
        raise flags.RunError(f"{path}: no record with bits per dimension")
    train, test = (np.array(rows[kind], dtype=float).reshape(-1, 3) for kind in rows)
    stretches = np.array_split(train[:, :2], min(POINTS, len(train)) or 1)
    return np.array([stretch.mean(0) for stretch in stretches if len(stretch)]).reshape(-1, 2).T, test.T


def run_name(path):
    """{data}/{network}{infix} of {data}/{network}/out{infix}.jsonl."""
    path = Path(path).resolve()
    return f"{path.parent.parent.name}/{path.parent.name}{path.stem.removeprefix('out')}"


def log_figure(runs, labels, time=False, bpd=None):
    """runs: what `curves` gives, one per label. Lines: training; markers with error bars: tests."""
    with style():
        figure = Figure(figsize=(COLUMN, 2.2 + 0.14 * len(runs)), layout="constrained")
        axes = figure.subplots()
        for k, ((train, test), label) in enumerate(zip(runs, labels, strict=True)):
            line = {"color": COLOURS[k % len(COLOURS)], "linestyle": ("-", "--", ":")[k // len(COLOURS) % 3]}
            points = {"color": line["color"], "marker": "osD^v*"[k % 6], "markersize": 3}
            axes.plot(*train, **line, linewidth=0.8)
            axes.errorbar(*test, **points, linestyle="", elinewidth=0.8)
            axes.plot([], [], **{**line, **points}, linewidth=0.8, label=label)
        axes.set(xlabel="time of training in hours" if time else "step", ylabel="bits per dimension", ylim=bpd)
        for text in figure.legend(loc="outside upper left", frameon=False).get_texts():
            text.set_parse_math(False)
    return figure


def main(argv=None):
    parser = flags.Parser("Draw bits per dimension during training, of one run or of several (no weights needed).")
    parser.add_argument("files", nargs="+", metavar="FILE", help="out.jsonl of a run's folder")
    parser.add_argument("--time", action="store_true", help="against the time of training instead of steps")
    parser.add_argument("--labels", nargs="+", metavar="TEXT", help="of the runs (default: data set and network)")
    parser.add_argument(
        "--bpd", type=flags.number_list(flags.finite), metavar="LOW,HIGH", help="range that is shown (default: all)"
    )
    parser.add_argument("--name", default="log", metavar="TEXT", help="name of the pictures")
    parser.add_argument("--fig_dir", default="./figures", metavar="DIR", help="folder for pictures, PNG and PDF")
    args = parser.parse_args(argv)
    if args.bpd and (len(args.bpd) != 2 or args.bpd[0] >= args.bpd[1]):
        parser.error(f"argument --bpd: {flags.listing(args.bpd)}: must be two numbers, the smaller first")
    labels = args.labels or [run_name(file) for file in args.files]
    if len(labels) != len(args.files):
        parser.error(f"argument --labels: {len(labels)} labels: must be {len(args.files)}, one per file")
    runs = [curves(file, args.time) for file in args.files]
    figure = log_figure(runs, labels, args.time, args.bpd)
    for picture in save_figure(figure, Path(args.fig_dir) / args.name):
        print(picture)
    for (train, test), label in zip(runs, labels, strict=True):
        last = f"last test {test[1, -1]:.3f} ± {test[2, -1]:.3f}" if test.size else f"no test, {train[1, -1]:.3f}"
        print(f"{label}: lines training, at most {POINTS} means; markers test; {last} bits per dimension")


if __name__ == "__main__":
    flags.script(main)
