"""RNVP blocks that also bend: a rational-quadratic spline behind the affine map (`--subnet spline`).

An affine coupling moves and stretches an entry, but cannot change the shape of its distribution: that of the noise
which dequantisation leaves of a pixel is a box, that of the prior is not. A monotone curve of a few pieces can. In each
piece it is a ratio of quadratic polynomials, and so is its inverse in closed form: Durkan, Bekasov, Murray and
Papamakarios, Neural Spline Flows, NeurIPS 2019, equations 4-8. The RG-Flow paper invites such maps in section 5.

The curve maps the square [-EDGE, EDGE]^2 from corner to corner, and outside it is the identity. It has 4 pieces between
5 knots. Instead of by a softmax and a search the pieces are found by halving: the middle knot cuts the square's width
and height in two, each at a fraction between CUT and 1 - CUT, and the knot of the half in which a point lies cuts that
again. So no piece is steeper or flatter than ((1 - CUT) / CUT)^2 on average; slopes at the knots are within STEEPEST.
"""

from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .coupling import RNVP
from .coupling import couple as affine_couple
from .coupling import uncouple as affine_uncouple
from .residual import ResidualNetworks, evaluate

EDGE = 3.0
CUT = 0.2
STEEPEST = 10.0
NUMBERS = 9  # that make a curve: 3 knots, each with its fraction of the width, fraction of the height, and slope

_SOFT = 1 / (STEEPEST - 1)


class Piece(NamedTuple):
    """The piece of a curve that holds a point. All (N, n), pairs (2, N, n) are of x and y.

    corner: its lower left end, counted from (-EDGE, -EDGE)
    size: width and height
    left, right: slopes at its ends
    outer, inner: 1 where the point is right of the middle knot, and of the knot of its half, otherwise 0
    half, fractions: size of that half, and where its knot cuts it
    """

    corner: torch.Tensor
    size: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    outer: torch.Tensor
    inner: torch.Tensor
    half: torch.Tensor
    fractions: torch.Tensor


def knots(bounded):
    """Numbers in [0, 1], (9, N, n) -> fractions (2, 3, N, n) and slopes (3, N, n) of the middle, left and right knot;
    1/2 everywhere gives the identity."""
    fractions, slopes = bounded.unflatten(0, (3, 3)).split((2, 1))
    return CUT + (1 - 2 * CUT) * fractions, ((slopes + _SOFT) / (1 - slopes + _SOFT))[0]


def find(fractions, slopes, distance, axis):
    """The pieces that hold points at a distance (N, n) from -EDGE along an axis, 0 for x and 1 for y."""
    cut = 2 * EDGE * fractions[:, 0]
    outer = above(distance, cut[axis])
    half = torch.lerp(cut, 2 * EDGE - cut, outer)
    corner = cut * outer
    fractions = torch.lerp(fractions[:, 1], fractions[:, 2], outer)
    cut = half * fractions
    inner = above(distance - corner[axis], cut[axis])
    size = torch.lerp(cut, half - cut, inner)
    corner = torch.addcmul(corner, cut, inner)
    slope, excess = torch.lerp(slopes[1], slopes[2], outer), slopes[0] - 1
    left = torch.lerp(1 + excess * outer, slope, inner)
    right = torch.lerp(slope, slopes[0] - excess * outer, inner)
    return Piece(corner, size, left, right, outer, inner, half, fractions)


def above(a, b):
    """1 where a > b, otherwise 0, of the type of a. (On a CPU several times faster than a comparison to booleans.)"""
    return (a - b).detach().sign().clamp_min(0)


def quadratics(piece, along):
    """What makes the curve in a piece, at a fraction `along` of its width: with its mean slope s,

        y - y_corner = (x - x_corner) s R / D,   dy / dx = s^2 M / D^2

    Returns s, s - left, c, D, R, M; D = s + c along (1 - along) with c = left + right - 2 s.
    """
    mean = piece.size[1] / piece.size[0]
    rise = mean - piece.left
    curvature = piece.right - mean - rise
    D = torch.addcmul(mean, curvature, along - along * along)
    R = torch.addcmul(piece.left, rise, along)
    M = torch.addcmul(piece.left, along, torch.addcmul(rise + rise, curvature, along))
    return mean, rise, curvature, D, R, M


