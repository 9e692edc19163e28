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
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

# |beta| counts as at least this, since silu(0 x) / 0 is 0 / 0; the gradient passes straight through.
BETA_MIN = 1e-4
# A column of weights with a smaller norm counts as 0, as one does that a mask clears entirely.
NORM_MIN = 1e-12
# Weights are folded in pieces of about this many entries, which stay in the processor's cache between operations.
PIECE = 2**19


class ResidualBlock(nn.Module):
    """The parameters of one residual block n -> n, with `nmlp` hidden layers of width `nhidden`, of S networks.

    Linear layer k is  gain * (x V / |V|) + bias  with V = weight * mask (in, out) and |V| the norm of each column.

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
        self.betas = nn.ParameterList(torch.ones(nnetworks, nin) for nin in sizes[:-1])
        self.weights = nn.ParameterList()
        self.gains = nn.ParameterList()
        for k, (nin, nout) in enumerate(pairwise(sizes)):
            bound = math.sqrt(2.81 * 3 / nin)  # 1 / 2.81 is the second moment of a swish of a standard normal variable
            weight = torch.empty(nnetworks, nin, nout).uniform_(-bound, bound)
            self.weights.append(weight)
            self.gains.append(torch.linalg.vector_norm(weight if masks is None else weight * masks[k], dim=1))
        self.biases = nn.ParameterList(torch.zeros(nnetworks, nout) for nout in sizes[1:])

    def fold(self, ngroups, scale=None, differentiable=False):
        """What `evaluate` needs of this block for each half-step, a list of K tuples; `scale` (S, n), if given,
        multiplies the block's output."""
        if scale is None:
            scale = torch.ones_like(self.biases[-1])
        masks = [getattr(self, f"mask{k}") for k in range(self.num_linear)]
        arguments = ngroups, masks, self.skip, scale, *self.betas, *self.weights, *self.gains, *self.biases
        if differentiable:
            outputs = Fold.apply(*arguments)
        else:
            outputs, _ = fold(*arguments)
        per_step = 2 + 2 * self.num_linear
        return [outputs[k : k + per_step] for k in range(0, len(outputs), per_step)]


