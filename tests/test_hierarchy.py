"""Levels, blocks and cones, against counts by hand and against equations 8 and 9 taken literally."""

from itertools import product

import pytest
import torch

from flow.hierarchy import from_blocks, generation_cone, inference_cone, level_map, num_levels, to_blocks


def test_number_of_levels():
    sizes = (4, 4), (8, 4), (16, 4), (32, 4), (64, 4), (32, 2), (48, 6)
    assert [num_levels(*size) for size in sizes] == [1, 2, 3, 4, 5, 5, 4]
    for L, m, word in ((24, 4, "L 24"), (2, 4, "L 2"), (32, 3, "kernel_size 3"), (32, 0, "kernel_size 0")):
        with pytest.raises(ValueError, match=word):
            num_levels(L, m)


def test_level_map():
    assert (3 * level_map(32, 4).flatten().bincount()).tolist() == [2304, 576, 144, 48]
    assert level_map(8, 4).tolist() == [[1, 0, 1, 0, 1, 0, 1, 0], [0] * 8] * 4
    assert level_map(16, 4)[8, [4, 6]].tolist() == [2, 1] and level_map(16, 4)[0, 0] == 2  # capped at h_L


@pytest.mark.parametrize("L, m, h", [(32, 4, 0), (32, 4, 2), (32, 4, 3), (16, 2, 1), (24, 6, 1)])
def test_blocks_follow_equations_8_and_9(L, m, h):
    """The pixel positions r = 2^h (m p + m/2 + a, m q + m/2 + b) of a disentangler, and r' without m/2."""
    pixels = torch.stack(torch.meshgrid(torch.arange(L), torch.arange(L), indexing="ij"))[None]  # (1, 2, L, L)
    live = pixels[:, :, :: 2**h, :: 2**h]
    number = L // 2**h // m
    for offset in (m // 2, 0):
        blocks = to_blocks(live, m, offset)
        assert torch.equal(from_blocks(blocks, L >> h, offset), live)
        for p, q, a, b in product(range(number), range(number), range(m), range(m)):
            row, column = 2**h * (m * p + offset + a) % L, 2**h * (m * q + offset + b) % L
            assert blocks[p * number + q, :, a, b].tolist() == [row, column]


@pytest.mark.parametrize("L, m", [(8, 4), (16, 4), (32, 4), (16, 2)])
def test_cones_are_each_others_transpose(L, m):
    generation = torch.stack([generation_cone(i, j, L, m).flatten() for i in range(L) for j in range(L)])
    pixels = torch.eye(L * L, dtype=bool).reshape(-1, L, L)
    assert torch.equal(generation, torch.stack([inference_cone(pixel, m).flatten() for pixel in pixels]).T)
    with pytest.raises(ValueError, match=rf"\(3, {L}\).*0\.\.{L - 1}"):
        generation_cone(3, L, L, m)


def test_latents_of_a_10x10_region():
    """The counts behind the paper's "about 1,200" latents (section 4.6), for 3 x 32 x 32."""
    counts = set()
    for i, j in product(range(23), range(23)):
        region = torch.zeros(32, 32, dtype=bool)
        region[i : i + 10, j : j + 10] = True
        counts.add(3 * int(inference_cone(region, 4).sum()))
    assert sorted(counts) == [1092, 1200, 1344, 1488, 1668]
