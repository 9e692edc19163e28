"""Residual networks that compute s and t of a coupling (Appendix A and figure A1, blue blocks).

One residual block is  x <- (x + f(x)) / sqrt(2)  with the pre-activated multilayer perceptron
f = linear . swish . linear . swish . … . linear . swish  (the rightmost acts first), swish(x) = x sigmoid(beta x) with
one learnable beta per feature, and weight normalisation on every linear layer. The output of the last block is
multiplied by a learnable scale that starts at 0, so that an untrained coupling is the identity.

The networks of one coupling half-step do not depend on each other and have equal sizes, so they run side by side as
batched matrix products: G networks, N patches, n features. What depends on parameters alone is folded into the
matrices beforehand: since  x sigmoid(beta x) = silu(beta x) / beta, the factor beta goes into the matrix before the
activation and 1 / beta into the matrix after it, together with norm, gain, 1 / sqrt(2) and the final scale. Between two
products only the silu is left. All K half-steps of a bijector are folded at once: their parameters lie in common
tensors, S = K G networks long.
"""

import math
from contextlib import contextmanager
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from .networks import Networks, compiled

# |beta| counts as at least this, since silu(0 x) / 0 is 0 / 0; the gradient passes straight through.
BETA_MIN = 1e-4
# A column of weights with a smaller norm counts as 0, as one does that a mask clears entirely.
NORM_MIN = 1e-12
# Weights are folded in pieces of about this many entries, which stay in the processor's cache between operations. Sets
# of networks that are smaller are folded together.
PIECE = 2**19


class ResidualBlock(nn.Module):
    """The parameters of one residual block n -> n, with `nmlp` hidden layers of width `nhidden`, of S networks.

    Linear layer k is  gain * (x V / |V|) + bias  with V = weight * mask (in, out) and |V| the norm of each column.
    `weights` holds one (S, in, out) per layer; `beta` (S, sum of in), `gain` and `bias` (S, sum of out) hold those of
    all layers side by side.

    masks: one (in, out) tensor of zeros and ones per linear layer, or None
    skip: whether x is added; without, the block is f(x) alone
    """

    def __init__(self, nnetworks, nfeatures, nhidden, nmlp, masks=None, skip=True):
        super().__init__()
        sizes = [nfeatures] + [nhidden] * nmlp + [nfeatures]
        self.skip = skip
        self.num_linear = nmlp + 1
        for k, mask in enumerate(masks or [None] * self.num_linear):
            self.register_buffer(f"mask{k}", mask, persistent=False)
        self.weights = nn.ParameterList()
        for nin, nout in pairwise(sizes):
            bound = math.sqrt(2.81 * 3 / nin)  # 1 / 2.81 is the second moment of a swish of a standard normal variable
            self.weights.append(torch.empty(nnetworks, nin, nout).uniform_(-bound, bound))
        norms = [torch.linalg.vector_norm(masked(*pair), dim=1) for pair in zip(self.weights, self.masks, strict=True)]
        self.beta = nn.Parameter(torch.ones(nnetworks, sum(sizes[:-1])))
        self.gain = nn.Parameter(torch.cat(norms, 1).detach())
        self.bias = nn.Parameter(torch.zeros(nnetworks, sum(sizes[1:])))

    @property
    def masks(self):
        return [getattr(self, f"mask{k}") for k in range(self.num_linear)]


