#!/usr/bin/env python3
"""What latents and mixing do to MSDS1 or MSDS2, as numbers: the claims of section 4.1 (figure 4) and of section 4.5.

    python effects.py --weights saved_model/msds1/…/60.state --json results/effects.json
    python effects.py --weights RGFLOW_MSDS1 REALNVP_MSDS1 RGFLOW_MSDS2 REALNVP_MSDS2

Ovals are read from the pixels (`data.msds_structure`), and changed images are generated from encoded test images.

Latents: the strongest of each level, by receptive fields, each moved over a range of values while all others stay. How
many of the 16 ovals change their colour, and their orientation, by more than `THRESHOLDS`, how much, and how far all
ovals of an image change alike: 1 if all do the same, 0 if one changes alone or if the changes are unrelated. The paper
claims that a latent of the top level changes the global factor, colour in MSDS1 and orientation in MSDS2, of all ovals,
and one of a low level the local factor, the other one, of one oval. Real NVP's strongest are sought among a few random
latents of each level.

Mixing: levels h >= theta of one test image with levels h < theta of another (equation 15). Least squares of the mixed
image's global factor, the mean over its ovals, on those of both images, and of each oval's local factor on those of the
two ovals in its cell: the weight of an image is 1 where the factor is all of it and 0 where it is none of it. Beside
them, whether the mixed images still are MSDS images: cells with an oval, structure score.

Receptive fields are kept in --fig_dir, shared with plot_receptive_fields.py.
"""

import statistics
import sys

import numpy as np
import torch
from tqdm import tqdm

import args as flags
from data import msds
from data.msds_structure import calibration, find_ovals, structure_scores
from flow.latents import decode, encode, mix
from flow.preprocess import to_bytes
from plot_latents import vary
from plot_receptive_fields import add_flags, get_fields, get_levels
from plot_walk import check_two
from utils import cli
from utils.cli import UserError
from utils.memory import keep_freed_memory
from utils.results import about, save

FACTORS = {1: {"global": "colour", "local": "orientation"}, 2: {"global": "orientation", "local": "colour"}}
# Distance in RGB, of 256 levels, and degrees. Between two drawings that differ in the other factor alone, the readings
# of 0.7 % and 0.02 % of the ovals differ by more (root mean square 4.8 to 5.2 levels, 0.5 degrees; 300 images a set).
THRESHOLDS = {"colour": 20.0, "orientation": 10.0}
MIN_OVALS = 8  # of 16, that an image's global factor needs
MIN_ROWS = 20  # images, or ovals, that a regression needs


def read_ovals(images):
    """Images in [0, 1] (..., 3, 32, 32) -> colours (..., 16, 3), angles (..., 16), found (..., 16), of `find_ovals`.

    Raises UserError for images that are not finite.
    """
    if not images.isfinite().all():
        raise UserError("it generates images that are not finite")
    parts = find_ovals(to_bytes(images.flatten(0, -4)).numpy())
    return tuple(part.reshape(*images.shape[:-3], *part.shape[1:]) for part in parts)


def moved(images):
    """What moving a latent does to ovals: images in [0, 1] (n, B, 3, 32, 32) of n values -> results, a dict.

    found: share of cells with an oval at all values; for others a change is not known, and none is counted
    colour, orientation: `change`
    """
    colours, angles, found = read_ovals(images)
    found = found.all(0)
    angles = np.unwrap(angles, axis=0, period=180)  # turns add up from value to value, so that none has two signs
    changes = {"colour": colours[1:] - colours[0], "orientation": (angles[1:] - angles[0])[..., None]}
    rows = {name: change(vectors, found, THRESHOLDS[name]) for name, vectors in changes.items()}
    return {"found": float(found.mean()), **rows}


def change(vectors, found, threshold):
    """How ovals differ from what they are at the first value: vectors (n - 1, B, 16, D) and found (B, 16) -> a dict.

    ovals: number per image that differ by more than the threshold at some value
    size: how much these differ at most, mean; None without them
    common: mean scalar product of the vectors of two ovals of an image / of an oval with itself, over images with
        two ovals; None without changed ovals in these
    """
    vectors = vectors * found[..., None]
    size = np.linalg.norm(vectors, axis=-1).max(0)
    changed = size > threshold
    row = {"ovals": float(changed.sum(1).mean()), "size": None, "common": None}
    if changed.any():
        row["size"] = float(size[changed].mean())
    others = found.sum(1) - 1  # ovals of the image beside one
    if changed[others > 0].any():
        own = np.square(vectors).sum((0, 2, 3))  # (B,)
        pairs = np.square(vectors.sum(2)).sum((0, 2)) - own
        row["common"] = float(pairs[others > 0].sum() / (own * others)[others > 0].sum())
    return row


