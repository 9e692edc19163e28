"""The base class of all flows on images: a bijector and a prior (section 3.1, equations 1 and 2)."""

import math

import torch
from torch import nn

from layers.fold import folded_together
from layers.networks import Networks

from .hierarchy import num_levels
from .prior import PRIORS


class Flow(nn.Module):
    """Base class. Images x and latents z are arrays (B, C, L, L); x is in model space (see `flow.preprocess`).

    A subclass MUST define
        forward(x) -> z, log_det     log |det dz/dx|, (B,), the second term of equation 1
        inverse(z) -> x, log_det     the exact inverse; log |det dx/dz|, (B,), which equation 2 subtracts
        multiply_adds(inverse)       multiply-adds of the networks for one image, in one direction
        default_nlayers(num_levels)  the default of `nlayers`
    and keep its modules in lists, one per level, or one for all levels.

    level_map: (L, L) integers in 0 … num_levels - 1, the level of each latent position. All other code finds the level
    of a latent in the buffer of that name, (C, L, L).
    """

    def __init__(self, nchannels, L, kernel_size, level_map, prior, **sizes):
        """Raises ValueError for an unknown prior, and unless all sizes are at least 1."""
        super().__init__()
        for name, size in {"nchannels": nchannels, **sizes}.items():
            if size < 1:
                raise ValueError(f"{name} {size}: must be at least 1")
        if prior not in PRIORS:
            raise ValueError(f"prior {prior!r}: must be one of {', '.join(PRIORS)}")
        self.nchannels, self.L, self.kernel_size = nchannels, L, kernel_size
        self.num_levels, self.prior = num_levels(L, kernel_size), PRIORS[prior]()
        self.register_buffer("level_map", level_map.expand(nchannels, L, L).clone(), persistent=False)

    def layers(self):
        """The layers that act on patches, see `RGFlow.layers`; without such, an empty list."""
        return []

    def level_parameters(self, h):
        """The parameters of level h, a list; those for all levels count at h = 0."""
        return [parameter for modules in self.children() for parameter in modules[h : h + 1].parameters()]

    def accelerate(self, *args, **kwargs):
        """Set how the networks run, with the arguments of `Networks.accelerate`."""
        for module in self.modules():
            if isinstance(module, Networks):
                module.accelerate(*args, **kwargs)

    def extra_repr(self):
        return f"{self.nchannels}x{self.L}x{self.L} image, {self.num_levels} levels, kernel_size {self.kernel_size}"

    def check_shape(self, images):
        """Raises ValueError unless `images` are (B, C, L, L) with the flow's C and L."""
        if images.dim() != 4 or images.shape[1:] != self.level_map.shape:
            raise ValueError(f"shape {tuple(images.shape)}: must be (B, {self.nchannels}, {self.L}, {self.L})")

    def log_prob(self, x):
        """log p(x), nats: (B, C, L, L) -> (B,), by equation 1 with the factorised prior of equations 10 and D.1. The
        mean of -log p(x) over the data is the loss of equations 11 and 12, a KL divergence plus a constant."""
        with folded_together(self):
            z, log_det = self(x)
        return self.prior.log_prob(z).sum((1, 2, 3)) + log_det

    def sample_prior(self, n, temperature=1.0, generator=None):
        """n draws of the latents, (n, C, L, L); temperature, generator: see `sample`."""
        z = next(self.parameters()).new_empty(n, *self.level_map.shape)
        return self.prior.sample(z, self.temperature_map(temperature).to(z.dtype), generator)

    @torch.no_grad()
    def sample(self, n, temperature=1.0, generator=None):
        """n images in model space: (n, C, L, L).

        temperature: T of Appendix D, a number, a sequence with one number per level (index 0 is h = 0), or a tensor
            that broadcasts to (C, L, L)
        generator: a torch.Generator on the flow's device, None for the global one
        Raises ValueError if a temperature is negative or not finite, or if their number is wrong.
        """
        with folded_together(self):
            return self.inverse(self.sample_prior(n, temperature, generator))[0]

    @torch.no_grad()
    def first_nonfinite_level(self, x):
        """The level where numbers stop being finite for images x (B, C, L, L) in model space, None if all are finite.
        The lowest level with a latent or a prior density that is not finite. Without one, the highest level with a
        gradient whose norm is not finite: backpropagation reaches that level first."""
        z, _ = self(x)
        bad = ~(z.isfinite() & self.prior.log_prob(z).isfinite()).all(0)
        if bad.any():
            return int(self.level_map[bad].min())
        for h in reversed(range(self.num_levels)):
            gradients = (parameter.grad for parameter in self.level_parameters(h))
            if not all(gradient is None or gradient.norm().isfinite() for gradient in gradients):
                return h

    def temperature_map(self, temperature):
        """The temperature T_l of each latent, a tensor that broadcasts to (C, L, L). The factors of the prior (equation
        D.1) become p(z_l)^(1 / T_l), up to a constant (equation D.4)."""
        values = torch.as_tensor(temperature, dtype=torch.float64, device=self.level_map.device)
        if isinstance(temperature, (list, tuple)):
            if len(values) != self.num_levels:
                given = ",".join(map(str, temperature))
                raise ValueError(f"temperature {given}: must be one number or {self.num_levels}, one per level")
            values = values[self.level_map]
        bad = values[~((values >= 0) & (values < math.inf))]
        if len(bad):
            raise ValueError(f"temperature {bad[0].item():g}: must be finite and at least 0")
        return values


def per_level(nlayers, num_levels, share_levels=False):
    """`nlayers` as a tuple, one entry per level or a single one with `share_levels`. Raises ValueError if it is not."""
    length = 1 if share_levels else num_levels
    nlayers = (nlayers,) * length if isinstance(nlayers, int) else tuple(nlayers)
    rule = "one number with share_levels" if share_levels else f"one number or {num_levels}, one per level"
    if len(nlayers) != length or min(nlayers) < 1:
        raise ValueError(f"nlayers {','.join(map(str, nlayers))}: must be {rule}, and at least 1")
    return nlayers
