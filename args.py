"""Command-line flags, their checks, the name of a run, the flow and the images that a script is asked for.

Flags keep the names and defaults of the authors' release; the defaults are the paper's CelebA run.
"""

import argparse
import inspect
import math
import os
import re
import shlex
import sys
from pathlib import Path

import torch

from data import DATASETS, DataError, open_dataset
from flow.base import per_level
from flow.hierarchy import num_levels
from flow.load import MODELS, from_state
from flow.prior import PRIORS
from layers import PATCH_BIJECTORS
from utils import checkpoint
from utils.distributed import PeerError, is_torchelastic_launched
from utils.results import check_writable
from utils.signals import leave_on_signals

DEFAULT_DATA = "celeba32"


class RunError(Exception):
    """A run that cannot start or go on; the message is one sentence for the user."""


class FlagError(Exception):
    """A value of a flag that does not fit the flow or the data of other flags."""

    def __init__(self, flag, value, rule):
        super().__init__(f"argument {flag}: {value}: {rule}")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every flag that has one and does not explain it itself."""

    def _get_help_string(self, action):
        explained = "(default" in (action.help or "") or action.default in (None, "", False)
        return action.help if explained else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence and whose @FILEs hold flags with their values, and # comments."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            epilog="@FILE reads flags from a file: one flag with its value per line, quotes round a value with spaces,"
            " a comment after # and a space or at the start of a line; later flags win.",
        )
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -1e-3 and -1,2 are values too, wrong as they may be

    def convert_arg_line_to_args(self, arg_line):
        lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", arg_line.lstrip("\ufeff")), posix=True)
        lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
        try:
            return list(lexer)
        except ValueError as error:
            self.error(f"argument file: line {arg_line!r}: {error}")

    def parse_args(self, args=None, namespace=None):
        try:
            return super().parse_args(args, namespace)
        except RecursionError:
            self.error("argument file: reads itself")
        except ValueError as error:  # a name or content that is no text
            self.error(f"argument file: {error}")

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high, rule):
    """An argparse type: an int or float from `low` to `high`; `rule` says so in words."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: must be {rule}")
        return value

    return convert


LARGEST = 2**31 - 1
count = number(int, 0, LARGEST, f"a whole number of at least 0 and at most {LARGEST}")
positive = number(int, 1, LARGEST, f"a whole number of at least 1 and at most {LARGEST}")
several = number(int, 2, LARGEST, f"a whole number of at least 2 and at most {LARGEST}")
above_zero = number(float, 1e-30, 1e30, "a number above 0 and at most 1e30")
non_negative = number(float, 0, 1e30, "a number of at least 0 and at most 1e30")
finite = number(float, -1e30, 1e30, "a number from -1e30 to 1e30")


def number_list(kind):
    """An argparse type: one `kind` or several, comma separated, as a tuple."""
    return lambda text: tuple(kind(item) for item in text.split(","))


def assignment(name, value):
    """An argparse type: `name`=`value`, types themselves, as a pair."""

    def convert(text):
        left, equals, right = text.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text!r}: must be something = a number")
        return name(left), value(right)

    return convert


def latent_name(text):
    """An argparse type: the name h:i:j:c of a latent, its level, row, column and channel, as a tuple of numbers."""
    parts = text.split(":")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: must be level:row:column:channel, counted from 0, as in 2:4:12:0")
    return tuple(map(int, parts))


def gpu_list(text):
    """The numbers of `--cuda`, a tuple; empty is the CPU."""
    numbers = text.split(",") if text else []
    for number in numbers:
        if not number.isdecimal():
            raise argparse.ArgumentTypeError(
                f"{text!r}: must be numbers of GPUs, comma separated, or empty for the CPU"
            )
        if int(number) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"{text!r}: no GPU {number}, the number of GPUs that can be used here is {torch.cuda.device_count()}"
            )
    if len(set(map(int, numbers))) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: names a GPU twice")
    return tuple(map(int, numbers))


