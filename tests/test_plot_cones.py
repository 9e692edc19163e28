"""Cones level by level, compared with what changes in a flow, and their sizes for 10 x 10 regions."""

import re

import numpy as np
import pytest
import torch
from checks import small
from matplotlib.colors import to_rgb

import plot_cones as script
from plot_cones import generation_sections, inference_sections

SIZES = {1092, 1200, 1344, 1488, 1668}  # of the inference cones of 10 x 10 regions, in latents of three channels


@pytest.mark.parametrize("h, i, j", [(0, 5, 7), (0, 0, 1), (1, 6, 14), (1, 2, 0), (2, 12, 4)])
def test_generation_sections_are_what_a_latent_changes(h, i, j):
    flow = small(nchannels=1)
    z = flow.sample_prior(1)
    other = z.clone()
    other[0, 0, i, j] += 1
    steps = [list(flow.generate(each, lambda bijector, x: bijector.inverse(x)[0])) for each in (z, other)]
    sections = generation_sections(h, i, j, 16, 4)
    assert len(sections) == 3
    for section, one, two in zip(reversed(sections), *steps, strict=True):
        assert np.array_equal(section, ((one - two).abs() > 1e-12)[0, 0].numpy())


@pytest.mark.parametrize("i, j, size", [(0, 0, 1), (3, 9, 1), (5, 6, 3), (14, 1, 2)])
def test_inference_sections_are_what_pixels_change(i, j, size):
    flow, x = small(nchannels=1), torch.randn(1, 1, 16, 16)
    other = x.clone()
    other[..., i : i + size, j : j + size] += 1
    changed = ((flow(x)[0] - flow(other)[0]).abs() > 1e-12)[0, 0]
    for h, section in enumerate(inference_sections(i, j, size, 16, 4)):
        own = changed & (flow.level_map[0] == h)
        assert np.array_equal(section, own[:: 2**h, :: 2**h].numpy())
        assert section.sum() == own.sum()


def test_figure_and_caption(draw, monkeypatch):
    figures, original = [], script.draw
    monkeypatch.setattr(script, "draw", lambda *own: figures.append(original(*own)) or figures[-1])
    paths, text = draw(script, None, "--latents 1:2:2:0 --regions 0:0,22:3")
    assert all("/cones_latents_1_2_2_0_regions_0_0_22_3_" in path for path in paths) and len(paths) == 2
    generation, first, second = text.splitlines()
    assert generation == "latent 1:2:2:0 affects 400 of 1024 pixels"
    pattern = r"at (\d+:\d+) affect (\d+) of 3072 latents \((\d+) at h = 0, (\d+) at h = 1, (\d+) at .*, (\d+) at h = 3"
    for caption, at in ((first, "0:0"), (second, "22:3")):
        where, total, *by_level = re.search(pattern, caption).groups()
        assert where == at and int(total) == sum(map(int, by_level)) and int(total) in SIZES
    panels = figures[0].axes
    assert [axes.get_title() for axes in panels[:5]] == ["$h = 0$", "$h = 1$", "$h = 2$", "$h = 3$", "1200 of 3072"]
    for axes, colour in zip(panels[4:], [script.RED] * 4 + [script.BLUE] * 8, strict=True):
        picture = np.asarray(axes.images[0].get_array())
        coloured = (picture == to_rgb(colour)).all(-1).sum()
        assert axes.get_title().startswith(f"{3 * coloured} of ")


@pytest.mark.parametrize("L, m, C", [(4, 4, 1), (8, 4, 3), (32, 2, 1)])
def test_other_sizes(draw, L, m, C):
    paths, text = draw(script, None, f"--L {L} --kernel_size {m} --nchannels {C}")
    assert f"of {C * L * L} latents" in text and f"/cones_L_{L}_kernel_size_{m}_nchannels_{C}_" in paths[1]
