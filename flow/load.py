"""A flow from its configuration or from a checkpoint file."""

import inspect

import torch

from utils import checkpoint
from utils.cache import digest
from utils.cli import UserError

from .real_nvp import RealNVP
from .rg_flow import RGFlow

MODELS = {"rgflow": RGFlow, "realnvp": RealNVP}


def build(config):
    """A freshly initialised flow. config: a dict with `model`, the constructor's arguments and `dtype`. Raises
    ValueError for values that the constructor refuses."""
    model = MODELS[config["model"]]
    flow = model(**{name: config[name] for name in inspect.signature(model).parameters})
    return flow.to(getattr(torch, config["dtype"]))


def load(path, device="cpu"):
    """(flow, config) from a checkpoint file: the flow in evaluation mode on `device`, and its run's configuration.
    Raises utils.cli.UserError if the file cannot be used."""
    return load_trained(path, device)[:2]


def load_trained(path, device="cpu", state=None, dtype=None):
    """`load`, and `trained`, what results record of the training; the file may lack seconds and machine (None).

    state: what the file holds, if it has been read already
    dtype: name of the type of the flow's numbers, that of the training if None
    """
    state = state or checkpoint.read(path, device)
    config = state["config"]
    try:
        flow = build(config)
        flow.load_state_dict(state["model"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(f"checkpoint {path}: its weights do not fit its configuration ({cause})") from error
    parameters = sum(parameter.numel() for parameter in flow.parameters())
    trained = {"weights": str(path), "parameters": parameters, "epoch": state["epoch"], "step": state["step"]}
    trained |= {"train_seconds": state.get("seconds"), "trained_on": state.get("machine")}
    trained["digest"] = digest(state["model"])
    return flow.to(device, getattr(torch, dtype or config["dtype"])).eval(), config, trained