def build_parser(description, needs_weights=False, pictures=False, numbers=False, several=False):
    """The flags of `main.py`; also those of a script that uses a trained flow (or several), draws pictures, writes
    numbers."""
    parser = Parser(description)
    if needs_weights or pictures or numbers:
        group = parser.add_argument_group("input and output")
    if needs_weights:
        group.add_argument(
            "--weights",
            metavar="FILE",
            nargs="+" if several else None,
            help="checkpoint, which carries its own configuration; without it, the flags below name a run whose newest"
            " checkpoint is used",
        )
        group.add_argument("--draw_seed", type=count, default=0, metavar="N", help="seed of what is drawn")
    if pictures:
        group.add_argument("--fig_dir", default="./figures", metavar="DIR", help="folder for pictures, PNG and PDF")
    if numbers:
        group.add_argument("--json", metavar="FILE", help="write the results there")

    group = parser.add_argument_group("dataset parameters")
    group.add_argument(
        "--data",
        choices=DATASETS,
        help="dataset name; folder: the images in data_path"
        f" (default: {DEFAULT_DATA}{', with --weights their own' if needs_weights else ''})",
    )
    group.add_argument("--data_path", default="./datasets", metavar="DIR", help="folder of the data sets")
    group.add_argument("--nchannels", type=positive, metavar="C", help="number of channels (default: the data set's)")
    group.add_argument(
        "--L", type=positive, metavar="PIXELS", help="edge length of images, in pixels (default: the data set's)"
    )

    group = parser.add_argument_group("network parameters")
    group.add_argument(
        "--model", choices=MODELS, default="rgflow", help="the flow; realnvp: the baseline to compare with"
    )
    group.add_argument("--prior", choices=PRIORS, default="laplace", help="prior of latent variables")
    group.add_argument("--subnet", choices=PATCH_BIJECTORS, default="rnvp", help="type of subnet in an RG block")
    group.add_argument(
        "--kernel_size", type=positive, default=4, metavar="PIXELS", help="edge length of an RG block, in pixels, even"
    )
    group.add_argument(
        "--nlayers",
        type=number_list(positive),
        metavar="N[,N…]",
        help="number of subnet layers in an RG block, or of couplings of each kind at a level of Real NVP, one number"
        " or one per level from h = 0 up, comma separated (default: 8,6,4,2, cut or continued with 2 to the number of"
        " levels; 4 with --share_levels; for realnvp 3, at the last level 4)",
    )
    group.add_argument(
        "--nresblocks", type=positive, default=4, metavar="N", help="number of residual blocks in a network"
    )
    group.add_argument(
        "--nmlp",
        type=positive,
        default=2,
        metavar="N",
        help="number of hidden layers, or of Real NVP's convolutions, in a residual block",
    )
    group.add_argument(
        "--nhidden",
        type=positive,
        metavar="N",
        help="width of hidden layers; Real NVP doubles it at every scale (default: 512; for realnvp 64)",
    )
    group.add_argument(
        "--share_levels",
        action="store_true",
        help="one disentangler and one decimator at all levels (scale invariance)",
    )
    group.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="type of all numbers")

    group = parser.add_argument_group("optimizer parameters")
    group.add_argument("--batch_size", type=positive, default=64, metavar="IMAGES", help="images per step")
    group.add_argument("--lr", type=above_zero, default=1e-3, help="learning rate, above 0")
    group.add_argument(
        "--weight_decay", type=non_negative, default=5e-2, metavar="RATE", help="weight decay; times lr per step"
    )
    group.add_argument("--epoch", type=positive, default=500, metavar="N", help="number of epochs")
    group.add_argument("--max_steps", type=count, default=0, metavar="N", help="end after N steps, 0 for no such limit")
    group.add_argument("--warmup_steps", type=count, default=0, metavar="N", help="steps over which lr rises from 0")
    group.add_argument(
        "--lr_schedule",
        choices=["constant", "cosine"],
        default="constant",
        help="cosine: falls to 0 at the end of the run",
    )
    group.add_argument(
        "--clip_grad",
        type=non_negative,
        default=1.0,
        metavar="NORM",
        help="global norm to clip gradients, 0 for disabled",
    )
    group.add_argument(
        "--seed", type=count, default=0, metavar="N", help="seed of weights, order, flips, noise and samples"
    )

    group = parser.add_argument_group("system parameters")
    group.add_argument("--no_stdout", action="store_true", help="do not print log to stdout")
    group.add_argument("--print_step", type=count, default=1, metavar="N", help="steps between log lines, 0 for none")
    group.add_argument(
        "--test_steps",
        type=number_list(positive),
        default=(),
        metavar="N[,N…]",
        help="also measure the test BPD after these steps (default: after each epoch and at the end of the run only)",
    )
    group.add_argument(
        "--save_epoch", type=count, default=1, metavar="N", help="epochs between checkpoints, 0 for one at the end only"
    )
    group.add_argument(
        "--keep_epoch", type=count, default=10, metavar="N", help="keep the checkpoint of every Nth epoch, 0 for all"
    )
    group.add_argument(
        "--save_minutes",
        type=non_negative,
        default=0.0,
        metavar="MINUTES",
        help="time between saves inside an epoch, 0 for none",
    )
    group.add_argument(
        "--init",
        metavar="FILE",
        help="start from the weights of this checkpoint, of a network of the same sizes, unless the run has its own",
    )
    if not needs_weights:
        group.add_argument(
            "--export",
            metavar="FILE",
            help="only write weights and configuration of the run's newest checkpoint to FILE",
        )
    group.add_argument(
        "--plot_epoch",
        type=count,
        default=1,
        metavar="N",
        help="epochs between sample grids, 0 for one at the end only",
    )
    group.add_argument(
        "--cuda",
        type=gpu_list,
        default="",
        metavar="ID[,ID…]",
        help="number of the GPU, or of several, each for a process of its own (default: empty, the CPU)",
    )
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run networks as compiled kernels and, on a GPU, the training step as one CUDA graph; compiling takes"
        " minutes on a CPU (default: on a GPU only)",
    )
    group.add_argument(
        "--amp",
        choices=["none", "tf32", "bf16"],
        default="none",
        help="precision of the matrix products in the networks, instead of dtype; couplings, log-determinants, prior"
        " and loss keep dtype. tf32 needs a GPU",
    )
    group.add_argument(
        "--grad_checkpoint",
        action="store_true",
        help="recompute the networks in the backward pass instead of keeping them: less memory, a third more work",
    )
    group.add_argument("--out_infix", default="", metavar="TEXT", help="infix in output file names, to tell runs apart")
    group.add_argument(
        "-o", "--out_dir", default="./saved_model", metavar="DIR", help="folder for output, empty for no output files"
    )
    return parser


