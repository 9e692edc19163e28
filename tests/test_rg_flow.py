"""The whole flow: bijection, log-determinant, causal cones, contract."""

import pytest
import torch
from checks import check_bijector, jacobian, randomise

from flow import RGFlow
from flow.base import per_level
from flow.hierarchy import generation_cone, inference_cone, level_map
from layers import PATCH_BIJECTORS


def small(**settings):
    return RGFlow(**{"nchannels": 1, "L": 8, "nlayers": 2, "nresblocks": 1, "nmlp": 1, "nhidden": 16, **settings})


@pytest.mark.parametrize("share_levels", [False, True])
@pytest.mark.parametrize("L", [4, 8, 16])
@pytest.mark.parametrize("nchannels", [1, 3])
@pytest.mark.parametrize("subnet", PATCH_BIJECTORS)
def test_bijection_and_log_det(subnet, nchannels, L, share_levels):
    flow = small(nchannels=nchannels, L=L, subnet=subnet, share_levels=share_levels, nlayers=1 if L == 16 else 2)
    check_bijector(randomise(flow, 0.3), 2 * torch.randn(2, nchannels, L, L))


def test_other_kernel_sizes():
    check_bijector(randomise(small(L=8, kernel_size=2)), torch.randn(2, 1, 8, 8))
    check_bijector(randomise(small(L=12, kernel_size=6)), torch.randn(2, 1, 12, 12))


def cones(L):
    """(latents, pixels) bool, from geometry."""
    return torch.stack([generation_cone(i, j, L, 4).flatten() for i in range(L) for j in range(L)])


def sparsity(flow, L):
    """Where the Jacobians of the inverse and of the forward map are not 0, both as (latents, pixels)."""
    x = torch.randn(1, 1, L, L)
    z = flow(x)[0]
    forward = jacobian(lambda value: flow(value)[0], x) != 0
    inverse = jacobian(lambda value: flow.inverse(value)[0], z) != 0
    return inverse.T, forward


@pytest.mark.parametrize(
    "subnet, nlayers, L",
    [("rnvp", 1, 16), ("rnvp", 2, 16), ("ar", 1, 16), ("ar", 2, 16), ("spline", 1, 16), ("rnvp", 1, 32)],
)
def test_jacobian_fills_the_causal_cones(subnet, nlayers, L):
    expected = cones(L)
    assert not expected.all(), "every cone is full, nothing to see"
    full = subnet != "ar" or nlayers >= 2
    for pattern in sparsity(randomise(small(L=L, subnet=subnet, nlayers=nlayers)), L):
        assert not (pattern & ~expected).any()
        assert not full or torch.equal(pattern, expected)


def test_a_changed_region_moves_the_latents_of_its_inference_cone():
    flow = randomise(small(L=16, nchannels=3))
    region = torch.zeros(16, 16, dtype=bool)
    region[3:6, 13:16] = True
    x = torch.randn(1, 3, 16, 16)
    moved = (flow(x)[0] != flow(x + region)[0])[0].any(0)
    assert torch.equal(moved, inference_cone(region, 4))


def test_shared_levels_share_parameters():
    shared, separate = small(L=16, share_levels=True), small(L=16)
    count = [sum(parameter.numel() for parameter in flow.parameters()) for flow in (shared, separate)]
    assert count[1] == 3 * count[0]
    assert len(shared.level_parameters(1)) == 0
    assert sum(p.numel() for h in range(3) for p in separate.level_parameters(h)) == count[1]


def test_default_parameters():
    with torch.device("meta"):
        flow = RGFlow()
    assert sum(parameter.numel() for parameter in flow.parameters()) == 185_516_800


def test_level_map_is_a_buffer():
    flow = small(nchannels=3, L=16)
    assert flow.level_map.shape == (3, 16, 16)
    assert torch.equal(flow.level_map[2], level_map(16, 4))
    assert "level_map" in dict(flow.named_buffers())


def test_log_prob_of_the_untrained_flow_is_the_priors():
    x = torch.randn(3, 1, 8, 8)
    laplace = torch.distributions.Laplace(0.0, 0.5**0.5).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(small().log_prob(x), laplace)
    gaussian = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(small(prior="gaussian").log_prob(x), gaussian)


