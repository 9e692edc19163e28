"""Fast evaluation of the residual networks of residual.py, with the parameters folded into the matrices.

The G networks of one step of a bijector do not depend on each other and have equal sizes, so they run side by side as
batched matrix products. What depends on parameters alone is folded into the matrices beforehand, once per training
step: since  x sigmoid(beta x) = silu(beta x) / beta, the factor beta goes into the matrix before the activation and
1 / beta into the matrix after it, together with norm, gain, 1 / sqrt(2) and the final scale. Between two products only
the silu is left. All K steps of a bijector are folded at once, S = K G networks.

On a GPU small products take as long as their kernels are many. So there compiled networks have wide matrices: `EXTRA`
variables more, all 1, enter every product, and the row of one of them is the bias. Nothing adds a bias or sums its
derivative.
"""

import math
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from itertools import islice, repeat

import torch
import torch.nn.functional as F

from .networks import HELD, NORM_MIN, Networks, asked, compiled, transformed

# |beta| counts as at least this, since silu(0 x) / 0 is 0 / 0; the gradient passes straight through.
BETA_MIN = 1e-4
# Weights are folded in pieces of about this many entries, which stay in the processor's cache between operations.
PIECE = 2**19
# Multiples of 8 stay such, as fast kernels need. silu(ONE) = 1, in bfloat16 too.
EXTRA, ONE = 8, 1.2784645427610738
# How weights are folded: number G of networks of a step, type of the matrices, whether they are wide.
Settings = namedtuple("Settings", "ngroups dtype wide")


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
    for beta, factor, matrices, biases in folded:
        y = (x * beta).to(matrices[0].dtype)  # (G, N, n)
        if biases:
            for matrix, bias in zip(matrices, biases, strict=True):
                y = torch.baddbmm(bias, F.silu(y), matrix)  # (G, N, nhidden), at last (G, N, n)
        else:
            y = F.pad(y, (0, EXTRA), value=ONE)
            for matrix in matrices:
                y = torch.bmm(F.silu(y), matrix)  # (G, N, nhidden + EXTRA), at last (G, N, n)
        x = torch.addcmul(y.to(x.dtype), x, factor)
    return x


def fold_networks(group):
    """The folded parameters of networks of one kind: for each a list over steps of tuples over blocks."""
    steps = zip(*(fold_block(group, k) for k in range(len(group[0].blocks))), strict=True)
    return [list(islice(steps, len(networks.scale) // networks.ngroups)) for networks in group]


def fold_block(group, k):
    """What `evaluate` needs of residual block k of all networks of the group, for each step: beta (G, 1, n), factor of
    the skip connection (G, 1, n), matrices (G, in, out), and biases (G, 1, out), none with wide matrices."""
    one, blocks = group[0], [networks.blocks[k] for networks in group]
    wide = one.compile_kernels and wide_on(one.scale.device) and not transformed()
    settings = Settings(one.ngroups, one.dtype or one.scale.dtype, wide)
    weights = [joined(each) for each in zip(*(block.weights for block in blocks), strict=True)]
    ins, outs = zip(*(weight.shape[1:] for weight in weights), strict=True)
    # Split outside of compiled code: there, torch 2.14 derives `split` beside sums wrongly (seen on a CPU).
    small = ("beta", ins), ("gain", outs), ("bias", outs)
    small = [joined([getattr(block, name) for block in blocks]).split(sizes, 1) for name, sizes in small]
    factor = joined([networks.scale for networks in group])
    if k < len(one.blocks) - 1:  # only the last block is scaled
        factor = torch.ones_like(factor)
    factor = factor * (math.sqrt(0.5) if blocks[0].skip else 1)
    fold = compiled(fold_tensors) if wide else fold_tensors
    beta, factor, matrices, biases = fold(settings, blocks[0].skip, blocks[0].masks, weights, *small, factor)

    def steps(tensor):
        return tensor if isinstance(tensor, tuple) else tensor.split(one.ngroups)

    layers = (zip(*map(steps, each), strict=True) if each else repeat(()) for each in (matrices, biases))
    return list(zip(steps(beta), steps(factor), *layers, strict=False))


def wide_on(device):
    """Whether compiled networks have wide matrices, which are folded by compiled kernels. On a CPU both are slower."""
    return device.type != "cpu"


def fold_tensors(settings, skip, masks, weights, betas, gains, biases, factor):
    """`fold_block` for S networks, from lists over layers: beta, factor (S, 1, n), and lists over layers of matrices
    (S, in, out), which may be tuples over steps, and of biases (S, 1, out)."""
    betas = [beta - beta.detach() + torch.where(beta.abs() < BETA_MIN, BETA_MIN, beta).detach() for beta in betas]
    afters = [*betas[1:], factor]  # what the output of each linear layer is multiplied by
    befores = [beta.reciprocal() for beta in betas]
    fold = fold_plainly if settings.wide or transformed() else FoldWeight.apply
    matrices = [fold(settings, *layer) for layer in zip(masks, weights, befores, gains, afters, strict=True)]
    biases = [(bias * after).to(settings.dtype)[:, None] for bias, after in zip(biases, afters, strict=True)]
    if settings.wide:
        hidden = [True] * (len(biases) - 1) + [False]
        matrices, biases = [widened(*layer) for layer in zip(matrices, biases, hidden, strict=True)], []
    return betas[0][:, None], (factor * skip)[:, None], matrices, biases


def widened(matrix, bias, hidden):
    """matrix (S, in, out) and bias (S, 1, out) -> a wide matrix (S, in + EXTRA, out). With `hidden` it has `EXTRA` more
    columns, which give ONE."""
    if hidden:
        matrix, bias = F.pad(matrix, (0, EXTRA)), F.pad(bias, (0, EXTRA), value=ONE)
    return torch.cat((matrix, F.pad(bias, (0, 0, 0, EXTRA - 1))), 1)


def fold_plainly(settings, mask, weight, before, gain, after):
    """The matrix of `fold_weight` in operations that PyTorch can transform, compile and differentiate."""
    return fold_piece(masked(weight, mask), before, gain * after, settings.dtype)[0]


def pieces(weight, ngroups):
    """Slices of whole steps that cover the S networks of a weight (S, in, out): `PIECE` entries or so on a CPU, all on
    a GPU."""
    size = weight.numel() if weight.is_cuda else PIECE
    length = ngroups * max(1, size // (ngroups * weight[0].numel()))
    return [slice(start, min(start + length, len(weight))) for start in range(0, len(weight), length)]


def fold_weight(settings, mask, weight, before, gain, after):
    """before (S, in) * V / |V| * gain (S, out) * after (S, out) with V = mask * weight (S, in, out), a list over steps;
    |V| (S, out)."""
    slices, columns = pieces(weight, settings.ngroups), gain * after
    done = [fold_piece(masked(weight[at], mask), before[at], columns[at], settings.dtype) for at in slices]
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
            return None, None, *pull(joined(grads))
        settings, mask, (weight, before, gain, after, norm) = ctx.settings, ctx.mask, ctx.saved_tensors
        unit, grad_weight, sums = gain / norm, torch.empty_like(weight), []
        columns = unit * after
        for at in pieces(weight, settings.ngroups):
            grad = joined(grads[at.start // settings.ngroups : at.stop // settings.ngroups]).to(weight.dtype)
            pair = masked(grad, mask), masked(weight[at], mask)
            sums.append(unfold_piece(*pair, before[at], columns[at], norm[at], grad_weight[at]))
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
