"""Real NVP, the baseline: the multi-scale architecture of Dinh, Sohl-Dickstein and Bengio (ICLR 2017).

Scale h has c = 2^h C channels of edge l = L / 2^h. The variables pass couplings that keep a checkerboard, are squeezed
(each 2 x 2 square becomes 4 c channels: positions 0 1 above 2 3), and pass couplings that keep half of the channels (0,
1 or 2, 3). Then 1, 2 are the latents of level h; 0, 3, as 2 c channels of edge l / 2, go on to scale h + 1. The last
scale, of edge `kernel_size`, has checkerboard couplings only, and all its variables are latents: four levels h = 0 … 3
for L = 32 (figure C1).
"""

import torch
from torch import nn

from layers.convolution import ChannelCouplings, CheckerboardCouplings

from . import hierarchy
from .base import Flow, per_level


class RealNVP(Flow):
    """The flow on images (B, C, L, L) in model space, whose latents lie in an array of the same shape.

    Squares are put back where they came from, so that the level of latent (i, j) is the number of zeros at the end of
    the binary i xor j, at most h_L.

    nchannels, L: shape of an image; L / kernel_size must be a power of two
    kernel_size: edge of the last scale, even
    nlayers: couplings of each of the two kinds at a scale, one number or one per scale
    nresblocks, nmlp: residual blocks per network, convolutions per residual block
    nhidden: channels inside the networks of the first couplings; twice as many after every squeeze
    prior: a name in `flow.prior.PRIORS`

    Raises ValueError for sizes that do not fit and unknown names; so do `forward` and `inverse` for another shape.
    """

    def __init__(
        self, nchannels=3, L=32, kernel_size=4, nlayers=(3, 3, 3, 4), nresblocks=4, nmlp=2, nhidden=64, prior="laplace"
    ):
        num_levels = hierarchy.num_levels(L, kernel_size)
        sizes = {"nresblocks": nresblocks, "nmlp": nmlp, "nhidden": nhidden}
        super().__init__(nchannels, L, level_map(L, num_levels), num_levels, prior, **sizes)
        nlayers = per_level(nlayers, num_levels)

        def couplings(kind, h, channels, width):
            return kind(2**h * channels, nlayers[h], nresblocks, nmlp, 2**h * width)

        levels = range(num_levels)
        self.checkerboards = nn.ModuleList(couplings(CheckerboardCouplings, h, nchannels, nhidden) for h in levels)
        self.channels = nn.ModuleList(couplings(ChannelCouplings, h, 4 * nchannels, 2 * nhidden) for h in levels[:-1])

    @staticmethod
    def default_nlayers(num_levels):
        """3 couplings of each kind, 4 at the last scale."""
        return (3,) * (num_levels - 1) + (4,)

    def layers(self):
        """No layers of patches."""
        return []

    def level_parameters(self, h):
        """The parameters of scale h, a list."""
        return [*self.checkerboards[h].parameters(), *self.channels[h : h + 1].parameters()]

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
            x, change = channels(squeeze(x))
            x, latents = factor_out(x)
            factored_out.append(latents)
            x, more = checkerboards(x)
            log_det = log_det + change + more
        for latents in reversed(factored_out):
            x = unsqueeze(factor_in(x, latents))
        return x, log_det

    def inverse(self, z):
        """z: (B, C, L, L) -> x of the same shape, log_det (B,) of this direction."""
        self.check_shape(z)
        x, factored_out = z, []
        for _ in self.channels:
            x, latents = factor_out(squeeze(x))
            factored_out.append(latents)
        x, log_det = self.checkerboards[-1].inverse(x)
        for h in reversed(range(len(self.channels))):
            x, change = self.channels[h].inverse(factor_in(x, factored_out[h]))
            x, more = self.checkerboards[h].inverse(unsqueeze(x))
            log_det = log_det + change + more
        return x, log_det


def level_map(L, num_levels):
    """The level of each latent position: (L, L) integers."""
    position = torch.arange(L)
    different = position[:, None] ^ position
    return sum((different % 2**h == 0 for h in range(1, num_levels)), torch.zeros_like(different))


def squeeze(x):
    """(B, c, l, l) -> (B, 4 c, l / 2, l / 2): upper left positions, upper right, lower left, lower right."""
    B, c, l, _ = x.shape
    return x.reshape(B, c, l // 2, 2, l // 2, 2).permute(0, 3, 5, 1, 2, 4).flatten(1, 3)  # of (B, 2, 2, c, l/2, l/2)


def unsqueeze(x):
    """The inverse of `squeeze`."""
    x = x.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2)  # (B, c/4, l, 2, l, 2)
    return x.flatten(4, 5).flatten(2, 3)


def factor_out(x):
    """Squeezed (B, 4 c, l, l) -> the diagonal of the squares, which goes on, and the rest, (B, 2 c, l, l) each."""
    upper_left, upper_right, lower_left, lower_right = x.chunk(4, 1)
    return torch.cat((upper_left, lower_right), 1), torch.cat((upper_right, lower_left), 1)


def factor_in(kept, latents):
    """The inverse of `factor_out`."""
    (upper_left, lower_right), (upper_right, lower_left) = kept.chunk(2, 1), latents.chunk(2, 1)
    return torch.cat((upper_left, upper_right, lower_left, lower_right), 1)
