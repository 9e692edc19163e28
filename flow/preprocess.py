"""From uint8 images to model space and back, and bits per dimension.

x = (image + u) / 256,  u uniform in [0, 1)      dequantisation
y = 0.05 + 0.9 x                                 restriction, keeps the logit finite
l = log y - log(1 - y)                           model space
log |dl/dx| = sum log(0.9 / (y (1 - y))) = sum (softplus(l) + softplus(-l) + log 0.9)
"""

import math

import torch

from utils.random import dequantisation_noise

MARGIN = 0.05
SPAN = 1 - 2 * MARGIN


def to_model(images, generator=None, noise=None, dtype=None):
    """uint8 images (B, C, L, L) -> l of the same shape in model space, log |dl/dx| (B,), nats.

    generator: a torch.Generator on the images' device for the dequantisation noise u, None for the global one
    noise: u itself instead of a draw, a number or a tensor in [0, 1)
    dtype: of the result, the default type if None
    Raises ValueError if the images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"images of type {images.dtype}: must be torch.uint8")
    dtype = dtype or torch.get_default_dtype()
    if noise is None:
        noise = dequantisation_noise(images.shape, images.device, generator, dtype)
    y = MARGIN + SPAN / 256 * (images.to(dtype) + noise)
    density = y * (1 - y) / SPAN  # dx/dl; its logarithm is -(softplus(l) + softplus(-l) + log 0.9)
    return torch.logit(y), -density.log().sum((1, 2, 3))


def to_image(x):
    """Model space (B, C, L, L) -> floats in [0, 1], the inverse x = (sigmoid(l) - 0.05) / 0.9 clamped."""
    return ((torch.sigmoid(x) - MARGIN) / SPAN).clamp(0, 1)


def to_uint8(x):
    """Model space (B, C, L, L) -> uint8 images; undoes `to_model`, exactly where u is further from 0 and 1 than the
    rounding of the logit, about 1e-12 in float64 and 1e-4 in float32."""
    return to_bytes(to_image(x))


def to_bytes(images):
    """Images in [0, 1] -> uint8."""
    return (images * 256).floor().clamp(0, 255).to(torch.uint8)


def nats_to_bits(nats):
    """What `nats_per_dim` gives -> bits per dimension of the 8-bit image: + log2(256) = 8."""
    return nats / math.log(2) + 8


def nats_per_dim(flow, images, generator=None, noise=None):
    """-(log p(l) + log |dl/dx|) / (C L^2) of uint8 images (B, C, L, L): (B,), nats, p(l) of equation 1. Its mean over a
    batch is the loss of equation 13, per dimension of x = (image + u) / 256. generator, noise: see `to_model`."""
    x, log_det = to_model(images, generator, noise, dtype=next(flow.parameters()).dtype)
    return -(flow.log_prob(x) + log_det) / x.shape[1:].numel()


class Loss(torch.nn.Module):
    """The training loss (equation 13): nats per dimension, the mean over a batch."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, images, noise):
        return nats_per_dim(self.flow, images, noise=noise).mean()


def bits_per_dim(flow, images, generator=None, noise=None):
    """Bits per dimension of uint8 images (B, C, L, L), the BPD of table B1: (B,). generator, noise: see `to_model`."""
    return nats_to_bits(nats_per_dim(flow, images, generator, noise))