def latent_rows(flow, fields, levels, number, z, values):
    """Results for the `number` strongest latents of each level, moved in z (B, C, L, L): a dict each."""
    chosen = [k for h in levels for k in fields.strongest(h, number).tolist()]
    rows = []
    for k in tqdm(chosen, desc="move", unit="latent", leave=False, disable=None):
        row = {"level": int(fields.levels[k]), "latent": fields.name(k), "strength": fields.strengths[k].item()}
        rows.append({**row, **moved(vary(flow, z, tuple(fields.latents[k].tolist()), values))})
    return rows


def level_rows(rows):
    """Means over the latents of each level of the results of `latent_rows`; sizes and common shares over those with
    any. `most` is the largest number of ovals that a latent changes, `most_latent` its name."""
    results = []
    for h in dict.fromkeys(row["level"] for row in rows):
        own = [row for row in rows if row["level"] == h]
        result = {"level": h, "latents": len(own)}
        result |= {name: mean([row[name] for row in own]) for name in ("strength", "found")}
        for factor in THRESHOLDS:
            strongest = max(own, key=lambda row, factor=factor: row[factor]["ovals"])
            result[factor] = {name: mean([row[factor][name] for row in own]) for name in ("ovals", "size", "common")}
            result[factor] |= {"most": strongest[factor]["ovals"], "most_latent": strongest["latent"]}
        results.append(result)
    return results


def mean(values):
    """Of those that are not None; None without any."""
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else None


def mixing_rows(flow, high, low, variant):
    """Results for each theta, 0 … h_L + 1, of mixing uint8 images high and low (P, 3, 32, 32): a dict each."""
    z = encode(flow, torch.cat((high, low))).chunk(2)
    sources = [find_ovals(images.numpy()) for images in (high, low)]
    rows = []
    for theta in range(flow.num_levels + 1):
        images = decode(flow, mix(flow, *z, theta))
        ovals = [read_ovals(images), *sources]
        scores = structure_scores(to_bytes(images).numpy(), variant, high.numpy())
        row = {"theta": theta, "found": scores["share"], "score": scores["score"], "failure": scores["failure"]}
        rows.append(
            {
                **row,
                "global": weights(*global_factors(ovals, variant)),
                "local": weights(*local_factors(ovals, variant)),
            }
        )
    return rows


def factor_values(ovals, name):
    """Numbers to be averaged, (P, 16, D), of ovals as `find_ovals` gives them."""
    colours, angles, _ = ovals
    return colours if name == "colour" else msds.doubled(angles)


def global_factors(all_ovals, variant):
    """The mean global factor of each image, (N, D) for each of the readings, over images with MIN_OVALS in all."""
    enough = np.all([found.sum(1) >= MIN_OVALS for _, _, found in all_ovals], 0)
    for ovals in all_ovals:
        values, found = factor_values(ovals, FACTORS[variant]["global"])[enough], ovals[2][enough, :, None]
        yield (values * found).sum(1) / found.sum(1)


def local_factors(all_ovals, variant):
    """The local factor of each cell, (N, D) for each of the readings, of cells with an oval in all."""
    everywhere = np.all([found for _, _, found in all_ovals], 0)
    for ovals in all_ovals:
        yield factor_values(ovals, FACTORS[variant]["local"])[everywhere]


def weights(mixed, high, low):
    """Least squares mixed = w_high high + w_low low + constant, (N, D) each: one pair of weights for all D numbers.

    high, low: the weights; r2: the share of the variance of `mixed` that they explain; number: N
    failure: why these are None, a sentence
    """
    result = {"high": None, "low": None, "r2": None, "number": len(mixed), "failure": None}
    if len(mixed) < MIN_ROWS:
        return {**result, "failure": f"ovals for {len(mixed)} rows only, at least {MIN_ROWS} are needed"}
    mixed, high, low = ((part - part.mean(0)).ravel().astype(float) for part in (mixed, high, low))
    design = np.stack((high, low), 1)
    total = np.square(mixed).sum()
    if not total or np.linalg.matrix_rank(design) < 2:
        return {**result, "failure": "the factor does not vary"}
    solution = np.linalg.lstsq(design, mixed)[0]
    r2 = 1 - np.square(mixed - design @ solution).sum() / total
    return {**result, "high": float(solution[0]), "low": float(solution[1]), "r2": float(r2)}


