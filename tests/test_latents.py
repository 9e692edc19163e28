"""Latents for figures: encoded, mixed, varied, walked, decoded, each against the flow itself or counted entries."""

import math

import pytest
import torch
from checks import bytes_of, levels, random_images, randomise, small

from args import exact
from flow import RealNVP, RGFlow
from flow.hierarchy import generation_cone
from flow.latents import (
    Decoder,
    decode,
    edited,
    encode,
    energies,
    from_levels,
    interpolate,
    latents_of,
    mix,
    random_walk,
    vary,
)
from flow.preprocess import to_image


@pytest.fixture(params=[RGFlow, RealNVP])
def flow(request):
    return small(request.param)


def test_mixing_takes_each_level_from_the_right_image(flow):
    a, b = torch.randn(2, 3, 16, 16)
    for theta in range(5):
        assert torch.equal(mix(flow, a, b, theta), torch.where(levels(flow) >= theta, a, b))
    torch.testing.assert_close(interpolate(a, b, 5)[1], b + 0.75 * (a - b))


def test_encoded_images_come_back_whatever_their_number(flow):
    images = random_images(35)
    z = encode(flow, images)
    assert torch.equal(bytes_of(decode(flow, z)), images)
    torch.testing.assert_close(z[34:], encode(flow, images[34:]))


@pytest.mark.parametrize("model, size", [(RGFlow, 0.2), (RealNVP, 0.2), (RGFlow, 1.5)])
def test_float64_where_float32_loses_the_round_trip(model, size, capsys):
    single, images = randomise(small(model), size).float(), random_images(4)
    lost = not torch.equal(bytes_of(decode(single, encode(single, images))), images)
    used = exact(single, images)
    assert lost == (used is not single) == (size == 1.5)
    assert lost == capsys.readouterr().err.startswith("note: encoded and decoded in float32, images change by up to ")
    assert torch.equal(bytes_of(decode(used, encode(used, images))), images)
    assert {each.dtype for each in single.parameters()} == {torch.float32}


def test_random_walk(flow):
    """Closed, of equal steps, in the chosen levels alone; every frame has the prior's variance at its temperature."""
    z = torch.randn(20, 3, 16, 16)
    walk = random_walk(flow, z, (0, 2), 3, 8, (0.5, 1.0, 2.0), torch.Generator().manual_seed(0))
    assert walk.shape == (24, 20, 3, 16, 16)
    assert (walk[..., levels(flow) == 1] == z[..., levels(flow) == 1]).all()
    for h, temperature in ((0, 0.5), (2, 2.0)):
        moving = walk[..., levels(flow) == h]
        variances = moving.square().flatten(1).mean(1)
        assert (variances / temperature**2 - 1).abs().max() < 0.2
        steps = (moving.roll(-1, 0) - moving).square().flatten(1).mean(1).sqrt()
        assert steps.max() < min(1.2 * steps.min(), 0.3 * temperature)


def test_varied_latents(flow):
    latent, values = (2, 4, 12), torch.tensor([0.0, 0.7, 6.0])
    z = flow.sample_prior(2)
    for value, varied in zip(values, vary(flow, z, latent, values), strict=True):
        own = z.clone()
        own[(slice(None), *latent)] = value
        torch.testing.assert_close(varied, to_image(flow.inverse(own)[0]))


def test_edits(flow):
    z, other = torch.randn(2, 1, 3, 16, 16)
    values = [((2, 4, 3), 7.0), ((0, 0, 0), -1.0)]
    kept = z.clone()
    found = edited(flow, z, other, (1, 2), ((0, 0.5), (1, 3.0), (1, 2.0)), values)
    expected = torch.where(levels(flow) == 0, 0.5 * z, torch.where(levels(flow) == 1, 6 * other, other))
    expected[0, 2, 4, 3], expected[0, 0, 0, 0] = 7, -1
    assert torch.equal(found, expected) and torch.equal(z, kept)


def test_energies():
    flow = small()
    z = torch.where(flow.level_map == 1, 2.0, -0.5).expand(1, 3, 16, 16)
    expected = [
        {"level": h, "latents": n, "mean_square": size**2, "nats_per_latent": math.log(2) / 2 + math.sqrt(2) * size}
        for h, n, size in ((0, 576, 0.5), (1, 144, 2), (2, 48, 0.5))
    ]
    assert energies(flow, z) == [pytest.approx(each) for each in expected]


def test_levels_added_from_the_top(flow):
    z = torch.randn(3, 16, 16)
    for h, part in enumerate(from_levels(flow, z)):
        assert torch.equal(part, torch.where(levels(flow) < h, 0.0, z))


def test_latents_of_images_and_samples(flow):
    (image,) = random_images(1)
    torch.testing.assert_close(latents_of(flow, ("test", 3), image), encode(flow, image[None])[0])
    one, again, other = (latents_of(flow, ("sample", seed), None, (0.5, 1, 2)) for seed in (4, 4, 5))
    assert torch.equal(one, again) and not torch.equal(one, other)
    hot = latents_of(flow, ("sample", 4), None, (1, 1, 2))
    torch.testing.assert_close(hot, torch.where(levels(flow) == 0, 2 * one, one))


@pytest.mark.parametrize("latent", [(0, 5, 6), (2, 6, 8), (1, 12, 4)])  # of h = 0, 1, 2
def test_decoder_decodes_what_has_changed(flow, latent):
    """Exactly as a whole decoding, with no more blocks than the cone touches, and no bit different outside it."""
    decoder, z = Decoder(flow), flow.sample_prior(3)
    before = decoder(z)
    torch.testing.assert_close(before, to_image(flow.inverse(z)[0]))
    assert torch.equal(decoder(z), before)
    counts, z = [], z.clone()
    z[(1, *latent)] += 1
    for bijector, _, _ in flow.layers():
        own = bijector.inverse
        bijector.inverse = lambda blocks, own=own: counts.append(len(blocks)) or own(blocks)
    after = decoder(z)
    torch.testing.assert_close(after, to_image(flow.inverse(z)[0]))
    assert not torch.equal(after[1], before[1])
    if flow.layers():
        outside = ~generation_cone(*latent[1:], 16, 4)
        assert torch.equal(after[[0, 2]], before[[0, 2]]) and torch.equal(after[1][:, outside], before[1][:, outside])
        assert counts[:2] == [1, 4] or latent != (0, 5, 6)  # blocks of one decimator, then of one disentangler
    torch.testing.assert_close(decoder(z[:2]), after[:2])  # of another number of images


def test_decoder_on_images_that_are_not_finite():
    flow = small()
    decoder, z = Decoder(flow), flow.sample_prior(1)
    before, broken = decoder(z), z.clone()
    broken[0, 0, 5, 6] = torch.nan
    assert decoder(broken).isnan().any()
    torch.testing.assert_close(decoder(z), before)
