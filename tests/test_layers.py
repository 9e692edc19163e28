"""Patch bijectors and the residual networks in them."""

import math
from unittest.mock import Mock

import pytest
import torch
from checks import check_bijector, jacobian, randomise
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from layers import PATCH_BIJECTORS, residual
from layers.autoregressive import autoregressive_masks
from layers.coupling import join_checkerboard, split_checkerboard
from layers.residual import ResidualNetworks, evaluate, folded_together


@pytest.mark.parametrize("name", PATCH_BIJECTORS)
@pytest.mark.parametrize("nchannels, kernel_size", [(1, 2), (3, 2), (1, 4), (3, 4)])
@pytest.mark.parametrize("nlayers", [1, 2, 3])
def test_bijector(name, nchannels, kernel_size, nlayers):
    bijector = PATCH_BIJECTORS[name](nchannels, kernel_size, nlayers, nresblocks=2, nmlp=2, nhidden=7)
    check_bijector(randomise(bijector), torch.randn(3, nchannels, kernel_size, kernel_size))


@pytest.mark.parametrize("name", PATCH_BIJECTORS)
def test_untrained_bijector_is_the_identity(name):
    x = torch.randn(3, 3, 4, 4)
    y, log_det = PATCH_BIJECTORS[name](3, 4, 2, 2, 2, 16)(x)
    assert torch.equal(y, x)
    assert torch.equal(log_det, torch.zeros(3))


def test_checkerboard_of_a_counted_patch():
    even, odd = split_checkerboard(torch.arange(16.0).reshape(1, 1, 4, 4))
    assert sorted(even[0].tolist()) == [0, 2, 5, 7, 8, 10, 13, 15]
    assert sorted(odd[0].tolist()) == [1, 3, 4, 6, 9, 11, 12, 14]
    patches = torch.randn(5, 3, 4, 4)
    assert torch.equal(join_checkerboard(*split_checkerboard(patches), patches.shape), patches)


def test_first_rnvp_half_step_keeps_the_even_entries():
    """x2' = x2 exp(s1(x1)) + t1(x1): an odd entry of the output depends on its own input and on all even ones."""
    rnvp = randomise(PATCH_BIJECTORS["rnvp"](1, 4, 1, 1, 1, 9))
    even, odd = split_checkerboard(torch.arange(16).reshape(1, 1, 4, 4))
    matrix = jacobian(lambda x: rnvp(x)[0], torch.randn(1, 1, 4, 4))
    odd_to_odd = matrix[odd[0]][:, odd[0]]
    assert torch.equal(odd_to_odd != 0, torch.eye(8, dtype=bool))
    assert (matrix[odd[0]][:, even[0]] != 0).all()
    assert (matrix[even[0]] != 0).all()


def layers(block, pick=lambda parameter: parameter):
    """(weight, gain, bias, beta) of each linear layer of a residual block, or `pick` of the parameters."""
    weights = [pick(weight) for weight in block.weights]
    sizes = [weight.shape[-2:] for weight in block.weights]
    outs, ins = [nout for _, nout in sizes], [nin for nin, _ in sizes]
    vectors = [pick(block.gain).split(outs, -1), pick(block.bias).split(outs, -1), pick(block.beta).split(ins, -1)]
    return list(zip(weights, *vectors, strict=True))


class Plain(nn.Module):
    """One residual network, written down as the formulas stand, on PyTorch's own weight normalisation."""

    def __init__(self, networks, g):
        super().__init__()
        self.linears, self.betas, self.skips, self.masks = nn.ModuleList(), [], [], []
        for block in networks.blocks:
            own = layers(block, lambda parameter: parameter[g].detach().clone())
            for (weight, gain, bias, beta), mask in zip(own, block.masks, strict=True):
                linear = nn.Linear(*weight.shape)
                linear.weight.data = (weight * (1 if mask is None else mask)).T.contiguous()
                linear.bias.data = bias
                linear = weight_norm(linear, dim=0)
                linear.parametrizations.weight.original0.data = gain[:, None]
                self.linears.append(linear)
                self.betas.append(beta.requires_grad_())
            self.skips.append(block.skip)
        self.scale = networks.scale[g].detach().clone().requires_grad_()

    def forward(self, x):
        per_block = len(self.linears) // len(self.skips)
        for n, skip in enumerate(self.skips):
            y = x
            for k in range(n * per_block, (n + 1) * per_block):
                y = self.linears[k](y * torch.sigmoid(self.betas[k] * y))
            x = (x + y) / math.sqrt(2) if skip else y
        return x * self.scale


