#!/usr/bin/env python3
"""Draw bits per dimension during training, of one or several runs. Needs no weights."""

import math
import re
from itertools import count

import numpy as np

from utils import cli
from utils.logging import read_bpds, run_name
from utils.plotting import COLOURS, COLUMN, PAGE, Figure, LogLocator, save_figure, style

POINTS = 200  # of a training curve: means over as many equal stretches
SPREAD = 0.028  # of BPD over three seeds of a small RG-Flow (rnvp) after 1,000 steps, docs/recipe.md; smaller later


def read(path):
    """`read_bpds`, with a UserError for a file that is no log. Raises OSError."""
    try:
        return read_bpds(path)
    except ValueError as error:
        raise cli.UserError(f"{path}: {error}") from error


def curves(path, time=False):
    """Curves of a log: train (2, n), at most `POINTS` means of steps and BPD, and test (3, n), step, BPD, error; with
    `time`, hours of training instead of steps. Raises UserError for a file with no BPD, or with no times."""
    axis, unit = ("seconds", 3600) if time else ("step", 1)
    arrays = []
    for records in read(path).values():
        if not all(axis in record for record in records):
            raise cli.UserError(f"{path}: its records have no {axis}, written by an older version")
        rows = [(record[axis] / unit, record["bpd"], record.get("bpd_stderr", 0)) for record in records]
        arrays.append(np.array(rows, dtype=float).reshape(-1, 3))
    train, test = arrays
    stretches = np.array_split(train[:, :2], min(POINTS, len(train)) or 1)
    return np.array([stretch.mean(0) for stretch in stretches if len(stretch)]).reshape(-1, 2).T, test.T


def verdict(step, own, other, spread):
    """One sentence on two BPD after as many steps; spread: standard deviation of such numbers over seeds."""
    difference, limit = own - other, 2 * math.sqrt(2) * spread
    word = "on track" if abs(difference) <= limit else "behind" if difference > 0 else "ahead"
    rule = f"on track is within {limit:.4f}, two standard deviations of the difference of two seeds: 2 x sqrt 2 x"
    return f"{word}: {own:.4f} against {other:.4f} after {step:,} steps ({difference:+.4f}; {rule} {spread:g})"


def comparison(file, against, spread):
    """Lines: a table of two logs where both have a test, the verdict, whether learning rates differ. Raises as `read`,
    and UserError if they have no test after the same step."""
    runs = [read(file), read(against)]
    yours, theirs = ({record["step"]: record["bpd"] for record in run["test"]} for run in runs)
    if not (steps := sorted(yours.keys() & theirs.keys())):
        raise cli.UserError(f"{file} and {against}: both need a test after the same step, see --test_steps of main.py")
    yield f"{run_name(file)} (yours) against {run_name(against)} (theirs), bits per dimension of the test images"
    yield f"{'step':>10} {'yours':>8} {'theirs':>8} {'difference':>10}"
    for step in steps:
        yield f"{step:10,} {yours[step]:8.4f} {theirs[step]:8.4f} {yours[step] - theirs[step]:+10.4f}"
    yield verdict(step, yours[step], theirs[step], spread)
    rates = [{record["step"]: record.get("lr") for record in run["train"]}.get(step) for run in runs]
    if None not in rates and not math.isclose(*rates, rel_tol=1e-2):
        line = "the learning rates there are {:.3g} and {:.3g}: with another --lr, or a cosine that ends at other"
        yield line.format(*rates) + " --max_steps, the two need not agree"


def log_figure(runs, labels, time=False, bpd=None):
    """runs: what `curves` gives, one per label. Lines: training; markers with error bars: tests."""
    with style():
        figure = Figure(figsize=(COLUMN, 2.2 + 0.14 * len(runs)), layout="constrained")
        axes = figure.subplots()
        for (train, test), label, line in zip(runs, labels, lines(), strict=False):
            axes.plot(*train, **{**line, "marker": ""})
            axes.errorbar(*test, **{**line, "linestyle": ""})
            axes.plot([], [], **line, label=label)
        axes.set(xlabel="time of training in hours" if time else "step", ylabel="bits per dimension", ylim=bpd)
        plain(figure.legend(loc="outside upper left", frameon=False))
    return figure


