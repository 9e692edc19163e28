#!/usr/bin/env python3
"""Measure a trained flow: bits per dimension, round trip, structure of MSDS samples, FID, KID, precision and recall.

    python evaluate.py --weights saved_model/…/last.state --json results/msds1.json
    python evaluate.py --data celeba32 --cuda 0 --fid --json results/celeba32.json
    python evaluate.py --data celeba32 --draws 0 --round_trip 0 --fid --temperature 0.9 --feature_weights FILE

The JSON file is of kind "evaluation"; its results are, as far as they were asked for,
    bpd                 bits per dimension of the test split, mean over images and draws of the dequantisation noise
    bpd_stderr          standard error over images, of their means over the draws
    bpd_draws           the mean over the images for each draw; for --draw_seed 0 the first is that of main.py's log
    bpd_stderr_draws    standard error over draws, null for a single one
    images              number of test images
    round_trip          {"float32" and "float64": {"data" and "samples": {"image": largest |g(f(x)) - x|,
                        "levels": [largest |f(g(z)) - z| of the latents at h = 0, 1, …]}}} in model space, z = f(x) and
                        g = f^-1; null where it is not finite
    round_trip_images   number of test images, and of samples, that it is the largest of
    structure           of samples of an MSDS flow against as many test images: the dict of
                        `data.msds_structure.structure_scores`, calibration (its errors on these labelled images),
                        samples, temperature, seed
    fid, kid_mean, kid_std, precision, recall
                        of samples against a split; kid_std is over subsets
    fid_settings        samples, images, split, temperature, seed, library, version, feature_extractor, feature_layer,
                        feature_weights (a file name), feature_weights_sha256, resize, kid_subsets, kid_subset_size,
                        prc_neighborhood
    data_fingerprint    of the data set that was opened
    compile, amp        how the networks ran, but for the round trip, which runs without either
    warnings            a list of sentences
"""

import sys

import torch

import args as flags
from data import msds
from data.msds_structure import calibration, structure_scores
from flow.evaluation import (
    bits_per_dim_of_all,
    first_nonfinite,
    mean_and_stderr,
    noisy_batch,
    round_trip_errors,
    sample_uint8,
)
from flow.preprocess import to_model
from utils import cli, metrics
from utils.cli import UserError
from utils.compilation import why_not_compiled
from utils.memory import keep_freed_memory
from utils.results import about, save

MIN_SAMPLES = 100  # for structure scores


def build_parser():
    parser = flags.build_parser(__doc__.split("\n")[0], needs_weights=True, numbers=True)
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--draws", type=cli.count, default=3, metavar="N", help="draws of the noise for the BPD, 0 for no BPD"
    )
    group.add_argument(
        "--round_trip",
        type=cli.count,
        default=1000,
        metavar="N",
        help="test images, and samples, for the round trip, 0 for none",
    )
    group.add_argument(
        "--structure",
        type=cli.count,
        metavar="N",
        help="samples for the structure scores of msds1 and msds2, 0 for none (default: 2000 for these sets)",
    )
    group.add_argument(
        "--fid", action="store_true", help="FID, KID, precision and recall of samples; needs requirements-metrics.txt"
    )
    group.add_argument("--samples", type=cli.positive, default=50_000, metavar="N", help="samples for --fid")
    group.add_argument("--split", choices=["train", "test"], default="train", help="images that --fid compares with")
    cli.add_temperature(group)
    group.add_argument(
        "--feature_weights",
        metavar="FILE",
        help="Inception's weights for --fid (default: torch-fidelity's, in torch.hub's folder or downloaded)",
    )
    return parser


