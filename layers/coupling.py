"""The RNVP block of the paper (Appendix A, equation A.1, red block) on m x m patches."""

import torch
from torch import nn

from .residual import ResidualNetworks


class RNVP(nn.Module):
    """`nlayers` RNVP blocks in a row, a bijector of patches.

    The checkerboard splits a patch into x1 (row + column even) and x2, C m^2 / 2 variables each, and every block maps

        x2' = x2 * exp(s1(x1)) + t1(x1),    x1' = x1 * exp(s2(x2')) + t2(x2')

    with s = tanh(...) bounded and t free, four residual networks with parameters of their own.
    """

    def __init__(self, nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden):
        super().__init__()
        half = nchannels * kernel_size**2 // 2
        self.networks = ResidualNetworks(2 * nlayers, 2, half, nhidden, nresblocks, nmlp)

    def forward(self, x):
        """x: (N, C, m, m) -> y of the same shape, log_det (N,)."""
        shape = x.shape
        kept, moved = split_checkerboard(x)
        log_scale = 0
        for networks in self.networks.steps():
            s, t = scale_and_shift(networks, kept)
            kept, moved = torch.addcmul(t, moved, s.exp()), kept
            log_scale = log_scale + s
        return join_checkerboard(kept, moved, shape), log_scale.sum(1)

    def inverse(self, y):
        """y: (N, C, m, m) -> x of the same shape, log_det (N,) of this direction."""
        shape = y.shape
        kept, moved = split_checkerboard(y)
        log_scale = 0
        for networks in reversed(self.networks.steps()):
            s, t = scale_and_shift(networks, moved)
            kept, moved = moved, (kept - t) * (-s).exp()
            log_scale = log_scale - s
        return join_checkerboard(kept, moved, shape), log_scale.sum(1)


def scale_and_shift(networks, x):
    """s and t, each (N, n), from two networks side by side at x (N, n)."""
    s, t = networks(x).unbind(0)
    return s.tanh(), t


def split_checkerboard(x):
    """x: (N, C, m, m) -> the entries with even and those with odd row + column, (N, C m^2 / 2) each."""
    N, C, m, _ = x.shape
    x = x.reshape(N, C, m // 2, 2, m // 2, 2)
    even = torch.stack((x[:, :, :, 0, :, 0], x[:, :, :, 1, :, 1]), 1)  # (N, 2, C, m/2, m/2)
    odd = torch.stack((x[:, :, :, 0, :, 1], x[:, :, :, 1, :, 0]), 1)
    return even.flatten(1), odd.flatten(1)


def join_checkerboard(even, odd, shape):
    """The inverse of `split_checkerboard`; shape: (N, C, m, m)."""
    N, C, m, _ = shape
    even = even.reshape(N, 2, C, m // 2, m // 2)
    odd = odd.reshape(N, 2, C, m // 2, m // 2)
    upper = torch.stack((even[:, 0], odd[:, 0]), 4)  # (N, C, m/2, m/2, 2), rows 0, 2, …
    lower = torch.stack((odd[:, 1], even[:, 1]), 4)
    return torch.stack((upper, lower), 3).reshape(shape)  # (N, C, m/2, 2, m/2, 2) -> (N, C, m, m)
