"""Real NVP: its networks, couplings, scales, and the whole flow as a bijection."""

import math

import pytest
import torch
from checks import check_bijector, jacobian, randomise
from torch import nn
from torch.nn.functional import silu
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from flow import RealNVP, RGFlow
from flow.real_nvp import factor_in, factor_out, squeeze, unsqueeze
from layers.convolution import ChannelCouplings, CheckerboardCouplings, ConvolutionalNetworks, evaluate


def small(**settings):
    return RealNVP(**{"nchannels": 1, "L": 8, "nlayers": 2, "nresblocks": 1, "nmlp": 2, "nhidden": 4, **settings})


@pytest.mark.parametrize("L, kernel_size", [(4, 4), (8, 4), (16, 4), (8, 2), (12, 6)])
@pytest.mark.parametrize("nchannels", [1, 3])
def test_bijection_and_log_det(nchannels, L, kernel_size):
    flow = small(nchannels=nchannels, L=L, kernel_size=kernel_size, nlayers=1 if L == 16 else 3)
    check_bijector(randomise(flow, 0.3), 2 * torch.randn(2, nchannels, L, L))


@pytest.mark.parametrize("couplings", [CheckerboardCouplings, ChannelCouplings])
@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_couplings(couplings, nlayers):
    check_bijector(randomise(couplings(4, nlayers, 2, 1, 5)), torch.randn(3, 4, 4, 4))


