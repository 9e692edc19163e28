"""Fast evaluation of the residual networks of residual.py, with the parameters folded into the matrices.

The G networks of one step of a bijector do not depend on each other and have equal sizes, so they run side by side as
batched matrix products. What depends on parameters alone is folded into the matrices beforehand, once per training
step: since  x sigmoid(beta x) = silu(beta x) / beta, the factor beta goes into the matrix before the activation and
1 / beta into the matrix after it, together with norm, gain, 1 / sqrt(2) and the final scale. Between two products only
the silu is left. All K steps of a bijector are folded at once, S = K G networks.
"""

import math
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F

from .networks import HELD, NORM_MIN, Networks, asked, compiled, transformed

# |beta| counts as at least this, since silu(0 x) / 0 is 0 / 0; the gradient passes straight through.
BETA_MIN = 1e-4
# Weights are folded in pieces of about this many entries, which stay in the processor's cache between operations.
PIECE = 2**19
# How weights are folded: number G of networks of a step, type of the matrices, whether by compiled kernels.
Settings = namedtuple("Settings", "ngroups dtype compile")


class FoldedNetworks(Networks):
    """How `ResidualNetworks` are evaluated: `steps` gives what `evaluate` needs for each step of the bijector."""

    def fold(self):
        return fold_networks([self])[0]

    @property
    def kind(self):
        """None for those with masks or large weights."""
        masked = any(mask is not None for block in self.blocks for mask in block.masks)
        if masked or max(weight.numel() for block in self.blocks for weight in block.weights) > PIECE:
            return None
        sizes = tuple((block.skip, *(weight.shape[1:] for weight in block.weights)) for block in self.blocks)
        return sizes, self.ngroups, self.dtype, self.compile_kernels, self.scale.dtype, self.scale.device


@contextmanager
def folded_together(module):
    """Fold the networks of `module` once; within, `steps()` gives what their parameters were on entry.

    For a training step, and where a flow is used many times. Small residual networks are folded at once, which costs by
    the number of operations, not by their size. Others are folded here only without gradients, and otherwise when they
    are used, so that memory holds the gradient of one of them at a time. Within another such context it does nothing.
    """
    held, differentiable, kinds = dict(HELD.get()), asked(module.parameters()), {None: []}
    for networks in module.modules():
        if isinstance(networks, Networks) and id(networks) not in held:
            kinds.setdefault(networks.kind, []).append(networks)
    alone = kinds.pop(None)
    folded = [] if differentiable else [(networks, networks.fold()) for networks in alone]
    for group in kinds.values():
        folded += zip(group, fold_networks(group), strict=True)
    held |= {id(networks): (tuple(networks.parameters()), differentiable, steps) for networks, steps in folded}
    token = HELD.set(held)
    try:
        yield
    finally:
        HELD.reset(token)


def evaluate(folded, x):
    """The G residual networks of one step at x (N, n), the same for all: (G, N, n). The products are computed in the
    type of the matrices; x and what the blocks add to it are of the type of x."""
    for beta, factor, *layers in folded:
        y = (x * beta).to(layers[0].dtype)  # (G, N, n)
        for matrix, bias in zip(layers[::2], layers[1::2], strict=True):
            y = torch.baddbmm(bias, F.silu(y), matrix)  # (G, N, nhidden), at last (G, N, n)
        x = torch.addcmul(y.to(x.dtype), x, factor)
    return x


