"""What every flow on images offers: a bijector joined with a prior (section 3.1, equations 1 and 2)."""

import math

import torch
from torch import nn

from layers.networks import Networks

from .prior import PRIORS


class Flow(nn.Module):
    """Base class. Images x and latents z are arrays (B, C, L, L); x is in model space (see `flow.preprocess`).

    A subclass MUST define, for one bijection and its exact inverse,
        forward(x) -> z, log_det     log |det dz/dx|, (B,)
        inverse(z) -> x, log_det     log |det dx/dz|, (B,): the log-determinant is that of the direction just travelled
        layers()                     the layers that act on patches, see `RGFlow.layers`; an empty list without such
        level_parameters(h)          the parameters of level h, a list; those of shared levels count at h = 0
        multiply_adds(inverse)       those of the networks for one image, in one direction
        default_nlayers(num_levels)  `nlayers` where none is given

    level_map: (L, L) integers in 0 … num_levels - 1, the level of each latent position; kept as a buffer (C, L, L).
    Whoever needs the level of a latent looks there.
    """

    def __init__(self, nchannels, L, level_map, num_levels, prior):
        super().__init__()
        if prior not in PRIORS:
            raise ValueError(f"prior {prior!r}: must be one of {', '.join(PRIORS)}")
        self.num_levels = num_levels
        self.nchannels = nchannels
        self.L = L
        self.prior = PRIORS[prior]()
        self.register_buffer("level_map", level_map.expand(nchannels, L, L).clone(), persistent=False)

    def accelerate(self, compile=False, dtype=None, recompute=False):
        """Set how the networks run; what is computed, and what a checkpoint holds, stays the same but for rounding.

        compile: run networks and couplings, and of RG-Flow the folding of parameters, as kernels of torch.compile
        dtype: type of the networks' matrix products, such as torch.bfloat16; couplings, log-determinants, prior and
            parameters keep theirs
        recompute: keep only the variables between coupling layers for the backward pass and compute the rest again
        """
        for module in self.modules():
            if isinstance(module, Networks):
                module.accelerate(compile, dtype, recompute)

    def check_shape(self, images):
        """Raises ValueError unless `images` are (B, C, L, L) as the flow's."""
        shape = self.nchannels, self.L, self.L
        if images.dim() != 4 or images.shape[1:] != shape:
            raise ValueError(f"shape {tuple(images.shape)}: must be (B, {', '.join(map(str, shape))})")

    def log_prob(self, x):
        """log p(x) of equation 1, nats: (B, C, L, L) -> (B,)."""
        z, log_det = self(x)
        return self.prior.log_prob(z).sum((1, 2, 3)) + log_det

    def sample_prior(self, n, temperature=1.0, generator=None):
        """n draws of the latents: (n, C, L, L). For `temperature` see `sample`."""
        dtype = next(self.parameters()).dtype
        z = torch.empty(n, self.nchannels, self.L, self.L, dtype=dtype, device=self.level_map.device)
        return self.prior.sample(z, self.temperature_map(temperature).to(dtype), generator)

    @torch.no_grad()
    def sample(self, n, temperature=1.0, generator=None):
        """n images in model space: (n, C, L, L).

        temperature: T of Appendix D, a number, a sequence with one number per level (index 0 is h = 0), or a tensor
            that broadcasts to (C, L, L)
        generator: a torch.Generator on the flow's device, None for the global one
        Raises ValueError for a negative or non-finite temperature and for a wrong number of them.
        """
        return self.inverse(self.sample_prior(n, temperature, generator))[0]

    @torch.no_grad()
    def first_nonfinite_level(self, x):
        """The lowest level with a latent, or its prior, that is not finite for images x (B, C, L, L) in model space.

        With finite latents, the highest level with a gradient that is not finite or has no finite norm, which is where
        backpropagation met it first. None if all is finite.
        """
        z, _ = self(x)
        bad = ~(z.isfinite() & self.prior.log_prob(z).isfinite()).all(0)
        if bad.any():
            return int(self.level_map[bad].min())
        for h in reversed(range(self.num_levels)):
            gradients = [parameter.grad for parameter in self.level_parameters(h) if parameter.grad is not None]
            if not all(gradient.norm().isfinite() for gradient in gradients):
                return h
        return None

    def temperature_map(self, temperature):
        """The temperature of each latent as a tensor that broadcasts to (C, L, L)."""
        device = self.level_map.device
        if isinstance(temperature, (list, tuple)):
            if len(temperature) != self.num_levels:
                given, rule = ",".join(map(str, temperature)), f"must be one number or {self.num_levels}, one per level"
                raise ValueError(f"temperature {given}: {rule}")
            temperature = torch.tensor(temperature, dtype=torch.float64, device=device)[self.level_map]
        temperature = torch.as_tensor(temperature, dtype=torch.float64, device=device)
        if not ((temperature >= 0) & (temperature < math.inf)).all():
            raise ValueError(f"temperature {temperature.min().item():g}: must be finite and at least 0")
        return temperature


def per_level(nlayers, num_levels, share_levels=False):
    """`nlayers` as a tuple with one entry per level (one in all with `share_levels`).

    Raises ValueError when the number of entries is wrong or one of them is below 1.
    """
    length = 1 if share_levels else num_levels
    nlayers = (nlayers,) * length if isinstance(nlayers, int) else tuple(nlayers)
    if len(nlayers) != length:
        rule = "one number with share_levels" if share_levels else f"one number or {num_levels}, one per level"
        raise ValueError(f"nlayers {','.join(map(str, nlayers))}: must be {rule}")
    if min(nlayers) < 1:
        raise ValueError(f"nlayers {','.join(map(str, nlayers))}: must be at least 1 at every level")
    return nlayers


def check_sizes(**sizes):
    """Raises ValueError unless all are at least 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} {size}: must be at least 1")
