"""The fast way to evaluate residual networks: what residual.py says, with the parameters folded into the matrices.

The G networks of one step of a bijector do not depend on each other and have equal sizes, so they run side by side as
batched matrix products. What depends on parameters alone is folded into the matrices beforehand, once per training
step: since  x sigmoid(beta x) = silu(beta x) / beta, the factor beta goes into the matrix before the activation and
1 / beta into the matrix after it, together with norm, gain, 1 / sqrt(2) and the final scale. Between two products only
the silu is left. All K steps of a bijector are folded at once, S = K G networks.

Every weight is folded once per training step. What autograd would record of it, a dozen passes over the weights and as
many small operations per layer, costs more than the matrix products of a small batch, so the derivative is written out.
"""

import math
from contextlib import contextmanager
from itertools import chain, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .networks import NORM_MIN, Networks, compiled

# |beta| counts as at least this, since silu(0 x) / 0 is 0 / 0; the gradient passes straight through.
BETA_MIN = 1e-4
# Weights are folded in pieces of about this many entries, which stay in the processor's cache between operations.
PIECE = 2**19


class FoldedNetworks(Networks):
    """How `ResidualNetworks` are evaluated: `steps` gives what `evaluate` needs for each step of the bijector."""

    _held = None

    def fold(self):
        return fold_networks([self])[0]

    def steps(self):
        return self._held or super().steps()

    @property
    def kind(self):
        """Equal for networks that `folded_together` folds at once, None for those with masks or large weights."""
        if any(mask is not None for block in self.blocks for mask in block.masks):
            return None
        if max(weight.numel() for block in self.blocks for weight in block.weights) > PIECE:
            return None
        sizes = tuple((block.skip, *(weight.shape[1:] for weight in block.weights)) for block in self.blocks)
        return sizes, self.ngroups, self.dtype, self.compile_kernels, self.scale.dtype, self.scale.device


@contextmanager
def folded_together(module):
    """Fold all small networks of `module` at once; within, `steps()` gives what their parameters were on entry.

    For a training step: where networks are small, what folding costs is the number of operations, not their size.
    Large networks are folded when they are used, so that memory holds the gradient of one of them at a time.
    """
    every = [part for part in module.modules() if isinstance(part, FoldedNetworks) and part.kind]
    kinds = {}
    for networks in every:
        kinds.setdefault(networks.kind, []).append(networks)
    try:
        for group in kinds.values():
            for networks, steps in zip(group, fold_networks(group), strict=True):
                networks._held = steps
        yield
    finally:
        for networks in every:
            networks._held = None


