"""RG-Flow (section 3.2, figures 2, 3): equations 3, 4 and 5; disentanglers are equation 6, decimators equation 7."""

from torch import nn

from layers import PATCH_BIJECTORS

from . import hierarchy
from .base import Flow, check_sizes, per_level


class RGFlow(Flow):
    """The hierarchical flow on images (B, C, L, L) in model space.

    Latents live in an array of the image's shape: (i, j) belongs to the level of the largest 2^h that divides both.

    nchannels, L: shape of an image; L / kernel_size must be a power of two
    kernel_size: edge m of a block, even
    nlayers: coupling blocks in each disentangler and in each decimator, one number or one per level
    nresblocks, nmlp, nhidden: residual blocks per network, hidden layers per residual block, their width
    subnet: the patch bijector, a name in `layers.PATCH_BIJECTORS`
    prior: a name in `flow.prior.PRIORS`
    share_levels: one disentangler and one decimator at all levels, a scale-invariant RG step (Appendix A)

    Raises ValueError for sizes that do not fit and unknown names.
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
        num_levels = hierarchy.num_levels(L, kernel_size)
        super().__init__(nchannels, L, hierarchy.level_map(L, kernel_size), num_levels, prior)
        self.kernel_size = kernel_size
        nlayers = per_level(nlayers, num_levels, share_levels)
        if subnet not in PATCH_BIJECTORS:
            raise ValueError(f"subnet {subnet!r}: must be one of {', '.join(PATCH_BIJECTORS)}")
        check_sizes(nchannels=nchannels, nresblocks=nresblocks, nmlp=nmlp, nhidden=nhidden)

        def stacks():
            build = PATCH_BIJECTORS[subnet]
            bijectors = [build(nchannels, kernel_size, n, nresblocks, nmlp, nhidden) for n in nlayers]
            return nn.ModuleList(bijectors)

        self.disentanglers = stacks()
        self.decimators = stacks()

    @staticmethod
    def default_nlayers(num_levels):
        """8,6,4,2, cut or continued with 2 to the number of levels."""
        return ((8, 6, 4, 2) + (2,) * num_levels)[:num_levels]

    def level(self, h):
        """Disentangler and decimator of level h."""
        h = min(h, len(self.decimators) - 1)
        return self.disentanglers[h], self.decimators[h]

    def level_parameters(self, h):
        """The parameters of level h, a list; with `share_levels` all are counted at h = 0."""
        if h >= len(self.decimators):
            return []
        return [parameter for bijector in self.level(h) for parameter in bijector.parameters()]

    def multiply_adds(self, inverse=False):
        """Multiply-adds of the networks' matrix products for one image, forward or inverse: every weight of a bijector
        is used once per patch, by each pass that the direction takes."""
        total = 0
        for h in range(self.num_levels):
            for bijector in self.level(h):
                weights = sum(parameter.numel() for parameter in bijector.parameters() if parameter.dim() == 3)
                passes = bijector.inverse_passes if inverse else 1
                total += (self.L // 2**h // self.kernel_size) ** 2 * passes * weights
        return total

    def extra_repr(self):
        image, block = f"{self.nchannels}x{self.L}x{self.L}", f"{self.kernel_size}x{self.kernel_size}"
        return f"{image} image, {self.num_levels} levels, {block} blocks"

    def forward(self, x):
        """x: (B, C, L, L) -> z of the same shape, log_det (B,). Raises ValueError for another shape."""
        self.check_shape(x)
        B, m = len(x), self.kernel_size
        log_det = x.new_zeros(B)
        outputs = []
        for h in range(self.num_levels):
            l = self.L >> h
            disentangler, decimator = self.level(h)
            for bijector, offset in ((disentangler, m // 2), (decimator, 0)):
                blocks, log_det_blocks = bijector(hierarchy.to_blocks(x, m, offset))
                x = hierarchy.from_blocks(blocks, l, offset)
                log_det = log_det + log_det_blocks.reshape(B, -1).sum(1)
            outputs.append(x)
            x = x[:, :, ::2, ::2]  # x^(h+1); the other three quarters are z^(h)
        z = outputs.pop()
        while outputs:
            coarse, z = z, outputs.pop().clone()
            z[:, :, ::2, ::2] = coarse
        return z, log_det

    def inverse(self, z):
        """z: (B, C, L, L) -> x and log_det (B,) of this direction. Raises ValueError for another shape."""
        self.check_shape(z)
        log_dets = []

        def layer(bijector, blocks):
            blocks, log_det = bijector.inverse(blocks)
            log_dets.append(log_det.reshape(len(z), -1).sum(1))
            return blocks

        *_, x = self.generate(z, layer)
        return x, sum(log_dets)

    def generate(self, z, layer):
        """From latents (B, C, L, L) down to the image: yields x^(h), (B, C, L / 2^h, L / 2^h), for h = h_L … 0.

        At each level the decimator acts, then the disentangler, by `layer(bijector, blocks)`, which gives what becomes
        of the blocks (N, C, m, m).
        """
        x, m = None, self.kernel_size
        for h in range(self.num_levels - 1, -1, -1):
            coarse, x = x, z[:, :, :: 2**h, :: 2**h]
            if coarse is not None:
                x = x.clone()
                x[:, :, ::2, ::2] = coarse
            disentangler, decimator = self.level(h)
            for bijector, offset in ((decimator, 0), (disentangler, m // 2)):
                blocks = layer(bijector, hierarchy.to_blocks(x, m, offset))
                x = hierarchy.from_blocks(blocks, self.L >> h, offset)
            yield x
