"""The whole flows: bijection, log-determinant, levels, causal cones, samples, contract; the parts of Real NVP."""

import math
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from checks import check_bijector, jacobian, levels, randomise
from torch import nn
from torch.distributions import Laplace, Normal
from torch.nn.functional import silu
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from flow import RealNVP, RGFlow
from flow.hierarchy import generation_cone
from flow.latents import decode
from flow.preprocess import bits_per_dim
from layers import PATCH_BIJECTORS
from layers.convolution import ChannelCouplings, CheckerboardCouplings, ConvolutionalNetworks, evaluate
from layers.coupling import join_diagonal, join_squares, split_diagonal, split_squares
from layers.fold import folded_together
from layers.networks import HELD
from layers.spline_lu import Linear

both = pytest.mark.parametrize("model", [RGFlow, RealNVP])
SIZES = [(1, 2, 2), (1, 4, 4), (3, 4, 4), (1, 8, 4), (3, 8, 4), (1, 16, 4), (1, 8, 2), (1, 12, 6)]  # C, L, m
RG_FLOW = [{"subnet": subnet, "share_levels": shared} for subnet in PATCH_BIJECTORS for shared in (False, True)]
CASES = [(RGFlow, settings, *size) for settings in RG_FLOW for size in SIZES] + [(RGFlow, {"nmlp": 2}, 3, 16, 4)]
CASES += [(RealNVP, {"nmlp": 2, "nlayers": 3}, *size) for size in (*SIZES, (3, 16, 4), (3, 8, 2), (3, 12, 6))]


def small(model=RGFlow, **settings):
    return model(**{"nchannels": 1, "L": 8, "nlayers": 2, "nresblocks": 1, "nmlp": 1, "nhidden": 8, **settings})


@pytest.mark.parametrize("model, settings, nchannels, L, m", CASES)
def test_bijection_and_log_det(model, settings, nchannels, L, m):
    settings = {"nlayers": 1 if L == 16 else 2, **settings}
    flow = small(model, nchannels=nchannels, L=L, kernel_size=m, **settings)
    check_bijector(randomise(flow, 0.3), 2 * torch.randn(2, nchannels, L, L))


CASES = [("rnvp", 1, 16), ("rnvp", 2, 16), ("rnvp", 1, 32), ("ar", 1, 16), ("ar", 2, 16), ("spline", 1, 16)]
CASES += [("spline_lu", 1, 16)]


@pytest.mark.parametrize("subnet, nlayers, L", CASES)
def test_jacobian_fills_the_causal_cones(subnet, nlayers, L):
    cones = torch.stack([generation_cone(i, j, L, 4).flatten() for i in range(L) for j in range(L)])
    assert not cones.all(), "every cone is full, nothing to see"
    flow, x = randomise(small(L=L, subnet=subnet, nlayers=nlayers)), torch.randn(1, 1, L, L)
    forward = jacobian(lambda value: flow(value)[0], x)
    inverse = jacobian(lambda value: flow.inverse(value)[0], flow(x)[0])
    for pattern in (forward != 0, inverse.T != 0):  # both as (latents, pixels)
        assert not (pattern & ~cones).any()
        assert torch.equal(pattern, cones) or (subnet, nlayers) == ("ar", 1)


@both
def test_level_map_names_the_levels_of_latents(model):
    """A change of level h's parameters moves the latents of h and above, and no other."""
    flow = randomise(small(model, nchannels=3, L=16), 0.3)
    assert torch.equal(dict(flow.named_buffers())["level_map"], levels(flow).expand(3, 16, 16))
    x = torch.randn(1, 3, 16, 16)
    before = flow(x)[0]
    for h in (2, 1, 0):
        for parameter in flow.level_parameters(h):
            parameter.add_(0.1 * torch.randn_like(parameter))
        after = flow.eval()(x)[0]
        assert torch.equal((after != before)[0], flow.level_map >= h)
        before = after


