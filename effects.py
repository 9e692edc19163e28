#!/usr/bin/env python3
"""Measure what latents and mixing do to images of MSDS1 or MSDS2 (claims of sections 4.1, with figure 4, and 4.5)."""

import statistics

import numpy as np
import torch
from tqdm import tqdm

import args as flags
from data import msds
from data.msds_structure import calibration, find_ovals, structure_scores
from flow.fields import get_fields
from flow.latents import decode, encode, mix, vary
from flow.preprocess import to_bytes
from utils import cli
from utils.results import about, by_network, in_words, means, row, save, table

FACTORS = {1: {"global": "colour", "local": "orientation"}, 2: {"global": "orientation", "local": "colour"}}
# Distance in RGB, of 256 levels, and degrees. Between two drawings that differ in the other factor alone, the readings
# of 0.7 % and 0.02 % of the ovals differ by more (root mean square 4.8 to 5.2 levels, 0.5 degrees; 300 images a set).
THRESHOLDS = {"colour": 20.0, "orientation": 10.0}
DIGITS = {"ovals": 1, "most": 1, "common": 2}
MIN_OVALS = 8  # of 16, that an image's global factor needs
MIN_ROWS = 20  # images, or ovals, that a regression needs


def read_ovals(images):
    """`find_ovals` for images in [0, 1] (..., 3, 32, 32). Raises FloatingPointError for images that are not finite."""
    if not images.isfinite().all():
        raise FloatingPointError("it generates images that are not finite")
    parts = find_ovals(to_bytes(images.flatten(0, -4)).numpy())
    return tuple(part.reshape(*images.shape[:-3], *part.shape[1:]) for part in parts)


def moved(images):
    """What moving a latent does to ovals: images in [0, 1] (n, B, 3, 32, 32) of n values -> `change` of factors, and
    found, the share of cells with an oval at all values, which alone are counted."""
    colours, angles, found = read_ovals(images)
    found = found.all(0)
    angles = np.unwrap(angles, axis=0, period=180)  # turns add up from value to value, so that none has two signs
    factors = {"colour": colours, "orientation": angles[..., None]}
    changes = {name: change(each[1:] - each[0], found, THRESHOLDS[name]) for name, each in factors.items()}
    return {"found": float(found.mean()), **changes}


def change(vectors, found, threshold):
    """How ovals differ from what they are at the first value: vectors (n - 1, B, 16, D) and found (B, 16) -> a dict.

    ovals: number per image that differ by more than the threshold at some value
    size: how much these differ at most, mean; None without them
    common: mean scalar product of the vectors of two ovals of an image / of an oval with itself, over images with two
        ovals; None without changed ovals in these
    """
    vectors = vectors * found[..., None]
    size = np.linalg.norm(vectors, axis=-1).max(0)
    changed = size > threshold
    mean_size = float(size[changed].mean()) if changed.any() else None
    result = {"ovals": float(changed.sum(1).mean()), "size": mean_size, "common": None}
    several = found.sum(1) > 1
    if changed[several].any():
        own = np.square(vectors).sum((0, 2, 3))  # (B,)
        pairs = np.square(vectors.sum(2)).sum((0, 2)) - own
        result["common"] = float(pairs[several].sum() / (own * (found.sum(1) - 1))[several].sum())
    return result


def of_latents(flow, fields, levels, number, z, values):
    """Results for the `number` strongest latents of each level, moved one at a time in z (B, C, L, L): a dict each. In
    the paper a latent of the top level changes the global factor of all ovals, one of a low level one oval."""
    chosen, results = torch.cat([fields.strongest(h, number) for h in levels]), []
    for k in tqdm(chosen, desc="move", unit="latent", leave=False, disable=None):
        named = {"level": int(fields.levels[k]), "latent": fields.name(k), "strength": fields.strengths[k].item()}
        results.append({**named, **moved(vary(flow, z, tuple(fields.latents[k].tolist()), values))})
    return results