def table(result):
    """The lines of the tables of a flow."""
    names = FACTORS[msds.VARIANTS[result["data"]]]
    columns = " ".join(f"{f'{names[kind]}: ovals':>18} {'most':>5} {'size':>5} {'common':>6}" for kind in names)
    yield f"{'level':>5} {'strength':>8} {'found':>6} {columns}"
    for row in result["levels"]:
        cells = [row[name] for name in names.values()]
        columns = " ".join(
            f"{each['ovals']:18.2f} {each['most']:5.1f} {text(each['size'], 0):>5} {text(each['common']):>6}"
            for each in cells
        )
        yield f"{row['level']:5} {row['strength']:8.2g} {row['found']:6.1%} {columns}"
    columns = " ".join(f"{f'{kind} {name}: high':>26} {'low':>5} {'R2':>5}" for kind, name in names.items())
    yield f"{'theta':>5} {'score':>6} {'found':>6} {columns}"
    for row in result["mixing"]:
        columns = " ".join(
            f"{text(row[kind]['high']):>26} {text(row[kind]['low']):>5} {text(row[kind]['r2']):>5}" for kind in names
        )
        yield f"{row['theta']:5} {text(row['score']):>6} {row['found']:6.1%} {columns}"


def text(value, digits=2):
    return "–" if value is None else f"{value:.{digits}f}"


def measure(args, flow, config, variant):
    """The results for a flow, a dict."""
    check_two(args)
    levels = get_levels(args, flow)
    dataset, warnings = flags.open_data(args, config)
    for flag, needed in (("images", args.images), ("pairs", 2 * args.pairs)):
        if needed > len(dataset.test):
            limit = len(dataset.test) * getattr(args, flag) // needed
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at most {limit} for {config['data']}")
    z = encode(flow, torch.from_numpy(dataset.test[: args.images]))
    values = torch.linspace(*args.range, args.steps, dtype=torch.float64)
    rows = latent_rows(flow, get_fields(args, flow, config), levels, args.strongest, z, values)
    images = torch.from_numpy(dataset.test[: 2 * args.pairs])
    ovals, _ = msds.read_labels(dataset.path, "test", len(images))
    return {
        "levels": level_rows(rows),
        "mixing": mixing_rows(flow, *images.chunk(2), variant),
        "latents": rows,
        "calibration": calibration(images.numpy(), ovals),
        "warnings": warnings,
    }


def effects_parser():
    parser = flags.build_parser(
        "What latents and mixing do to MSDS1 or MSDS2, as numbers (sections 4.1 and 4.5).",
        needs_weights=True,
        several=True,
        pictures=True,
        numbers=True,
    )
    group = parser.add_argument_group("effects")
    group.add_argument("--strongest", type=cli.positive, default=8, metavar="N", help="latents moved at each level")
    group.add_argument(
        "--range",
        type=cli.number_list(cli.finite),
        default=(-3.0, 3.0),
        metavar="LOW,HIGH",
        help="of a moved latent, whose prior has variance 1 (default: -3,3)",
    )
    group.add_argument("--steps", type=cli.several, default=5, metavar="N", help="values of a moved latent")
    group.add_argument(
        "--images", type=cli.positive, default=16, metavar="N", help="test images in which latents are moved"
    )
    many = cli.number(int, MIN_ROWS, cli.LARGEST, f"a whole number from {MIN_ROWS} to {cli.LARGEST}")
    group.add_argument("--pairs", type=many, default=200, metavar="N", help="pairs of test images to mix")
    add_flags(group)
    parser.set_defaults(latents=None)
    return parser


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = flags.get_args(argv, effects_parser())
    origin = about(__file__, argv, args.cuda)  # at the start: the commit of the code that runs
    keep_freed_memory()
    results = []
    for named, flow, config, trained in flags.load_flows(args, msds.VARIANTS):
        try:
            result = measure(args, flow, config, msds.VARIANTS[named["data"]])
        except UserError as error:
            raise UserError(f"{trained['weights']}: {error}") from error
        results.append({**named, **trained, **result, "config": config})
        print(f"{named['data']}, {named['network']}, seed {named['seed']}: {trained['weights']}")
        for line in table(results[-1]):
            print(line, flush=True)
        if args.json:  # after each flow, lest a later one fails
            settings = {
                name: getattr(args, name) for name in ("images", "pairs", "strongest", "range", "steps", "draws")
            }
            save(args.json, {"kind": "effects", **origin, **settings, "thresholds": THRESHOLDS, "results": results})


if __name__ == "__main__":
    cli.script(main)
