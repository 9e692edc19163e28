"""The RNVP block of the paper (Appendix A, equation A.1, red block) on m x m patches.

The checkerboard splits a patch into the halves x1 (row + column even) and x2, n = C m^2 / 2 variables each.
"""

import torch
from torch import nn

from .fold import evaluate
from .residual import ResidualNetworks


def couple(folded, x, moved):
    """moved * exp(s(x)) + t(x) and s(x), all (N, n)."""
    s, t = evaluate(folded, x).unbind(0)
    s = s.tanh()
    return torch.addcmul(t, moved, s.exp()), s


def uncouple(folded, x, moved):
    """The inverse of `couple`: (moved - t(x)) * exp(-s(x)) and s(x)."""
    s, t = evaluate(folded, x).unbind(0)
    s = s.tanh()
    return (moved - t) * (-s).exp(), s


class RNVP(nn.Module):
    """`nlayers` RNVP blocks in a row, a bijector of patches.

    Every block maps, by two couplings,

        x2' = x2 * exp(s1(x1)) + t1(x1),    x1' = x1 * exp(s2(x2')) + t2(x2')

    with s = tanh(...) bounded and t free, four residual networks with parameters of their own. A subclass with `couple`
    and `uncouple` of its own is another coupling: they map single entries, given the networks, and give for each the
    logarithm of the derivative of `couple`.
    """

    inverse_passes = 1
    nnetworks = 2  # of a coupling
    couple, uncouple = staticmethod(couple), staticmethod(uncouple)

    def __init__(self, nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden):
        super().__init__()
        half = nchannels * kernel_size**2 // 2
        self.networks = ResidualNetworks(2 * nlayers, self.nnetworks, half, nhidden, nresblocks, nmlp)

    def forward(self, x):
        """x: (N, C, m, m) -> y of the same shape, log_det (N,)."""
        return on_halves([self.couple_halves], x)

    def inverse(self, y):
        """y: (N, C, m, m) -> x of the same shape, log_det (N,) of this direction."""
        return on_halves([self.uncouple_halves], y)

    def steps(self):
        """What `couple` needs of the parameters, a list over couplings."""
        return self.networks.steps()

    def couple_halves(self, x1, x2):
        """y1, y2 and the logarithms of the derivatives of single entries, (N, n) all."""
        kept, moved, log_scale = x1, x2, 0
        for step in self.steps():
            (kept, s), moved = self.networks.run(self.couple, step, kept, moved), kept
            log_scale = log_scale + s
        return kept, moved, log_scale

    def uncouple_halves(self, y1, y2):
        """The inverse of `couple_halves`: x1, x2 and the logarithms of its own derivatives."""
        kept, moved, log_scale = y1, y2, 0
        for step in reversed(self.steps()):
            kept, (moved, s) = moved, self.networks.run(self.uncouple, step, moved, kept)
            log_scale = log_scale - s
        return kept, moved, log_scale


def on_halves(functions, x):
    """Apply methods such as `couple_halves` one after the other to x (N, C, m, m): the result joined, log_det (N,)."""
    even, odd = split_checkerboard(x)
    log_scale = 0
    for function in functions:
        even, odd, change = function(even, odd)
        log_scale = log_scale + change
    return join_checkerboard(even, odd, x.shape), log_scale.sum(1)


def split_checkerboard(x):
    """x: (N, C, m, m) -> the entries with even and those with odd row + column, (N, C m^2 / 2) each."""
    N, C, m, _ = x.shape
    upper, lower = x.reshape(N, C, m // 2, 2, m // 2, 2).unbind(3)  # rows 0, 2, … and rows 1, 3, …
    (even0, odd0), (odd1, even1) = upper.unbind(-1), lower.unbind(-1)
    return torch.stack((even0, even1), 1).flatten(1), torch.stack((odd0, odd1), 1).flatten(1)


def join_checkerboard(even, odd, shape):
    """The inverse of `split_checkerboard`; shape: (N, C, m, m)."""
    N, C, m, _ = shape
    (even0, even1), (odd0, odd1) = (half.reshape(N, 2, C, m // 2, m // 2).unbind(1) for half in (even, odd))
    upper, lower = torch.stack((even0, odd0), 4), torch.stack((odd1, even1), 4)  # (N, C, m/2, m/2, 2)
    return torch.stack((upper, lower), 3).reshape(shape)  # (N, C, m/2, 2, m/2, 2) -> (N, C, m, m)
