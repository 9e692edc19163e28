"""The chain of block-diagonal Jacobians against autograd's and the cones."""

import pytest
import torch
from checks import jacobian as autograd_jacobian
from checks import randomise

from flow import RealNVP, RGFlow
from flow import jacobian as module
from flow.hierarchy import generation_cone
from flow.jacobian import receptive_fields, tangents
from layers import PATCH_BIJECTORS


def small(**settings):
    sizes = {"nchannels": 1, "L": 8, "nlayers": 2, "nresblocks": 1, "nmlp": 1, "nhidden": 9, **settings}
    return randomise(RGFlow(**sizes), 0.3)


def jacobian(flow, z):
    return torch.cat(list(tangents(flow, z, torch.arange(z.numel()))))


def assert_autograds(flow):
    """Autograd's Jacobian of the forward map at the same image, inverted: it is fast for every kind of layer."""
    z = torch.randn(flow.nchannels, flow.L, flow.L)
    expected = torch.linalg.inv(autograd_jacobian(lambda x: flow(x)[0], flow.inverse(z[None])[0]))
    torch.testing.assert_close(jacobian(flow, z).flatten(1), expected.T, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("nchannels", [1, 3])
@pytest.mark.parametrize("L", [8, 16])
@pytest.mark.parametrize("subnet", PATCH_BIJECTORS)
def test_jacobian_is_autograds(subnet, L, nchannels):
    """And receptive fields fill the generation cones, no more."""
    flow = small(subnet=subnet, L=L, nchannels=nchannels)
    assert_autograds(flow)
    cones = torch.stack([generation_cone(i, j, L, 4) for i in range(L) for j in range(L)])
    assert torch.equal(receptive_fields(flow, 2) > 0, cones.reshape(L, L, L, L).expand(nchannels, *[-1] * 4))


def test_jacobian_with_shared_levels_in_parts_and_of_real_nvp(monkeypatch):
    assert_autograds(small(L=16, share_levels=True))
    assert_autograds(randomise(RealNVP(nchannels=1, L=8, nlayers=1, nresblocks=1, nhidden=4), 0.3))
    monkeypatch.setattr(module, "PATCHES", 3)
    monkeypatch.setattr(module, "ENTRIES", 1000)
    assert_autograds(small(L=16))


def test_receptive_fields_are_the_mean_over_draws():
    """Central differences of the generated images, at the draws that the generator gives."""
    flow = small(nchannels=3)
    latents = torch.tensor([[0, 1, 1], [2, 4, 0], [1, 7, 6]])
    fields = receptive_fields(flow, 3, latents, 0.7, torch.Generator().manual_seed(5))
    z = flow.sample_prior(3, 0.7, torch.Generator().manual_seed(5))
    for field, (c, i, j) in zip(fields, latents.tolist(), strict=True):
        step = torch.zeros_like(z)
        step[:, c, i, j] = 1e-5
        slope = (flow.inverse(z + step)[0] - flow.inverse(z - step)[0]) / 2e-5
        torch.testing.assert_close(field, slope.abs().sum(1).mean(0), rtol=1e-6, atol=1e-8)
    everything = receptive_fields(flow, 3, None, 0.7, torch.Generator().manual_seed(5))
    torch.testing.assert_close(everything[latents[:, 0], latents[:, 1], latents[:, 2]], fields)


def test_float32_and_parameters_that_ask_for_gradients():
    flow = small(nchannels=3).requires_grad_(True)
    expected = receptive_fields(flow, 1, generator=torch.Generator().manual_seed(1))
    assert not expected.requires_grad
    z = flow.sample_prior(1, 1.0, torch.Generator().manual_seed(1))[0]
    single = jacobian(flow.float(), z.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double().abs().sum(1).reshape(expected.shape), expected, rtol=1e-3, atol=1e-3)
