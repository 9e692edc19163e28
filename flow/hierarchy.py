"""The geometry of RG-Flow: levels, blocks and causal cones (section 3.2, equations 6-9, figure 3). No parameters.

The variables of level h sit on the pixels whose row and column are multiples of 2^h. They are stored as one compact
square of edge L / 2^h. The disentangler acts on its m x m blocks that start at m / 2 and wrap round at the border
(equations 6 and 8), then the decimator on those that start at 0 (equations 7 and 9). The even rows and columns of the
result go up to level h + 1; the rest are the latents of level h.
"""

import torch


def num_levels(L, kernel_size):
    """h_L + 1 = log2(L / m) + 1. Raises ValueError unless m is even and L / m a power of two."""
    if kernel_size < 2 or kernel_size % 2:
        raise ValueError(f"kernel_size {kernel_size}: must be even and at least 2")
    ratio, rest = divmod(L, kernel_size)
    if rest or ratio < 1 or ratio & (ratio - 1):
        sizes = f"{kernel_size}, {2 * kernel_size}, {4 * kernel_size}, …"
        raise ValueError(f"L {L}: must be kernel_size times a power of two: {sizes}")
    return ratio.bit_length()


def level_map(L, kernel_size):
    """The level h of each latent position (i, j), 2^h the largest that divides both, at most h_L: (L, L) integers."""
    levels = torch.zeros(L, L, dtype=torch.long)
    for h in range(1, num_levels(L, kernel_size)):
        levels[:: 2**h, :: 2**h] = h
    return levels


def to_blocks(x, m, offset):
    """x: (B, C, l, l) -> the m x m blocks that start at `offset`, wrapping round, (B (l/m)^2, C, m, m)."""
    B, C, l, _ = x.shape
    if offset:
        x = x.roll((-offset, -offset), (2, 3))
    return x.reshape(B, C, l // m, m, l // m, m).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def from_blocks(blocks, l, offset):
    """The inverse of `to_blocks`: (B (l/m)^2, C, m, m) -> (B, C, l, l)."""
    _, C, m, _ = blocks.shape
    x = blocks.reshape(-1, l // m, l // m, C, m, m).permute(0, 3, 1, 4, 2, 5).reshape(-1, C, l, l)
    return x.roll((offset, offset), (2, 3)) if offset else x


def touched_blocks(regions, m, offset):
    """regions: (B, l, l) bool -> which of the blocks of `to_blocks` hold a position of them, (B (l/m)^2) bool."""
    return to_blocks(regions[:, None], m, offset).flatten(1).any(1)


def block_positions(chosen, l, m, offset):
    """The inverse: which blocks, (B (l/m)^2) bool -> all of their positions, (B, l, l) bool."""
    return from_blocks(chosen[:, None, None, None].expand(-1, 1, m, m), l, offset)[:, 0]


def cone_blocks(regions, kernel_size):
    """The blocks that a change of these regions alters: (B, L, L) bool -> a list with, per level, which disentangler
    blocks and which decimator blocks, (B (l/m)^2) bool each, in the order of `to_blocks`.

    S_0 is the region, D_h the disentangler blocks that touch S_h, E_h the decimator blocks that touch D_h, and S_(h+1)
    the part of E_h that goes on. To generate S_0 takes the same blocks, and no latent outside E_h.
    """
    L, m, blocks = regions.shape[-1], kernel_size, []
    for h in range(num_levels(L, m)):
        l, disentangled = L >> h, touched_blocks(regions, m, m // 2)
        decimated = touched_blocks(block_positions(disentangled, l, m, m // 2), m, 0)
        blocks.append((disentangled, decimated))
        regions = block_positions(decimated, l, m, 0)[:, ::2, ::2]
    return blocks


def inference_cone(region, kernel_size):
    """The latents that a set of pixels can affect (section 3.5, figure 3 (d)): (L, L) bool -> (L, L) bool."""
    region = torch.as_tensor(region, dtype=torch.bool)
    cone = torch.zeros_like(region)
    for h, (_, decimated) in enumerate(cone_blocks(region[None], kernel_size)):
        # The next level writes its own positions over these.
        cone[:: 2**h, :: 2**h] = block_positions(decimated, len(region) >> h, kernel_size, 0)[0]
    return cone


def generation_cone(i, j, L, kernel_size):
    """The pixels that latent (i, j) can affect (section 3.4, figure 3 (c)): row, column -> (L, L) bool."""
    if not (0 <= i < L and 0 <= j < L):
        raise ValueError(f"latent ({i}, {j}): row and column must lie in 0..{L - 1}")
    m, level = kernel_size, int(level_map(L, kernel_size)[i, j])
    region = torch.zeros(1, L >> level + 1, L >> level + 1, dtype=torch.bool)
    region[0, i >> level + 1, j >> level + 1] = True
    for h in range(level, -1, -1):
        region = region.repeat_interleave(2, 1).repeat_interleave(2, 2)  # 2 x 2 squares, each in one decimator block
        for offset in (0, m // 2):
            region = block_positions(touched_blocks(region, m, offset), L >> h, m, offset)
    return region[0]
