"""RNVP blocks; in the first, couplings end with a monotone curve, a rational-quadratic spline (`--subnet spline`).

An affine coupling cannot change the shape of an entry's distribution, such as the box of dequantisation. A monotone
curve can. Each piece is a ratio of quadratic polynomials, whose inverse has a closed form: Durkan, Bekasov, Murray and
Papamakarios, Neural Spline Flows, NeurIPS 2019, equations 4-8. Section 5 of the RG-Flow paper invites such maps.

The curve leads from (-edge, -edge) to (edge, edge) in 4 pieces; outside it is the identity. The middle knot cuts width
and height of the square in two, each at its own fraction; the knot of the half that holds a point cuts this half again.
Numbers 0 and 1 say where a point lies: on a CPU booleans and `where` are several times slower than arithmetic.
"""

from collections import namedtuple

import torch
from torch import nn

from .coupling import RNVP, travel
from .fold import evaluate
from .networks import transformed

NUMBERS = 9  # that make a curve: for the middle, the left and the right knot its fractions x 3, y 3 and slopes 3
EDGE = 3.0  # half the edge of the square
CUT = 0.2  # a knot cuts at a fraction between CUT and 1 - CUT; a piece is at most ((1 - CUT) / CUT)^2 steep on average
# The slope at a knot is between 1 / 10 and 10; between knots all measured are between 1 / 1500 and 32. With much wider
# limits (CUT 0.01, slopes to 1000) float32 fails.
SOFT = 1 / (10 - 1)
# The pieces of curves that hold points, all (N, n), or (2, N, n) for x and y.
#   corner: lower left end, counted from (-edge, -edge);  size: width and height;  left, right: slopes at the ends
#   middle, own: the numbers of the middle knot, and of the knot of the half that holds the point, in [0, 1], (3, N, n)
#   outer, inner: 1 for a point right of the middle knot, and right of its own, otherwise 0
#   half, fractions: size of that half, and where its knot cuts it;  middle_slope, own_slope: of both knots
Piece = namedtuple("Piece", "corner size left right middle own outer inner half fractions middle_slope own_slope")
# What a coupling with curves needs: folded networks of s, t and the curves' features, the linear map of these, and
# whether the derivative is the one that is written out.
Step = namedtuple("Step", "folded head bias by_hand")


def bend(raw, x):
    """The curve of raw (9, N, n), 0 for the identity: x (N, n) -> y, log(dy / dx), and what the derivative needs."""
    distance = (x + EDGE).clamp(0, 2 * EDGE)
    piece = find(raw, distance, 0)
    distance = distance - piece.corner[0]
    along = distance / piece.size[0]
    terms = mean, _, D, R, _, M = quadratics(piece, along)
    ratio = mean / D
    # x and two differences, which are exactly 0 where the curve is the identity.
    y = torch.addcmul(x + (piece.corner[1] - piece.corner[0]), distance, ratio * R - 1)
    return y, (M * ratio.square()).log(), piece, along, terms


def unbend(raw, y):
    """The inverse of `bend`: y (N, n) -> x and log(dy / dx) there."""
    distance = (y + EDGE).clamp(0, 2 * EDGE)
    piece = find(raw, distance, 1)
    distance = distance - piece.corner[1]
    mean, up = piece.size[1] / piece.size[0], distance / piece.size[1]
    # The root of  (mean - b) along^2 + b along - mean up = 0  in [0, 1],  b = linear + slant; its terms do not cancel.
    linear, slant = piece.left * (1 - up) - piece.right * up, 2 * mean * up
    root = (linear.square() + 2 * mean * slant * (1 - up)).sqrt()
    shrink = 2 / (linear + slant + root)
    x = torch.addcmul(y - (piece.corner[1] - piece.corner[0]), distance, shrink - 1)
    mean, _, D, _, _, M = quadratics(piece, distance * shrink / piece.size[0])
    return x, (M * (mean / D).square()).log()


def find(raw, distance, axis):
    """The pieces that hold points at a distance (N, n) from -edge along an axis, 0 for x and 1 for y."""
    middle, left, right = raw.unflatten(0, (3, 3)).unbind(1)
    middle = middle.sigmoid()
    fractions, middle_slope = knot(middle)
    cut = 2 * EDGE * fractions
    outer = above(distance, cut[axis])
    half, corner = torch.lerp(cut, 2 * EDGE - cut, outer), cut * outer
    own = torch.lerp(left, right, outer).sigmoid()
    fractions, own_slope = knot(own)
    cut = half * fractions
    inner = above(distance - corner[axis], cut[axis])
    size, corner = torch.lerp(cut, half - cut, inner), torch.addcmul(corner, cut, inner)
    excess = middle_slope - 1  # over that at the ends of the curve
    left = torch.lerp(1 + excess * outer, own_slope, inner)
    right = torch.lerp(own_slope, middle_slope - excess * outer, inner)
    return Piece(corner, size, left, right, middle, own, outer, inner, half, fractions, middle_slope, own_slope)