def fold_networks(group):
    """The folded parameters of networks of one kind: for each a list over steps of tuples over blocks."""
    steps = zip(*(fold_blocks(group, k) for k in range(len(group[0].blocks))), strict=True)
    return [list(islice(steps, len(networks.scale) // networks.ngroups)) for networks in group]


def fold_blocks(group, k):
    """What `evaluate` needs of residual block k of all networks of the group, a list of tuples, one per step."""
    one, blocks, scales = group[0], [networks.blocks[k] for networks in group], [n.scale for n in group]
    if blocks[0] is not one.blocks[-1]:  # only the last block is scaled
        scales = [torch.ones_like(scale) for scale in scales]
    dtype = one.dtype or one.scale.dtype
    settings = Settings(one.ngroups, dtype, one.compile_kernels, blocks[0].masks, blocks[0].skip)
    own = zip(*((block.beta, block.gain, block.bias, *block.weights) for block in blocks), strict=True)
    parameters = [scales, *own]
    if torch.is_grad_enabled() and any(parameter.requires_grad for each in parameters for parameter in each):
        outputs = Fold.apply(settings, len(group), *chain(*parameters))
    else:
        outputs, _ = fold(settings, *map(joined, parameters))
    length = 2 + 2 * len(blocks[0].weights)
    return [outputs[start : start + length] for start in range(0, len(outputs), length)]


def evaluate(folded, x):
    """The G residual networks of one step at x (N, n), the same for all: (G, N, n).

    The products are computed in the type of the matrices; x and what the blocks add to it are of the type of x.
    """
    for beta, factor, *layers in folded:
        y = (x * beta).to(layers[0].dtype)  # (G, N, n)
        for matrix, bias in zip(layers[::2], layers[1::2], strict=True):
            y = torch.baddbmm(bias, F.silu(y), matrix)  # (G, N, nhidden), at last (G, N, n)
        x = torch.addcmul(y.to(x.dtype), x, factor)
    return x


class Settings(NamedTuple):
    """How a residual block is folded.

    ngroups: G
    dtype: type of the folded matrices and biases
    compile: whether weights are folded by compiled kernels
    masks, skip: see `ResidualBlock`
    """

    ngroups: int
    dtype: torch.dtype
    compile: bool
    masks: list
    skip: bool

    def pieces(self, weight):
        """Slices of whole steps that cover the S networks of a weight (S, in, out): `PIECE` entries or so each on a
        CPU, all on a GPU."""
        size = weight.numel() if weight.is_cuda else PIECE
        length = self.ngroups * max(1, size // (self.ngroups * weight[0].numel()))
        return [slice(start, min(start + length, len(weight))) for start in range(0, len(weight), length)]


def fold(settings, scale, beta, gain, bias, *weights):
    """beta (G, 1, n), factor of the skip connection (G, 1, n), matrix (G, in, out), bias (G, 1, out), matrix, bias, …
    of one residual block, step after step; and what the derivative needs.

    For the parameters see `ResidualBlock`; `scale` (S, n) multiplies the block's output.
    """
    n, ngroups = scale.shape[1], settings.ngroups
    fold_piece = compiled(fold_weight) if settings.compile else fold_weight
    beta = torch.where(beta.abs() < BETA_MIN, BETA_MIN, beta)
    factor = scale * math.sqrt(0.5) if settings.skip else scale
    after = torch.cat((beta[:, n:], factor), 1)  # what the output of each linear layer is multiplied by
    rows, columns = beta.reciprocal(), gain * after
    folded, norms = [by_step(beta[:, :n], ngroups), by_step(factor * settings.skip, ngroups)], []
    for weight, mask, rows_k, columns_k, bias_k in by_layer(settings, weights, rows, columns, bias * after):
        done = [
            fold_piece(masked(weight[piece], mask), rows_k[piece], columns_k[piece], settings.dtype)
            for piece in settings.pieces(weight)
        ]
        matrices = [step for matrix, _ in done for step in matrix.split(ngroups)]
        folded += [matrices, by_step(bias_k.to(settings.dtype), ngroups)]
        norms.append(joined([norm for _, norm in done]))
    outputs = [tensor for step in zip(*folded, strict=True) for tensor in step]
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
    """`fold` with its derivative written out."""

    @staticmethod
    def forward(ctx, settings, count, *parameters):
        """Of `count` networks, one after the other: their scales, betas, gains, … as `fold` has them."""
        kinds = [parameters[k : k + count] for k in range(0, len(parameters), count)]
        outputs, saved = fold(settings, *map(joined, kinds))
        ctx.settings, ctx.lengths = settings, [len(scale) for scale in kinds[0]]
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():
            raise RuntimeError("second derivatives by the parameters of residual networks: not available")
        settings, (rows, after, norm, gain, bias, *weights) = ctx.settings, ctx.saved_tensors
        n, dtype, ngroups = weights[0].shape[1], norm.dtype, settings.ngroups
        unfold_piece = compiled(unfold_weight) if settings.compile else unfold_weight
        outputs = [grads[k :: 2 + 2 * len(weights)] for k in range(2 + 2 * len(weights))]  # each over steps
        grad_beta, grad_factor, *grad_biases = (
            torch.cat(steps)[:, 0].to(dtype) for steps in outputs[:2] + outputs[3::2]
        )
        grad_bias = torch.cat(grad_biases, 1)
        unit = gain / norm
        sums, grad_weights = [], []
        layers = by_layer(settings, weights, rows, norm, unit * after)
        for steps, (weight, mask, rows_k, norm_k, columns_k) in zip(outputs[2::2], layers, strict=True):
            grad_weights.append(torch.empty_like(weight))
            done = []
            for piece in settings.pieces(weight):
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
        if settings.skip:
            grad_scale = (grad_scale + grad_factor) * math.sqrt(0.5)
        kinds = grad_scale, grad_all_betas, grad_columns * after / norm, grad_bias * after, *grad_weights
        return None, None, *(part for grad in kinds for part in grad.split(ctx.lengths))


def masked(tensor, mask):
    return tensor if mask is None else tensor * mask


def joined(tensors):
    """The tensors one after the other."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def by_layer(settings, weights, rows, *columns):
    """(weight, mask, rows, *columns) of each linear layer, from those side by side: rows (S, sum of in), each of
    columns (S, sum of out)."""
    ins, outs = zip(*(weight.shape[1:] for weight in weights), strict=True)
    return zip(weights, settings.masks, rows.split(ins, 1), *(each.split(outs, 1) for each in columns), strict=True)


def by_step(tensor, ngroups):
    """(S, n) -> K of (G, 1, n)."""
    return tensor[:, None, :].split(ngroups)
