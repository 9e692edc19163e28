"""The exact Jacobian of the generator and receptive fields (section 3.4, equation 14).

The Jacobian of a disentangler or decimator is block-diagonal, a block per patch, and that of RG-Flow is a chain of
products with such blocks. C m^2 = 48 passes through the networks, whatever L is, give all blocks: each tangent serves
all patches. Other flows, such as Real NVP, need one pass per latent, C L^2.
"""

import warnings

import torch
from tqdm import tqdm

from layers.fold import folded_together

# At a time: patches whose layers are differentiated, entries of tangents in a chain, passes of other flows.
PATCHES, ENTRIES, PASSES = 512, 2**25, 32


@torch.no_grad()
def receptive_fields(flow, n, latents=None, temperature=1.0, generator=None, progress=False):
    """Equation 14: E |dG / dz_l| over n draws of z, summed over colours, G the generator with images in model space.

    latents: (S, 3) integers, channel, row and column of each, or None for all
    temperature, generator: of the draws, see `Flow.sample`; progress: show a bar on terminals
    Returns (C, L, L, L, L), latent c, i, j -> pixels, or (S, L, L) for chosen latents.
    """
    C, L = flow.nchannels, flow.L
    z = flow.sample_prior(n, temperature, generator)
    flat = torch.arange(C * L * L) if latents is None else (latents[:, 0] * L + latents[:, 1]) * L + latents[:, 2]
    fields = z.new_zeros(len(flat), L, L)
    total = sum((l // flow.kernel_size) ** 2 for _, l, _ in flow.layers()) or len(flat)
    bar = tqdm(total=n * total, desc="receptive fields", disable=None if progress else True)
    with bar, folded_together(flow):
        for each in z:
            done = 0
            for part in tangents(flow, each, flat.to(z.device), bar.update):
                fields[done : done + len(part)] += part.abs().sum(1) / n
                done += len(part)
    return fields.reshape(C, L, L, L, L) if latents is None else fields


@torch.no_grad()
def tangents(flow, z, latents, advance=lambda number: None):
    """dG / dz_l at z (C, L, L) for latents l, indices (S,) into z.flatten(): parts (s, C, L, L) of all S, in order.
    advance: called with the number of patches, or of latents for flows without, that have been differentiated."""
    jacobians = layer_jacobians(flow, z, advance) if flow.layers() else None
    size = max(1, ENTRIES // z.numel())
    for chosen in latents.split(size if jacobians else min(size, PASSES)):
        units = torch.zeros(len(chosen), z.numel(), dtype=z.dtype, device=z.device)
        units = units.scatter_(1, chosen[:, None], 1).reshape(-1, *z.shape)
        if jacobians:
            remaining = iter(jacobians)
            *_, images = flow.generate(units, lambda _, blocks, its=remaining: apply_blocks(next(its), blocks))
        else:
            images = derivative(flow.inverse, z.repeat(len(chosen), 1, 1, 1), units)
            advance(len(chosen))
        yield images


def layer_jacobians(flow, z, advance):
    """The Jacobians of the generator's layers at z, for each of their P patches: (P, C m^2, C m^2), output by input."""
    jacobians = []

    def layer(bijector, blocks):
        outputs, _ = bijector.inverse(blocks)
        parts = []
        for before, after in zip(blocks.split(PATCHES), outputs.split(PATCHES), strict=True):
            direct = bijector.inverse_passes == 1  # otherwise the forward map at the same points is cheaper
            own = block_jacobians(bijector.inverse, before) if direct else block_jacobians(bijector, after).inverse()
            parts.append(own)
            advance(len(before))
        jacobians.append(torch.cat(parts))
        return outputs

    list(flow.generate(z[None], layer))
    return jacobians


def block_jacobians(function, blocks):
    """The Jacobian of a layer's function at each of the blocks (P, C, m, m): (P, C m^2, C m^2), output by input."""
    size = blocks[0].numel()
    units = torch.eye(size, dtype=blocks.dtype, device=blocks.device).reshape(size, 1, *blocks.shape[1:])
    columns = torch.func.vmap(lambda unit: derivative(function, blocks, unit.expand_as(blocks)))(units)
    return columns.flatten(2).permute(1, 2, 0)


def derivative(bijection, x, direction):
    """The derivative of a bijection's first result at x, of the shape of x, in a direction of the same shape."""
    with warnings.catch_warnings():  # torch, on its first forward-mode derivative, warns of a function of its own
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
        return torch.func.jvp(lambda each: bijection(each)[0], (x,), (direction,))[1]


def apply_blocks(jacobians, blocks):
    """Blocks (S P, C, m, m) of S tangents, each times the Jacobian of its patch (P, C m^2, C m^2)."""
    values = blocks.reshape(-1, len(jacobians), blocks[0].numel())  # (S, P, C m^2)
    return torch.bmm(values.transpose(0, 1), jacobians.mT).transpose(0, 1).reshape(blocks.shape)
