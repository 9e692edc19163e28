"""Blocks with curves behind learned linear maps of the whole patch (`--subnet spline_lu`).

All couplings of `spline.py` have the same two halves, and none moves an entry of a half by another entry of that half,
such as the colours of a pixel by each other. A linear map before each block mixes the halves. It is kept as the product
of two triangular matrices, as in Kingma and Dhariwal, Glow, NeurIPS 2018, section 3.2, where it is a 1 x 1 convolution.
"""

import torch
from torch import nn

from .coupling import RNVP
from .spline import Bent

# Parameters are entries divided by this, so that a step of the optimiser changes the maps less than other parameters.
RATE = 0.1


class Linear(nn.Module):
    """The map x -> x L U of flattened patches; L is lower triangular with ones on its diagonal, U is upper triangular
    with a positive diagonal. All parameters are in one matrix, zero for the identity, whose diagonal is log diag U."""

    def __init__(self, size):
        super().__init__()
        self.entries = nn.Parameter(torch.zeros(1, size, size))  # `RGFlow.multiply_adds` counts three dimensions

    def factors(self):
        """L, U, both (D, D), and the log-determinant of their product."""
        entries = RATE * self.entries[0]
        diagonal = entries.diagonal()
        upper = entries.triu(1) + diagonal.exp().diag_embed()
        return entries.tril(-1) + torch.eye(len(entries), dtype=upper.dtype, device=upper.device), upper, diagonal.sum()

    def forward(self, x):
        """x: (N, C, m, m) -> y of the same shape, log_det (N,)."""
        lower, upper, log_det = self.factors()
        return (x.flatten(1) @ (lower @ upper)).view_as(x), log_det.expand(len(x))

    def inverse(self, y):
        """y: (N, C, m, m) -> x of the same shape, log_det (N,) of this direction."""
        lower, upper, log_det = self.factors()
        x = torch.linalg.solve_triangular(upper, y.flatten(1), upper=True, left=False)
        x = torch.linalg.solve_triangular(lower, x, upper=False, left=False, unitriangular=True)
        return x.view_as(y), -log_det.expand(len(y))


class SplineLU(nn.Module):
    """`nlayers` times a linear map and a block, a bijector of patches: the first block is `Bent`, the others `RNVP`."""

    inverse_passes = 1

    def __init__(self, nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden):
        super().__init__()
        self.layers = nn.ModuleList()
        for k in range(nlayers):
            block = RNVP if k else Bent
            self.layers.append(Linear(nchannels * kernel_size**2))
            self.layers.append(block(nchannels, kernel_size, 1, nresblocks, nmlp, nhidden))

    def forward(self, x):
        """x: (N, C, m, m) -> y of the same shape, log_det (N,)."""
        total = 0
        for layer in self.layers:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def inverse(self, y):
        """y: (N, C, m, m) -> x of the same shape, log_det (N,) of this direction."""
        total = 0
        for layer in reversed(self.layers):
            y, log_det = layer.inverse(y)
            total = total + log_det
        return y, total