class ResidualNetworks(nn.Module):
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
        self._folded = self._folded_from = None

    def steps(self):
        """One function per half-step, (N, n) -> (G, N, n), of the parameters as they are now.

        In evaluation mode, where no gradient is asked for, the folded parameters are kept until the parameters change:
        until their versions do, or a gradient is there, since fused optimisers do not count up the version of what they
        change. A change through `.data` is not seen; `train()` and `eval()` forget what was kept.
        """
        parameters = list(self.parameters())
        differentiable = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        if self.training or differentiable or any(parameter.grad is not None for parameter in parameters):
            self._folded_from = self._folded = None
            folded = self.fold(differentiable)
        else:
            state = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
            if self._folded_from != state:
                with torch.inference_mode(False), torch.no_grad():
                    self._folded, self._folded_from = self.fold(), state
            folded = self._folded
        return [partial(evaluate, blocks) for blocks in folded]

    def train(self, mode=True):
        self._folded_from = self._folded = None
        return super().train(mode)

    def __repr__(self):
        block, (steps, networks) = self.blocks[0], (len(self.scale) // self.ngroups, self.ngroups)
        sizes = [weight.shape[1] for weight in block.weights] + [block.weights[-1].shape[2]]
        blocks = f"{len(self.blocks)} residual blocks {' -> '.join(map(str, sizes))}"
        return f"{type(self).__name__}({steps} half-steps x {networks} networks of {blocks})"

    def fold(self, differentiable=False):
        """The folded parameters: a list over half-steps of tuples over blocks."""
        *first, last = self.blocks
        blocks = [block.fold(self.ngroups, None, differentiable) for block in first]
        blocks.append(last.fold(self.ngroups, self.scale, differentiable))
        return list(zip(*blocks, strict=True))


def evaluate(blocks, x):
    """G residual networks with the folded parameters of each block, at x (N, n), the same for all: (G, N, n)."""
    for beta, factor, *layers in blocks:
        y = x * beta  # (G, N, n)
        for matrix, bias in zip(layers[::2], layers[1::2], strict=True):
            y = torch.baddbmm(bias, F.silu(y), matrix)  # (G, N, nhidden), at last (G, N, n)
        x = torch.addcmul(y, x, factor)
    return x


def fold(ngroups, masks, skip, scale, *parameters):
    """beta (G, 1, n), factor of the skip connection (G, 1, n), matrix (G, in, out), bias (G, 1, out), matrix, bias, …
    of one residual block, half-step after half-step; and what the derivative needs.

    parameters: n each of beta (S, in), weight (S, in, out), gain (S, out) and bias (S, out).
    """
    n, nsteps = len(masks), len(scale) // ngroups
    betas, weights, gains, biases = (parameters[k : k + n] for k in range(0, 4 * n, n))
    betas = [torch.where(beta.abs() < BETA_MIN, BETA_MIN, beta) for beta in betas]
    factor = scale * math.sqrt(0.5) if skip else scale
    folded, saved = [split(betas[0], ngroups), split(factor * skip, ngroups)], []
    for k, after in enumerate([*betas[1:], factor]):  # what the output of linear layer k is multiplied by
        norms, matrices = [], []
        before = betas[k].reciprocal()
        for piece in pieces(weights[k], ngroups):
            weight = weights[k][piece] if masks[k] is None else weights[k][piece] * masks[k]
            norm = weight.square().sum(1).sqrt_().clamp_min_(NORM_MIN)
            matrix = weight * (gains[k][piece] * after[piece] / norm)[:, None, :]
            matrices += matrix.mul_(before[piece][:, :, None]).split(ngroups)
            norms.append(norm)
        folded += [matrices, split(biases[k] * after, ngroups)]
        saved += [weights[k], torch.cat(norms), gains[k], biases[k], before, after]
    return [tensors[step] for step in range(nsteps) for tensors in folded], saved


class Fold(torch.autograd.Function):
    """`fold` with its derivative written out.

    Every weight passes through here once per step. What autograd would record of it, a dozen passes over the weights
    and as many small operations per layer, costs more than the matrix products of a small batch.
    """

    @staticmethod
    def forward(ctx, ngroups, masks, skip, scale, *parameters):
        outputs, saved = fold(ngroups, masks, skip, scale, *parameters)
        ctx.ngroups, ctx.masks, ctx.skip = ngroups, masks, skip
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        n, ngroups, saved = len(ctx.masks), ctx.ngroups, ctx.saved_tensors
        grads = [grads[k :: 2 + 2 * n] for k in range(2 + 2 * n)]  # per kind of output, over half-steps
        grad_betas, grad_weights, grad_gains, grad_biases = ([None] * n for _ in range(4))
        grad_after = torch.cat(grads[1])[:, 0]
        for k in reversed(range(n)):
            weights, norm, gain, bias, before, after = saved[6 * k : 6 * k + 6]
            grad_bias = torch.cat(grads[3 + 2 * k])[:, 0]
            unit = gain / norm
            grad_columns, grad_rows = torch.empty_like(norm), torch.empty_like(before)
            grad_weights[k] = torch.empty_like(weights)
            for piece in pieces(weights, ngroups):
                mask, weight, grad_weight = ctx.masks[k], weights[piece], grad_weights[k][piece]
                steps = grads[2 + 2 * k][piece.start // ngroups : piece.stop // ngroups]
                grad = steps[0] if len(steps) == 1 else torch.cat(steps)
                if mask is not None:
                    grad, weight = grad * mask, weight * mask
                rows, columns = before[piece][:, :, None], (unit[piece] * after[piece])[:, None, :]
                torch.mul(grad, weight, out=grad_weight)
                torch.bmm(rows.transpose(1, 2), grad_weight, out=grad_columns[piece][:, None, :])
                torch.bmm(grad_weight, columns.transpose(1, 2), out=grad_rows[piece][:, :, None])
                # The norm's part: d|V|/dV = V / |V| for each column.
                shrink = grad_columns[piece][:, None, :] * columns / norm[piece][:, None, :].square()
                torch.mul(grad, rows, out=grad_weight).mul_(columns).addcmul_(weight, shrink, value=-1)
            grad_gains[k] = grad_columns * after / norm
            grad_biases[k] = grad_bias * after
            grad_betas[k] = -grad_rows * before.square()
            grad_after_k = grad_columns * unit + grad_bias * bias
            if k < n - 1:
                grad_betas[k + 1] += grad_after_k
            else:
                grad_scale = (grad_after_k + grad_after * ctx.skip) * (math.sqrt(0.5) if ctx.skip else 1)
        grad_betas[0] += torch.cat(grads[0])[:, 0]
        grad_scale = grad_scale if ctx.needs_input_grad[3] else None
        return None, None, None, grad_scale, *grad_betas, *grad_weights, *grad_gains, *grad_biases


def split(tensor, ngroups):
    """(S, n) -> K of (G, 1, n)."""
    return tensor[:, None, :].split(ngroups)


def pieces(weights, ngroups):
    """Slices of whole half-steps that cover the S networks of `weights` (S, in, out), `PIECE` entries or so each."""
    length = ngroups * max(1, PIECE // (ngroups * weights[0].numel()))
    return [slice(start, min(start + length, len(weights))) for start in range(0, len(weights), length)]
