"""Measurements of a flow on many images: bits per dimension, round trip, and samples to compare with data.

The noise of a batch is a function of a seed and its place, so `main.py` and `evaluate.py` give the same numbers.
"""

import copy
import math

import torch
from tqdm import tqdm

from layers.fold import folded_together
from utils.graphs import captured
from utils.random import dequantisation_noise, generator

from .preprocess import bits_per_dim, to_model, to_uint8

BATCH = 250


def noisy_batch(flow, images, index, seed=0, draw=0):
    """The batch of images, numpy (N, C, L, L), that holds number `index`, and its noise, on the flow's device."""
    like = next(flow.parameters())
    start = index // BATCH * BATCH
    batch = torch.from_numpy(images[start : start + BATCH]).to(like.device)
    source = generator(seed, "test", draw * len(images) + start, like.device)
    return batch, dequantisation_noise(batch.shape, like.device, source, like.dtype)


@torch.no_grad()
def bits_per_dim_of_all(flow, images, seed=0, draw=0, part=0, parts=1, quiet=None):
    """Bits per dimension of each image, float64 (N,) on the flow's device; 0 for those of other parts.

    images: numpy array, uint8 (N, C, L, L); draw: number of the dequantisation noise; part, parts: of the batches
    quiet: no progress bar; None for one on terminals only
    """
    values = torch.zeros(len(images), dtype=torch.float64, device=next(flow.parameters()).device)
    measure = captured(lambda batch, noise: bits_per_dim(flow, batch, noise=noise), values.device)
    with folded_together(flow):
        for start in tqdm(range(part * BATCH, len(images), parts * BATCH), desc="test", leave=False, disable=quiet):
            batch, noise = noisy_batch(flow, images, start, seed, draw)
            values[start : start + BATCH] = measure(batch, noise).to(values.dtype)
    return values


def first_nonfinite(values):
    """The index of the first of values (N,) that is not finite, or None."""
    return next(iter((~values.isfinite()).nonzero().flatten().tolist()), None)


def level_that_fails(flow, images, noise):
    """Where the latents of a batch first are not finite, in words."""
    level = flow.first_nonfinite_level(to_model(images, noise=noise, dtype=noise.dtype)[0])
    return "in the sum over all levels" if level is None else f"first at level h = {level}"


def mean_and_stderr(values):
    """The mean of values (N,) and its standard error, which is 0 for a single one."""
    mean = values.mean().item()
    return mean, (values - mean).square().sum().item() ** 0.5 / max(1, len(values) * (len(values) - 1)) ** 0.5


@torch.no_grad()
def round_trip_errors(flow, images, dtype, seed=0):
    """Largest |g(f(x)) - x| and |f(g(z)) - z| of z = f(x) and its inverse x = g(z), in model space.

    images: numpy array, uint8 (N, C, L, L); dtype: that of a copy of the flow, which computes without acceleration
    Returns {"data": …, "samples": …}, starting from x of the images and from N draws z of the prior: each
    {"image": |g(f(x)) - x|, "levels": [|f(g(z)) - z| for h = 0 up]}, with None for an error that is not finite.
    """
    flow = copy.deepcopy(flow).to(dtype).eval()
    flow.accelerate()
    largest = torch.zeros(2, 1 + flow.num_levels, dtype=torch.float64)
    name = f"round trip {dtype}".replace("torch.", "")
    with folded_together(flow):
        for start in tqdm(range(0, len(images), BATCH), desc=name, leave=False, disable=None):
            batch, noise = noisy_batch(flow, images, start, seed)
            x, _ = to_model(batch, noise=noise, dtype=dtype)
            z = flow.sample_prior(len(batch), generator=generator(seed, "round trip", start, batch.device))
            ways = (flow, flow.inverse), (flow.inverse, flow)
            for row, given, there, back in zip(largest, (x, z), *ways, strict=True):
                end = there(given)[0]
                again = back(end)[0]
                errors = (again - given).abs(), (there(again)[0] - end).abs()
                image, latents = errors if there is flow else errors[::-1]
                levels = [latents[:, flow.level_map == h].max() for h in range(flow.num_levels)]
                row.copy_(torch.maximum(row, torch.stack([image.max(), *levels]).to(row)))  # keeps NaN
    data, samples = ([error if math.isfinite(error) else None for error in row] for row in largest.tolist())
    return {name: {"image": row[0], "levels": row[1:]} for name, row in (("data", data), ("samples", samples))}


@torch.no_grad()
def sample_uint8(flow, n, temperature=1.0, seed=0):
    """n samples, uint8 (n, C, L, L) on the host; see `Flow.sample`. Raises FloatingPointError for one with a NaN."""
    images = torch.empty(n, flow.nchannels, flow.L, flow.L, dtype=torch.uint8)
    inverse = captured(lambda z: flow.inverse(z)[0], flow.level_map.device)
    with folded_together(flow):
        for start in tqdm(range(0, n, BATCH), desc="samples", leave=False, disable=None):
            part = images[start : start + BATCH]
            draws = generator(seed, "samples", start, flow.level_map.device)
            x = inverse(flow.sample_prior(len(part), temperature, draws))
            if x.isnan().any():
                raise FloatingPointError(f"samples {start} to {start + len(part) - 1}: hold values that are no numbers")
            part.copy_(to_uint8(x))
    return images