def get_args(argv=None, parser=None):
    """Parse and check flags; nchannels, L and nlayers filled in. Exits with status 2 and one sentence on bad input."""
    parser = parser or build_parser(
        "Train RG-Flow on images; a run that is started again goes on from its newest checkpoint."
    )
    args = parser.parse_args(argv)
    if "weights" in args:
        args.given_data = args.data
    args.data = args.data or DEFAULT_DATA
    spec = DATASETS[args.data]
    for name in ("nchannels", "L"):
        given, own = getattr(args, name), getattr(spec, name)
        if given not in (None, own) and spec.fixed_shape:
            parser.error(f"argument --{name}: {given}: must be {own} for --data {args.data}")
        setattr(args, name, own if given is None else given)
    if args.nchannels not in (1, 3):
        parser.error(f"argument --nchannels: {args.nchannels}: must be 1 (grey) or 3 (colour)")
    if args.nhidden is None:
        args.nhidden = inspect.signature(MODELS[args.model]).parameters["nhidden"].default
    if args.model == "realnvp":
        if args.share_levels:
            parser.error("argument --share_levels: only with --model rgflow")
        if args.subnet != "rnvp":
            parser.error(f"argument --subnet: {args.subnet}: must be rnvp with --model realnvp")
    set_device(parser, args, several="export" in args)  # main.py
    if args.amp != "none" and args.dtype != "float32":
        parser.error(f"argument --amp: {args.amp}: needs --dtype float32")
    if args.amp == "tf32" and args.cuda == "cpu":
        parser.error("argument --amp: tf32: needs a GPU, see --cuda")
    if args.compile is None:
        args.compile = args.cuda != "cpu"
    if any(separator in args.out_infix for separator in "/\\\0"):
        parser.error(f"argument --out_infix: {args.out_infix!r}: must not contain a path separator")
    check_output(parser, args)
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