def bits_of_split(flow, images, seed, draws):
    """Results of the bits per dimension of images (N, C, L, L). Raises FloatingPointError if they are not finite."""
    values = []
    for draw in range(draws):
        values.append(bits_per_dim_of_all(flow, images, seed, draw))
        bad = first_nonfinite(values[-1])
        if bad is not None:
            batch, noise = noisy_batch(flow, images, bad, seed, draw)
            level = flow.first_nonfinite_level(to_model(batch, noise=noise, dtype=noise.dtype)[0])
            where = "in the sum over all levels" if level is None else f"first at level h = {level}"
            raise FloatingPointError(f"BPD of test images is not finite, {where}")
    bpd_draws = [value.mean().item() for value in values]
    bpd, stderr = mean_and_stderr(torch.stack(values).mean(0))
    return {
        "bpd": bpd,
        "bpd_stderr": stderr,
        "bpd_draws": bpd_draws,
        "bpd_stderr_draws": mean_and_stderr(torch.tensor(bpd_draws, dtype=torch.float64))[1] if draws > 1 else None,
        "images": len(images),
    }


def structure(args, flow, dataset, variant):
    """Results of the structure scores. Raises FloatingPointError if samples are not numbers."""
    real = dataset.test[: args.structure]
    samples = sample_uint8(flow, args.structure, temperature_of(args), args.draw_seed).numpy()
    ovals, _ = msds.read_labels(dataset.path, "test", len(real))
    return {
        **structure_scores(samples, variant, real),
        "calibration": calibration(real, ovals),
        "samples": len(samples),
        "temperature": temperature_of(args),
        "seed": args.draw_seed,
    }


def temperature_of(args):
    """A number, or one per level where they differ."""
    return args.temperature if len(set(args.temperature)) > 1 else args.temperature[0]


def distances(args, flow, images, weights):
    """Results of --fid: samples against images (N, C, L, L). Raises FloatingPointError if samples are not numbers."""
    samples = sample_uint8(flow, args.samples, temperature_of(args), args.draw_seed)
    results = metrics.image_distances(samples, images, weights, args.cuda, verbose=sys.stderr.isatty())
    settings = {"split": args.split, "temperature": temperature_of(args), "seed": args.draw_seed}
    return {**results, "fid_settings": {**settings, **results["fid_settings"]}}


def describe(results):
    """The results in prose, line by line."""
    if "bpd" in results:
        draws, spread = len(results["bpd_draws"]), results["bpd_stderr_draws"]
        over_draws = f", ± {spread:.5f} over {draws} draws of the noise" if spread is not None else ""
        yield (
            f"test BPD {results['bpd']:.4f} ± {results['bpd_stderr']:.4f} over {results['images']:,} images{over_draws}"
        )
    for dtype, sources in results.get("round_trip", {}).items():
        for source, errors in sources.items():
            image, *levels = ("not finite" if e is None else f"{e:.2g}" for e in (errors["image"], *errors["levels"]))
            listing = ", ".join(f"h = {h}: {error}" for h, error in enumerate(levels))
            yield f"round trip, {dtype}, {source}: largest error {image} of images, of latents {listing}"
    if "structure" in results:
        scores = results["structure"]
        score = f"score {scores['score']:.3f}" if scores["score"] is not None else f"no score, {scores['failure']}"
        yield (
            f"structure of {scores['samples']:,} samples: {score}; ovals in {scores['share']:.1%} of the cells, in real"
            f" images in {scores['share_real']:.1%}"
        )
    if "fid" in results:
        settings = results["fid_settings"]
        yield (
            f"FID {results['fid']:.4g}, KID {results['kid_mean']:.4g} ± {results['kid_std']:.2g}, precision"
            f" {results['precision']:.4f}, recall {results['recall']:.4f} of {settings['samples']:,} samples against"
            f" {settings['images']:,} {settings['split']} images"
        )