def build_networks(skips=(True, True), masks=None, nsteps=1):
    networks = ResidualNetworks(nsteps, 2, 6, 11, len(skips), 2, masks, skips)
    randomise(networks, 0.5).requires_grad_(True)
    return networks


@pytest.mark.parametrize("piece", [1, 2**19])  # one half-step at a time, all at once
@pytest.mark.parametrize("skips", [(True,), (True, True), (False, True, True)])
def test_residual_networks_follow_the_formulas(skips, piece, monkeypatch):
    """Values and the gradient of every parameter and of the input, for three half-steps of two networks."""
    monkeypatch.setattr(residual, "PIECE", piece)
    networks = build_networks(skips, nsteps=3)
    x = torch.randn(5, 6, requires_grad=True)
    target = torch.randn(6, 5, 6)
    outputs = torch.cat([evaluate(folded, x) for folded in networks.steps()])
    (outputs * target).sum().backward()
    grad_x, x.grad = x.grad, None
    for g in range(6):
        plain = Plain(networks, g)
        y = plain(x)
        torch.testing.assert_close(outputs[g], y)
        (y * target[g]).sum().backward()
        torch.testing.assert_close(networks.scale.grad[g], plain.scale.grad)
        linears, betas = iter(plain.linears), iter(plain.betas)
        for block in networks.blocks:
            for weight, gain, bias, beta in layers(block, lambda parameter, g=g: parameter.grad[g]):
                linear = next(linears)
                originals = linear.parametrizations.weight
                torch.testing.assert_close(weight.T, originals.original1.grad)
                torch.testing.assert_close(gain, originals.original0.grad[:, 0])
                torch.testing.assert_close(bias, linear.bias.grad)
                torch.testing.assert_close(beta, next(betas).grad)
    torch.testing.assert_close(grad_x, x.grad)


@pytest.mark.parametrize("together, piece", [(3, 2**19), (2, 2 * 4 * 11 * 11), (0, 1)])
def test_small_networks_folded_together_are_those_folded_alone(together, piece, monkeypatch):
    """Of 2, 2 and 1 half-steps of two networks, and one of other sizes; `piece` bounds the largest weights."""
    every = nn.ModuleList([*(build_networks(nsteps=nsteps) for nsteps in (2, 2, 1)), build_networks((True,))])
    x = torch.randn(5, 6)

    def gradients():
        every.zero_grad()
        sum(evaluate(folded, x).square().sum() for networks in every for folded in networks.steps()).backward()
        return [parameter.grad for parameter in every.parameters()]

    expected = gradients()
    monkeypatch.setattr(residual, "PIECE", piece)
    for networks in every:
        networks.fold = Mock(side_effect=networks.fold)
    with folded_together(every):
        for one, other in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert sum(networks.fold.call_count for networks in every) == 4 - together
    with torch.no_grad():
        every[0].scale.zero_()
    assert not torch.equal(gradients()[0], expected[0])  # nothing is held any longer


def test_masked_residual_networks_follow_the_formulas():
    masks = [autoregressive_masks(6, 11, 2, strict) for strict in (True, False)]
    networks = build_networks((False, True), masks)
    x = torch.randn(5, 6)
    evaluate(networks.steps()[0], x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in networks.parameters())
    for block in networks.blocks:
        for k, weight in enumerate(block.weights):
            assert (weight.grad[:, getattr(block, f"mask{k}") == 0] == 0).all()
    # PyTorch's weight normalisation makes 0 / 0 of the row that is masked entirely, so it is compared below it.
    networks = build_networks((True, True), [masks[1]] * 2)
    for g in range(2):
        torch.testing.assert_close(evaluate(networks.steps()[0], x)[g], Plain(networks, g)(x))


