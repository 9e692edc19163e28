"""Couplings of feature maps with residual convolutional networks, the layers of Real NVP (Dinh et al., ICLR 2017).

A network is a 3 x 3 convolution, residual blocks  x <- (x + f(x)) / sqrt(2)  with the pre-activated
f = conv . silu . … . conv . silu  of width `nhidden`, and a last silu and convolution that gives s and t side by side,
all with weight normalisation. As in RG-Flow's networks, the output is multiplied by a learnable scale that starts at 0,
so that an untrained coupling is the identity; then s goes through tanh, t does not.

B images, c channels, l x l positions. Kernels are stored with the input channels last, the layout of fast convolutions.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .networks import NORM_MIN, Networks, initial_weight, transformed


class ConvolutionalNetworks(Networks):
    """K residual networks, nin channels -> s and t of nout channels each, with parameters of their own."""

    def __init__(self, nsteps, nin, nout, nhidden, nresblocks, nmlp):
        widths = f"{nin} -> {nhidden} -> {2 * nout} channels"
        super().__init__(f"{nsteps} steps x {nresblocks} residual blocks of {nmlp} convolutions, {widths}")
        self.nmlp = nmlp
        shapes = [(1, nhidden, nin), (nresblocks * nmlp, nhidden, nhidden), (1, 2 * nout, nhidden)]
        self.weights, self.gains, self.biases = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for number, outputs, inputs in shapes:
            weight = initial_weight(nsteps, number, outputs, 3, 3, inputs, fan_in=9 * inputs)
            self.weights.append(weight)
            self.gains.append(norm_of(weight)[..., 0, 0, 0])
            self.biases.append(torch.zeros(nsteps, number, outputs))
        self.scale = nn.Parameter(torch.zeros(nsteps, 2 * nout))

    def fold(self):
        """The folded parameters for `evaluate`: a list over K steps of lists over stages of lists of (kernel, bias)."""
        last_of_block = torch.arange(self.weights[1].shape[1], device=self.scale.device) % self.nmlp == self.nmlp - 1
        factors = [1, 1 - (1 - math.sqrt(0.5)) * last_of_block.to(self.scale.dtype)[:, None], self.scale[:, None]]
        stages = []
        for weight, gain, bias, factor in zip(self.weights, self.gains, self.biases, factors, strict=True):
            kernels = weight * ((gain * factor)[..., None, None, None] / norm_of(weight))
            kernels = kernels.to(self.dtype or weight.dtype).permute(0, 1, 2, 5, 3, 4)  # (K, number, out, in, 3, 3)
            biases = (bias * factor).to(kernels.dtype)
            stages.append([list(zip(*pair, strict=True)) for pair in zip(kernels, biases, strict=True)])
        blocks = [[inner[k : k + self.nmlp] for k in range(0, len(inner), self.nmlp)] for inner in stages[1]]
        return [[first, *inner, last] for first, inner, last in zip(stages[0], blocks, stages[2], strict=True)]


def norm_of(weight):
    """The norm of each output feature's kernel: (…, out, 3, 3, in) -> (…, out, 1, 1, 1)."""
    return torch.linalg.vector_norm(weight, dim=(-3, -2, -1), keepdim=True).clamp_min(NORM_MIN)


def evaluate(folded, x):
    """s before tanh, and t, (B, nout, l, l) each, of a folded network at x (B, nin, l, l): computed in the type of the
    kernels, returned in that of x."""
    first, *blocks, last = folded
    layout = torch.preserve_format if transformed() else torch.channels_last
    y = F.conv2d(x.to(first[0][0].dtype, memory_format=layout), *first[0], padding=1)
    for block in blocks:
        f = y
        for layer in block:
            f = F.conv2d(F.silu(f), *layer, padding=1)
        y = torch.add(f, y, alpha=math.sqrt(0.5))  # 1 / sqrt(2) of f is in its kernels
    return F.conv2d(F.silu(y), *last[0], padding=1).to(x.dtype).chunk(2, 1)


class Couplings(nn.Module):
    """`nlayers` couplings of (B, c, l, l) maps in a row, which keep one half of the variables and the other in turn;
    the rest becomes x * exp(s(kept)) + t(kept). A subclass MUST define step(k, function, folded, x): x after coupling k
    by function, `couple` or `uncouple`, and the sum of s, (B,)."""

    def __init__(self, nfeatures, nlayers, nresblocks, nmlp, nhidden):
        super().__init__()
        self.networks = ConvolutionalNetworks(nlayers, nfeatures, nfeatures, nhidden, nresblocks, nmlp)

    def forward(self, x):
        """x: (B, c, l, l) -> y of the same shape, log_det (B,)."""
        return self.travel(x, couple, 1)

    def inverse(self, y):
        """y: (B, c, l, l) -> x of the same shape, log_det (B,) of this direction."""
        return self.travel(y, uncouple, -1)

    def travel(self, x, function, direction):
        log_det = x.new_zeros(len(x))
        for k, folded in [*enumerate(self.networks.steps())][::direction]:
            x, s = self.step(k, function, folded, x)
            log_det = log_det + s
        return x, direction * log_det


class CheckerboardCouplings(Couplings):
    """Couplings that keep the positions of even row + column, then of odd."""

    def step(self, k, function, folded, x):
        position = torch.arange(x.shape[2], device=x.device)
        kept = ((position[:, None] + position + k + 1) % 2).to(x.dtype)
        return self.networks.run(function, folded, x, x, kept)


class ChannelCouplings(Couplings):
    """Couplings that keep the first half of the channels, c even, then the second."""

    def __init__(self, nchannels, *sizes):
        super().__init__(nchannels // 2, *sizes)

    def step(self, k, function, folded, x):
        order = -1 if k % 2 else 1
        kept, moved = x.chunk(2, 1)[::order]
        moved, s = self.networks.run(function, folded, kept, moved)
        return torch.cat((kept, moved)[::order], 1), s


def couple(folded, kept, moved, mask=None):
    """moved * exp(s(kept)) + t(kept) and the sum of s, (B,); for `mask` see `conditioned`."""
    s, t = conditioned(folded, kept, mask)
    return torch.addcmul(t, moved, s.exp()), s.sum((1, 2, 3))


def uncouple(folded, kept, moved, mask=None):
    """The inverse of `couple`: (moved - t(kept)) * exp(-s(kept)) and the sum of s, (B,)."""
    s, t = conditioned(folded, kept, mask)
    return (moved - t) * (-s).exp(), s.sum((1, 2, 3))


def conditioned(folded, kept, mask):
    """s and t at `kept`; with a mask (l, l) at mask * kept, and 0 where the mask is 1."""
    s, t = evaluate(folded, kept if mask is None else kept * mask)
    return (s.tanh(), t) if mask is None else (s.tanh() * (1 - mask), t * (1 - mask))
