"""The flags of training and of the scripts that use trained weights, their checks, and the names of files.

Flags of the authors' release keep their names. Their defaults are the paper's CelebA run.
"""

import argparse
import copy
import inspect
import os
import sys
from pathlib import Path

import torch

from data import DATASETS, open_dataset
from data.images import load_single
from flow.base import per_level
from flow.hierarchy import num_levels
from flow.latents import round_trip_error
from flow.load import MODELS, load_trained
from flow.prior import PRIORS
from layers import PATCH_BIJECTORS
from utils import checkpoint, cli
from utils.cli import UserError, above_zero, count, gpu_list, non_negative, number_list, positive
from utils.distributed import is_torchelastic_launched
from utils.optim import why_not_compiled
from utils.results import data_name, elsewhere, training_name
from utils.run import FIXED, differences

DEFAULT_DATA = "celeba32"
ROUND_TRIP = 0.1  # levels of 256, largest error of images for which a flow counts as exact; on test images 0.01 at most
LOCATION = "data", "nlayers", "data_path", "out_dir", "out_infix", "cuda"  # what finds a run, and where a script runs
NETWORK = "data nchannels L model prior subnet kernel_size nlayers nresblocks nmlp nhidden share_levels dtype cuda"
TRAIN = "Train a flow on images. Repeat the command to resume from the newest checkpoint."


def build_parser(description=TRAIN, only=""):
    """The flags of `main.py`, or `only` those named, separated by spaces. They also name a run to scripts."""
    parser = cli.Parser(description)

    def group(title):
        add = parser.add_argument_group(title).add_argument

        def add_wanted(*names, **how):
            if not only or names[-1][2:] in only.split():
                add(*names, **how)

        return add_wanted

    add = group("dataset parameters")
    add("--data", choices=DATASETS, default=DEFAULT_DATA, help="data set; folder: all images below --data_path")
    add_paths(add)
    add("--nchannels", type=positive, metavar="C", help="number of channels (default: the data set's)")
    add("--L", type=positive, metavar="PIXELS", help="edge length of images (default: the data set's)")
    mirrored = f"default: with {' and '.join(name for name, spec in DATASETS.items() if spec.flips)} only"
    flips = f"mirror training images left to right at random ({mirrored})"
    add("--flip", action=argparse.BooleanOptionalAction, help=flips)

    add = group("network parameters")
    add("--model", choices=MODELS, default="rgflow", help="the flow; realnvp is the baseline")
    add("--prior", choices=PRIORS, default="laplace", help="prior of the latents")
    add("--subnet", choices=PATCH_BIJECTORS, default="rnvp", help="bijector of patches")
    add("--kernel_size", type=positive, default=4, metavar="PIXELS", help="edge length of a patch, even")
    layers = "blocks of a patch bijector (realnvp: couplings of each kind at a level), one number or one per level from"
    layers += " h = 0 up, comma separated (default: 8,6,4,2,2,…; 4 with --share_levels; realnvp: 3,…,3,4)"
    add("--nlayers", type=number_list(positive), metavar="N[,N…]", help=layers)
    add("--nresblocks", type=positive, default=4, metavar="N", help="residual blocks in a network")
    hidden = "hidden layers (realnvp: convolutions) per residual block"
    add("--nmlp", type=positive, default=2, metavar="N", help=hidden)
    width = "width of hidden layers; realnvp doubles it at every level (default: 512; for realnvp 64)"
    add("--nhidden", type=positive, metavar="N", help=width)
    add("--share_levels", action="store_true", help="use the same two bijectors at all levels (scale invariance)")
    add("--dtype", choices=["float32", "float64"], default="float32", help="type of all numbers")

    add = group("optimizer parameters")
    add("--batch_size", type=positive, default=64, metavar="IMAGES", help="images per step, of all GPUs together")
    add("--lr", type=above_zero, default=1e-3, help="learning rate")
    add("--weight_decay", type=non_negative, default=5e-2, metavar="RATE", help="weight decay; times lr per step")
    add("--epoch", type=positive, default=500, metavar="N", help="number of epochs")
    add("--max_steps", type=count, default=0, metavar="N", help="stop after N steps, 0 for no limit")
    add("--warmup_steps", type=count, default=0, metavar="N", help="steps over which lr rises from 0")
    add("--lr_schedule", choices=["constant", "cosine"], default="constant", help="cosine falls to 0 at the end")
    add("--clip_grad", type=non_negative, default=1.0, metavar="NORM", help="largest gradient norm, 0 for no limit")
    add("--seed", type=count, default=0, metavar="N", help="seed of weights, order, flips, noise and samples")

    add = group("system parameters")
    add("--no_stdout", action="store_true", help="do not print the log")
    add("--print_step", type=count, default=1, metavar="N", help="steps between log lines, 0 for none")
    tests = "also measure the test BPD after these steps (default: after each epoch and at the end of the run only)"
    add("--test_steps", type=number_list(positive), default=(), metavar="N[,N…]", help=tests)
    add("--save_epoch", type=count, default=1, metavar="N", help="epochs between checkpoints, 0 for the end only")
    add("--keep_epoch", type=count, default=10, metavar="N", help="keep the checkpoint of every Nth epoch, 0 for all")
    add("--save_minutes", type=non_negative, default=0.0, metavar="T", help="minutes between saves, 0 for none")
    add("--init", metavar="FILE", help="start a new run from the weights of FILE, a checkpoint of an equal network")
    add("--export", metavar="FILE", help="only write weights and configuration of the run's newest checkpoint to FILE")
    add("--plot_epoch", type=count, default=1, metavar="N", help="epochs between sample grids, 0 for the end only")
    gpus = "number of the GPU; several numbers: one process per GPU (default: empty, the CPU)"
    add("--cuda", type=gpu_list, default="", metavar="ID[,ID…]", help=gpus)
    add_speed(add)
    recompute = "recompute networks in the backward pass: less memory, more work"
    add("--grad_checkpoint", action="store_true", help=recompute)
    add("--out_infix", default="", metavar="TEXT", help="infix in the names of output files, to tell runs apart")
    add("-o", "--out_dir", default="./saved_model", metavar="DIR", help="folder for output, empty for no output files")
    return parser


