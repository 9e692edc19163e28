"""How a run starts: its folder, its disk space, and the checkpoint that it resumes or starts from."""

import math
from contextlib import contextmanager
from shutil import disk_usage

from . import checkpoint
from .cli import UserError
from .files import lock

# A run resumes only with the same values of these. All other flags may change.
NETWORK = ("model", "L", "nchannels", "subnet", "prior", "kernel_size", "nlayers", "nresblocks", "nmlp", "nhidden")
NETWORK += ("share_levels", "dtype")
FIXED = (*NETWORK, "data", "fingerprint", "seed", "batch_size")


def open_folder(base, out_dir):
    """Make {base}_save/ and return its path and the run's lock. Raises UserError, naming --out_dir, if that fails."""
    folder = base.with_name(f"{base.name}_save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(f"{base}.lock")
    except BlockingIOError as error:
        message = f"{base}.lock: another process is training this run, set --out_infix to start another"
        raise UserError(message) from error
    except OSError as error:
        raise UserError(f"--out_dir {out_dir}: cannot be written ({error.strerror})") from error
    checkpoint.remove_leftovers(folder)
    return folder, held


def find(folder, config, earlier):
    """(path, state, notes) of the checkpoint that a run with this configuration resumes from, None if there is none.
    Raises UserError if the checkpoint is slim or of a run with other settings.

    earlier: a dict, what runs had before there was a flag for it
    """
    found = checkpoint.newest(folder, full=True) if folder else None
    if found is None:
        return None
    path, state, notes = found
    if not checkpoint.is_full(state):
        raise UserError(
            f"{path} is slim, it has no optimiser state: a run cannot resume from it, but a new one, with another"
            f" --out_infix, can start from its weights with --init {path}" + "".join(f" ({note})" for note in notes)
        )
    different = differences(state["config"], config, FIXED)
    if different:
        settings = "; ".join(different)
        raise UserError(f"{path} was trained with other settings ({settings}): set --out_infix to start a new run")
    changed = differences({**earlier, **state["config"]}, config, config)
    notes += [f"continuing from {path}, step {state['step']}" + (", --init is not used" if config["init"] else "")]
    return path, state, notes + ([f"changed: {'; '.join(changed)}"] if changed else [])


def read_initial(path, config):
    """The state in the file of --init. Raises UserError if its network is another one."""
    state = checkpoint.read(path)
    different = differences(state["config"], config, NETWORK)
    if different:
        raise UserError(f"--init {path}: is of another network ({'; '.join(different)})")
    return state


def differences(old, new, names):
    """The differences between two configurations, in words."""
    # As text: a file may hold anything.
    return [f"{name} {old.get(name)} -> {new[name]}" for name in names if str(old.get(name)) != str(new[name])]


@contextmanager
def loading(path):
    """Turns the errors of a state that does not fit into a UserError that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint {path}: {str(error).splitlines()[0]}") from error


def check_disk(folder, args, weights, epochs, finished):
    """A line for the log: the disk space that the checkpoints need. Raises UserError if it is not available. weights,
    epochs, finished: bytes of all parameters, epochs of the whole run, whether nothing remains to be written"""
    kept = epochs // math.lcm(args.save_epoch, args.keep_epoch or 1) if args.save_epoch else min(epochs, 1)
    present = sum(path.stat().st_size for path in folder.glob("*.state"))
    needed, free = checkpoint.disk_space(weights, kept), disk_usage(folder).free
    line = f"disk: the checkpoints need up to {needed / 1e9:.3g} GB, {present / 1e9:.3g} GB of it are there"
    line += f", {free / 1e9:.3g} GB are free"
    if not finished and needed - present > free:
        raise UserError(f"--out_dir {args.out_dir}: {line}; a larger --keep_epoch keeps fewer files")
    return line
