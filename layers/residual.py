"""Residual networks that compute s and t of a coupling (Appendix A and figure A1, blue blocks).

One residual block is  x <- (x + f(x)) / sqrt(2)  with the pre-activated multilayer perceptron
f = linear . swish . linear . swish . … . linear . swish  (the rightmost acts first), swish(x) = x sigmoid(beta x) with
one learnable beta per feature, and weight normalisation on every linear layer. The output of the last block is
multiplied by a learnable scale that starts at 0, so that an untrained coupling is the identity.

The networks of one coupling half-step do not depend on each other and have equal sizes, so they run side by side as
batched matrix products: G networks, N patches, n features. What depends on parameters alone is folded into the
matrices beforehand: since  x sigmoid(beta x) = silu(beta x) / beta, the factor beta goes into the rows of the matrix
before the activation and 1 / beta into the columns of the matrix after it, together with norm, gain, 1 / sqrt(2) and
the final scale. Between two products only the silu is left.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

# |beta| counts as at least this, since silu(0 x) / 0 is 0 / 0; the gradient passes straight through.
BETA_MIN = 1e-4
# A row of weights with a smaller norm counts as 0, as one does that a mask clears entirely.
NORM_MIN = 1e-12


class ResidualBlock(nn.Module):
    """The parameters of G residual blocks n -> n with `nmlp` hidden layers of width `nhidden`.

    Linear layer k is  gain (V / |V|) x + bias  with V = weight * mask and |V| the norm of each row.

    masks: one (out, in) tensor of zeros and ones per linear layer, or None
    skip: whether x is added; without, the block is f(x) alone
    """

    def __init__(self, ngroups, nfeatures, nhidden, nmlp, masks=None, skip=True):
        super().__init__()
        sizes = [nfeatures] + [nhidden] * nmlp + [nfeatures]
        self.skip = skip
        self.num_linear = nmlp + 1
        for k, mask in enumerate(masks or [None] * self.num_linear):
            self.register_buffer(f"mask{k}", mask, persistent=False)
        self.betas = nn.ParameterList(torch.ones(ngroups, nin) for nin in sizes[:-1])
        self.weights = nn.ParameterList()
        self.gains = nn.ParameterList()
        for k, (nin, nout) in enumerate(pairwise(sizes)):
            bound = math.sqrt(2.81 * 3 / nin)  # 1 / 2.81 is the second moment of a swish of a standard normal variable
            weight = torch.empty(ngroups, nout, nin).uniform_(-bound, bound)
            self.weights.append(weight)
            self.gains.append(torch.linalg.vector_norm(weight if masks is None else weight * masks[k], dim=2))
        self.biases = nn.ParameterList(torch.zeros(ngroups, nout) for nout in sizes[1:])

    def fold(self, scale):
        """[beta, factor, matrix, bias, matrix, bias, …] for `ResidualNetworks.forward`; scale: (G, n) multiplies the
        block's output."""
        masks = [getattr(self, f"mask{k}") for k in range(self.num_linear)]
        arguments = masks, self.skip, scale, *self.betas, *self.weights, *self.gains, *self.biases
        if torch.is_grad_enabled() and self.biases[0].requires_grad:
            return Fold.apply(*arguments)
        return fold(*arguments)[0]


class ResidualNetworks(nn.Module):
    """G residual networks n -> n side by side, each with its own parameters.

    masks, skips: per residual block, see `ResidualBlock`.
    """

    def __init__(self, ngroups, nfeatures, nhidden, nresblocks, nmlp, masks=None, skips=None):
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(ngroups, nfeatures, nhidden, nmlp, mask, skip)
            for mask, skip in zip(masks or [None] * nresblocks, skips or [True] * nresblocks, strict=True)
        )
        self.scale = nn.Parameter(torch.zeros(ngroups, nfeatures))
        self.register_buffer("one", torch.ones(1, 1), persistent=False)
        self._folded = self._folded_from = None

    def forward(self, x):
        """x: (N, n), the same for all networks -> (G, N, n)."""
        for block, (beta, factor, *layers) in zip(self.blocks, self.folded(), strict=True):
            y = F.silu(x * beta)  # (G, N, n)
            while len(layers) > 2:
                matrix, bias, *layers = layers
                y = F.silu(torch.baddbmm(bias, y, matrix))  # (G, N, nhidden)
            matrix, bias = layers
            y = torch.baddbmm(bias, y, matrix)  # (G, N, n)
            x = torch.addcmul(y, x, factor) if block.skip else y
        return x

    def folded(self):
        """The folded parameters of each block; kept until the parameters change, where no gradient is asked for.

        Fused optimisers do not count up the version of what they change, so nothing is kept while a gradient is there.
        """
        asked = torch.is_grad_enabled() and self.scale.requires_grad
        if asked or self.scale.grad is not None:
            self._folded_from = None
            return self._fold()
        state = [(parameter.data_ptr(), parameter._version) for parameter in self.parameters()]
        if self._folded_from != state:
            self._folded, self._folded_from = self._fold(), state
        return self._folded

    def _fold(self):
        *first, last = self.blocks
        return [block.fold(self.one) for block in first] + [last.fold(self.scale)]