def test_autoregressive_masks_by_gradients():
    """Output i depends on inputs j < i, all of them (j <= i without strict)."""
    for strict in (True, False):
        masks = autoregressive_masks(6, 13, 2, strict)
        (folded,) = randomise(ResidualNetworks(1, 1, 6, 13, 1, 2, [masks], [False])).steps()
        matrix = jacobian(lambda x, folded=folded: evaluate(folded, x), torch.randn(1, 6))
        expected = torch.ones(6, 6, dtype=bool).tril(-1 if strict else 0)
        assert torch.equal(matrix != 0, expected)


def test_swish_near_zero_beta():
    """beta = 0 is x / 2, and beta passes through 0 in training: value and gradient stay right there."""
    networks = build_networks((True,))
    with torch.no_grad():
        networks.blocks[0].beta[:, ::2] = 0
    x = torch.randn(5, 6)
    evaluate(networks.steps()[0], x).sum().backward()
    for g in range(2):
        plain = Plain(networks, g)
        y = plain(x)
        torch.testing.assert_close(evaluate(networks.steps()[0], x)[g], y, rtol=1e-3, atol=1e-3)
        y.sum().backward()
        betas = torch.cat([beta.grad for beta in plain.betas])
        torch.testing.assert_close(networks.blocks[0].beta.grad[g], betas, rtol=2e-3, atol=2e-3)


def test_folded_weights_follow_every_change_of_the_parameters():
    networks = build_networks()
    x = torch.randn(5, 6)

    def value():
        with torch.no_grad():
            return evaluate(networks.steps()[0], x)

    networks.eval()
    before = value()
    networks.fold = counted = Mock(side_effect=networks.fold)
    value()
    assert counted.call_count == 0  # kept
    networks.steps()
    assert counted.call_count == 1  # not in training
    optimizer = torch.optim.AdamW(networks.parameters(), lr=0.1, fused=True)
    state = {name: tensor.clone() for name, tensor in networks.state_dict().items()}
    evaluate(networks.steps()[0], x).sum().backward()
    optimizer.step()
    assert not torch.equal(value(), before)
    networks.load_state_dict(state)
    assert torch.equal(value(), before)
    networks.float()
    assert torch.allclose(evaluate(networks.steps()[0], x.float()).double(), before, atol=1e-4)


def test_a_sample_first_then_the_gradient_of_the_input():
    """What was folded in inference mode serves autograd afterwards, twice, also with only some parameters frozen."""
    for frozen in (
        lambda networks: networks.requires_grad_(False),
        lambda networks: networks.scale.requires_grad_(False),
    ):
        networks = build_networks().eval()
        frozen(networks)
        with torch.inference_mode():
            evaluate(networks.steps()[0], torch.randn(5, 6))
        for _ in range(2):
            x = torch.randn(5, 6, requires_grad=True)
            evaluate(networks.steps()[0], x).sum().backward()
            assert x.grad.abs().sum() > 0


def test_parameters_of_a_default_network():
    """24 -> 24 with 4 residual blocks of 3 linear layers and width 512, counted by hand."""
    block = (24 * 512 + 512 * 512 + 512 * 24) + 2 * (512 + 512 + 24) + (24 + 512 + 512)
    assert 4 * block + 24 == 1_159_480
    networks = ResidualNetworks(1, 1, 24, 512, 4, 2)
    assert sum(parameter.numel() for parameter in networks.parameters()) == 1_159_480


def test_initial_weights():
    """Uniform within sqrt(2.81 * 3 / fan_in), gains equal to the norms, biases 0, beta 1."""
    block = ResidualNetworks(1, 2, 24, 64, 1, 2).blocks[0]
    for weight, gain, bias, beta in layers(block):
        bound = math.sqrt(2.81 * 3 / weight.shape[1])
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.var().item() == pytest.approx(2.81 / weight.shape[1], rel=0.1)
        torch.testing.assert_close(gain, weight.square().sum(1).sqrt())
        assert (bias == 0).all()
        assert (beta == 1).all()
