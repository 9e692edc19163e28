"""Real NVP, the baseline: the multi-scale architecture of Dinh, Sohl-Dickstein and Bengio (ICLR 2017).

Level h has c = 2^h C channels of edge l = L / 2^h. First come couplings that keep a checkerboard. Then each 2 x 2
square becomes 4 c channels (positions 0 1 above 2 3), and couplings keep half of the channels (0, 1 or 2, 3). Channels
1, 2 are the latents of level h; 0, 3, as 2 c channels of edge l / 2, go up to level h + 1. The last level, of edge
`kernel_size`, has checkerboard couplings only, and all its variables are latents: four levels h = 0 … 3 for L = 32
(figure C1).
"""

import torch
from torch import nn

from layers.convolution import ChannelCouplings, CheckerboardCouplings
from layers.coupling import join_diagonal, join_squares, split_diagonal, split_squares

from . import hierarchy
from .base import Flow, per_level


class RealNVP(Flow):
    """The flow on images (B, C, L, L) in model space, whose latents lie in an array of the same shape.

    Squares are put back where they came from, so that the level of latent (i, j) is the number of zeros at the end of
    the binary i xor j, at most h_L.

    nchannels, L: shape of an image; L / kernel_size must be a power of two
    kernel_size: edge of the last level, even
    nlayers: couplings of each of the two kinds at a level, one number or one per level
    nresblocks, nmlp: residual blocks per network, convolutions per residual block
    nhidden: channels inside the networks of the first couplings; twice as many after every squeeze
    prior: a name in `flow.prior.PRIORS`

    Raises ValueError for sizes that do not fit and unknown names; so do `forward` and `inverse` for another shape.
    """

    def __init__(
        self, nchannels=3, L=32, kernel_size=4, nlayers=(3, 3, 3, 4), nresblocks=4, nmlp=2, nhidden=64, prior="laplace"
    ):
        sizes = {"nresblocks": nresblocks, "nmlp": nmlp, "nhidden": nhidden}
        super().__init__(nchannels, L, kernel_size, level_map(L, kernel_size), prior, **sizes)
        nlayers = per_level(nlayers, self.num_levels)
        self.checkerboards = nn.ModuleList(
            CheckerboardCouplings(2**h * nchannels, n, nresblocks, nmlp, 2**h * nhidden) for h, n in enumerate(nlayers)
        )
        self.channels = nn.ModuleList(
            ChannelCouplings(2**h * 2 * nchannels, n, nresblocks, nmlp, 2**h * nhidden)
            for h, n in enumerate(nlayers[:-1], 1)
        )

    @staticmethod
    def default_nlayers(num_levels):
        """3 couplings of each kind, 4 at the last level."""
        return (3,) * (num_levels - 1) + (4,)

    def multiply_adds(self, inverse=False):
        """Multiply-adds of the convolutions for one image, in either direction: each position uses each weight once."""
        stages = [(self.L >> h, each) for h, each in enumerate(self.checkerboards)]
        stages += [(self.L >> h + 1, each) for h, each in enumerate(self.channels)]
        return sum(edge**2 * weight.numel() for edge, each in stages for weight in each.networks.weights)

    def forward(self, x):
        """x: (B, C, L, L) -> z of the same shape, log_det (B,)."""
        self.check_shape(x)
        x, log_det = self.checkerboards[0](x)
        factored_out = []
        for channels, checkerboards in zip(self.channels, self.checkerboards[1:], strict=True):
            x, change = channels(torch.cat(split_squares(x), 1))
            x, latents = split_diagonal(x.chunk(4, 1))
            factored_out.append(latents)
            x, more = checkerboards(x)
            log_det = log_det + change + more
        for latents in reversed(factored_out):
            x = join_squares(join_diagonal(x, latents))
        return x, log_det

    def inverse(self, z):
        """z: (B, C, L, L) -> x of the same shape, log_det (B,) of this direction."""
        self.check_shape(z)
        x, factored_out = z, []
        for _ in self.channels:
            x, latents = split_diagonal(split_squares(x))
            factored_out.append(latents)
        x, log_det = self.checkerboards[-1].inverse(x)
        for h in reversed(range(len(self.channels))):
            x, change = self.channels[h].inverse(torch.cat(join_diagonal(x, factored_out[h]), 1))
            x, more = self.checkerboards[h].inverse(join_squares(x.chunk(4, 1)))
            log_det = log_det + change + more
        return x, log_det


def level_map(L, kernel_size):
    """The level of each latent position: (L, L) integers."""
    position = torch.arange(L)
    different = position[:, None] ^ position
    levels = range(1, hierarchy.num_levels(L, kernel_size))
    return sum((different % 2**h == 0 for h in levels), torch.zeros_like(different))
