"""Patch bijectors and the residual networks in them."""

import math
from unittest.mock import Mock

import pytest
import torch
from checks import check_bijector, jacobian, randomise
from torch import nn
from torch.nn.functional import linear

from layers import PATCH_BIJECTORS, fold
from layers.autoregressive import autoregressive_masks
from layers.coupling import join_checkerboard, split_checkerboard
from layers.fold import evaluate, folded_together
from layers.residual import ResidualNetworks


@pytest.mark.parametrize("name", PATCH_BIJECTORS)
@pytest.mark.parametrize("nchannels, kernel_size", [(1, 2), (3, 2), (1, 4), (3, 4)])
@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_bijector_that_starts_as_the_identity(name, nchannels, kernel_size, nlayers):
    bijector = PATCH_BIJECTORS[name](nchannels, kernel_size, nlayers, nresblocks=2, nmlp=2, nhidden=7)
    x = torch.randn(3, nchannels, kernel_size, kernel_size)
    y, log_det = bijector(x)
    assert torch.equal(y, x) and torch.equal(log_det, torch.zeros(3))
    check_bijector(randomise(bijector), x)


def test_checkerboard_of_a_counted_patch():
    even, odd = split_checkerboard(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert sorted(even[0].tolist()) == [0, 2, 5, 7, 8, 10, 13, 15]
    assert sorted(odd[0].tolist()) == [1, 3, 4, 6, 9, 11, 12, 14]
    patches = torch.randn(5, 3, 4, 4)
    assert torch.equal(join_checkerboard(*split_checkerboard(patches), patches.shape), patches)


def test_first_rnvp_coupling_keeps_the_even_entries():
    """x2' = x2 exp(s1(x1)) + t1(x1): an odd entry of the output depends on its own input and on all even ones."""
    rnvp = randomise(PATCH_BIJECTORS["rnvp"](1, 4, 1, 1, 1, 9))
    even, odd = split_checkerboard(torch.arange(16).reshape(1, 1, 4, 4))
    filled = jacobian(lambda x: rnvp(x)[0], torch.randn(1, 1, 4, 4)) != 0
    assert torch.equal(filled[odd[0]][:, odd[0]], torch.eye(8, dtype=bool))
    assert filled[odd[0]][:, even[0]].all() and filled[even[0]].all()


def build_networks(skips=(True, True), masks=None, nsteps=1):
    """Two networks 6 -> 6 with hidden layers of width 11, two per residual block, for each step."""
    networks = ResidualNetworks(nsteps, 2, 6, 11, len(skips), 2, masks, skips)
    return randomise(networks, 0.5).requires_grad_(True)


def folded(networks, x):
    """What a flow computes: (K, G, N, n)."""
    return torch.stack([evaluate(step, x) for step in networks.steps()])


def results(networks, function, x):
    """Values, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    y = function(x)
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *networks.parameters()])]


def assert_folding_changes_nothing(networks, **tolerances):
    x = torch.randn(5, 6)
    expected = results(networks, networks, x)
    torch.testing.assert_close(results(networks, lambda x: folded(networks, x), x), expected, **tolerances)


@pytest.mark.parametrize("skips", [(True,), (False, True, True)])
def test_residual_networks_follow_the_formulas(skips):
    """Written down for single networks, on PyTorch's own weight normalisation."""
    networks, x = build_networks(skips, nsteps=3), torch.randn(5, 6)
    for g, outputs in enumerate(networks(x).flatten(0, 1)):
        y = x
        for block, skip in zip(networks.blocks, skips, strict=True):
            gains, biases, betas = block.gain[g].split([11, 11, 6]), block.bias[g].split([11, 11, 6]), block.beta[g]
            f = y
            for weight, gain, bias, beta in zip(block.weights, gains, biases, betas.split([6, 11, 11]), strict=True):
                f = linear(f * torch.sigmoid(beta * f), torch._weight_norm(weight[g].T, gain[:, None]), bias)
            y = (y + f) / math.sqrt(2) if skip else f
        torch.testing.assert_close(outputs, y * networks.scale[g])


MASKS = [autoregressive_masks(6, 11, 2, strict) for strict in (True, False)]  # the first clears whole columns


@pytest.mark.parametrize("piece", [1, 2**19])  # one step at a time, all at once
@pytest.mark.parametrize("skips, masks", [((True,), None), ((False, True, True), None), ((False, True), MASKS)])
def test_folding_changes_no_value_and_no_gradient(skips, masks, piece, monkeypatch):
    """Nor does it where beta = 0, which is x / 2 and which beta passes in training."""
    monkeypatch.setattr(fold, "PIECE", piece)
    networks = build_networks(skips, masks, nsteps=3)
    assert_folding_changes_nothing(networks)
    networks.blocks[0].beta.data[:, ::2] = 0
    assert_folding_changes_nothing(networks, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("alone, piece", [(0, 2**19), (2, 300), (4, 1)])
def test_small_networks_folded_together_are_those_folded_alone(alone, piece, monkeypatch):
    """Of 2, 2 and 1 steps, with largest weights of 484, 484 and 242 entries, and one of another kind with 242."""
    every = nn.ModuleList([*(build_networks(nsteps=nsteps) for nsteps in (2, 2, 1)), build_networks((True,))])
    x = torch.randn(5, 6)

    def gradients():
        return results(every, lambda x: sum(folded(networks, x).square().sum() for networks in every), x)

    expected = gradients()
    monkeypatch.setattr(fold, "PIECE", piece)
    for networks in every:
        networks.fold = Mock(side_effect=networks.fold)
    with folded_together(every):
        torch.testing.assert_close(gradients(), expected)
    assert sum(networks.fold.call_count for networks in every) == alone
    gradients()
    assert sum(networks.fold.call_count for networks in every) == alone + 4  # nothing is held any longer


def test_second_derivatives_by_parameters_are_refused():
    """Those by the input are right, and so is their gradient by a parameter."""
    networks, x = build_networks(), torch.randn(5, 6, requires_grad=True)
    block = networks.blocks[1]
    for parameter in (*block.weights, block.gain, block.beta, networks.scale):
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(folded(networks, x).sum(), parameter, create_graph=True)
    second = []
    for function in (networks, lambda x: folded(networks, x)):
        (gradient,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), [x, networks.blocks[0].weights[1]]))
    torch.testing.assert_close(*second)