@pytest.mark.parametrize("k", [0, 1])
def test_what_a_coupling_keeps(k):
    """The Jacobian of coupling k is the identity on the kept half, and the moved half does not move itself."""
    positions = torch.arange(4)
    checkerboard = ((positions[:, None] + positions) % 2 == k).expand(4, 4, 4)
    half = (positions // 2 == k)[:, None, None].expand(4, 4, 4)
    for couplings, kept in ((CheckerboardCouplings, checkerboard), (ChannelCouplings, half)):
        bijector = randomise(couplings(4, k + 1, 1, 1, 5))
        if k:  # the first coupling as the identity
            bijector.networks.scale[0] = 0
        matrix = jacobian(lambda value, bijector=bijector: bijector(value)[0], torch.randn(1, 4, 4, 4))
        kept = kept.flatten()
        assert torch.equal(matrix[kept], torch.eye(64)[kept])
        block = matrix[~kept][:, ~kept]
        assert torch.equal(block, block.diag().diag())
        assert (matrix[~kept][:, kept] != 0).any(1).all()


def conv(weight, gain, bias):
    """torch's weight-normalised convolution; weight: (out, 3, 3, in)."""
    layer = weight_norm(nn.Conv2d(weight.shape[-1], weight.shape[0], 3, padding=1), dim=0).requires_grad_(False)
    layer.parametrizations.weight.original0.copy_(gain[:, None, None, None])
    layer.parametrizations.weight.original1.copy_(weight.permute(0, 3, 1, 2))
    layer.bias.copy_(bias)
    return layer


@pytest.mark.parametrize("nresblocks, nmlp", [(1, 1), (3, 2)])
def test_networks_against_weight_norm_of_torch(nresblocks, nmlp):
    """The same network built of torch's convolutions and weight normalisation, one after the other."""
    networks = randomise(ConvolutionalNetworks(2, 3, 2, 5, nresblocks, nmlp))
    x = torch.randn(2, 3, 6, 6)
    for k, folded in enumerate(networks.steps()):
        stages = zip(networks.weights, networks.gains, networks.biases, strict=True)
        (first,), inner, (last,) = ([conv(*each) for each in zip(w[k], g[k], b[k], strict=True)] for w, g, b in stages)
        y = first(x)
        for block in range(nresblocks):
            f = y
            for layer in inner[block * nmlp : (block + 1) * nmlp]:
                f = layer(silu(f))
            y = (y + f) / math.sqrt(2)
        expected = networks.scale[k][:, None, None] * last(silu(y))
        torch.testing.assert_close(torch.cat(evaluate(folded, x), 1), expected)


def test_float64_whatever_the_default_type():
    """The folded 1 / sqrt(2) is exact."""
    networks = randomise(ConvolutionalNetworks(1, 1, 1, 3, 1, 1))
    expected = networks.fold()
    torch.set_default_dtype(torch.float32)
    for one, other in zip(networks.fold()[0], expected[0], strict=True):
        assert torch.equal(one[0][0], other[0][0])


def test_squeeze_and_factor_out():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    squeezed = squeeze(x)
    assert squeezed[0, :, 0, 1].tolist() == [2, 3, 6, 7]
    kept, latents = factor_out(squeezed)
    assert kept[0, :, 0, 1].tolist() == [2, 7]
    assert latents[0, :, 0, 1].tolist() == [3, 6]
    assert torch.equal(unsqueeze(factor_in(kept, latents)), x)
    several = torch.randn(2, 3, 4, 6 - 2)
    assert torch.equal(unsqueeze(squeeze(several)), several)


def test_level_map_of_figure_c1():
    """Four levels for L = 32; a position is followed by hand from square to square."""
    level_map = small(nchannels=3, L=32).level_map
    assert [int((level_map == h).sum()) for h in range(4)] == [1536, 768, 384, 384]
    for i in range(32):
        for j in range(32):
            h, row, column = 0, i, j
            while h < 3 and (row + column) % 2 == 0:
                h, row, column = h + 1, row // 2, column // 2
            assert (level_map[:, i, j] == h).all()


def test_level_map_names_the_levels_of_latents():
    """A change of scale h's parameters moves the latents of h and above, and no other."""
    flow = randomise(small(L=16), 0.3)
    x = torch.randn(1, 1, 16, 16)
    before = flow(x)[0]
    for h in (2, 1, 0):
        for parameter in flow.level_parameters(h):
            parameter.add_(0.1 * torch.randn_like(parameter))
        flow.eval()
        after = flow(x)[0]
        assert torch.equal((after != before)[0], flow.level_map >= h)
        before = after


def test_about_as_many_parameters_as_the_rg_flow_it_is_compared_with():
    with torch.device("meta"):
        pairs = [(RealNVP(), RGFlow()), (RealNVP(nlayers=3), RGFlow(nlayers=4))]  # CelebA, MSDS
    for pair in pairs:
        counts = [sum(parameter.numel() for parameter in flow.parameters()) for flow in pair]
        assert counts[0] == pytest.approx(counts[1], rel=0.1)


def test_multiply_adds():
    """As torch counts the operations of the convolutions that run."""
    flow = small(nchannels=3, L=16, nlayers=3)
    with FlopCounterMode(display=False) as counter:
        flow(torch.randn(1, 3, 16, 16))
    assert counter.get_total_flops() == 2 * flow.multiply_adds()


def test_log_prob_of_the_untrained_flow_is_the_priors():
    x = torch.randn(3, 1, 8, 8)
    expected = {"laplace": torch.distributions.Laplace(0.0, 0.5**0.5), "gaussian": torch.distributions.Normal(0.0, 1.0)}
    for name, prior in expected.items():
        torch.testing.assert_close(small(prior=name).log_prob(x), prior.log_prob(x).sum((1, 2, 3)))


def test_every_parameter_matters():
    flow = randomise(small(L=16), 0.3).requires_grad_(True)
    flow.log_prob(torch.randn(2, 1, 16, 16)).sum().backward()
    for name, parameter in flow.named_parameters():
        assert (parameter.grad != 0).float().mean() > 0.99, name
    assert sum(len(flow.level_parameters(h)) for h in range(3)) == len(list(flow.parameters()))


@pytest.mark.parametrize(
    "name, value, words",
    [
        *(("L", 12, "L 12"), ("nlayers", (1, 2, 3), "nlayers 1,2,3"), ("nlayers", 0, "nlayers 0")),
        *(("nhidden", 0, "nhidden 0"), ("prior", "cauchy", "prior 'cauchy'")),
    ],
)
def test_bad_settings_are_refused(name, value, words):
    with pytest.raises(ValueError, match=words):
        small(**{name: value})
