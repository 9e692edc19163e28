"""Masked autoregressive affine blocks on m x m patches (`--subnet ar`). An inverse evaluates the networks of a block
C m^2 times, one after the other: a sample costs as much as about 48 forward passes for C = 3, m = 4."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from .coupling import couple, uncouple
from .residual import ResidualNetworks


class Autoregressive(nn.Module):
    """`nlayers` autoregressive blocks in a row, a bijector of patches.

    With the D = C m^2 variables of a patch in an order, every block maps

        z_i = x_i * exp(s_i(x_<i)) + t_i(x_<i),    s = tanh(...), t free,

    two masked residual networks D -> D. Successive blocks alternate between the order of the flattened (C, m, m) patch
    and its reverse, so that every variable meets every other one after two blocks, provided that nhidden >= D.
    """

    def __init__(self, nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden):
        super().__init__()
        self.size = self.inverse_passes = nchannels * kernel_size**2
        # After the first residual block, strictly masked and without skip, entry i depends on x_<i; the rest keep that.
        masks = [autoregressive_masks(self.size, nhidden, nmlp, strict=block == 0) for block in range(nresblocks)]
        skips = [block > 0 for block in range(nresblocks)]
        self.reversed = [1] * (nlayers % 2)  # the axis that an odd number of blocks leaves reversed
        self.networks = ResidualNetworks(nlayers, 2, self.size, nhidden, nresblocks, nmlp, masks, skips)

    def forward(self, x):
        """x: (N, C, m, m) -> z of the same shape, log_det (N,)."""
        shape, x, log_det = x.shape, x.flatten(1), 0
        for folded in self.networks.steps():
            x, s = self.networks.run(couple, folded, x, x)
            x = x.flip(1)  # the next block sees the reverse order
            log_det = log_det + s.sum(1)
        return x.flip(self.reversed).reshape(shape), log_det

    def inverse(self, z):
        """z: (N, C, m, m) -> x of the same shape, log_det (N,) of this direction."""
        shape, z, log_det = z.shape, z.flatten(1).flip(self.reversed), 0
        for folded in reversed(self.networks.steps()):
            z = z.flip(1)
            x = torch.zeros_like(z)
            for i in range(self.size):  # after pass i entries 0 … i of x are right, the others 0
                x, s = self.networks.run(uncouple, folded, x, z)
                x = F.pad(x[:, : i + 1], (0, self.size - i - 1))
            log_det = log_det - s.sum(1)
            z = x
        return z.reshape(shape), log_det


def autoregressive_masks(size, nhidden, nmlp, strict):
    """Masks of a multilayer perceptron whose output i depends on inputs j <= i (j < i if strict): one (in, out) tensor
    of zeros and ones per linear layer. Hidden units see the inputs up to a degree of their own, spread over all."""
    outer, hidden = torch.arange(size), torch.arange(nhidden) * size // nhidden
    degrees = [outer] + [hidden] * nmlp + [outer]
    masks = [after[None, :] >= before[:, None] for before, after in pairwise(degrees)]
    if strict:
        masks[-1] = degrees[-1][None, :] > degrees[-2][:, None]
    return [mask.to(torch.get_default_dtype()) for mask in masks]