def of_levels(latents):
    """Means of the results of `of_latents` over the latents of each level; sizes and common shares over those with any.
    `most` is the largest number of ovals that a latent changes, `most_latent` its name."""

    def mean(results, *names):
        values = {name: [each[name] for each in results if each[name] is not None] for name in names}
        return {name: statistics.mean(own) if own else None for name, own in values.items()}

    results = []
    for h in dict.fromkeys(each["level"] for each in latents):
        own = [each for each in latents if each["level"] == h]
        result = {"level": h, "latents": len(own), **mean(own, "strength", "found")}
        for factor in THRESHOLDS:
            most = max(own, key=lambda each, factor=factor: each[factor]["ovals"])
            result[factor] = mean([each[factor] for each in own], "ovals", "size", "common")
            result[factor] |= {"most": most[factor]["ovals"], "most_latent": most["latent"]}
        results.append(result)
    return results


def of_mixing(flow, high, low, variant):
    """Results for each theta, 0 … h_L + 1, of mixing (equation 15) uint8 images high and low (P, 3, 32, 32): a
    dict each, `weights` of the global factor of images and the local one of ovals, and scores as images of MSDS."""
    z = encode(flow, torch.cat((high, low))).chunk(2)
    sources, results = [find_ovals(images.numpy()) for images in (high, low)], []
    for theta in range(flow.num_levels + 1):
        images = decode(flow, mix(flow, *z, theta))
        readings = [read_ovals(images), *sources]
        scores = structure_scores(to_bytes(images).numpy(), variant, high.numpy())
        result = {"theta": theta, "found": scores["share"], "score": scores["score"], "failure": scores["failure"]}
        results.append(result | {kind: weights(*factors(readings, variant, kind)) for kind in FACTORS[variant]})
    return results


def factors(readings, variant, kind):
    """The factor of a kind in each of the readings of `find_ovals`, (N, D) each: the global one is the mean of ovals
    of each image with MIN_OVALS in all readings, the local one that of each cell with an oval in all."""
    colours, angles, found = zip(*readings, strict=True)
    values = colours if FACTORS[variant][kind] == "colour" else [msds.doubled(each) for each in angles]
    if kind == "local":
        return [each[np.all(found, 0)] for each in values]
    enough = np.all([each.sum(1) >= MIN_OVALS for each in found], 0)
    found = [each[enough, :, None] for each in found]
    return [(each[enough] * ovals).sum(1) / ovals.sum(1) for each, ovals in zip(values, found, strict=True)]


def weights(mixed, high, low):
    """Least squares mixed = w_high high + w_low low + constant, (N, D) each, one pair of weights for all D numbers -> a
    dict: high, low, their r2, number, N, and failure, a sentence on why the first three are None."""
    result = {"high": None, "low": None, "r2": None, "number": len(mixed), "failure": None}
    if len(mixed) < MIN_ROWS:
        return {**result, "failure": f"ovals for {len(mixed)} rows only, at least {MIN_ROWS} are needed"}
    mixed, *design = ((part - part.mean(0)).ravel().astype(float) for part in (mixed, high, low))
    design, total = np.stack(design, 1), np.square(mixed).sum()
    if not total or np.linalg.matrix_rank(design) < 2:
        return {**result, "failure": "the factor does not vary"}
    solution = np.linalg.lstsq(design, mixed)[0]
    r2 = 1 - np.square(mixed - design @ solution).sum() / total
    return {**result, "high": float(solution[0]), "low": float(solution[1]), "r2": float(r2)}


def rows(record):
    thresholds, (low, high) = record["thresholds"], record["range"]
    moves = f"moved from {low:g} to {high:g} in {record['images']:,} test images; changed: by more than"
    moves += f" {thresholds['colour']:g} of 256 levels or {thresholds['orientation']:g}°"
    for first, results, data, flow, seeds in by_network(record["results"]):
        levels = list(zip(*(result["levels"] for result in results), strict=True))
        details = f"{seeds}, {moves}; {max(own[0]['latents'] for own in levels)} latents a level"
        for factor in THRESHOLDS:
            cells = {f"h = {own[0]['level']}": means([each[factor] for each in own], **DIGITS) for own in levels}
            yield row("moved", f"{data} {factor}, {flow}", cells, details, first)
        details = f"{seeds}, {record['pairs']:,} pairs of test images"
        thetas = list(zip(*(result["mixing"] for result in results), strict=True))
        lines = {f"{k} factor": [means([each[k] for each in own], high=2, low=2) for own in thetas] for k in FACTORS[1]}
        lines["structure score"] = [means(own, score=2) for own in thetas]
        lines["cells with an oval, %"] = [in_words([100 * each["found"] for each in own], 1) for own in thetas]
        for name, line in lines.items():
            cells = {f"Θ = {own[0]['theta']}": text for own, text in zip(thetas, line, strict=True)}
            yield row("mixing", f"{data} {name}, {flow}", cells, details, first)