def knot(unit):
    """Numbers in [0, 1], (3, N, n) -> the fractions (2, N, n) of x and y at which a knot cuts, and its slope (N, n)."""
    slope = (unit[2] + SOFT) / (1 + SOFT - unit[2])
    return CUT + (1 - 2 * CUT) * unit[:2], slope


def above(a, b):
    """1 where a > b, otherwise 0, in their type, a constant for autograd."""
    difference = (a - b).detach()
    return (difference > 0).to(difference.dtype) if transformed() else difference.gt_(0)


def quadratics(piece, along):
    """mean, curvature, D, R, Q and M at a fraction `along` of a piece's width, with which

    y = y_corner + (x - x_corner) mean R / D,    dy / dx = mean^2 M / D^2.
    """
    mean = piece.size[1] / piece.size[0]
    curvature = torch.sub(piece.left + piece.right, mean, alpha=2)
    D = torch.addcmul(mean, curvature, torch.addcmul(along, along, along, value=-1))
    R, Q = torch.lerp(piece.left, mean, along), torch.lerp(mean, piece.right, along)
    return mean, curvature, D, R, Q, torch.lerp(R, Q, along)


def couple(step, x, moved):
    """curve(moved * exp(s(x)) + t(x)) and the logarithm of its derivative, all (N, n)."""
    outputs = evaluate(step.folded, x)
    if step.by_hand:
        return CoupleInTraining.apply(outputs, moved, step.head, step.bias)
    return couple_plainly(outputs, moved, step.head, step.bias)


def couple_plainly(outputs, moved, head, bias):
    """`couple` behind its networks."""
    raw, s, t, _ = conditioned(outputs, head, bias)
    y, log_slope, *_ = bend(raw, torch.addcmul(t, moved, s.exp()))
    return y, s + log_slope


def uncouple(step, x, moved):
    """The inverse of `couple`, and the same logarithm."""
    raw, s, t, _ = conditioned(evaluate(step.folded, x), step.head, step.bias)
    y, log_slope = unbend(raw, moved)
    return (y - t) * (-s).exp(), s + log_slope


def conditioned(outputs, head, bias):
    """Outputs of the networks (3, N, n), head (n, 9 n), bias (9 n) -> the numbers of the curves (9, N, n), s, t, and
    tanh(features) / 2."""
    s, t, features = outputs
    features = (features + features).sigmoid() - 0.5  # in a third of the time of tanh
    raw = torch.addmm(bias, features, head).unflatten(1, (NUMBERS, -1)).transpose(0, 1).contiguous()
    return raw, s.tanh(), t, features


