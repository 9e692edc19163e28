"""What the command lines share: the parser, types of flags, checks, and errors in one sentence."""

import argparse
import hashlib
import io
import math
import os
import re
import shlex
import sys
from os.path import expanduser
from pathlib import Path

from .files import check_writable
from .memory import keep_freed_memory
from .signals import leave_on_signals

MIXED = 0.2, 0.6  # temperatures of level 0 and of the levels above in figure 6 (Appendix D)
LONGEST_NAME = 100  # characters of a picture's name
UNNAMED = {"weights", "data", "data_path", "prepared_path", "cuda", "fig_dir", "json"}  # flags not in it
PER_LEVEL = "one for all levels or one per level from h = 0 up, comma separated"


class UserError(Exception):
    """An error of the user's: one sentence that names the flag or file, the value and the rule. status: the script's
    exit status, 2 for a flag."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def flag_error(flag, value, rule):
    """The UserError for a value that does not fit the flow or the data of other flags."""
    return UserError(f"argument {flag}: {value}: {rule}", 2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default of each flag that has one, unless its help explains it."""

    def _get_help_string(self, action):
        explained = "(default" in (action.help or "") or action.default in (None, "", ()) or action.default is False
        return action.help if explained else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and whose @FILEs hold flags with their values, and # comments.

    description: --help shows the first line, so a script can give its docstring
    In values of flags with the metavar FILE, DIR or PATH, ~ is the user's folder, also where no shell expands it.
    The result's `given` lists the flags that were given, `typed` those on the command line itself, not in a file.
    """

    def __init__(self, description):
        super().__init__(
            description=description.partition("\n")[0],
            formatter_class=HelpFormatter,
            fromfile_prefix_chars="@",
            allow_abbrev=False,
            epilog="@FILE reads flags from a file: one flag with its value per line, quotes round values with spaces. A"
            " # at the start of a line or after a space starts a comment. Later flags win.",
        )
        self._negative_number_matcher = re.compile(r"-[\d.]")  # -1e-3 and -1,2 are values too, not flags
        self.restrictions, self.naming = [], ()  # naming: flags that name a run where there are no --weights

    def restrict(self, flags, needs="", excludes=""):
        """Refuse those of `flags` that are typed while none of the flags `needs` is set, or while one of the flags
        `excludes` is given; all are names separated by spaces. A file may hold the flags of several scripts."""
        self.restrictions.append((flags.split(), needs.split(), excludes.split()))

    def convert_arg_line_to_args(self, arg_line):
        lexer = shlex.shlex(re.sub(r"(^|\s)#.*", "", arg_line.lstrip("\ufeff")), posix=True)
        lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", ""
        try:
            return list(lexer)
        except ValueError as error:
            self.error(f"argument file: line {arg_line!r}: {error}")

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [f"@{expanduser(each[1:])}" if each.startswith("@~") else each for each in args]
        for action in self._actions:
            if action.metavar in ("FILE", "DIR", "PATH"):
                action.type = expanduser
        try:
            expanded, unset = self._read_args_from_files(args), object()  # once: a pipe can be read only once
            found, rest = super().parse_known_args(expanded, namespace)
            given, _ = super().parse_known_args(expanded, argparse.Namespace(**dict.fromkeys(vars(found), unset)))
            if any("\0" in value for value in vars(found).values() if isinstance(value, str)):
                raise ValueError("a value holds a null character")
        except (RecursionError, ValueError) as error:  # a file that reads itself; a name or content that is no text
            self.error(f"argument file: {'reads itself' if isinstance(error, RecursionError) else error}")
        found.given = [name for name, value in vars(given).items() if value is not unset]
        found.typed = [each.partition("=")[0][2:].removeprefix("no-") for each in args if each.startswith("--")]
        for flags, needs, excludes in self.restrictions:
            without = needs and not any(getattr(found, name) for name in needs)
            obstacles = needs if without else [name for name in excludes if name in found.given]
            for flag in flags if obstacles else ():
                if flag in found.typed and (flag not in self.naming or found.weights):
                    listed = " or ".join(f"--{name}" for name in obstacles)
                    self.error(f"argument --{flag}: has no effect {'without' if without else 'with'} {listed}")
        return found, rest

    def error(self, message):
        message = re.sub(r"^\[Errno \d+\] (.*): (['\"])(.*)\2$", r"argument file \3: \1", message)
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
panels = number(int, 1, 200, "a whole number from 1 to 200, in a picture")
several = number(int, 2, LARGEST, f"a whole number of at least 2 and at most {LARGEST}")
above_zero = number(float, 1e-30, 1e30, "a number above 0 and at most 1e30")
non_negative = number(float, 0, 1e30, "a number of at least 0 and at most 1e30")
finite = number(float, -1e30, 1e30, "a number from -1e30 to 1e30")


def number_list(kind, size=None):
    """An argparse type: one `kind` or several, comma separated, as a tuple; with `size`, that many."""

    def convert(text):
        values = tuple(kind(item) for item in text.split(","))
        if size not in (None, len(values)):
            raise argparse.ArgumentTypeError(f"{text!r}: must be {size} numbers")
        return values

    return convert


def assignment(name, value):
    """An argparse type: `name`=`value`, types themselves, as a pair."""

    def convert(text):
        left, equals, right = text.partition("=")
        if not equals:
            raise argparse.ArgumentTypeError(f"{text!r}: must be something = a number")
        return name(left), value(right)

    return convert


def indices(names, example):
    """An argparse type: numbers counted from 0 and joined by colons, as a tuple; `names` says what they are."""

    def convert(text):
        parts = text.split(":")
        if len(parts) != len(names.split(":")) or not all(part.isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r}: must be {names}, counted from 0, as in {example}")
        return tuple(map(int, parts))

    return convert


latent_name = indices("level:row:column:channel", "2:4:12:0")
latent_names, counts = number_list(latent_name), number_list(count)


def source(text):
    """An argparse type: "test:N" -> ("test", N), "sample:SEED" -> ("sample", SEED), another text -> ("file", path)."""
    kind, _, number = text.partition(":")
    return (kind, count(number)) if kind in ("test", "sample") and number else ("file", expanduser(text))


def gpu_list(text):
    """The numbers of `--cuda`, a tuple; empty is the CPU."""
    from torch.cuda import device_count  # here: processes that draw images do without torch

    refuse, numbers = argparse.ArgumentTypeError, text.split(",") if text else []
    if text == "mps":
        raise refuse("'mps': GPUs of Apple have no float64, which this program needs; without --cuda the CPU computes")
    if not all(number.isdecimal() for number in numbers):
        raise refuse(f"{text!r}: must be numbers of GPUs, comma separated, or empty for the CPU")
    numbers = tuple(map(int, numbers))
    if max(numbers, default=-1) >= device_count():
        raise refuse(f"{text!r}: no GPU {max(numbers)}, the number of GPUs that are available is {device_count()}")
    if len(set(numbers)) < len(numbers):
        raise refuse(f"{text!r}: names a GPU twice")
    return numbers


def add_temperature(add, mixed=False):
    """--temperature, or with `mixed` --temperatures."""
    flag, default, text = "--temperature", (1.0,), "1"
    if mixed:
        flag, default, text = "--temperatures", None, f"{MIXED[0]} at h = 0, {MIXED[1]} above"
    add(flag, type=number_list(non_negative), default=default, metavar="T[,T…]", help=f"{PER_LEVEL} (default: {text})")


def add_range(add):
    explained = "first and last value of a latent (default: 0,6 at levels 0 and 1, 0,1.5 above, as in figure 6)"
    add("--range", type=number_list(finite, 2), metavar="LOW,HIGH", help=explained)


def add_field_flags(add):
    add("--levels", type=counts, metavar="H[,H…]", help="only these levels (default: all)")
    add("--draws", type=positive, default=16, metavar="N", help="draws of z; a receptive field is the mean over them")
    subset = "compute the receptive fields of N random latents per level (default: of all latents for rgflow if they"
    subset += " take at most 1 GiB, otherwise of 16)"
    add("--per_level", type=positive, metavar="N", help=subset)


def listing(values):
    """Numbers as the flags take them."""
    return ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def check_range(flag, values, size):
    """Raises UserError, naming `flag`, unless all values are in 0 … size - 1."""
    for value in values:
        if not 0 <= value < size:
            raise flag_error(flag, value, f"must be in 0..{size - 1}")


def check_levels(levels, flow):
    """The levels of --levels, all if None, from the top. Raises UserError for a level that the flow does not have."""
    check_range("--levels", levels or (), flow.num_levels)
    return sorted(set(levels or range(flow.num_levels)), reverse=True)


def check_temperature(temperatures, flow, flag="--temperature"):
    """A tuple of one temperature per level, from one for all or one per level. Raises UserError, naming `flag`, for
    another number of them."""
    if len(temperatures) not in (1, flow.num_levels):
        rule = f"must be one number or {flow.num_levels}, one per level of the flow"
        raise flag_error(flag, listing(temperatures), rule)
    return temperatures * flow.num_levels if len(temperatures) == 1 else temperatures


def check_temperatures(temperatures, flow):
    """`check_temperature` of --temperatures, by default MIXED."""
    return check_temperature(temperatures or (MIXED[0], *MIXED[1:] * (flow.num_levels - 1)), flow, "--temperatures")


def check_latents(latents, level_map, flag="--latents"):
    """Names (h, i, j, c) of latents as indices (c, i, j) into a flow's level_map (C, L, L), a list of tuples. Raises
    UserError, naming `flag`, for a latent that the flow does not have."""
    C, L, _ = level_map.shape
    for h, i, j, c in latents:
        name = f"{h}:{i}:{j}:{c}"
        if max(i, j) >= L:
            raise flag_error(flag, name, f"row and column must be in 0..{L - 1}")
        if c >= C:
            raise flag_error(flag, name, f"the channel must be in 0..{C - 1}")
        level = int(level_map[c, i, j])
        if h != level:
            raise flag_error(flag, name, f"row {i}, column {j} is at level {level} of 0..{level_map.max()}")
    return [(c, i, j) for h, i, j, c in latents]


def picture_path(args, kind, *names, key=None):
    """{fig_dir}/{kind}_{names}_{given flags}_{hash}, without ending: the flags that were given tell pictures apart. The
    hash is of all that determines the picture: flags, where files are looked for, and `key`, such as the weights."""
    given = {flag: getattr(args, flag) for flag in args.given if flag not in UNNAMED}
    parts = [kind, *names, *(f"{flag} {'' if value is True else value}" for flag, value in given.items())]
    total = repr((kind, names, given, os.getcwd(), getattr(args, "data_path", None), key))
    return Path(args.fig_dir) / f"{file_name('_'.join(parts))}_{hashlib.sha256(total.encode()).hexdigest()[:6]}"


def file_name(text):
    """A text as a part of a file's name: letters, digits and ._+- alone, at most LONGEST_NAME of them, no folders."""
    text = re.sub(r"[^\s'\",]*/", "", text)
    return re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9.+-]", "_", text)).strip("_")[:LONGEST_NAME]


def check_output(parser, args):
    """Exits with one sentence, before any computation, if a file or folder named by a flag cannot be written."""
    given = {flag: getattr(args, flag, None) for flag in ("json", "out", "fig_dir")}
    for flag, path in given.items():
        try:
            if path is not None:
                check_writable(Path(path) / "picture" if flag == "fig_dir" else path)
        except OSError as error:
            parser.error(f"argument --{flag}: {path}: cannot be written ({error.strerror})")


def out_of_memory(error):
    """Whether an error means that; PyTorch has words for a GPU and for a CPU."""
    return isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error)) is not None


def script(main):
    """Run a script's main. User errors print one sentence; bugs keep their traceback."""
    leave_on_signals()
    keep_freed_memory()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `>&-`
            setattr(sys, name, io.StringIO())
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what the terminal's encoding lacks becomes a question mark
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # the reader of the output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(141)  # as after the signal SIGPIPE
    except OSError as error:
        sys.exit(f"error: {error.filename or 'output'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(f"error: out of memory, try a smaller batch or network ({str(error).splitlines()[0]})")