def test_density_integrates_to_one():
    """A 2 x 2 one-channel flow: importance sampling from a wide normal distribution gives 1 within its own error."""
    flow = randomise(small(L=2, kernel_size=2, prior="gaussian"), 0.2)
    proposal = torch.distributions.Normal(0.0, 3.0)
    x = proposal.sample((200_000, 1, 2, 2))
    weights = (flow.log_prob(x) - proposal.log_prob(x).sum((1, 2, 3))).exp()
    error = weights.std() / len(weights) ** 0.5
    assert error < 0.02
    assert abs(weights.mean() - 1) < 4 * error


def test_sampling_temperatures():
    """The untrained flow is the identity: the spread of samples per level is the prior's at that temperature."""
    for prior, power in (("laplace", 1.0), ("gaussian", 0.5)):
        flow = small(L=16, prior=prior)
        temperatures = (0.25, 1.0, 4.0)
        x = flow.sample(4000, temperatures, torch.Generator().manual_seed(1))
        assert not x.requires_grad
        for h, T in enumerate(temperatures):
            assert x[:, flow.level_map == h].std().item() == pytest.approx(T**power, rel=0.05)
    assert (flow.sample(2, 0.0) == 0).all()
    wide = flow.sample(4000, torch.where(flow.level_map == 0, 9.0, 0.0))
    assert wide[:, flow.level_map == 0].std().item() == pytest.approx(3, rel=0.05)
    assert (wide[:, flow.level_map > 0] == 0).all()


def test_samples_are_a_function_of_the_generator():
    flow = randomise(small())
    first, second, other = (flow.sample(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("temperature, word", [((1.0, 1.0), "3, one per level"), (-1.0, "-1"), (float("nan"), "nan")])
def test_bad_temperatures_are_refused(temperature, word):
    with pytest.raises(ValueError, match=f"temperature.*{word}"):
        small(L=16).sample(1, temperature)


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"L": 12}, "L 12"),
        ({"nlayers": (1, 2, 3)}, "nlayers 1,2,3"),
        ({"nlayers": (1, 0)}, "nlayers 1,0"),
        ({"nlayers": (1, 1), "share_levels": True}, "nlayers 1,1"),
        ({"nhidden": 0}, "nhidden 0"),
        ({"subnet": "mlp"}, "subnet 'mlp'"),
        ({"prior": "cauchy"}, "prior 'cauchy'"),
    ],
)
def test_bad_settings_are_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        small(**settings)


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 8, 8), (1, 8, 8)])
def test_images_of_another_shape_are_refused(shape):
    flow = small()
    for function in (flow, flow.inverse):
        with pytest.raises(ValueError, match=r"must be \(B, 1, 8, 8\)"):
            function(torch.randn(shape))


def test_per_level():
    assert per_level(3, 4) == (3, 3, 3, 3)
    assert per_level(3, 4, share_levels=True) == (3,)
    assert per_level([8, 6], 2) == (8, 6)


def test_first_nonfinite_level():
    flow = small(L=16)
    x = torch.randn(2, 1, 16, 16)
    flow.log_prob(x).sum().backward()
    assert flow.first_nonfinite_level(x) is None
    flow.level_parameters(1)[0].grad.fill_(float("nan"))
    flow.level_parameters(0)[0].grad.fill_(float("nan"))
    assert flow.first_nonfinite_level(x) == 1  # backpropagation comes from the top
    for parameter in flow.decimators[1].parameters():
        parameter.data.fill_(float("inf"))
    assert flow.first_nonfinite_level(x) == 1
    for parameter in flow.disentanglers[0].parameters():
        parameter.data.fill_(float("nan"))
    assert flow.first_nonfinite_level(x) == 0


def test_repr_tells_the_geometry():
    with torch.device("meta"):
        text = repr(RGFlow())
    assert "3x32x32 image, 4 levels, 4x4 blocks" in text
    assert "16 steps x 2 networks of 4 residual blocks 24 -> 512 -> 512 -> 24" in text
    assert text.count("\n") < 40