def bend(raw, x):
    """The curve: raw (9, N, n), any numbers, x (N, n) -> y and log(dy / dx), both (N, n)."""
    return curve(raw.sigmoid(), x)[:2]


def curve(bounded, x):
    """`bend` with numbers in [0, 1] instead of any, and what its derivative needs besides."""
    fractions, slopes = knots(bounded)
    distance = (x + EDGE).clamp(0, 2 * EDGE)
    piece = find(fractions, slopes, distance, 0)
    distance = distance - piece.corner[0]
    along = distance / piece.size[0]
    terms = mean, _, _, D, R, M = quadratics(piece, along)
    ratio = mean / D
    # The sum of x and two differences that are 0 for the identity: no rounding there, nor far outside.
    y = torch.addcmul(x + (piece.corner[1] - piece.corner[0]), distance, ratio * R - 1)
    return y, (M * ratio.square()).log(), slopes, piece, along, terms


def unbend(raw, y):
    """The inverse of `bend`: raw (9, N, n), y (N, n) -> x and log(dy / dx) there, both (N, n)."""
    fractions, slopes = knots(raw.sigmoid())
    distance = (y + EDGE).clamp(0, 2 * EDGE)
    piece = find(fractions, slopes, distance, 1)
    distance = distance - piece.corner[1]
    mean = piece.size[1] / piece.size[0]
    up = distance / piece.size[1]
    bent = up * (piece.left + piece.right - 2 * mean)
    # The root of  (mean - left + bent) along^2 + (left - bent) along - mean up = 0  between 0 and 1.
    linear = piece.left - bent
    root = (linear.square() + 4 * mean * up * (mean - linear)).sqrt()
    run = 2 / (linear + root)
    along = distance * run / piece.size[0]
    x = torch.addcmul(y - (piece.corner[1] - piece.corner[0]), distance, run - 1)
    mean, _, _, D, _, M = quadratics(piece, along)
    return x, (M * (mean / D).square()).log()


class Bend(torch.autograd.Function):
    """`bend` with its derivative written out, for training: a third of the time of what autograd records."""

    @staticmethod
    def forward(ctx, raw, x):
        bounded = raw.sigmoid()
        y, log_slope, slopes, piece, along, terms = curve(bounded, x)
        ctx.save_for_backward(x, bounded, slopes, along, *piece, *terms)
        return y, log_slope

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_log):
        """In the order of `curve` backwards; grad_… is the derivative by what follows it."""
        x, bounded, slopes, along, *saved = ctx.saved_tensors
        piece, (mean, rise, curvature, D, R, M) = Piece(*saved[:8]), saved[8:]
        width, height = piece.size
        # y = … + height along R / D, log(dy / dx) = 2 log mean + log M - 2 log D
        grad_ratio = grad_y * height / D
        grad_R, grad_M, twice = grad_ratio * along, grad_log / M, grad_log + grad_log
        grad_D = -torch.addcmul(twice, grad_R, R) / D
        rest = 1 - along
        both = along * rest
        grad_along = (grad_ratio * R).addcmul_(grad_R, rise).addcmul_(grad_D * curvature, rest - along)
        grad_along.addcmul_(grad_M, torch.addcmul(rise, curvature, along), value=2)
        grad_mean = (twice / mean).addcmul_(grad_R, along).addcmul_(grad_D, 1 - 2 * both).addcmul_(grad_M, both, value=2)
        grad_D.mul_(both)
        grad_left = torch.addcmul(grad_D, grad_R, rest).addcmul_(grad_M, rest.square())
        grad_right = torch.addcmul(grad_D, grad_M, along.square())
        grad_distance = grad_along / width
        grad_mean_width = grad_mean / width
        grad_width = -torch.addcmul(grad_distance * along, grad_mean_width, mean)
        grad_height = torch.addcmul(grad_mean_width, grad_ratio * along / height, R)
        grad_size = torch.stack((grad_width, grad_height))
        grad_corner = torch.stack((-grad_distance, grad_y))
        # Where the knots cut, from the inner one out; each is a corner to its right and a size to its left.
        grad_cut = torch.lerp(grad_size, grad_corner - grad_size, piece.inner)
        grad_half = torch.addcmul(grad_size * piece.inner, grad_cut, piece.fractions)
        grad_fraction, grad_slope = grad_cut * piece.half, torch.lerp(grad_right, grad_left, piece.inner)
        grad = torch.empty_like(bounded).unflatten(0, (3, 3))
        torch.lerp(grad_half, grad_corner - grad_half, piece.outer, out=grad[:2, 0]).mul_(2 * EDGE)
        torch.lerp(grad_left, grad_right, piece.inner, out=grad[2, 0]).mul_((piece.outer - piece.inner).abs_())
        for knot, weight in ((1, 1 - piece.outer), (2, piece.outer)):
            torch.mul(grad_fraction, weight, out=grad[:2, knot])
            torch.mul(grad_slope, weight, out=grad[2, knot])
        grad[:2].mul_(1 - 2 * CUT)
        grad[2].mul_((1 + slopes).square_()).mul_(1 / (1 + 2 * _SOFT))
        grad_raw = grad.flatten(0, 1).mul_(bounded).mul_(1 - bounded)
        return grad_raw, torch.lerp(grad_y, grad_distance, above(torch.full_like(x, EDGE), x.abs()))