def set_device(parser, args, several):
    """Replace the numbers of --cuda by a device for this process, and set `gpus`, the number of GPUs if there are
    several."""
    numbers, local_rank = args.cuda, int(os.environ.get("LOCAL_RANK", 0)) if is_torchelastic_launched() else 0
    if len(numbers) > 1 and not several:
        parser.error(f"argument --cuda: {','.join(map(str, numbers))}: must be the number of one GPU")
    if numbers and local_rank >= len(numbers):
        parser.error(
            f"argument --cuda: {','.join(map(str, numbers))}: must name a GPU for each process of this machine"
        )
    args.cuda = f"cuda:{numbers[local_rank]}" if numbers else "cpu"
    args.gpus = len(numbers) if len(numbers) > 1 else 0
    # PyTorch's own default is tf32 for convolutions.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.amp == "tf32"


def check_output(parser, args):
    """Ends with one sentence, before anything is computed, if a file or folder that a flag names cannot be written."""
    for flag in ("json", "out", "fig_dir"):
        path = getattr(args, flag, None)
        if path is not None:
            try:
                check_writable(Path(path) / "picture" if flag == "fig_dir" else path)
            except OSError as error:
                parser.error(f"argument --{flag}: {getattr(args, flag)}: cannot be written ({error.strerror})")


def network_name(args):
    """The folder of a network's runs, as in the release: what differs from the release's defaults, then the sizes."""
    name = "" if args.model == "rgflow" else f"{args.model}_"
    name += "" if args.prior == "gaussian" else f"{args.prior}_"
    name += "" if args.subnet == "rnvp" else f"{args.subnet}_"
    name += "share_" if args.share_levels else ""
    name += "" if args.kernel_size == 4 else f"ks{args.kernel_size}_"
    nlayers = args.nlayers[:1] if len(set(args.nlayers)) == 1 else args.nlayers
    return name + f"nl{','.join(map(str, nlayers))}_nr{args.nresblocks}_nm{args.nmlp}_nh{args.nhidden}"


def run_path(args, suffix):
    """{out_dir}/{data}/{network}/out{infix}{suffix}, or None without --out_dir."""
    if not args.out_dir:
        return None
    return Path(args.out_dir) / args.data / network_name(args) / f"out{args.out_infix}{suffix}"


def picture_path(args, config, name):
    """{fig_dir}/{name}_{data}_{network}{infix}, without ending, a --draw_seed but 0 after the name; config: of
    `load_flow`."""
    run = argparse.Namespace(**config)
    seed = f"_seed{args.draw_seed}" if args.draw_seed else ""
    return Path(args.fig_dir) / f"{name}{seed}_{run.data}_{network_name(run)}{run.out_infix}"


def load_flow(args):
    """(flow, config, trained) of `--weights`, or of the newest checkpoint of the run that the flags name.

    trained: what results record of the training: file, epochs, steps, seconds (None where the file does not say)
    Raises utils.checkpoint.CheckpointError if there is none, RunError if it is not of the data set of --data.
    """
    if args.weights is None:
        state, path = newest_state(args)
    else:
        state, path = checkpoint.read(args.weights, args.cuda), args.weights
    flow, config = from_state(state, path, args.cuda)
    if args.weights is not None and args.given_data not in (None, config["data"]):
        raise RunError(f"--data {args.given_data}: {path} was trained on {config['data']}")
    trained = {
        "weights": str(path),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "epoch": state["epoch"],
        "step": state["step"],
        "train_seconds": state.get("seconds"),
        "trained_on": state.get("machine"),
    }
    return flow, config, trained


def load_flows(args, data_names):
    """(named, flow, config, trained) of each file of --weights, or of the newest checkpoint of the run that the flags
    name, one after the other; named: data set, network in words and seed, different for each.

    Raises as `load_flow`, and RunError for a data set that is not in `data_names` and for a flow named as one before.
    """
    files, seen = args.weights or [None], []
    for args.weights in files:
        flow, config, trained = load_flow(args)
        path, data, prior, seed = trained["weights"], config["data"], config["prior"], config["seed"]
        if data not in data_names:
            raise RunError(f"{path}: trained on {data}, must be one of {', '.join(data_names)}")
        network = network_name(argparse.Namespace(**config)).replace(f"{prior}_", "")
        network = f"{prior} {network}, {trained['step']:,} step{'s' * (trained['step'] != 1)}"
        named = {"data": data, "network": network, "seed": seed}
        if named in seen:
            raise RunError(f"{path}: a second flow of {network} with seed {seed} on {data}")
        seen.append(named)
        yield named, flow, config, trained


