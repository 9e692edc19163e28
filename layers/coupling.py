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
        return travel([self], x)

    def inverse(self, y):
        """y: (N, C, m, m) -> x of the same shape, log_det (N,) of this direction."""
        return travel([self], y, -1)

    def steps(self):
        """What `couple` needs of the parameters, a list over couplings."""
        return self.networks.steps()


def travel(blocks, x, direction=1):
    """Pass x (N, C, m, m) through all couplings of `RNVP` modules in a row, or undo them with direction -1: the result,
    log_det (N,)."""
    kept, moved = split_checkerboard(x)[::direction]
    log_scale = 0
    for block in blocks[::direction]:
        function, change = block.couple if direction > 0 else block.uncouple, 0
        for step in block.steps()[::direction]:
            (kept, s), moved = block.networks.run(function, step, kept, moved), kept
            change = change + s
        log_scale = log_scale + change
    log_det = log_scale.sum(1)
    return join_checkerboard(*(kept, moved)[::direction], x.shape), log_det if direction > 0 else -log_det


def split_checkerboard(x):
    """x: (N, C, m, m) -> the entries with even and those with odd row + column, (N, C m^2 / 2) each."""
    return [half.flatten(1) for half in split_diagonal(split_squares(x))]


def join_checkerboard(even, odd, shape):
    """The inverse of `split_checkerboard`; shape: (N, C, m, m)."""
    halves = (half.unflatten(1, (-1, shape[2] // 2, shape[3] // 2)) for half in (even, odd))
    return join_squares(join_diagonal(*halves))


def split_squares(x):
    """x: (B, c, l, l) -> the upper left, upper right, lower left and lower right entries of its 2 x 2 squares, each
    (B, c, l / 2, l / 2)."""
    B, c, l, _ = x.shape
    upper, lower = x.reshape(B, c, l // 2, 2, l // 2, 2).unbind(3)
    return *upper.unbind(-1), *lower.unbind(-1)


def join_squares(quarters):
    """The inverse of `split_squares`."""
    upper, lower = torch.stack(quarters[:2], 4), torch.stack(quarters[2:], 4)  # (B, c, l/2, l/2, 2)
    return torch.stack((upper, lower), 3).flatten(4, 5).flatten(2, 3)  # (B, c, l/2, 2, l/2, 2) -> (B, c, l, l)


def split_diagonal(quarters):
    """What `split_squares` gives -> upper left and lower right, upper right and lower left, (B, 2 c, l / 2, l / 2)."""
    upper_left, upper_right, lower_left, lower_right = quarters
    return torch.cat((upper_left, lower_right), 1), torch.cat((upper_right, lower_left), 1)


def join_diagonal(diagonal, rest):
    """The inverse of `split_diagonal`."""
    (upper_left, lower_right), (upper_right, lower_left) = diagonal.chunk(2, 1), rest.chunk(2, 1)
    return upper_left, upper_right, lower_left, lower_right
