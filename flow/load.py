"""A flow from its configuration or from a checkpoint file."""

import inspect

import torch

from utils import checkpoint
from utils.cli import UserError

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

    Raises utils.cli.UserError if the file cannot be used.
    """
    flow, config, _ = load_trained(path, device)
    return flow, config


def load_trained(path, device="cpu", data=None):
    """(flow, config, trained) from a checkpoint file.

    data: name of the data set that it must have been trained on, or None
    trained: what results record of the training: file, parameters, epochs, steps, seconds and machine (None where the
        file does not say)
    Raises utils.cli.UserError if the file cannot be used.
    """
    state = checkpoint.read(path, device)
    config = state["config"]
    try:
        flow = build(config)
        flow.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"checkpoint {path}: its weights do not fit its configuration ({cause})") from error
    if data not in (None, config["data"]):
        raise UserError(f"--data {data}: {path} was trained on {config['data']}")
    trained = {
        "weights": str(path),
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "epoch": state["epoch"],
        "step": state["step"],
        "train_seconds": state.get("seconds"),
        "trained_on": state.get("machine"),
    }
    return flow.to(device).eval(), config, trained
