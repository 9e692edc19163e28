"""The density p(z_l) of one latent (section 3.6). The prior is its product over all latents (equations 10 and D.1).

At temperature T the density is proportional to p(z_l)^(1/T) (equations D.2 and D.4).
"""

import math

import torch


class Laplace:
    """p(z) = exp(-|z| / b) / (2 b), of scale T b at temperature T. b = 1 / sqrt(2), so that the variance is 1, as of
    the Gaussian prior; equation D.3 of the paper has b = 1."""

    scale = math.sqrt(0.5)

    def log_prob(self, z):
        """z: any shape -> the log-density of each entry, nats."""
        return -z.abs() / self.scale - math.log(2 * self.scale)

    def sample(self, like, temperature=1.0, generator=None):
        """A draw with the shape, type and device of `like`; temperature: a number or a tensor that broadcasts to it."""
        # Inverse distribution function. Where torch.rand is 0, so is the tail; its next value is eps.
        u = 2 * torch.rand(like.shape, dtype=like.dtype, device=like.device, generator=generator) - 1
        tail = (1 - u.abs()).clamp_min(torch.finfo(like.dtype).eps / 2)
        return -self.scale * temperature * u.sign() * tail.log()

    def from_normal(self, normal, temperature=1.0):
        """Standard normal variables -> variables of this prior at the temperature, by both distribution functions."""
        tail = torch.special.erfc(normal.abs() / math.sqrt(2)).clamp_min(torch.finfo(normal.dtype).tiny)
        return -self.scale * temperature * normal.sign() * tail.log()


class Gaussian:
    """The standard normal distribution, with the methods of `Laplace`. At temperature T the standard deviation is
    sqrt(T) (equation D.2)."""

    def log_prob(self, z):
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def sample(self, like, temperature=1.0, generator=None):
        z = torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)
        return self.from_normal(z, temperature)

    def from_normal(self, normal, temperature=1.0):
        return normal * temperature**0.5


PRIORS = {"laplace": Laplace, "gaussian": Gaussian}