def couple(step, x, moved, bend=bend):
    """The half-step of an RNVP block, and behind it, where the step has networks for one, a curve."""
    affine, *curve = step
    moved, log_slope = affine_couple(affine, x, moved)
    if curve:
        moved, change = bend(numbers(*curve, x), moved)
        log_slope = log_slope + change
    return moved, log_slope


def couple_in_training(step, x, moved):
    return couple(step, x, moved, Bend.apply)


def uncouple(step, x, moved):
    """The inverse of `couple`, and the same logarithm."""
    affine, *curve = step
    change = 0
    if curve:
        moved, change = unbend(numbers(*curve, x), moved)
    moved, log_slope = affine_uncouple(affine, x, moved)
    return moved, log_slope + change


def numbers(folded, head, bias, x):
    """What makes the curves of the half that is moved, (9, N, n), from the half that is kept, (N, n)."""
    features = evaluate(folded, x)[0].tanh()
    raw = torch.addmm(bias.to(head.dtype), features.to(head.dtype), head).to(x.dtype)  # (N, 9 n)
    return raw.unflatten(1, (NUMBERS, -1)).transpose(0, 1).contiguous()


class Spline(RNVP):
    """`nlayers` RNVP blocks in a row, of which the first also bends: each of its half-steps is

        x2' = curve(x2 * exp(s(x1)) + t(x1); c(x1))

    The numbers c that make the curves, 9 for an entry, are a linear map of tanh of a residual network like those of s
    and t. The map starts at 0, where the curve is the identity; tanh bounds what inputs far from the data do to it.
    """

    uncouple = staticmethod(uncouple)

    def __init__(self, nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden):
        super().__init__(nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden)
        half = nchannels * kernel_size**2 // 2
        self.curves = ResidualNetworks(2, 1, half, nhidden, nresblocks, nmlp)
        nn.init.ones_(self.curves.scale)
        self.head = nn.Parameter(torch.zeros(2, half, NUMBERS * half))
        self.bias = nn.Parameter(torch.zeros(2, NUMBERS * half))

    @property
    def couple(self):
        return couple_in_training if self.training and not self.networks.compile_kernels else couple

    def steps(self):
        affine = self.networks.steps()
        curves = list(zip(self.curves.steps(), self.head, self.bias, strict=True))
        return [(first, *curve) for first, curve in zip_longest(affine, curves, fillvalue=())]