def tests_figure(runs, labels, panels, time=False, bpd=None):
    """runs: what `curves` gives, one per label and title of its panel. Tests alone, joined by lines, over a logarithmic
    axis: what more steps, or more time, bring."""
    titles = [*dict.fromkeys(panels)]
    with style():
        figure = Figure(figsize=(min(PAGE, COLUMN * len(titles)), 3), layout="constrained")
        for axes, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
            own = [run for run, panel in zip(zip(runs, labels, strict=True), panels, strict=True) if panel == title]
            for ((_, test), label), line in zip(own, lines(), strict=False):
                axes.errorbar(*test, **line, label=label)
            axes.set_title(title, parse_math=False)
            axes.set(xlabel="time of training in hours" if time else "step", ylabel="bits per dimension", ylim=bpd)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}" if time else "{x:,g}")
            axes.xaxis.set_minor_formatter("")
            plain(axes.legend(frameon=False))
    return figure


def lines():
    """How to draw one run after the other: keywords of `plot` and `errorbar`."""
    for k in count():
        line = {"color": COLOURS[k % len(COLOURS)], "linestyle": ("-", "--", ":")[k // len(COLOURS) % 3]}
        yield {**line, "linewidth": 0.8, "marker": "osD^v*"[k % 6], "markersize": 3}


def plain(legend):
    """Show its texts as they are: no formulas."""
    for text in legend.get_texts():
        text.set_parse_math(False)


def main(argv=None):
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="out.jsonl of a run's folder")
    add("--against", metavar="FILE", help="log to compare with: prints both at the same steps, and a verdict")
    spread = "standard deviation over seeds, for the verdict (default: %(default)s, see docs/recipe.md)"
    add("--spread", type=cli.non_negative, default=SPREAD, metavar="BPD", help=spread)
    add("--time", action="store_true", help="draw over the time of training instead of steps")
    tests = "draw the tests alone, over a logarithmic axis, a panel for each data set that a run's name starts with"
    add("--tests", action="store_true", help=tests)
    add("--labels", nargs="+", metavar="TEXT", help="names of the runs, --against last (default: data set, network)")
    add("--bpd", type=cli.number_list(cli.finite, 2), metavar="LOW,HIGH", help="range of the BPD axis (default: all)")
    add("--fig_dir", default="./figures", metavar="DIR", help="folder for pictures, PNG and PDF")
    parser.restrict("spread", needs="against")
    args = parser.parse_args(argv)
    if args.bpd and args.bpd[0] >= args.bpd[1]:
        parser.error(f"argument --bpd: {cli.listing(args.bpd)}: must be two numbers, the smaller first")
    files = [*args.files, *[args.against] * bool(args.against)]
    labels = args.labels or [run_name(file) for file in files]
    if len(labels) != len(files):
        parser.error(f"argument --labels: {len(labels)} labels: must be {len(files)}, one per file")
    comparisons = [line for file in args.files if args.against for line in comparison(file, args.against, args.spread)]
    runs = [curves(file, args.time) for file in files]
    if args.tests:
        for file, (_, test) in zip(files, runs, strict=True):
            if not (test[0] > 0).any():
                raise cli.UserError(f"{file}: has no test after the start of training, --tests draws nothing else")
        panels = [re.split("[/_]", run_name(file))[0] for file in files]
        figure = tests_figure(runs, labels, panels, args.time, args.bpd)
    else:
        figure = log_figure(runs, labels, args.time, args.bpd)
    save_figure(figure, cli.picture_path(args, "log"))
    for (train, test), label in zip(runs, labels, strict=True):
        last = f"last test {test[1, -1]:.3f} ± {test[2, -1]:.3f}" if test.size else f"no test, {train[1, -1]:.3f}"
        drawn = "tests" if args.tests else f"lines training, at most {POINTS} means; markers test"
        print(f"{label}: {drawn}; {last} bits per dimension")
    for line in comparisons:
        print(line)


if __name__ == "__main__":
    cli.script(main)
