"""RG-Flow (section 3.2, figures 2, 3): equations 3, 4 and 5; disentanglers are equation 6, decimators equation 7."""

from functools import partial, reduce

from torch import nn

from layers import PATCH_BIJECTORS

from . import hierarchy
from .base import Flow, per_level


class RGFlow(Flow):
    """The flow on images (B, C, L, L) in model space.

    Latents live in an array of the image's shape: (i, j) belongs to the level of the largest 2^h that divides both.

    nchannels, L: shape of an image; L / kernel_size must be a power of two
    kernel_size: edge m of a block, even
    nlayers: coupling blocks in each disentangler and in each decimator, one number or one per level
    nresblocks, nmlp, nhidden: residual blocks per network, hidden layers per residual block, their width
    subnet: the patch bijector, a name in `layers.PATCH_BIJECTORS`
    prior: a name in `flow.prior.PRIORS`
    share_levels: one disentangler and one decimator at all levels, a scale-invariant RG step (Appendix A)

    Raises ValueError for sizes that do not fit and unknown names; so do `forward` and `inverse` for another shape.
    """

    def __init__(
        self,
        nchannels=3,
        L=32,
        kernel_size=4,
        nlayers=(8, 6, 4, 2),
        nresblocks=4,
        nmlp=2,
        nhidden=512,
        subnet="rnvp",
        prior="laplace",
        share_levels=False,
    ):
        sizes = {"nresblocks": nresblocks, "nmlp": nmlp, "nhidden": nhidden}
        super().__init__(nchannels, L, kernel_size, hierarchy.level_map(L, kernel_size), prior, **sizes)
        nlayers = per_level(nlayers, self.num_levels, share_levels)
        if subnet not in PATCH_BIJECTORS:
            raise ValueError(f"subnet {subnet!r}: must be one of {', '.join(PATCH_BIJECTORS)}")
        build = partial(PATCH_BIJECTORS[subnet], nchannels, kernel_size, **sizes)
        self.disentanglers, self.decimators = (nn.ModuleList(build(nlayers=n) for n in nlayers) for _ in range(2))

    @staticmethod
    def default_nlayers(num_levels):
        """8,6,4,2, cut or continued with 2 to the number of levels."""
        return ((8, 6, 4, 2) + (2,) * num_levels)[:num_levels]

    def layers(self):
        """The layers on the way up: (bijector, edge L / 2^h of the square it acts on, offset of its blocks), a list."""
        stacks = (self.disentanglers, self.kernel_size // 2), (self.decimators, 0)
        last = len(self.decimators) - 1  # 0 with `share_levels`
        return [(stack[min(h, last)], self.L >> h, offset) for h in range(self.num_levels) for stack, offset in stacks]

    def multiply_adds(self, inverse=False):
        """Multiply-adds of the networks' matrix products for one image: each pass uses each weight once per patch."""
        total, m = 0, self.kernel_size
        for bijector, l, _ in self.layers():
            weights = sum(parameter.numel() for parameter in bijector.parameters() if parameter.dim() == 3)
            total += (l // m) ** 2 * (bijector.inverse_passes if inverse else 1) * weights
        return total

    def forward(self, x):
        """The RG transformation, equation 3 level by level: x (B, C, L, L) -> z of the same shape, log_det (B,)."""
        self.check_shape(x)
        log_det, outputs = x.new_zeros(len(x)), []
        for bijector, l, offset in self.layers():
            blocks, log_det_blocks = bijector(hierarchy.to_blocks(x, self.kernel_size, offset))
            x = hierarchy.from_blocks(blocks, l, offset)
            log_det = log_det + log_det_blocks.unflatten(0, (len(x), (l // self.kernel_size) ** 2)).sum(1)
            if offset == 0:  # after the decimator
                outputs.append(x)
                x = x[:, :, ::2, ::2]  # x^(h+1); the other three quarters are z^(h)
        return reduce(with_coarse, reversed(outputs)), log_det

    def inverse(self, z):
        """The generator, equation 5: z (B, C, L, L) -> x of the same shape, log_det (B,) of this direction."""
        self.check_shape(z)
        log_dets = []

        def layer(bijector, blocks):
            blocks, log_det = bijector.inverse(blocks)
            log_dets.append(log_det.unflatten(0, (len(z), len(log_det) // max(1, len(z)))).sum(1))
            return blocks

        *_, x = self.generate(z, layer)
        return x, sum(log_dets)

    def generate(self, z, layer):
        """Equation 4 level by level: latents (B, C, L, L) -> x^(h) (B, C, L / 2^h, L / 2^h), yielded for h = h_L … 0.

        layer(bijector, blocks): called for each layer, returns what becomes of its blocks (N, C, m, m)
        """
        x = z[:, :, :: 2**self.num_levels, :: 2**self.num_levels]
        for bijector, l, offset in reversed(self.layers()):
            if offset == 0:  # before the decimator
                x = with_coarse(x, z[:, :, :: self.L // l, :: self.L // l])
            x = hierarchy.from_blocks(layer(bijector, hierarchy.to_blocks(x, self.kernel_size, offset)), l, offset)
            if offset:
                yield x


def with_coarse(coarse, z):
    """z (B, C, l, l) with x^(h+1), (B, C, l / 2, l / 2), on the even rows and columns."""
    return z.slice_scatter(z[:, :, ::2].slice_scatter(coarse, 3, step=2), 2, step=2)
