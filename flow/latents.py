"""Latents for figures: encode images (uint8 or floats in [0, 1], not in model space), mix, vary, walk, decode."""

from functools import partial

import torch
from tqdm import tqdm

from layers.fold import folded_together
from utils.graphs import captured
from utils.random import generator as seeded

from .preprocess import to_image, to_model

PART = 8  # images at a time


def encode(flow, images, generator=None, part=PART):
    """uint8 images (B, C, L, L) -> their latents, with dequantisation noise of the generator, or its mean, u = 0.5."""
    parameter, noise = next(flow.parameters()), None if generator else 0.5
    own = partial(to_model, generator=generator, noise=noise, dtype=parameter.dtype)
    return in_parts(flow, lambda each: flow(own(each.to(parameter.device))[0])[0], images, "encode", part)


def latents_of(flow, source, image, temperature=1.0):
    """The latents (C, L, L) of what `utils.cli.source` names: of the image, uint8, or of a sample."""
    if image is not None:
        return encode(flow, image[None])[0]
    device = flow.level_map.device
    return flow.sample_prior(1, temperature, seeded(source[1], "samples", 0, device))[0]


def decode(flow, z):
    """Latents (…, C, L, L) -> images of floats in [0, 1], on the CPU."""
    inverse = captured(lambda each: to_image(flow.inverse(each)[0]), z.device)
    return in_parts(flow, inverse, z.flatten(0, -4), "generate").cpu().reshape(z.shape)


class Decoder:
    """`decode` of one image after another: it keeps the activations of the last and evaluates only the blocks of which
    a variable has changed, those of the changed latents' generation cones. All other pixels stay equal to the last bit.
    A flow without blocks, such as Real NVP, is evaluated as a whole."""

    def __init__(self, flow):
        self.flow, self.kept = flow, []  # (blocks, what became of them) of each layer

    @torch.no_grad()
    def __call__(self, z):
        """Latents (B, C, L, L) -> images of floats in [0, 1], on the CPU."""
        if not self.flow.layers():
            return decode(self.flow, z)
        kept, now = iter(self.kept), []

        def layer(bijector, blocks):
            before, after = next(kept, (blocks[:0], None))
            if before.shape != blocks.shape:
                after, _ = bijector.inverse(blocks)
            elif (changed := (blocks != before).flatten(1).any(1)).any():
                after = after.index_put((changed,), bijector.inverse(blocks[changed])[0])
            now.append((blocks, after))
            return after

        *_, x = self.flow.generate(z, layer)
        self.kept = now
        return to_image(x).cpu()


def round_trip_error(flow, images):
    """The largest error of uint8 images (B, C, L, L) that are encoded and decoded, in levels of 256; infinite or NaN
    where values are not finite. A flow is exact for them if it is far below half a level."""
    return (256 * decode(flow, encode(flow, images)) - 0.5 - images.cpu()).abs().max().item()


@torch.no_grad()
def in_parts(flow, function, batch, description, part=PART):
    """function(batch) of a flow, `part` images at a time, with a bar on terminals."""
    parts = tqdm(batch.split(part), desc=description, unit="image", unit_scale=part, leave=False, disable=None)
    with folded_together(flow):
        return torch.cat([function(each) for each in parts])


def at_levels(flow, levels):
    """Which latents are of one of the levels, a sequence: (C, L, L) bool."""
    return torch.isin(flow.level_map, torch.tensor(levels, device=flow.level_map.device))


def from_levels(flow, z):
    """What each level adds to latents z (C, L, L): those of the levels >= h alone, the others 0, which is the mode of
    the prior, for h = 0 … h_L: (h_L + 1, C, L, L)."""
    return torch.stack([torch.where(flow.level_map >= h, z, 0) for h in range(flow.num_levels)])


def edited(flow, z, other=None, swap=(), scale=(), values=()):
    """Latents (B, C, L, L) with levels of `swap` taken from `other`, then each level of `scale`, pairs (h, factor),
    multiplied by its factor, then each of `values`, pairs ((c, i, j), value), set."""
    z = torch.where(at_levels(flow, swap), other, z) if swap else z.clone()
    for h, factor in scale:
        z[:, flow.level_map == h] *= factor
    for latent, value in values:
        z[(..., *latent)] = value
    return z


def energies(flow, z):
    """Of latents (B, C, L, L), per level: number per image, mean square, and mean -log p(z) in nats, a dict each."""
    rows = []
    for h in range(flow.num_levels):
        own = z[:, flow.level_map == h]
        row = {"level": h, "latents": own.shape[1], "mean_square": own.square().mean().item()}
        rows.append({**row, "nats_per_latent": -flow.prior.log_prob(own).mean().item()})
    return rows


def mix(flow, z_high, z_low, theta):
    """Hyperbolic mixing (equation 15): `z_high` at levels h >= theta, `z_low` at h < theta, which broadcast."""
    return torch.where(flow.level_map >= theta, z_high, z_low)


def interpolate(z_a, z_b, n):
    """Conventional mixing: lambda z_a + (1 - lambda) z_b, lambda from 1 to 0 in n steps: (C, L, L) -> (n, C, L, L)."""
    weights = torch.linspace(1, 0, n, dtype=z_a.dtype, device=z_a.device).reshape(n, 1, 1, 1)
    return weights * z_a + (1 - weights) * z_b


def vary(flow, z, latent, values):
    """Images (n, B, C, L, L) of samples z (B, C, L, L) with one latent, (channel, row, column), set to n values."""
    varied = z.repeat(len(values), 1, 1, 1, 1)
    varied[(..., *latent)] = values.to(z)[:, None]
    return decode(flow, varied)


def papers_range(h):
    """What a latent of level h is varied over in figure 6 (Appendix D); level 0, which it leaves out, as level 1."""
    return (0.0, 6.0) if h <= 1 else (0.0, 1.5)


def random_walk(flow, z, levels, stops, steps, temperature=1.0, generator=None):
    """A closed walk of the latents of `levels`, the others stay as in z (B, C, L, L): (stops steps, B, C, L, L). It
    passes `stops` >= 2 draws of the prior, with `steps` frames from each to the next, on arcs in the space of a normal
    variable: every frame is itself a draw of the prior. temperature, generator: see `Flow.sample`."""
    draws = torch.randn((stops, *z.shape), generator=generator, dtype=z.dtype, device=z.device)
    angle = torch.arange(steps, dtype=z.dtype, device=z.device).reshape(-1, 1, 1, 1, 1) * (torch.pi / 2 / steps)
    normal = torch.cat([angle.cos() * a + angle.sin() * b for a, b in zip(draws, draws.roll(-1, 0), strict=True)])
    walk = flow.prior.from_normal(normal, flow.temperature_map(temperature).to(z.dtype))
    return torch.where(at_levels(flow, levels), walk, z)