def measure(args, flow, config, variant, weights):
    """The results for a flow, a dict. Raises FloatingPointError for images that are not finite."""
    levels = cli.check_levels(args.levels, flow)
    dataset, warnings = flags.open_data(config, args)
    for flag, most in (("images", len(dataset.test)), ("pairs", len(dataset.test) // 2)):
        if getattr(args, flag) > most:
            raise cli.flag_error(f"--{flag}", getattr(args, flag), f"must be at most {most} for {config['data']}")
    given = {"subset": args.per_level, "weights": weights}
    fields = get_fields(flow, config, args.fig_dir, args.draws, args.draw_seed, **given)
    flow = flags.exact(flow, torch.from_numpy(dataset.test[: max(args.images, 2 * args.pairs)]))
    z = encode(flow, torch.from_numpy(dataset.test[: args.images]))
    values = torch.linspace(*args.range, args.steps, dtype=torch.float64)
    latents = of_latents(flow, fields, levels, args.strongest, z, values)
    images = torch.from_numpy(dataset.test[: 2 * args.pairs])
    errors = calibration(images.numpy(), msds.read_labels(dataset.path, "test", len(images))[0])
    result = {"levels": of_levels(latents), "mixing": of_mixing(flow, *images.chunk(2), variant), "latents": latents}
    return {**result, "calibration": errors, "warnings": warnings, "dtype": str(z.dtype)[6:]}


def main(argv=None):
    parser = flags.weights_parser(__doc__, pictures=True, numbers=True, images=True, several=True)
    add = parser.add_argument_group("effects").add_argument
    add("--strongest", type=cli.positive, default=8, metavar="N", help="latents moved at each level")
    limits = "first and last value of a moved latent; its prior has variance 1 (default: -3,3)"
    add("--range", type=cli.number_list(cli.finite, 2), default=(-3.0, 3.0), metavar="LOW,HIGH", help=limits)
    add("--steps", type=cli.several, default=5, metavar="N", help="values of a moved latent")
    add("--images", type=cli.positive, default=16, metavar="N", help="test images in which latents are moved")
    many = cli.number(int, MIN_ROWS, cli.LARGEST, f"a whole number from {MIN_ROWS} to {cli.LARGEST}")
    add("--pairs", type=many, default=200, metavar="N", help="pairs of test images to mix")
    cli.add_field_flags(add)
    args = flags.parse(parser, argv)
    record = {"kind": "effects", **about(__file__, argv, args.cuda)}  # at the start: the commit of the code that runs
    settings = "images", "pairs", "strongest", "range", "steps", "draws"
    record |= {**{name: getattr(args, name) for name in settings}, "thresholds": THRESHOLDS, "results": []}
    for named, flow, config, trained in flags.load_flows(args, msds.VARIANTS):
        print(f"{named['data']}, {named['network']}, seed {named['seed']}: {trained['weights']}")
        try:
            result = measure(args, flow, config, msds.VARIANTS[named["data"]], trained["weights"])
        except FloatingPointError as error:
            raise cli.UserError(f"{trained['weights']}: {error}") from error
        record["results"].append({**named, **trained, **result, "config": config})
        print(*table(result["levels"]), "", *table(result["mixing"]), sep="\n", flush=True)
        if args.json:  # after each flow, in case a later one fails
            save(args.json, record, rows)


if __name__ == "__main__":
    cli.script(main)