class CoupleInTraining(torch.autograd.Function):
    """`couple_plainly` with the derivative written out, in less time than what autograd records."""

    @staticmethod
    def forward(ctx, outputs, moved, head, bias):
        raw, s, t, features = conditioned(outputs, head, bias)
        scale = s.exp()
        x = torch.addcmul(t, moved, scale)
        y, log_slope, piece, along, terms = bend(raw, x)
        inside, saved = above(EDGE, x.abs()), piece._replace(corner=None, right=None)  # which `backward` does not use
        ctx.save_for_backward(outputs, moved, head, bias, s, scale, features, inside, along, *terms, *saved)
        return y, s + log_slope

    @staticmethod
    def backward(ctx, grad_y, grad_log):
        outputs, moved, head, bias, *saved = ctx.saved_tensors  # only once, for the sake of recomputation
        if torch.is_grad_enabled():  # second derivatives are asked for
            return torch.func.vjp(couple_plainly, outputs, moved, head, bias)[1]((grad_y, grad_log))
        s, scale, features, inside, along, mean, curvature, D, R, Q, M, *piece = saved
        piece = Piece(*piece)
        grads = torch.empty((3, *s.shape), dtype=s.dtype, device=s.device)  # of the outputs
        # `quadratics`, with  y = … + height along R / D,  log(dy / dx) = 2 log mean + log M - 2 log D,  M' = 2 (Q - R).
        # The gradients of along and height need that of R before M's part in it.
        (width, height), rest, unit = piece.size, 1 - along, 1 - 2 * CUT
        grad_ratio, twice = grad_y * height / D, grad_log + grad_log
        grad_R, grad_M = grad_ratio * along, grad_log / M
        shrink_D = torch.addcmul(twice, grad_R, R).div_(D)  # minus the gradient of D
        grad_along = (grad_ratio * R).addcmul_(grad_R, mean - piece.left).addcmul_(grad_M, Q - R, value=2)
        grad_along.addcmul_(shrink_D * curvature, along - rest)
        grad_height = grad_R * R / height
        grad_Q = grad_M * along
        grad_R.addcmul_(grad_M, rest)
        shrink_curvature = shrink_D * along * rest
        grad_left = torch.addcmul(-shrink_curvature, grad_R, rest)
        grad_right = torch.addcmul(-shrink_curvature, grad_Q, along)
        grad_mean = (twice / mean).addcmul_(grad_R, along).addcmul_(grad_Q, rest).sub_(shrink_D)
        grad_mean.add_(shrink_curvature, alpha=2).div_(width)
        grad_distance = grad_along / width
        grad_width = -torch.addcmul(grad_distance * along, grad_mean, mean)
        grad_size = torch.stack((grad_width, grad_height.add_(grad_mean)))
        grad_corner = torch.stack((-grad_distance, grad_y))
        grad_x = torch.lerp(grad_y, grad_distance, inside, out=grads[1])
        # `find`, backwards. A cut is the size of the piece left of it, the corner of the piece right of it.
        grad_cut = torch.lerp(grad_size, grad_corner - grad_size, piece.inner)
        grad_half = torch.addcmul(grad_size * piece.inner, grad_cut, piece.fractions)
        grad_middle, grad_own = torch.empty_like(piece.middle), torch.empty_like(piece.own)
        torch.lerp(grad_half, grad_corner - grad_half, piece.outer, out=grad_middle[:2]).mul_(2 * EDGE * unit)
        torch.lerp(grad_left, grad_right, piece.inner, out=grad_middle[2]).mul_((piece.outer - piece.inner).abs_())
        torch.mul(grad_cut, piece.half, out=grad_own[:2]).mul_(unit)
        torch.lerp(grad_right, grad_left, piece.inner, out=grad_own[2])
        # The slopes of the knots, and the sigmoid of all their numbers.
        for grad, slope in (grad_middle, piece.middle_slope), (grad_own, piece.own_slope):
            grad[2].mul_((1 + slope).square_()).mul_(1 / (1 + 2 * SOFT))
        grad_middle = torch.ops.aten.sigmoid_backward(grad_middle, piece.middle)
        grad_own = torch.ops.aten.sigmoid_backward(grad_own, piece.own)
        right = grad_own * piece.outer
        grad_raw = torch.stack((grad_middle, grad_own - right, right), 1).flatten(0, 1).transpose(0, 1).flatten(1)
        # The affine map and the map of the features.
        grad_moved = grad_x * scale
        grads[0] = torch.ops.aten.tanh_backward(torch.addcmul(grad_log, grad_moved, moved), s)
        torch.mm(grad_raw, head.t(), out=grads[2]).mul_(0.5 - 2 * features.square())
        return grads, grad_moved, features.t() @ grad_raw, grad_raw.sum(0)


class Bent(RNVP):
    """RNVP blocks whose couplings end with a curve, for x2 and x1 in turn:

        x2' = curve(x2 * exp(s1(x1)) + t1(x1); c1(x1)),    x1' = curve(x1 * exp(s2(x2')) + t2(x2'); c2(x2'))

    The numbers c, 9 per entry, are a linear map of tanh / 2 of a third residual network: bounded far from the data. The
    map starts at 0, where the curve is the identity; the network's scale starts at 1, or there would be no gradient.
    """

    nnetworks = 3
    couple, uncouple = staticmethod(couple), staticmethod(uncouple)

    def __init__(self, nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden):
        super().__init__(nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden)
        nn.init.ones_(self.networks.scale[self.nnetworks - 1 :: self.nnetworks])
        half = nchannels * kernel_size**2 // 2
        self.head = nn.Parameter(torch.zeros(2 * nlayers, half, NUMBERS * half))
        self.bias = nn.Parameter(torch.zeros(2 * nlayers, NUMBERS * half))

    def steps(self):
        plain = self.networks.compile_kernels or transformed()  # torch.compile writes out the derivative itself
        by_hand = self.training and not plain
        return [Step(*each, by_hand) for each in zip(self.networks.steps(), self.head, self.bias, strict=True)]


class Spline(nn.Module):
    """`nlayers` blocks in a row, a bijector of patches: the first is `Bent`, the others are those of `RNVP`."""

    inverse_passes = 1

    def __init__(self, nchannels, kernel_size, nlayers, nresblocks, nmlp, nhidden):
        super().__init__()
        sizes = nresblocks, nmlp, nhidden
        self.blocks = nn.ModuleList([Bent(nchannels, kernel_size, 1, *sizes)])
        if nlayers > 1:
            self.blocks.append(RNVP(nchannels, kernel_size, nlayers - 1, *sizes))

    def forward(self, x):
        """x: (N, C, m, m) -> y of the same shape, log_det (N,)."""
        return travel([*self.blocks], x)

    def inverse(self, y):
        """y: (N, C, m, m) -> x of the same shape, log_det (N,) of this direction."""
        return travel([*self.blocks], y, -1)