def test_autoregressive_masks_by_gradients():
    """Output i depends on inputs j < i, all of them (j <= i without strict)."""
    for strict in (True, False):
        masks = autoregressive_masks(6, 13, 2, strict)
        networks = randomise(ResidualNetworks(1, 1, 6, 13, 1, 2, [masks], [False]))
        expected = torch.ones(6, 6, dtype=bool).tril(-1 if strict else 0)
        assert torch.equal(jacobian(networks, torch.randn(1, 6)) != 0, expected)


def test_folded_weights_follow_every_change_of_the_parameters():
    networks, x = build_networks().eval(), torch.randn(5, 6)

    def value():
        with torch.no_grad():
            return folded(networks, x)

    before = value()
    networks.fold = counted = Mock(side_effect=networks.fold)
    value()
    assert counted.call_count == 0  # kept
    networks.steps()
    assert counted.call_count == 1  # not where a gradient is asked for
    optimizer = torch.optim.AdamW(networks.parameters(), lr=0.1, fused=True)
    state = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    folded(networks, x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(value(), before)
    networks.load_state_dict(state)
    assert torch.equal(value(), before)
    networks.float()
    assert torch.allclose(folded(networks, x.float()).double(), before, atol=1e-4)


@pytest.mark.parametrize("frozen", [lambda networks: networks, lambda networks: networks.scale])  # all, or only some
def test_a_sample_first_then_the_gradient_of_the_input(frozen):
    """What was folded in inference mode serves autograd afterwards, twice."""
    networks = build_networks().eval()
    frozen(networks).requires_grad_(False)
    with torch.inference_mode():
        folded(networks, torch.randn(5, 6))
    for _ in range(2):
        x = torch.randn(5, 6, requires_grad=True)
        folded(networks, x).sum().backward()
        assert x.grad.abs().sum() > 0


def test_initial_weights():
    """Uniform within sqrt(2.81 * 3 / fan_in), gains equal to the norms, biases 0, beta 1."""
    block = ResidualNetworks(1, 2, 24, 64, 1, 2).blocks[0]
    for weight in block.weights:
        bound = math.sqrt(2.81 * 3 / weight.shape[1])
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.var().item() == pytest.approx(2.81 / weight.shape[1], rel=0.1)
    torch.testing.assert_close(block.gain, torch.cat([weight.square().sum(1).sqrt() for weight in block.weights], 1))
    assert (block.bias == 0).all() and (block.beta == 1).all()
