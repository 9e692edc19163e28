"""A flow from its configuration or from a checkpoint file."""

import inspect

import torch

from utils import checkpoint

from .real_nvp import RealNVP
from .rg_flow import RGFlow

MODELS = {"rgflow": RGFlow, "realnvp": RealNVP}


def build(config):
    """The flow of a configuration (a dict with `model`, the constructor's arguments and `dtype`), freshly initialised.

    Raises ValueError for values that the constructor refuses.
    """
    model = MODELS[config["model"]]
    flow = model(**{name: config[name] for name in inspect.signature(model).parameters})
    return flow.to(getattr(torch, config["dtype"]))


def load(path, device="cpu"):
    """(flow, config) from a checkpoint file: the flow in evaluation mode on `device`, the configuration of its run.

    Raises utils.checkpoint.CheckpointError if the file cannot be used.
    """
    return from_state(checkpoint.read(path, device), path, device)


def from_state(state, path, device="cpu"):
    """The same from the dict that `utils.checkpoint.read` gave for `path`."""
    try:
        flow = build(state["config"])
        flow.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise checkpoint.CheckpointError(
            f"checkpoint {path}: its weights do not fit its configuration ({cause})"
        ) from error
    return flow.to(device).eval(), state["config"]
