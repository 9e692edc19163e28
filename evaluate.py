#!/usr/bin/env python3
"""Measure a trained flow: bits per dimension, round trip, structure of MSDS samples, FID, KID, precision and recall.

Results in the JSON file, if asked for:
    bpd, bpd_stderr     bits per dimension of the test `images`, mean and standard error of their means over the draws
    bpd_draws           mean for each draw of the noise; with --draw_seed 0 the first is that of main.py's log
    bpd_stderr_draws    standard error over draws, null for a single one
    round_trip          `flow.evaluation.round_trip_errors`, the largest of `round_trip_images` and as many samples
    structure           `structure_scores` of samples and as many test images, and `calibration` on these images
    fid, …, recall      `utils.metrics.image_distances` of samples and a split, with fid_settings
    compile, amp        how the networks ran, except for the round trip, which uses neither
    config              of the training; of other images than its own: `data`, and trained_data for the training's
    data_fingerprint    of the images; folder: its name, with --data folder; warnings: those printed of data and flags
"""

import sys
from pathlib import Path

import torch

import args as flags
from data import msds
from data.msds_structure import calibration, structure_scores
from flow import evaluation
from utils import cli, metrics
from utils.cli import UserError, flag_error
from utils.results import about, data_name, flow_names, row, save, table

MIN_SAMPLES = 100  # for structure scores


def build_parser():
    parser = flags.weights_parser(__doc__, numbers=True, images=True)
    add = parser.add_argument_group("what to measure").add_argument
    add("--draws", type=cli.count, default=3, metavar="N", help="draws of the noise for the BPD, 0 for no BPD")
    add("--round_trip", type=cli.count, default=1000, metavar="N", help="test images and samples to invert, 0 for none")
    scores = "samples for the structure scores of msds1 and msds2, 0 for none (default: 2000 for these sets)"
    add("--structure", type=cli.count, metavar="N", help=scores)
    add("--fid", action="store_true", help="FID, KID, precision and recall; needs requirements-metrics.txt")
    add("--samples", type=cli.positive, default=50_000, metavar="N", help="samples for --fid")
    add("--split", choices=["train", "test"], default="train", help="split that --fid compares samples with")
    cli.add_temperature(add)
    add("--feature_weights", metavar="FILE", help="Inception's weights for --fid (default: torch-fidelity's download)")
    flags.add_speed(add)
    parser.restrict("samples split feature_weights", needs="fid")
    return parser


def rows(record):
    """What tables B1 (MSDS) and G1 (other sets), structure and round trip show of a record, see `utils.results.row`."""
    results, config, cells, details = record["results"], record["config"], {}, []
    data = data_name(config["data"], results.get("folder"))
    model, flow = flow_names(config)
    if "bpd" in results:
        cells[f"{data} BPD"] = f"{results['bpd']:.3f}"
        words = "BPD {bpd:.4f} ± {bpd_stderr:.4f}, {images:,} images, {draws} draws"
        details.append(words.format(draws=len(results["bpd_draws"]), **results))
    if "fid" in results:
        cells[f"{data} FID"] = f"{results['fid']:.3g}"
        words = "FID {fid:.4g}, KID {kid_mean:.4g} ± {kid_std:.2g}, precision {precision:.3f}, recall {recall:.3f},"
        words += " {samples:,} samples at T = {temperature} against the {split} split, {library} {version},"
        details.append(f"{words} {{feature_weights}}".format(**{**results, **results["fid_settings"]}))
    if cells:
        details += [f"warning: {each}" for each in results["warnings"]]
        on_msds = config["data"] in msds.VARIANTS  # the paper has both priors there, otherwise the Laplacian alone
        with_prior = config["model"] == "rgflow" and (on_msds or config["prior"] == "gaussian")
        yield row("B1" if on_msds else "G1", flow if with_prior else model, cells, "; ".join(details))
    if "structure" in results:
        scores = {**results["structure"]["calibration"], **results["structure"]}
        score = "none" if scores["score"] is None else f"{scores['score']:.3f}"
        cells = {f"{data} score": score, f"{data} cells with an oval": f"{scores['share']:.1%}"}
        cells[f"{data} of real images"] = f"{scores['share_real']:.1%}"
        if scores["between"] is not None:
            cells[f"{data} spread between images / real"] = f"{scores['between']:.2f}"
        words = ", {samples:,} samples at T = {temperature}; off by {degrees:.1f}° and {levels:.1f} of 256 levels"
        words = (scores["failure"] or f"score {score}") + words.format(**scores)
        yield row("structure", flow, cells, f"{words} on labelled images")
    cells, trips = {}, results.get("round_trip", {})
    for dtype, sources in trips.items():
        errors = {"images": [each["image"] for each in sources.values()]}
        errors["latents"] = [error for each in sources.values() for error in each["levels"]]
        for name, values in errors.items():
            cells[f"{dtype}, {name}"] = "not finite" if None in values else f"{max(values):.1e}"
    if trips:
        words = f"{results['round_trip_images']:,} test images and samples"
        yield row("round trip", f"{data}: {flow}", cells, "; ".join(f"{dtype}, {words}" for dtype in trips))


