"""Randomness as a function of seed, purpose and index (epoch, step, batch, …), never of stored state."""

import hashlib

import torch


def derived_seed(seed, purpose, index=0):
    """A 63-bit seed of its own for each (seed, purpose, index): the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed, purpose, index=0, device="cpu"):
    """A torch.Generator on `device`, seeded with `derived_seed`."""
    return torch.Generator(device).manual_seed(derived_seed(seed, purpose, index))


def dequantisation_noise(shape, device, generator=None, dtype=None):
    """What is added to uint8 images before the division by 256: uniform in [0, 1). generator: None for the global."""
    return torch.rand(shape, generator=generator, dtype=dtype, device=device)