def add_paths(add):
    """--data_path and --prepared_path."""
    add("--data_path", default="./datasets", metavar="DIR", help="folder of the data sets")
    prepared = "folder for prepared arrays (default: prepared_arrays in --data_path, for --data folder in ./datasets)"
    add("--prepared_path", metavar="DIR", help=prepared)


def add_speed(add):
    """--compile and --amp."""
    compiled = "compile the networks; on a GPU, training records its step as one CUDA graph; takes minutes on a CPU"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled + " (default: on a GPU only)")
    precision = "precision of the networks' matrix products, none for that of the weights; tf32 needs a GPU"
    add("--amp", choices=["none", "tf32", "bf16"], default="none", help=precision)


def get_args(argv=None, parser=None, several=True):
    """The flags of a run, checked, with those filled in that data set and model determine; several: whether it may have
    several GPUs. Bad input: one sentence, exit status 2."""
    parser = parser or build_parser()
    args, rest = parser.parse_known_args(argv)
    build_parser().parse_args(rest)  # what a file holds for other scripts
    if unused := [each for each in rest if each.partition("=")[0][2:].removeprefix("no-") in args.typed]:
        parser.error(f"unrecognized arguments: {' '.join(unused)}")
    spec = DATASETS[args.data]
    for name in ("nchannels", "L"):
        given, own = getattr(args, name), getattr(spec, name)
        if given not in (None, own) and spec.fixed_shape:
            parser.error(f"argument --{name}: {given}: must be {own} for --data {args.data}")
        setattr(args, name, own if given is None else given)
    args.flip = spec.flips if getattr(args, "flip", None) is None else args.flip
    if args.nchannels not in (1, 3):
        parser.error(f"argument --nchannels: {args.nchannels}: must be 1 (grey) or 3 (colour)")
    if args.nhidden is None:
        args.nhidden = inspect.signature(MODELS[args.model]).parameters["nhidden"].default
    if args.model == "realnvp" and args.share_levels:
        parser.error("argument --share_levels: only with --model rgflow")
    if args.model == "realnvp" and args.subnet != "rnvp":
        parser.error(f"argument --subnet: {args.subnet}: must be rnvp with --model realnvp")
    if any(separator in getattr(args, "out_infix", "") for separator in "/\\\0"):
        parser.error(f"argument --out_infix: {args.out_infix!r}: must not contain a path separator")
    if getattr(args, "amp", "none") != "none" and args.dtype != "float32":
        parser.error(f"argument --amp: {args.amp}: needs --dtype float32")
    settle(parser, args, several)
    try:
        levels = num_levels(args.L, args.kernel_size)
        if args.nlayers is None:
            args.nlayers = 4 if args.share_levels else MODELS[args.model].default_nlayers(levels)
        elif len(args.nlayers) == 1:
            (args.nlayers,) = args.nlayers
        args.nlayers = per_level(args.nlayers, levels, args.share_levels)
    except ValueError as error:
        parser.error(f"argument --{error}")
    return args