class ResidualNetworks(Networks):
    """K times G residual networks n -> n, each with its own parameters; the G of one half-step run side by side.

    masks, skips: per residual block, see `ResidualBlock`.
    """

    def __init__(self, nsteps, ngroups, nfeatures, nhidden, nresblocks, nmlp, masks=None, skips=None):
        super().__init__()
        self.ngroups = ngroups
        self.blocks = nn.ModuleList(
            ResidualBlock(nsteps * ngroups, nfeatures, nhidden, nmlp, mask, skip)
            for mask, skip in zip(masks or [None] * nresblocks, skips or [True] * nresblocks, strict=True)
        )
        self.scale = nn.Parameter(torch.zeros(nsteps * ngroups, nfeatures))

    def __repr__(self):
        block, (steps, networks) = self.blocks[0], (len(self.scale) // self.ngroups, self.ngroups)
        sizes = [weight.shape[1] for weight in block.weights] + [block.weights[-1].shape[2]]
        blocks = f"{len(self.blocks)} residual blocks {' -> '.join(map(str, sizes))}"
        return f"{type(self).__name__}({steps} half-steps x {networks} networks of {blocks})"

    def fold(self):
        """The folded parameters: a list over half-steps of tuples over blocks."""
        return fold_networks([self])[0]

    @property
    def settings(self):
        return Settings(self.ngroups, self.dtype or self.scale.dtype, self.compile_kernels)

    @property
    def kind(self):
        """Equal for networks that can be folded together; those with masks are folded alone."""
        sizes = tuple((block.skip, *(weight.shape[1:] for weight in block.weights)) for block in self.blocks)
        masked = any(mask is not None for block in self.blocks for mask in block.masks)
        return self.settings, self.scale.dtype, self.scale.device, sizes, masked and self

    @property
    def largest(self):
        """Entries of the largest weight tensor."""
        return max(weight.numel() for block in self.blocks for weight in block.weights)


class Settings(NamedTuple):
    """ngroups: G
    dtype: type of the folded matrices and biases
    compile: whether weights are folded by compiled kernels
    """

    ngroups: int
    dtype: torch.dtype
    compile: bool


@contextmanager
def folded_together(module):
    """Fold small ResidualNetworks of `module` at once; within, `steps()` gives what their parameters were on entry.

    For training: where networks are small, what folding costs is the number of operations, not their size. All others
    are folded when they are used, so that each one's gradient is folded back as soon as it is there, and freed.
    """
    every = [part for part in module.modules() if isinstance(part, ResidualNetworks)]
    try:
        if module.training and torch.is_grad_enabled():
            for group in small_groups(every):
                for networks, steps in zip(group, fold_networks(group), strict=True):
                    networks._held = steps
        yield
    finally:
        for networks in every:
            networks._held = None


def small_groups(every):
    """Lists of several ResidualNetworks of a kind whose largest weights have at most `PIECE` entries in all."""
    kinds = {}
    for networks in every:
        groups = kinds.setdefault(networks.kind, [[]])
        if sum(member.largest for member in groups[-1]) + networks.largest > PIECE:
            groups.append([])
        groups[-1].append(networks)
    return [group for groups in kinds.values() for group in groups if len(group) > 1]


def fold_networks(group):
    """The folded parameters of ResidualNetworks of a kind: for each a list over half-steps of tuples over blocks."""
    steps = list(zip(*(fold_blocks(group, k) for k in range(len(group[0].blocks))), strict=True))
    counts = [len(networks.scale) // networks.ngroups for networks in group]
    return [steps[end - count : end] for count, end in zip(counts, accumulate(counts), strict=True)]


def fold_blocks(group, k):
    """What `evaluate` needs of residual block k of all networks of the group, a list of tuples, one per half-step."""
    blocks, first, scales = [networks.blocks[k] for networks in group], group[0].blocks[k], [n.scale for n in group]
    if first is not group[0].blocks[-1]:  # only the last block is scaled
        scales = [torch.ones_like(scale) for scale in scales]
    own = zip(*((block.beta, block.gain, block.bias, *block.weights) for block in blocks), strict=True)
    settings, parameters = (group[0].settings, first.masks, first.skip), (scales, *own)
    if torch.is_grad_enabled() and any(parameter.requires_grad for each in parameters for parameter in each):
        outputs = Fold.apply(*settings, len(group), *chain(*parameters))
    else:
        outputs, _ = fold(*settings, *map(joined, parameters))
    length = 2 + 2 * first.num_linear
    return [outputs[start : start + length] for start in range(0, len(outputs), length)]


def evaluate(folded, x):
    """G residual networks with the folded parameters of each block, at x (N, n), the same for all: (G, N, n).

    The products are computed in the type of the matrices; x and what the blocks add to it are of the type of x.
    """
    for beta, factor, *layers in folded:
        y = (x * beta).to(layers[0].dtype)  # (G, N, n)
        for matrix, bias in zip(layers[::2], layers[1::2], strict=True):
            y = torch.baddbmm(bias, F.silu(y), matrix)  # (G, N, nhidden), at last (G, N, n)
        x = torch.addcmul(y.to(x.dtype), x, factor)
    return x


def fold(settings, masks, skip, scale, beta, gain, bias, *weights):
    """beta (G, 1, n), factor of the skip connection (G, 1, n), matrix (G, in, out), bias (G, 1, out), matrix, bias, …
    of one residual block, half-step after half-step; and what the derivative needs.

    For the parameters see `ResidualBlock`; `scale` (S, n) multiplies the block's output.
    """
    n, nsteps = scale.shape[1], len(scale) // settings.ngroups
    fold_piece = compiled(fold_weight) if settings.compile else fold_weight
    beta = torch.where(beta.abs() < BETA_MIN, BETA_MIN, beta)
    factor = scale * math.sqrt(0.5) if skip else scale
    after = torch.cat((beta[:, n:], factor), 1)  # what the output of each linear layer is multiplied by
    rows, columns = beta.reciprocal(), gain * after
    folded, norms = [split(beta[:, :n], settings.ngroups), split(factor * skip, settings.ngroups)], []
    layers = zip(weights, masks, *by_layer(weights, rows, columns, bias * after), strict=True)
    for weight, mask, rows_k, columns_k, bias_k in layers:
        done = [
            fold_piece(masked(weight[piece], mask), rows_k[piece], columns_k[piece], settings.dtype)
            for piece in pieces(weight, settings.ngroups)
        ]
        matrices = [step for matrix, _ in done for step in matrix.split(settings.ngroups)]
        folded += [matrices, split(bias_k.to(settings.dtype), settings.ngroups)]
        norms.append(joined([norm for _, norm in done]))
    outputs = [tensors[step] for step in range(nsteps) for tensors in folded]
    return outputs, (rows, after, torch.cat(norms, 1), gain, bias, *weights)


def fold_weight(weight, rows, columns, dtype):
    """weight (S, in, out) -> weight * rows * columns / norm in `dtype`, norm (S, out) of its columns."""
    norm = weight.square().sum(1).sqrt_().clamp_min_(NORM_MIN)
    matrix = (weight * (columns / norm)[:, None, :]).mul_(rows[:, :, None])
    return matrix.to(dtype), norm


def unfold_weight(grad, weight, rows, columns, norm, out):
    """The derivative of `fold_weight`; `columns` are divided by norm here.

    Writes the gradient of the weight to `out` (S, in, out) and returns those of rows (S, in) and of columns (S, out).
    """
    rows, columns = rows[:, :, None], columns[:, None, :]
    if torch.compiler.is_compiling():  # sums, which fuse with the products; a library's product is one pass more
        product = grad * weight
        grad_rows, grad_columns = (product * columns).sum(2), (product * rows).sum(1)
    else:
        torch.mul(grad, weight, out=out)
        grad_rows, grad_columns = torch.bmm(out, columns.mT)[:, :, 0], torch.bmm(rows.mT, out)[:, 0]
    # The norm's part: d|V|/dV = V / |V| for each column.
    shrink = (grad_columns / norm.square())[:, None, :] * columns
    torch.mul(grad, rows, out=out).mul_(columns).addcmul_(weight, shrink, value=-1)
    return grad_rows, grad_columns


class Fold(torch.autograd.Function):
    """`fold` with its derivative written out.

    Every weight passes through here once per step. What autograd would record of it, a dozen passes over the weights
    and as many small operations per layer, costs more than the matrix products of a small batch.
    """

    @staticmethod
    def forward(ctx, settings, masks, skip, count, *parameters):
        """Of `count` groups of networks, one after the other: their scales, betas, gains, … as `fold` has them."""
        kinds = [parameters[k : k + count] for k in range(0, len(parameters), count)]
        outputs, saved = fold(settings, masks, skip, *map(joined, kinds))
        ctx.settings, ctx.masks, ctx.skip, ctx.lengths = settings, masks, skip, [len(scale) for scale in kinds[0]]
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        settings, (rows, after, norm, gain, bias, *weights) = ctx.settings, ctx.saved_tensors
        n, dtype, ngroups = weights[0].shape[1], norm.dtype, settings.ngroups
        unfold_piece = compiled(unfold_weight) if settings.compile else unfold_weight
        outputs = [grads[k :: 2 + 2 * len(weights)] for k in range(2 + 2 * len(weights))]  # each over half-steps
        grad_beta, grad_factor, *grad_biases = (
            torch.cat(steps)[:, 0].to(dtype) for steps in outputs[:2] + outputs[3::2]
        )
        grad_bias = torch.cat(grad_biases, 1)
        unit = gain / norm
        columns = unit * after
        sums, grad_weights = [], []
        layers = zip(weights, ctx.masks, outputs[2::2], *by_layer(weights, rows, norm, columns), strict=True)
        for weight, mask, steps, rows_k, norm_k, columns_k in layers:
            grad_weights.append(torch.empty_like(weight))
            done = []
            for piece in pieces(weight, ngroups):
                grad = joined(steps[piece.start // ngroups : piece.stop // ngroups]).to(dtype)
                pair, out = (masked(grad, mask), masked(weight[piece], mask)), grad_weights[-1][piece]
                done.append(unfold_piece(*pair, rows_k[piece], columns_k[piece], norm_k[piece], out))
            sums.append([joined(parts) for parts in zip(*done, strict=True)])
        grad_rows, grad_columns = (torch.cat(parts, 1) for parts in zip(*sums, strict=True))
        grad_after = grad_columns * unit + grad_bias * bias
        grad_all_betas = -grad_rows * rows.square()
        grad_all_betas[:, n:] += grad_after[:, :-n]
        grad_all_betas[:, :n] += grad_beta
        grad_scale = grad_after[:, -n:]
        if ctx.skip:
            grad_scale = (grad_scale + grad_factor) * math.sqrt(0.5)
        kinds = grad_scale, grad_all_betas, grad_columns * after / norm, grad_bias * after, *grad_weights
        return None, None, None, None, *(part for grad in kinds for part in grad.split(ctx.lengths))


def masked(tensor, mask):
    return tensor if mask is None else tensor * mask


def joined(tensors):
    """The tensors one after the other."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def by_layer(weights, rows, *columns):
    """Side by side for all layers -> one per layer: rows (S, sum of in), each of columns (S, sum of out)."""
    yield rows.split([weight.shape[1] for weight in weights], 1)
    for each in columns:
        yield each.split([weight.shape[2] for weight in weights], 1)


def split(tensor, ngroups):
    """(S, n) -> K of (G, 1, n)."""
    return tensor[:, None, :].split(ngroups)


def pieces(weights, ngroups):
    """Slices of whole half-steps that cover the S networks of `weights` (S, in, out): `PIECE` entries or so each on a
    CPU, all on a GPU."""
    size = weights.numel() if weights.is_cuda else PIECE
    length = ngroups * max(1, size // (ngroups * weights[0].numel()))
    return [slice(start, min(start + length, len(weights))) for start in range(0, len(weights), length)]