def fold_networks(group):
    """The folded parameters of networks of one kind: for each a list over steps of tuples over blocks."""
    steps = zip(*(fold_block(group, k) for k in range(len(group[0].blocks))), strict=True)
    return [list(islice(steps, len(networks.scale) // networks.ngroups)) for networks in group]


def fold_block(group, k):
    """What `evaluate` needs of residual block k of all networks of the group, for each step: beta (G, 1, n), factor of
    the skip connection (G, 1, n), matrix (G, in, out), bias (G, 1, out), matrix, bias, …"""
    one, blocks = group[0], [networks.blocks[k] for networks in group]
    skip, n = blocks[0].skip, one.scale.shape[1]
    settings = Settings(one.ngroups, one.dtype or one.scale.dtype, one.compile_kernels)
    beta, gain, bias = (joined([getattr(block, name) for block in blocks]) for name in ("beta", "gain", "bias"))
    beta = beta - beta.detach() + torch.where(beta.abs() < BETA_MIN, BETA_MIN, beta).detach()
    factor = joined([networks.scale for networks in group])
    if k < len(one.blocks) - 1:  # only the last block is scaled
        factor = torch.ones_like(factor)
    if skip:
        factor = factor * math.sqrt(0.5)
    after = torch.cat((beta[:, n:], factor), 1)  # what the output of each linear layer is multiplied by
    ins, outs = zip(*(weight.shape[1:] for weight in blocks[0].weights), strict=True)
    gains, afters, biases = (each.split(outs, 1) for each in (gain, after, (bias * after).to(settings.dtype)))
    befores = beta.reciprocal().split(ins, 1)
    weights = map(joined, zip(*(block.weights for block in blocks), strict=True))
    folded = [beta[:, None, :n].split(one.ngroups), (factor * skip)[:, None].split(one.ngroups)]
    for *layer, bias in zip(blocks[0].masks, weights, befores, gains, afters, biases, strict=True):
        fold = fold_plainly if transformed() else FoldWeight.apply
        folded += [fold(settings, *layer), bias[:, None].split(one.ngroups)]
    return list(zip(*folded, strict=True))


def fold_plainly(settings, mask, weight, before, gain, after):
    """What `fold_weight` gives without |V|, in operations that PyTorch can transform and differentiate."""
    return fold_piece(masked(weight, mask), before, gain * after, settings.dtype)[0].split(settings.ngroups)


def pieces(weight, ngroups):
    """Slices of whole steps that cover the S networks of a weight (S, in, out): `PIECE` entries or so on a CPU, all on
    a GPU."""
    size = weight.numel() if weight.is_cuda else PIECE
    length = ngroups * max(1, size // (ngroups * weight[0].numel()))
    return [slice(start, min(start + length, len(weight))) for start in range(0, len(weight), length)]


def fold_weight(settings, mask, weight, before, gain, after):
    """before (S, in) * V / |V| * gain (S, out) * after (S, out) with V = mask * weight (S, in, out), a list over steps;
    |V| (S, out)."""
    fold, columns = compiled(fold_piece) if settings.compile else fold_piece, gain * after
    slices = pieces(weight, settings.ngroups)
    done = [fold(masked(weight[at], mask), before[at], columns[at], settings.dtype) for at in slices]
    return [step for matrix, _ in done for step in matrix.split(settings.ngroups)], joined([norm for _, norm in done])


class FoldWeight(torch.autograd.Function):
    """`fold_weight` with its derivative written out: the dozen passes over every weight that autograd would record cost
    more than the matrix products of a small batch."""

    @staticmethod
    def forward(ctx, settings, mask, weight, before, gain, after):
        matrices, norm = fold_weight(settings, mask, weight, before, gain, after)
        ctx.settings, ctx.mask = settings, mask
        ctx.save_for_backward(weight, before, gain, after, norm)
        return tuple(matrices)

    @staticmethod
    def backward(ctx, *grads):
        if torch.is_grad_enabled():  # second derivatives are asked for
            pull = torch.func.vjp(partial(fold_plainly, ctx.settings, ctx.mask), *ctx.saved_tensors[:4])[1]
            return None, None, *pull(grads)
        settings, mask, (weight, before, gain, after, norm) = ctx.settings, ctx.mask, ctx.saved_tensors
        unfold = compiled(unfold_piece) if settings.compile else unfold_piece
        unit, grad_weight, sums = gain / norm, torch.empty_like(weight), []
        columns = unit * after
        for at in pieces(weight, settings.ngroups):
            grad = joined(grads[at.start // settings.ngroups : at.stop // settings.ngroups]).to(weight.dtype)
            pair = masked(grad, mask), masked(weight[at], mask)
            sums.append(unfold(*pair, before[at], columns[at], norm[at], grad_weight[at]))
        grad_before, grad_columns = (joined(parts) for parts in zip(*sums, strict=True))
        return None, None, grad_weight, grad_before, grad_columns * after / norm, grad_columns * unit


def fold_piece(weight, rows, columns, dtype):
    """weight (S, in, out) -> weight * rows * columns / norm in `dtype`, norm (S, out) of its columns."""
    norm = weight.square().sum(1).clamp_min(NORM_MIN**2).sqrt()  # whose second derivative is finite at 0
    matrix = (weight * (columns / norm)[:, None, :]).mul_(rows[:, :, None])
    return matrix.to(dtype), norm


def unfold_piece(grad, weight, rows, columns, norm, out):
    """The derivative of `fold_piece`, with columns / norm as `columns`: that of the weight goes to `out` (S, in, out),
    those of rows (S, in) and of columns (S, out) are returned."""
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


def masked(tensor, mask):
    return tensor if mask is None else tensor * mask


def joined(tensors):
    """The tensors one after the other."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