def settle(parser, args, several=False):
    """Check --cuda, --amp and the paths to write to. args.cuda becomes the device of this process, args.gpus how many
    there are, 0 for one, and --compile gets its default. TF32 is off until `accelerate`."""
    numbers, local_rank = args.cuda, int(os.environ.get("LOCAL_RANK", 0)) if is_torchelastic_launched() else 0
    listed, args.gpus = cli.listing(numbers), len(numbers) if len(numbers) > 1 else 0
    if args.gpus and not several:
        parser.error(f"argument --cuda: {listed}: must be the number of one GPU")
    if numbers and local_rank >= len(numbers):
        parser.error(f"argument --cuda: {listed}: must name a GPU for each process of this machine")
    args.cuda = f"cuda:{numbers[local_rank]}" if numbers else "cpu"
    if getattr(args, "amp", "none") == "tf32" and not numbers:
        parser.error("argument --amp: tf32: needs a GPU, see --cuda")
    if getattr(args, "compile", False) is None:
        args.compile = bool(numbers)
    allow_tf32(False)
    cli.check_output(parser, args)


def allow_tf32(allowed):
    """Whether GPUs may compute products of float32 matrices in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def accelerate(flow, args):
    """Apply --compile, --amp and --grad_checkpoint to a flow: whether it is compiled, and warnings for the log. Raises
    UserError for --amp with float64."""
    if args.amp != "none" and next(flow.parameters()).dtype != torch.float32:
        raise cli.flag_error("--amp", args.amp, "the numbers of the flow must be float32")
    allow_tf32(args.amp == "tf32")
    obstacle = why_not_compiled(torch.device(args.cuda)) if args.compile else None
    compiled = args.compile and not obstacle
    flow.accelerate(compiled, torch.bfloat16 if args.amp == "bf16" else None, getattr(args, "grad_checkpoint", False))
    return compiled, [f"--compile is off: torch.compile does not work here ({obstacle})"] if obstacle else []


def weights_parser(description, pictures=False, numbers=False, images=False, several=False, draws=True, dtype=None):
    """The flags of a script for a trained flow, or `several`; it may draw pictures or numbers, or read images. dtype:
    by default, None for that of the training."""
    parser = cli.Parser(description)
    parser.naming = "data", "data_path", "prepared_path", "cuda", "dtype"
    parser.epilog = f"Without --weights, the flags of main.py select a run's newest checkpoint. {parser.epilog}"
    add = parser.add_argument_group("input and output").add_argument
    add("--weights", metavar="FILE", nargs="+" if several else None, help="checkpoint, with its configuration")
    which = f"data set of the run, or with --weights of the images (default: the training's, otherwise {DEFAULT_DATA})"
    add("--data", choices=DATASETS, help=which)
    if images:
        add_paths(add)
    add("--cuda", type=gpu_list, default="", metavar="ID", help="number of the GPU (default: empty, the CPU)")
    types, text = ["float32", "float64"], f"type of all numbers (default: {dtype or 'that of the training'})"
    add("--dtype", choices=types, default=dtype, help=text)
    if draws:
        add("--draw_seed", type=count, default=0, metavar="N", help="seed of all draws")
    if pictures:
        add("--fig_dir", default="./figures", metavar="DIR", help="folder for pictures, PNG and PDF")
    if numbers:
        add("--json", metavar="FILE", help="write the results there")
    return parser


def parse(parser, argv=None):
    """The flags of a script, checked. args.run: those of `main.py` that name a run, None with --weights. Bad input: one
    sentence, exit status 2."""
    args, rest = parser.parse_known_args(argv)
    args.run = None
    if "export" in args.typed:
        parser.error("argument --export: only for main.py")
    if args.weights is not None and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (flags of main.py only without --weights)")
    if args.weights is None:
        shared = [f"--{name}={getattr(args, name)}" for name in ("data", "data_path") if getattr(args, name, None)]
        shared += [f"--cuda={cli.listing(args.cuda)}"]
        run_parser = build_parser()
        run_parser.prog = parser.prog
        args.run = get_args([*rest, *shared], run_parser)
    settle(parser, args)
    return args


def newest(run, advice=", or name one with --weights"):
    """(path, state) of the newest checkpoint of a run; prints warnings, also for given flags that its training had
    otherwise. Raises UserError if there is none, and for such flags of the flow and its data."""
    folder = run_path(run, "_save")
    found = checkpoint.newest(folder) if folder else None
    if not found:
        raise UserError(f"no checkpoint in {folder or '--out_dir'}: train first{advice}")
    path, state, warnings = found
    given = [name for name in run.given if name in state["config"] and name not in LOCATION]
    if different := differences(state["config"], vars(run), [name for name in given if name in FIXED]):
        raise UserError(f"{path} was trained with other settings ({'; '.join(different)})")
    if different := differences(state["config"], vars(run), given):
        warnings.append(f"flags without effect here, {path} was trained with others ({'; '.join(different)})")
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return path, state


def load_flow(args, path=None):
    """(flow, config, trained) of the file `path`, by default that of --weights or the newest checkpoint of the run that
    the flags name. config: see `with_data`; trained: see `flow.load.load_trained`"""
    path, state = newest(args.run) if args.run and not path else (path or args.weights, None)
    flow, config, trained = load_trained(path, args.cuda, state, args.dtype)
    return flow, with_data(config, args, path), trained


def with_data(config, args, path):
    """The configuration of the flow of a file, for the images of --data: `data` is their set and, if it is not that of
    the training, `trained_data` the latter in words. Raises UserError for images that the flow cannot take, and for
    another set in a script that reads none."""
    if args.data in (None, config["data"]):
        return config
    if not hasattr(args, "data_path"):
        raise cli.flag_error("--data", args.data, f"no data set is read here, {path} was trained on {config['data']}")
    spec, shape = DATASETS[args.data], (config["nchannels"], config["L"])
    if spec.fixed_shape and (spec.nchannels, spec.L) != shape:
        shapes = (f"{C} x {L} x {L}" for C, L in ((spec.nchannels, spec.L), shape))
        raise cli.flag_error("--data", args.data, "has images of {}, must be of {} for {}".format(*shapes, path))
    return {**config, "data": args.data, "trained_data": training_name(config, path)}


def load_flows(args, data_names):
    """(named, flow, config, trained) of each file of --weights, or of the run that the flags name.

    named: dict of data set, network in words and seed, different for each
    Raises as `load_flow`, and UserError for a data set that is not in `data_names` and for a second flow of one name.
    """
    seen = []
    for path in args.weights or [None]:
        flow, config, trained = load_flow(args, path)
        path, data, prior, seed = trained["weights"], config["data"], config["prior"], config["seed"]
        if data not in data_names:
            found = f"--data {data}:" if args.data else f"{path}: trained on {data},"
            raise UserError(f"{found} must be one of {', '.join(data_names)}")
        network = network_name(argparse.Namespace(**config)).replace(f"{prior}_", "")
        network = f"{prior} {network}, {trained['step']:,} step{'s' * (trained['step'] != 1)}{elsewhere(config)}"
        named = {"data": data, "network": network, "seed": seed}
        if named in seen:
            raise UserError(f"{path}: a second flow of {network} with seed {seed} on {data}")
        seen.append(named)
        yield named, flow, config, trained


def need_path(data, args):
    """Raises UserError for images of a folder that --data_path does not name."""
    if data == "folder" and "data_path" not in args.given:
        raise UserError("argument --data: folder: needs --data_path, the folder of the images", 2)


def open_data(config, args, *others):
    """The data set of `config` where --data_path and --prepared_path say, and warnings for the result, printed too:
    also one for each other training set of this configuration and `others`, which for another folder's images
    `trained_data` of the configuration then says."""
    data = config["data"]
    need_path(data, args)
    dataset = open_dataset(data, args.data_path, config["nchannels"], config["L"], args.prepared_path)
    warnings = list(dataset.warnings)
    for each in (config, *others):
        trained = each.get("fingerprint")
        if "trained_data" in each:
            images = f"--data {data}: the images are of {data_name(data, args.data_path)}"
            warnings.append(f"{images}, the flow was trained on {each['trained_data']}")
        elif trained not in (None, dataset.fingerprint):
            there = f"--data_path {args.data_path}: not the images of the training, or prepared in another way"
            warnings.append(f"{there} (fingerprint {dataset.fingerprint}, of the training {trained})")
            if data == "folder":
                each["trained_data"] = "other images"
    warnings = list(dict.fromkeys(warnings))
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return dataset, warnings


def load_images(config, args, numbers, flag="--images"):
    """Test images by their numbers: uint8 (N, C, L, L), of the data set of `config` as `open_data` finds it. Raises
    UserError, naming `flag`, for a number that does not exist, and if there are no images."""
    images = open_data(config, args)[0].test
    cli.check_range(flag, numbers, len(images))
    return torch.from_numpy(images[list(numbers)])


def load_source(source, config, args, flag):
    """The image (C, L, L), uint8, that `cli.source` names, None for a sample; in a script with --resize. Raises as
    `load_images`, naming `flag`, and as `data.images.load_single`."""
    kind, name = source
    if kind == "test":
        return load_images(config, args, [name], flag)[0]
    if kind == "file":
        return torch.from_numpy(load_single(name, config["nchannels"], config["L"], args.resize).copy())
    return None


def network_name(args):
    """The folder of a network's runs, as in the release: what differs from the release's defaults, then the sizes."""
    named = args.model, args.prior, args.subnet
    name = "".join(f"{each}_" for each in named if each not in ("rgflow", "gaussian", "rnvp"))
    name += "share_" if args.share_levels else ""
    name += "" if args.kernel_size == 4 else f"ks{args.kernel_size}_"
    nlayers = args.nlayers[:1] if len(set(args.nlayers)) == 1 else args.nlayers
    return name + f"nl{','.join(map(str, nlayers))}_nr{args.nresblocks}_nm{args.nmlp}_nh{args.nhidden}"


def run_path(args, suffix):
    """{out_dir}/{data}/{network}/out{infix}{suffix}, or None without --out_dir."""
    folder = Path(args.out_dir) / args.data / network_name(args)
    return folder / f"out{args.out_infix}{suffix}" if args.out_dir else None


def picture_path(args, config, trained, kind):
    """`cli.picture_path`, named after the file of --weights, or else after the run. config, trained: of `load_flow`"""
    run, name = argparse.Namespace(**config), Path(trained["weights"]).stem
    if name == "last" or name.isdecimal():  # of a run
        name = f"{run.data}_{network_name(run)}{run.out_infix}"
    images = [f"data {run.data}"] if elsewhere(config) else []
    return cli.picture_path(args, kind, name, *images, key=trained["digest"])


def exact(flow, images):
    """The flow, or where float32 loses the round trip of uint8 images (B, C, L, L) a copy in float64, with a note."""
    if next(flow.parameters()).dtype == torch.float64 or (error := round_trip_error(flow, images)) <= ROUND_TRIP:
        return flow
    double = copy.deepcopy(flow).double()
    words = f"note: encoded and decoded in float32, images change by up to {error:.2g} of 256 levels; float64 is used"
    print(f"{words} instead, which changes them by up to {round_trip_error(double, images):.2g}", file=sys.stderr)
    return double