def measure(args, flow, dataset, variant, feature_weights):
    """The results that the flags ask for, dict by dict. Raises FloatingPointError for what is not finite."""
    settings = {"temperature": args.temperature, "seed": args.draw_seed}
    if args.draws:
        values, images = [], dataset.test
        for draw in range(args.draws):
            values.append(evaluation.bits_per_dim_of_all(flow, images, args.draw_seed, draw))
            bad = evaluation.first_nonfinite(values[-1])
            if bad is not None:
                batch = evaluation.noisy_batch(flow, images, bad, args.draw_seed, draw)
                where = evaluation.level_that_fails(flow, *batch)
                raise FloatingPointError(f"BPD of test images is not finite, {where}")
        bpd, stderr = evaluation.mean_and_stderr(torch.stack(values).mean(0))
        means = torch.stack([value.mean() for value in values])
        spread = evaluation.mean_and_stderr(means)[1] if args.draws > 1 else None
        draws = {"bpd_draws": means.tolist(), "bpd_stderr_draws": spread}
        yield {"bpd": bpd, "bpd_stderr": stderr, **draws, "images": len(images)}
    if args.round_trip:
        images, dtypes = dataset.test[: args.round_trip], (torch.float32, torch.float64)
        flags.allow_tf32(False)
        errors = [evaluation.round_trip_errors(flow, images, dtype, args.draw_seed) for dtype in dtypes]
        flags.allow_tf32(args.amp == "tf32")
        yield {"round_trip": dict(zip(("float32", "float64"), errors, strict=True)), "round_trip_images": len(images)}
    if args.structure:
        real = dataset.test[: args.structure]
        samples = evaluation.sample_uint8(flow, args.structure, args.temperature, args.draw_seed).numpy()
        errors = calibration(real, msds.read_labels(dataset.path, "test", len(real))[0])
        scores = structure_scores(samples, variant, real)
        yield {"structure": {**scores, "calibration": errors, "samples": len(samples), **settings}}
    if args.fid:
        samples = evaluation.sample_uint8(flow, args.samples, args.temperature, args.draw_seed)
        images = getattr(dataset, args.split)
        results = metrics.image_distances(samples, images, feature_weights, args.cuda, verbose=sys.stderr.isatty())
        yield {**results, "fid_settings": {"split": args.split, **settings, **results["fid_settings"]}}


def main(argv=None):
    args = flags.parse(build_parser(), argv)
    flow, config, trained = flags.load_flow(args)
    variant = msds.VARIANTS.get(config["data"])
    if args.structure is None:
        args.structure = 2000 if variant else 0
    if args.structure and not variant:
        rule = f"only for {' and '.join(msds.VARIANTS)}, not {config['data']}"
        raise flag_error("--structure", args.structure, rule)
    if 0 < args.structure < MIN_SAMPLES:
        raise flag_error("--structure", args.structure, f"must be 0 or at least {MIN_SAMPLES}")
    if not (args.draws or args.round_trip or args.structure or args.fid):
        raise UserError("nothing to measure: --draws, --round_trip and --structure are 0 and there is no --fid", 2)
    drawn = args.structure or args.fid
    for flag, used in {"temperature": drawn, "amp": args.draws or drawn, "compile": args.draws or drawn}.items():
        if flag in args.typed and not used:
            raise UserError(f"argument --{flag}: has no effect on what is measured", 2)
    if args.fid and args.samples < metrics.MIN_IMAGES:
        raise flag_error("--samples", args.samples, f"must be at least {metrics.MIN_IMAGES} for --fid")
    temperatures = cli.check_temperature(args.temperature, flow)
    args.temperature = temperatures if len(set(temperatures)) > 1 else temperatures[0]
    feature_weights, notes = metrics.inception_weights(args.feature_weights) if args.fid else None, []
    if args.fid and not feature_weights[1].startswith(metrics.HASH):
        other = f"not those of the FID literature, whose SHA-256 is {metrics.HASH}…"
        notes.append(f"--feature_weights {feature_weights[0]}: {other}")
    compiled, obstacles = flags.accelerate(flow, args)
    notes += obstacles
    dataset, warnings = flags.open_data(config, args)
    images = data_name(config["data"], args.data_path)
    print(f"weights: {trained['weights']}, step {trained['step']}; images: {images}", flush=True)
    there = len(getattr(dataset, args.split))
    if args.fid and there < metrics.MIN_IMAGES:
        raise UserError(f"--fid: the {args.split} split has {there} images, {metrics.MIN_IMAGES} are needed")
    for line in notes:
        print(f"warning: {line}", file=sys.stderr)

    results = {"data_fingerprint": dataset.fingerprint, "compile": compiled, "amp": args.amp}
    results["dtype"] = args.dtype or config["dtype"]
    results["warnings"] = warnings + notes
    if config["data"] == "folder":
        results["folder"] = Path(args.data_path).absolute().name  # tells sets of images apart
    record = {"kind": "evaluation", **about(__file__, argv, args.cuda), **trained, "config": config, "results": results}
    try:
        for part in measure(args, flow, dataset, variant, feature_weights):
            print(*table([part]), sep="\n", flush=True)
            results |= part
            if args.json:  # after each part, in case a later one fails
                save(args.json, record, rows)
    except FloatingPointError as error:
        raise UserError(f"{trained['weights']}: {error}") from error


if __name__ == "__main__":
    cli.script(main)