@both
def test_every_parameter_matters_at_one_level(model):
    flow = randomise(small(model, L=16), 0.3).requires_grad_(True)
    flow.log_prob(torch.randn(30, 1, 16, 16)).sum().backward()
    for name, parameter in flow.named_parameters():
        assert (parameter.grad != 0).float().mean() > 0.99, name
    assert sum(len(flow.level_parameters(h)) for h in range(3)) == len(list(flow.parameters()))


def count(flow):
    return sum(parameter.numel() for parameter in flow.parameters())


def test_default_networks_and_their_repr():
    """Four networks of four residual blocks 24 -> 512 -> 512 -> 24 in each RNVP block, 64, 16, 4 and 1 patches."""
    with torch.device("meta"):
        flow, baseline, pair = RGFlow(), RealNVP(), (RGFlow(nlayers=4), RealNVP(nlayers=3))
        shared = RGFlow(nlayers=4, share_levels=True)
    assert count(pair[0]) == 4 * count(shared) and shared.level_parameters(1) == []
    products, rest = 4 * (24 * 512 + 512 * 512 + 512 * 24), 4 * (2 * (512 + 512 + 24) + (24 + 512 + 512)) + 24
    assert flow.multiply_adds() == 2 * (8 * 64 + 6 * 16 + 4 * 4 + 2 * 1) * 4 * products == pytest.approx(5.74e9, 1e-3)
    assert count(flow) == 2 * (8 + 6 + 4 + 2) * 4 * (products + rest) == 185_516_800
    for ours, theirs in ((flow, baseline), pair):  # of CelebA and MSDS: about as many parameters
        assert count(theirs) == pytest.approx(count(ours), rel=0.1)
    text = repr(flow)
    assert "3x32x32 image, 4 levels, kernel_size 4" in text and text.count("\n") < 40
    assert "16 steps x 2 networks of 4 residual blocks 24 -> 512 -> 512 -> 24" in text


@both
@pytest.mark.parametrize("name, prior", [("laplace", Laplace(0.0, 0.5**0.5)), ("gaussian", Normal(0.0, 1.0))])
def test_log_prob_of_the_untrained_flow_is_the_priors(model, name, prior):
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(small(model, prior=name).log_prob(x), prior.log_prob(x).sum((1, 2, 3)))


def test_sampling_temperatures():
    """The untrained flow is the identity: the spread of samples per level is the prior's at that temperature."""
    for prior, power in (("laplace", 1.0), ("gaussian", 0.5)):
        flow = small(L=16, prior=prior, nlayers=1, nhidden=2)
        temperatures = (0.25, 1.0, 4.0)
        x = flow.sample(4000, temperatures, torch.Generator().manual_seed(1))
        assert not x.requires_grad
        for h, T in enumerate(temperatures):
            assert x[:, flow.level_map == h].std().item() == pytest.approx(T**power, rel=0.05)
    wide = flow.sample(4000, torch.where(flow.level_map == 0, 9.0, 0.0))
    assert wide[:, flow.level_map == 0].std().item() == pytest.approx(3, rel=0.05)
    assert (wide[:, flow.level_map > 0] == 0).all()


@pytest.mark.parametrize("temperature, word", [((1.0, 1.0), "3, one per level"), (-1.0, "-1"), (float("nan"), "nan")])
def test_bad_temperatures_are_refused(temperature, word):
    with pytest.raises(ValueError, match=f"temperature.*{word}"):
        small(L=16).sample(1, temperature)


@both
def test_bad_settings_are_refused(model):
    bad = [("L", 12, "L 12"), ("nlayers", (1, 2, 3), "nlayers 1,2,3"), ("nlayers", (1, 0), "nlayers 1,0")]
    bad += [("nlayers", 0, "nlayers 0,0"), ("nhidden", 0, "nhidden 0"), ("prior", "cauchy", "prior 'cauchy'")]
    for name, value, words in bad + [("subnet", "mlp", "subnet 'mlp'")] * (model == RGFlow):
        with pytest.raises(ValueError, match=words):
            small(model, **{name: value})
    with pytest.raises(ValueError, match="nlayers 1,1: must be one number with share_levels"):
        small(nlayers=(1, 1), share_levels=True)