def check(args, parser, config):
    """Exit with one sentence for flags that ask for nothing, for too little or for what there is not."""
    data = config["data"]
    if args.structure is None:
        args.structure = 2000 if data in msds.VARIANTS else 0
    if args.structure and data not in msds.VARIANTS:
        parser.error(f"argument --structure: {args.structure}: only for {' and '.join(msds.VARIANTS)}, not {data}")
    if 0 < args.structure < MIN_SAMPLES:
        parser.error(f"argument --structure: {args.structure}: must be 0 or at least {MIN_SAMPLES}")
    if not (args.draws or args.round_trip or args.structure or args.fid):
        parser.error("nothing to measure: --draws, --round_trip and --structure are 0 and there is no --fid")
    if args.fid and args.samples < metrics.MIN_IMAGES:
        parser.error(f"argument --samples: {args.samples}: must be at least {metrics.MIN_IMAGES} for --fid")


def find_feature_weights(path):
    """(path, SHA-256) of Inception's weights, and sentences that a result must carry. Raises UserError."""
    try:
        found = metrics.inception_weights(path)
    except ValueError as error:
        raise UserError(f"--fid: {error}") from error
    if found[1].startswith(metrics.HASH):
        return found, []
    return found, [f"--feature_weights {found[0]}: not those of the FID literature, whose SHA-256 is {metrics.HASH}…"]


def accelerate(flow, args):
    """Make the networks run as --compile and --amp ask for; how they do, and sentences that a result must carry."""
    obstacle = why_not_compiled(torch.device(args.cuda)) if args.compile else None
    compiled = args.compile and not obstacle
    flow.accelerate(compiled, torch.bfloat16 if args.amp == "bf16" else None)
    notes = [f"--compile is off: torch.compile does not work here ({obstacle})"] if obstacle else []
    return {"compile": compiled, "amp": args.amp}, notes


def measure(args, flow, dataset, variant, feature_weights):
    """The results that the flags ask for, part by part, flat dicts. Raises FloatingPointError if the flow gives no
    numbers."""
    if args.draws:
        yield bits_of_split(flow, dataset.test, args.draw_seed, args.draws)
    if args.round_trip:
        images = dataset.test[: args.round_trip]
        dtypes = {"float32": torch.float32, "float64": torch.float64}
        errors = {name: round_trip_errors(flow, images, dtype, args.draw_seed) for name, dtype in dtypes.items()}
        yield {"round_trip": errors, "round_trip_images": len(images)}
    if args.structure:
        yield {"structure": structure(args, flow, dataset, variant)}
    if args.fid:
        yield distances(args, flow, getattr(dataset, args.split), feature_weights)


def main(argv=None):
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else list(argv)
    args = flags.get_args(argv, parser)
    keep_freed_memory()
    flow, config, trained = flags.load_flow(args)
    check(args, parser, config)
    args.temperature = cli.check_temperature(args.temperature, flow)
    feature_weights, notes = find_feature_weights(args.feature_weights) if args.fid else (None, [])
    dataset, warnings = flags.open_data(args, config)
    there = len(getattr(dataset, args.split))
    if args.fid and there < metrics.MIN_IMAGES:
        raise UserError(f"--fid: the {args.split} split has {there} images, {metrics.MIN_IMAGES} are needed")
    ways, more_notes = accelerate(flow, args)
    for line in notes + more_notes:
        print(f"warning: {line}", file=sys.stderr)
    warnings += notes + more_notes

    print(f"weights: {trained['weights']}, step {trained['step']}, {config['data']}")
    record = {"kind": "evaluation", **about(__file__, argv, args.cuda), **trained, "config": config}
    record["results"] = {"data_fingerprint": dataset.fingerprint, **ways, "warnings": warnings}
    try:
        for part in measure(args, flow, dataset, msds.VARIANTS.get(config["data"]), feature_weights):
            for line in describe(part):
                print(line, flush=True)
            record["results"].update(part)
            if args.json:  # after each part, lest a later one fails
                save(args.json, record)
    except FloatingPointError as error:
        raise UserError(f"{trained['weights']}: {error}") from error


if __name__ == "__main__":
    cli.script(main)
