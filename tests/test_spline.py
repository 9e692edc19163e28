"""The rational-quadratic spline behind the affine map: its formulas, its inverse, its derivative, its safety."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from checks import randomise

from flow import RGFlow
from layers import spline as module
from layers.spline import CoupleInTraining, Spline, bend, unbend

HARD = [0.0, 1e-9, -1e-9, 2.9999999, 3.0, -3.0, 3.0000001, 30.0, -30.0, 1e4, -1e4]


def set_limits(monkeypatch, edge, cut, steepest):
    """Half the edge of the square, how near its sides a knot may lie, the largest slope of a knot."""
    for name, value in (("EDGE", edge), ("CUT", cut), ("SOFT", 1 / (steepest - 1))):
        monkeypatch.setattr(module, name, value)


def bend_in_training(raw, x):
    """`bend` by what training runs: networks that give 0, behind which the curves come from the bias alone."""
    outputs, head = x.new_zeros(3, 1, len(x)), x.new_zeros(len(x), 9 * len(x))
    return [result.T for result in CoupleInTraining.apply(outputs, x.T, head, raw.flatten())]


def knots(raw, edge, cut, steepest):
    """The five knots (x, y, slope) of one curve: what `raw`, 9 numbers, stands for, one number after the other."""
    soft, unit = 1 / (steepest - 1), raw.sigmoid().unflatten(0, (3, 3)).numpy()
    fraction, slope = cut + (1 - 2 * cut) * unit[:2], (unit[2] + soft) / (1 - unit[2] + soft)
    corner, end = np.full((2, 2), edge) * [[-1], [1]]
    at_middle, at_left, at_right = fraction.T
    middle = corner + (end - corner) * at_middle
    points = [corner, corner + (middle - corner) * at_left, middle, middle + (end - middle) * at_right, end]
    return [(*point, d) for point, d in zip(points, (1, slope[1], slope[0], slope[2], 1), strict=True)]


@pytest.mark.parametrize("limits", [(3.0, 0.2, 10.0), (2.0, 0.3, 4.0)])
def test_the_curve_is_the_rational_quadratic_spline_of_its_knots(limits, monkeypatch):
    """Equations 4 and 5 of Durkan et al., piece by piece; the identity with slope 1 outside. And its inverse."""
    set_limits(monkeypatch, *limits)
    raw, x = 2 * torch.randn(9, 300, 1), 2 * torch.randn(300, 1)
    y, log_slope, *_ = bend(raw, x)
    back, log_slope_back = unbend(raw, y)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-11)
    torch.testing.assert_close(log_slope_back, log_slope, rtol=0, atol=1e-10)
    pieces = set()
    for n, at in enumerate(x.flatten().tolist()):
        expected = at, 1.0
        for k, ((x0, y0, d0), (x1, y1, d1)) in enumerate(pairwise(knots(raw[:, n, 0], *limits))):
            if x0 <= at < x1:
                pieces.add(k)
                s, xi = (y1 - y0) / (x1 - x0), (at - x0) / (x1 - x0)
                denominator = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
                expected = (
                    y0 + (y1 - y0) * (s * xi**2 + d0 * xi * (1 - xi)) / denominator,
                    s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / denominator**2,
                )
        assert y[n].item() == pytest.approx(expected[0], abs=1e-12)
        assert log_slope[n].exp().item() == pytest.approx(expected[1], rel=1e-10)
    assert pieces == {0, 1, 2, 3}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.float64, 1e-9)])
@pytest.mark.parametrize("extreme", [0.0, 50.0, -50.0])
def test_curve_is_finite_and_exact_at_hard_points(extreme, dtype, tolerance):
    """Where pieces meet (at 0 for numbers 0), at the ends and far outside; the steepest and the flattest curves."""
    x = torch.tensor(HARD, dtype=dtype)[:, None].requires_grad_()
    rest, outside = x[:, 0].abs() != 3, x.abs() > 3  # at 3 versions of PyTorch differ in the derivative of clamp
    for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=dtype)] * 3):
        raw = (extreme * signs.repeat_interleave(3)[:, None, None]).expand(9, len(HARD), 1).clone().requires_grad_()
        values, gradients = [], []
        for function in (bend, bend_in_training, unbend):
            values.append(function(raw, x)[:2])
            gradients.append(torch.autograd.grad(sum(value.sum() for value in values[-1]), (raw, x)))
            assert all(tensor.isfinite().all() for tensor in (*values[-1], *gradients[-1]))
        torch.testing.assert_close(gradients[1][0][:, rest], gradients[0][0][:, rest])
        torch.testing.assert_close(gradients[1][1][rest], gradients[0][1][rest])
        assert ((unbend(raw, values[0][0])[0] - x).abs() <= tolerance).all()
        torch.testing.assert_close(values[0][0][outside], x[outside], rtol=1e-6, atol=1e-6)


def test_inverse_at_flat_knots_beside_steep_pieces(monkeypatch):
    """In float32, where a difference under the root could become negative."""
    set_limits(monkeypatch, 3.0, 0.1, 100.0)
    n = 100_000
    raw = (20 * torch.randn(9, n, 1)).float()
    y = -3 + 6 * (0.1 + 0.8 * raw[3].sigmoid()) * (1 + 1e-6 * torch.randn(n, 1).float())  # just at the middle knot
    assert all(value.isfinite().all() for value in unbend(raw, y))


def test_gradients_of_training_are_autograds():
    """The network in training, with the derivative written out, against the same in evaluation."""
    spline = randomise(Spline(3, 4, 2, 1, 2, 8), 0.3).requires_grad_(True)
    x, weights = torch.randn(6, 3, 4, 4, requires_grad=True), torch.randn(6, 3, 4, 4)

    def gradients(mode):
        spline.train(mode)
        y, log_det = spline(x)
        return y, *torch.autograd.grad((y * weights).sum() + log_det.sum(), [x, *spline.parameters()])

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("subnet", ["spline", "spline_lu"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_random_networks_keep_the_round_trip(subnet, dtype, tolerance):
    """16 couplings with random weights, 8 of them with curves, at inputs of size 3: the median of the largest errors
    of 9 networks. Single ones multiply every rounding, as those of rnvp do."""
    errors = []
    for _ in range(9):
        flow = randomise(RGFlow(3, 8, nlayers=2, nresblocks=1, nhidden=24, subnet=subnet), 0.15).to(dtype)
        x = 3 * torch.randn(4, 3, 8, 8, dtype=dtype)
        errors.append((flow.inverse(flow(x)[0])[0] - x).abs().max())
    assert sorted(errors)[4] < tolerance
