"""Residual networks that compute s and t of a coupling (Appendix A and figure A1, blue blocks).

One residual block is  x <- (x + f(x)) / sqrt(2)  with the pre-activated multilayer perceptron
f = linear . swish . linear . swish . … . linear . swish  (the rightmost acts first), swish(x) = x sigmoid(beta x) with
one learnable beta per feature, and weight normalisation on every linear layer. The output of the last block is
multiplied by a learnable scale that starts at 0, so that an untrained coupling is the identity.

`forward` says this in code. Flows compute the same in less time, see fold.py; the tests compare the two.

S networks, N patches, n features.
"""

import math
from itertools import pairwise

import torch
from torch import nn

from .fold import FoldedNetworks, masked
from .networks import NORM_MIN, initial_weight


class ResidualBlock(nn.Module):
    """One residual block n -> n, with `nmlp` hidden layers of width `nhidden`, of S networks.

    Linear layer k is  gain * (x V / |V|) + bias  with V = weight * mask (in, out) and |V| the norm of each column.
    `weights` holds one (S, in, out) per layer; `beta` (S, sum of in), `gain` and `bias` (S, sum of out) hold those of
    all layers side by side.

    masks: one (in, out) tensor of zeros and ones per linear layer, or None
    skip: whether x is added; without, the block is f(x) alone
    """

    def __init__(self, nnetworks, nfeatures, nhidden, nmlp, masks=None, skip=True):
        super().__init__()
        sizes = [nfeatures] + [nhidden] * nmlp + [nfeatures]
        self.skip = skip
        for k, mask in enumerate(masks or [None] * (nmlp + 1)):
            self.register_buffer(f"mask{k}", mask, persistent=False)
        self.weights = nn.ParameterList(initial_weight(nnetworks, *pair, fan_in=pair[0]) for pair in pairwise(sizes))
        norms = [torch.linalg.vector_norm(masked(*pair), dim=1) for pair in zip(self.weights, self.masks, strict=True)]
        self.beta = nn.Parameter(torch.ones(nnetworks, sum(sizes[:-1])))
        self.gain = nn.Parameter(torch.cat(norms, 1).detach())
        self.bias = nn.Parameter(torch.zeros(nnetworks, sum(sizes[1:])))

    @property
    def masks(self):
        return [getattr(self, f"mask{k}") for k in range(len(self.weights))]

    def forward(self, x):
        """(S, N, n) -> (S, N, n)."""
        ins, outs = zip(*(weight.shape[1:] for weight in self.weights), strict=True)
        betas, gains, biases = self.beta.split(ins, 1), self.gain.split(outs, 1), self.bias.split(outs, 1)
        f = x
        for k, (weight, mask) in enumerate(zip(self.weights, self.masks, strict=True)):
            beta, gain, bias = (each[k][:, None] for each in (betas, gains, biases))
            f = f * torch.sigmoid(beta * f)
            V = masked(weight, mask)
            norm = torch.linalg.vector_norm(V, dim=1, keepdim=True).clamp_min(NORM_MIN)
            f = gain * (f @ (V / norm)) + bias
        return (x + f) / math.sqrt(2) if self.skip else f


class ResidualNetworks(FoldedNetworks):
    """S = K G residual networks n -> n, each with its own parameters: G for each of the K steps of a bijector.

    masks, skips: per residual block, see `ResidualBlock`.
    """

    def __init__(self, nsteps, ngroups, nfeatures, nhidden, nresblocks, nmlp, masks=None, skips=None):
        sizes = " -> ".join(map(str, [nfeatures] + [nhidden] * nmlp + [nfeatures]))
        super().__init__(f"{nsteps} steps x {ngroups} networks of {nresblocks} residual blocks {sizes}")
        self.ngroups = ngroups
        self.blocks = nn.ModuleList(
            ResidualBlock(nsteps * ngroups, nfeatures, nhidden, nmlp, mask, skip)
            for mask, skip in zip(masks or [None] * nresblocks, skips or [True] * nresblocks, strict=True)
        )
        self.scale = nn.Parameter(torch.zeros(nsteps * ngroups, nfeatures))

    def forward(self, x):
        """The networks of all steps at x (N, n): (K, G, N, n)."""
        x = x.expand(len(self.scale), *x.shape)
        for block in self.blocks:
            x = block(x)
        return (self.scale[:, None] * x).unflatten(0, (-1, self.ngroups))