def fold(masks, skip, scale, *parameters):
    """[beta, factor, matrix, bias, matrix, bias, …] of one residual block, and what the derivative needs.

    parameters: n each of beta (G, in), weight (G, out, in), gain (G, out) and bias (G, out).
    """
    n = len(masks)
    betas, weights, gains, biases = (parameters[k : k + n] for k in range(0, 4 * n, n))
    betas = [torch.where(beta.abs() < BETA_MIN, BETA_MIN, beta) for beta in betas]
    factor = (scale * math.sqrt(0.5) if skip else scale).expand_as(biases[-1])
    outputs, saved = [betas[0][:, None, :], factor[:, None, :]], []
    for k, after in enumerate([*betas[1:], factor]):  # what the output of linear layer k is multiplied by
        weight = weights[k] if masks[k] is None else weights[k] * masks[k]
        norm = torch.linalg.vector_norm(weight, dim=2).clamp_min_(NORM_MIN)
        unit = gains[k] / norm
        rows, columns = unit * after, betas[k].reciprocal()
        matrix = (weight * rows[:, :, None]).mul_(columns[:, None, :])
        outputs += [matrix.transpose(1, 2), (biases[k] * after)[:, None, :]]
        saved += [weight, norm, unit, rows, columns, biases[k], after]
    return outputs, saved


class Fold(torch.autograd.Function):
    """`fold` with its derivative written out.

    Every weight passes through here once per step. What autograd would record of it, a dozen passes over the weights
    and as many small operations per layer, costs more than the matrix products of a small batch.
    """

    @staticmethod
    def forward(ctx, masks, skip, scale, *parameters):
        outputs, saved = fold(masks, skip, scale, *parameters)
        ctx.masks, ctx.skip = masks, skip
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, grad_beta, grad_factor, *grads):
        n, saved = len(ctx.masks), ctx.saved_tensors
        betas, weights, gains, biases = ([None] * n for _ in range(4))
        grad_after = grad_factor[:, 0] if ctx.skip else 0
        for k in reversed(range(n)):
            weight, norm, unit, rows, columns, bias, after = saved[7 * k : 7 * k + 7]
            grad, grad_bias = grads[2 * k].transpose(1, 2), grads[2 * k + 1][:, 0]
            product = grad * weight
            grad_rows = torch.bmm(product, columns[:, :, None])[:, :, 0]
            grad_columns = torch.bmm(rows[:, None, :], product)[:, 0]
            grad = torch.mul(grad, columns[:, None, :], out=product).mul_(rows[:, :, None])
            grad.addcmul_(weight, (grad_rows * rows / norm.square())[:, :, None], value=-1)
            weights[k] = grad if ctx.masks[k] is None else grad.mul_(ctx.masks[k])
            gains[k] = grad_rows * after / norm
            biases[k] = grad_bias * after
            grad_after = grad_rows * unit + grad_bias * bias + grad_after
            if k == n - 1:
                grad_scale = grad_after * math.sqrt(0.5) if ctx.skip else grad_after
            else:
                betas[k + 1] += grad_after
            betas[k] = -grad_columns * columns.square()
            grad_after = 0
        betas[0] += grad_beta[:, 0]
        grad_scale = grad_scale if ctx.needs_input_grad[2] else None
        return None, None, grad_scale, *betas, *weights, *gains, *biases
