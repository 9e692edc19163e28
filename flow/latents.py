"""What figures do with latents: from images and back, mixing (section 4.5), walks. Levels are by `flow.level_map`.

Images here are uint8 or floats in [0, 1], not in model space.
"""

import math

import torch
from tqdm import tqdm

from .preprocess import to_image, to_model

PART = 8  # images at a time


def encode(flow, images):
    """uint8 images (B, C, L, L) -> their latents, with the dequantisation noise fixed at its mean, u = 0.5."""
    parameter = next(flow.parameters())
    x, _ = to_model(images.to(parameter.device), noise=0.5, dtype=parameter.dtype)
    return in_parts(lambda part: flow(part)[0], x, "encode")


def decode(flow, z):
    """Latents (B, C, L, L) -> images of floats in [0, 1], on the CPU."""
    return in_parts(lambda part: to_image(flow.inverse(part)[0]).cpu(), z, "generate")


@torch.no_grad()
def in_parts(function, batch, description):
    """function(batch), a part at a time, with a bar on terminals."""
    results = []
    with tqdm(total=len(batch), desc=description, unit="image", leave=False, disable=None) as bar:
        for part in batch.split(PART):
            results.append(function(part))
            bar.update(len(part))
    return torch.cat(results)


def at_levels(flow, levels):
    """Which latents are of one of the levels, a sequence: (C, L, L) bool."""
    return torch.isin(flow.level_map, torch.tensor(levels, device=flow.level_map.device))


def mix(flow, z_high, z_low, theta):
    """Hyperbolic mixing (equation 15): `z_high` at levels h >= theta, `z_low` at h < theta, which broadcast."""
    return torch.where(flow.level_map >= theta, z_high, z_low)


def interpolate(z_a, z_b, n):
    """Conventional mixing: lambda z_a + (1 - lambda) z_b, lambda from 1 to 0 in n steps: (C, L, L) -> (n, C, L, L)."""
    weights = torch.linspace(1, 0, n, dtype=z_a.dtype, device=z_a.device).reshape(n, 1, 1, 1)
    return weights * z_a + (1 - weights) * z_b


def vary(flow, z, latent, values):
    """Samples z (B, C, L, L) with one latent, (channel, row, column), set to each of n values: images in [0, 1],
    (n, B, C, L, L)."""
    varied = z.repeat(len(values), 1, 1, 1, 1)
    varied[(..., *latent)] = values.to(z)[:, None]
    return decode_frames(flow, varied)


def decode_frames(flow, z):
    """`decode` for latents (F, B, C, L, L)."""
    return decode(flow, z.flatten(0, 1)).unflatten(0, z.shape[:2])


def papers_range(h):
    """What a latent of level h is varied over in figure 6 (Appendix D); level 0, which it leaves out, as level 1."""
    return (0.0, 6.0) if h <= 1 else (0.0, 1.5)


def random_walk(flow, z, levels, stops, steps, temperature=1.0, generator=None):
    """A closed walk of the latents of `levels`, the others stay as in z (B, C, L, L): (stops steps, B, C, L, L).

    The walk passes `stops` draws of the prior, with `steps` frames from each to the next. It goes on arcs in the space
    of a standard normal variable, so that every frame is itself a draw of the prior.

    stops: at least 2
    temperature, generator: of the draws, see `Flow.sample`
    """
    draws = torch.randn((stops, *z.shape), generator=generator, dtype=z.dtype, device=z.device)
    angle = torch.arange(steps, dtype=z.dtype, device=z.device) * (math.pi / 2 / steps)
    angle = angle.reshape(-1, *[1] * z.dim())
    normal = torch.cat([angle.cos() * a + angle.sin() * b for a, b in zip(draws, draws.roll(-1, 0), strict=True)])
    walk = flow.prior.from_normal(normal, flow.temperature_map(temperature).to(z.dtype))
    return torch.where(at_levels(flow, levels), walk, z)