@both
def test_images_of_another_shape_are_refused(model):
    for shape in ((2, 1, 16, 16), (2, 3, 8, 8), (1, 8, 8)):
        for function in (small(model), small(model).inverse):
            with pytest.raises(ValueError, match=r"must be \(B, 1, 8, 8\)"):
                function(torch.randn(shape))


def test_first_nonfinite_level():
    flow = small(L=16)
    x = torch.randn(2, 1, 16, 16)
    flow.log_prob(x).sum().backward()
    assert flow.first_nonfinite_level(x) is None
    for h in (1, 0):
        flow.level_parameters(h)[0].grad.fill_(float("nan"))
    assert flow.first_nonfinite_level(x) == 1  # backpropagation comes from the top
    for layer, value, level in ((flow.decimators[1], "inf", 1), (flow.disentanglers[0], "nan", 0)):
        for parameter in layer.parameters():
            parameter.data.fill_(float(value))
        assert flow.first_nonfinite_level(x) == level


@pytest.mark.parametrize("k", [0, 1])
def test_what_a_coupling_keeps(k):
    """The Jacobian of coupling k is the identity on the kept half, and the moved half does not move itself."""
    positions = torch.arange(4)
    checkerboard = ((positions[:, None] + positions) % 2 == k).expand(4, 4, 4).flatten()
    half = (positions // 2 == k).repeat_interleave(16)
    for couplings, kept in ((CheckerboardCouplings, checkerboard), (ChannelCouplings, half)):
        bijector = randomise(couplings(4, k + 1, 1, 1, 5))
        if k:  # the first coupling as the identity
            bijector.networks.scale[0] = 0
        matrix = jacobian(lambda value, bijector=bijector: bijector(value)[0], torch.randn(1, 4, 4, 4))
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
    torch.testing.assert_close(networks.fold(), expected, rtol=0, atol=0)


def test_squares_and_their_diagonals():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    quarters = split_squares(x)
    kept, latents = split_diagonal(quarters)
    assert torch.cat(quarters, 1)[0, :, 0, 1].tolist() == [2, 3, 6, 7]
    assert kept[0, :, 0, 1].tolist() == [2, 7] and latents[0, :, 0, 1].tolist() == [3, 6]
    assert torch.equal(join_squares(join_diagonal(kept, latents)), x)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("model, settings", [(RealNVP, {"nlayers": 3}), *((RGFlow, each) for each in RG_FLOW)])
def test_multiply_adds(model, settings, inverse):
    """As torch counts the operations of the matrix products and convolutions that run. It also counts the product of a
    linear map's factors, and does not count triangular solves."""
    flow = small(model, nchannels=3, L=16, nmlp=2, **settings)
    with FlopCounterMode(display=False) as counter:
        (flow.inverse if inverse else flow)(torch.randn(1, 3, 16, 16))
    expected = flow.multiply_adds(inverse)
    for bijector, l, _ in flow.layers():
        number = sum(isinstance(module, Linear) for module in bijector.modules())
        expected += number * (-(48**2) * (l // 4) ** 2 if inverse else 48**3)
    assert counter.get_total_flops() == 2 * expected


TRANSFORMS = [(RGFlow, {"subnet": subnet}) for subnet in PATCH_BIJECTORS] + [(RealNVP, {})]


@pytest.fixture(params=TRANSFORMS, ids=lambda param: param[1].get("subnet", "realnvp"))
def trainable(request):
    model, settings = request.param
    return randomise(small(model, L=4, nlayers=2, nmlp=2, **settings), 0.3).requires_grad_(True)


def test_folded_parameters_are_held_for_themselves_alone(trainable):
    """Within `folded_together`: not for a copy, for other parameters, for derivatives, nor in another thread."""
    flow, other, x = trainable, deepcopy(trainable), torch.randn(2, 1, 4, 4)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    expected = other.log_prob(x)
    flow.log_prob(x).sum().backward()
    gradients = [parameter.grad for parameter in flow.parameters()]
    flow.zero_grad(set_to_none=True)
    with torch.no_grad(), folded_together(flow):
        copy = deepcopy(flow)
        copy.load_state_dict(other.state_dict())
        z, log_det = torch.func.functional_call(flow, dict(other.named_parameters()), (x,))
        with torch.enable_grad():
            flow.log_prob(x).sum().backward()
        with ThreadPoolExecutor() as threads:
            elsewhere = threads.submit(HELD.get).result()
    torch.testing.assert_close(copy.log_prob(x), expected)
    torch.testing.assert_close(other.prior.log_prob(z).sum((1, 2, 3)) + log_det, expected)
    torch.testing.assert_close([parameter.grad for parameter in flow.parameters()], gradients)
    assert not elsewhere and not HELD.get()


@pytest.mark.parametrize("training", [True, False])
def test_no_images_at_all(trainable, training):
    x = torch.zeros(0, 1, 4, 4)
    trainable.train(training)
    for function in (trainable, trainable.inverse):
        assert [each.shape for each in function(x)] == [(0, 1, 4, 4), (0,)]
    assert trainable.sample(0).shape == decode(trainable, x).shape == (0, 1, 4, 4)
    assert bits_per_dim(trainable, x.to(torch.uint8)).shape == (0,)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"compile": True}])
