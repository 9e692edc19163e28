"""What the networks of all couplings share: parameters folded once per training step, and how the products run."""

import math
import operator
import warnings
from contextvars import ContextVar
from functools import cache
from types import MappingProxyType

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

NORM_MIN = 1e-12  # a smaller norm of weights counts as this; weights that a mask clears have the norm 0


HELD = ContextVar("held", default=MappingProxyType({}))  # by `folded_together`, in its thread, of each Networks by id


class Networks(nn.Module):
    """The networks of the K steps of a bijector, each with its own parameters. A step is one coupling, which is half of
    an RNVP block, or one autoregressive block.

    A subclass MUST define fold(): a list over the K steps of what a step needs of the parameters, in `self.dtype` where
    that is not None, differentiable where gradients are asked for.
    """

    kind = None  # equal where `folded_together` folds networks at once; None: one after the other

    def __init__(self, description):
        super().__init__()
        self.description = description
        self.accelerate()

    def __repr__(self):
        return f"{type(self).__name__}({self.description})"

    def accelerate(self, compile=False, dtype=None, recompute=False):
        """Set how the networks run. Results change by rounding only; checkpoints do not change.

        compile: run the steps, and on a GPU the folding of residual networks, as kernels of torch.compile
        dtype: type of the networks' matrix products, such as torch.bfloat16; None, and all else, is of the parameters'
        recompute: for the backward pass, store only the variables between steps and recompute the rest
        """
        self.compile_kernels, self.dtype, self.recompute = compile, dtype, recompute

    def steps(self):
        """The folded parameters of the K steps, for `run`: as they are now, or within `folded_together` on entry, if
        they are the same parameters (`torch.func.functional_call` puts others there) and no derivative is missing."""
        parameters, differentiable, steps = HELD.get().get(id(self), ((), False, None))
        usable = steps and all(map(operator.is_, parameters, self.parameters())) and differentiable >= asked(parameters)
        return steps if usable else self.fold()

    def run(self, function, folded, *variables):
        """function(folded, *variables): one step with one entry of `steps()` and tensors."""
        if transformed():
            return function(folded, *variables)
        if self.compile_kernels:
            function = compiled(function)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, folded, *variables, use_reentrant=False, preserve_rng_state=False)
        return function(folded, *variables)


def asked(parameters):
    """Whether a derivative by parameters is asked for now."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)


def transformed():
    """Whether a transform of torch.func is at work, as vmap or grad. It needs plain operations: no compiled kernels,
    recomputation, derivatives by hand or memory formats."""
    return torch._C._are_functorch_transforms_active()


@cache
def compiled(function):
    """`function` as compiled kernels, the same for any number of patches or images."""
    # Training, testing and a last batch of one image need kernels of their own, more than the 8 that torch allows.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # The same kernels for all levels: sizes of parameters vary too, and sizes that happen to be equal are not related.
    torch._dynamo.config.force_parameter_static_shapes = torch.fx.experimental._config.use_duck_shape = False
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch 2.11 advises it; --amp tf32 is the switch
    return torch.compile(function, dynamic=True)


def initial_weight(*shape, fan_in):
    """Uniform, of variance 2.81 / fan_in: 1 / 2.81 is the second moment of a swish of a standard normal variable."""
    bound = math.sqrt(2.81 * 3 / fan_in)
    return torch.empty(shape).uniform_(-bound, bound)