def add_temperature(group, default=(1.0,)):
    """The flag --temperature; its value is for `check_temperature`."""
    group.add_argument(
        "--temperature",
        type=number_list(non_negative),
        default=default,
        metavar="T[,T…]",
        help=f"one for all levels or one per level from h = 0 up, comma separated (default: {listing(default)})",
    )


def listing(values):
    """Numbers as the flags take them."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def check_range(flag, values, size):
    """Raises FlagError, naming `flag`, unless all values are in 0 … size - 1."""
    for value in values:
        if not 0 <= value < size:
            raise FlagError(flag, value, f"must be in 0..{size - 1}")


def check_temperature(temperatures, flow, flag="--temperature"):
    """One temperature for all levels, or one per level: as a tuple, one per level.

    Raises FlagError, naming `flag`, for another number of them.
    """
    if len(temperatures) == 1:
        temperatures *= flow.num_levels
    if len(temperatures) != flow.num_levels:
        rule = f"must be one number or {flow.num_levels}, one per level of the flow"
        raise FlagError(flag, listing(temperatures), rule)
    return temperatures


def load_images(args, config, numbers, flag="--images"):
    """The test images of these numbers, uint8 (N, C, L, L), of the data set of `config` below --data_path.

    Raises FlagError, naming `flag`, for a number that the split does not have, data.DataError if there are no images.
    """
    images = open_data(args, config)[0].test
    check_range(flag, numbers, len(images))
    return torch.from_numpy(images[list(numbers)])


def open_data(args, config):
    """The data set of `config` below --data_path, and sentences that a result must carry; prints these.

    One of them says that its fingerprint is not that of the training.
    """
    dataset = open_dataset(config["data"], args.data_path, config["nchannels"], config["L"])
    warnings, trained = list(dataset.warnings), config.get("fingerprint")
    if trained not in (None, dataset.fingerprint):
        warnings.append(
            f"--data_path {args.data_path}: {config['data']} there has the fingerprint {dataset.fingerprint}, that of"
            f" the training is {trained}: prepared in another way or from other images"
        )
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return dataset, warnings


def check_latents(latents, flow, flag="--latents"):
    """Names (h, i, j, c) of latents as indices (c, i, j) into the flow's latents (C, L, L), a list of tuples.

    Raises FlagError for a latent that the flow does not have, naming `flag`.
    """
    for h, i, j, c in latents:
        name = f"{h}:{i}:{j}:{c}"
        if max(i, j) >= flow.L:
            raise FlagError(flag, name, f"row and column must be in 0..{flow.L - 1}")
        if c >= flow.nchannels:
            raise FlagError(flag, name, f"the channel must be in 0..{flow.nchannels - 1}")
        level = int(flow.level_map[c, i, j])
        if h != level:
            raise FlagError(flag, name, f"row {i}, column {j} is at level {level} of 0..{flow.num_levels - 1}")
    return [(c, i, j) for h, i, j, c in latents]


def newest_state(args):
    """(state, path) of the newest checkpoint of the run that the flags name; prints warnings.

    Raises utils.checkpoint.CheckpointError if there is none.
    """
    folder = run_path(args, "_save")
    found = checkpoint.newest(folder) if folder else None
    if not found:
        raise checkpoint.CheckpointError(
            f"no checkpoint in {folder or '--out_dir'}: train first"
            + (", or name one with --weights" if "weights" in args else "")
        )
    path, state, warnings = found
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)
    return state, path


def script(main):
    """Run a script's main; what the user can mend ends in one sentence and status 1, a bug in a traceback."""
    leave_on_signals()
    try:
        main()
    except FlagError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (DataError, RunError, PeerError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or 'file'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        sys.exit(f"error: out of memory, try a smaller batch or network ({str(error).splitlines()[0]})")