def test_transforms_of_torch_func(trainable, training, how):
    """vmap, grad, jacrev, jvp and functional_call, of images and of parameters, against single calls of autograd."""
    flow, x = trainable.train(training), torch.randn(3, 1, 4, 4)
    parameters = {name: parameter.detach() for name, parameter in flow.named_parameters()}

    def loss(parameters, x):
        z, log_det = torch.func.functional_call(flow, parameters, (x[None],))
        return (flow.prior.log_prob(z).sum() + log_det).sum()

    values, z, tangent = flow.log_prob(x), flow.inverse(x[:1])[0].detach(), torch.randn(1, 1, 4, 4)
    expected = [torch.autograd.grad(value, [*flow.parameters()], retain_graph=True) for value in values]
    expected = [torch.stack(each) for each in zip(*expected, strict=True)]
    flow.accelerate(**how)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(torch.func.vmap(lambda x: flow.log_prob(x[None])[0])(x), values)
            torch.testing.assert_close(torch.func.vmap(loss, (None, 0))(parameters, x), values)
            own = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
            torch.testing.assert_close([*own.values()], expected)
            several = {name: torch.stack((each, each, each)) for name, each in parameters.items()}
            torch.testing.assert_close(torch.func.vmap(loss)(several, x), values)
            rows = torch.func.jacrev(lambda z: flow.inverse(z[None])[0][0])(x[0]).flatten(3)
            columns = torch.func.jvp(lambda x: flow(x)[0], (z,), (tangent,))[1]
            torch.testing.assert_close(rows @ columns.flatten(), tangent[0])


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives(trainable, training):
    """By the image and by parameters, against differences of first derivatives."""
    flow, x = trainable.train(training), torch.randn(2, 1, 4, 4, requires_grad=True)
    inputs = [x, *flow.parameters()]
    directions = [torch.randn_like(each) for each in inputs]

    def gradients(**how):
        return torch.autograd.grad(flow.log_prob(x).sum(), inputs, **how)

    slope = sum((a * b).sum() for a, b in zip(gradients(create_graph=True), directions, strict=True))
    second, ends = torch.autograd.grad(slope, inputs), []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for each, direction in zip(inputs, directions, strict=True):
                each.add_(direction, alpha=step)
        ends.append(gradients())
    differences = [(a - b) / 2e-6 for a, b in zip(*ends, strict=True)]
    torch.testing.assert_close(second, tuple(differences), rtol=1e-4, atol=1e-4)
