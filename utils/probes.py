"""Linear regressions from latents to labels, scored on held-out data (float64): which latents encode a quantity?

R^2 = 1 - sum of squared errors / sum of squares about the mean of `fit`, per label, is negative where a prediction is
worse than that mean.
"""

from collections import namedtuple

import torch

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of ridge regression, per image; latents have variance 1
RIDGE = 1e-9  # the same where it only keeps matrices regular
STD_MIN = 1e-12  # a latent that varies less is constant

# Latents or labels (N, n) that determine the coefficients, choose the penalty or best latent, and give the number.
Parts = namedtuple("Parts", ("fit", "choose", "score"))


def standardised(parts, scale=True):
    """`parts` in float64 minus the mean of `fit`, and over its standard deviation with `scale`."""
    fit = parts.fit.double()
    mean, std = fit.mean(0), fit.std(0, correction=0) if scale else fit.new_ones(())
    return Parts(*((part.double() - mean) / std.clamp_min(STD_MIN) for part in parts))


def r2(predicted, labels):
    """Of predictions and centred labels (N, T): (T,)."""
    return 1 - (labels - predicted).square().sum(0) / labels.square().sum(0)


def ridge_r2(latents, labels):
    """R^2 of ridge regression from all latents, Parts (N, n), to Parts (N, T), its penalty chosen per label: (T,)."""
    z, y = standardised(latents), standardised(labels, scale=False)
    gram, target, scores = z.fit.T @ z.fit, z.fit.T @ y.fit, []
    for penalty in PENALTIES:
        regular = gram + penalty * len(z.fit) * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weights = torch.cholesky_solve(target, torch.linalg.cholesky(regular))
        scores.append(torch.stack((r2(z.choose @ weights, y.choose), r2(z.score @ weights, y.score))))
    return of_best(*torch.stack(scores, 1))


def of_best(chosen, scored):
    """The score of each label where its choice is best: (n, T) each -> (T,)."""
    return scored.gather(0, chosen.argmax(0)[None])[0]


def single_r2(latents, labels):
    """R^2 of each label from the one latent that is best for it: (T,). Arguments as those of `ridge_r2`."""
    return of_best(*position_r2(Parts(*(part[:, :, None] for part in latents)), labels))


def position_r2(latents, labels):
    """R^2 (P, T) of `choose` and `score`: least squares from each position alone, Parts (N, P, C), to Parts (N, T)."""
    z, y = standardised(latents), standardised(labels, scale=False)
    gram, product = moments(z.fit, y.fit)
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE * len(z.fit))  # a constant latent gets the weight 0
    weights = torch.linalg.solve(gram, product)  # (P, C, T)
    scores = []
    for z_part, y_part in ((z.choose, y.choose), (z.score, y.score)):
        gram, product = moments(z_part, y_part)
        explained = (weights * (2 * product - gram @ weights)).sum(1)  # |y|^2 - |y - z w|^2
        scores.append(explained / y_part.square().sum(0))
    return scores


def moments(z, y):
    """z (N, P, C) and y (N, T) -> z^T z (P, C, C) and z^T y (P, C, T)."""
    z = z.transpose(0, 1)
    return z.mT @ z, z.mT @ y
