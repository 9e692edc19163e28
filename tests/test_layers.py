"""Patch bijectors and the residual networks in them."""

import copy
import math
from unittest.mock import Mock

import pytest
import torch
from checks import check_bijector, jacobian, randomise
from torch import nn
from torch.nn.functional import linear
from torch.utils._pytree import tree_flatten

from layers import PATCH_BIJECTORS, fold
from layers.autoregressive import autoregressive_masks
from layers.convolution import ConvolutionalNetworks
from layers.coupling import join_checkerboard, split_checkerboard
from layers.fold import evaluate, folded_together
from layers.residual import ResidualNetworks
from layers.spline_lu import Linear


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


def test_a_linear_map_moves_every_entry_and_its_determinant_is_that_of_its_matrix():
    linear_map = randomise(Linear(12), 1.0)
    patches = torch.randn(5, 3, 2, 2)
    matrix = linear_map(torch.eye(12).reshape(12, 3, 2, 2))[0].flatten(1)
    mapped, log_det = linear_map(patches)
    assert torch.allclose(mapped.flatten(1), patches.flatten(1) @ matrix) and (matrix != 0).all()
    assert torch.allclose(log_det, torch.det(matrix).log().expand(5))


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


def test_second_derivatives():
    networks, x = build_networks(), torch.randn(5, 6, requires_grad=True)
    inputs, second = [x, *networks.parameters()], []
    for function in (networks, lambda x: folded(networks, x)):
        gradients = torch.autograd.grad(function(x).sum(), inputs, create_graph=True)
        second.append(torch.autograd.grad(sum(each.square().sum() for each in gradients), inputs))
    torch.testing.assert_close(*second)


def test_autoregressive_masks_by_gradients():
    """Output i depends on inputs j < i, all of them (j <= i without strict)."""
    for strict in (True, False):
        masks = autoregressive_masks(6, 13, 2, strict)
        networks = randomise(ResidualNetworks(1, 1, 6, 13, 1, 2, [masks], [False]))
        expected = torch.ones(6, 6, dtype=bool).tril(-1 if strict else 0)
        assert torch.equal(jacobian(networks, torch.randn(1, 6)) != 0, expected)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("make", [build_networks, lambda: ConvolutionalNetworks(1, 6, 6, 7, 1, 2)])
def test_steps_follow_every_change_of_the_parameters(make, mode):
    """Also through `.data`, by a fused optimiser, and of the type; not within `folded_together`."""
    networks = make().train(mode)

    @torch.no_grad()
    def value():
        return [tensor.double() for tensor in tree_flatten(networks.steps())[0] if torch.is_tensor(tensor)]

    before, state = value(), copy.deepcopy(networks.state_dict())

    def changed():
        return not all(map(torch.allclose, value(), before))

    with torch.no_grad(), folded_together(networks):
        for parameter in networks.parameters():
            parameter.data.add_(0.1)
        assert not changed()
    assert changed()
    networks.load_state_dict(state)
    assert not changed()
    optimizer = torch.optim.AdamW(networks.parameters(), lr=0.1, fused=True)
    sum(parameter.square().sum() for parameter in networks.parameters()).backward()
    optimizer.step()
    assert changed()
    networks.load_state_dict(state)
    before = [tensor.float().double() for tensor in before]
    assert not all(map(torch.equal, value(), before))
    networks.float()
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(value(), before, strict=True))


def test_without_gradients_all_networks_are_folded_once():
    """Convolutional ones and those with masks too, and in an inner context none anew."""
    every = nn.ModuleList([build_networks((False, True), MASKS), ConvolutionalNetworks(1, 6, 6, 7, 1, 2)])
    for networks in every:
        networks.fold = Mock(side_effect=networks.fold)
    for gradients, expected in ((True, 4), (False, 5)):
        with torch.set_grad_enabled(gradients), folded_together(every), folded_together(every):
            for networks in [*every, *every]:
                networks.steps()
        assert [networks.fold.call_count for networks in every] == [expected - 2, expected - 2]


def test_initial_weights():
    """Uniform within sqrt(2.81 * 3 / fan_in), gains equal to the norms, biases 0, beta 1."""
    block = ResidualNetworks(1, 2, 24, 64, 1, 2).blocks[0]
    for weight in block.weights:
        bound = math.sqrt(2.81 * 3 / weight.shape[1])
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.var().item() == pytest.approx(2.81 / weight.shape[1], rel=0.1)
    torch.testing.assert_close(block.gain, torch.cat([weight.square().sum(1).sqrt() for weight in block.weights], 1))
    assert (block.bias == 0).all() and (block.beta == 1).all()
