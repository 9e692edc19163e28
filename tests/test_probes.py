"""Linear probes where R^2 is known in closed form."""

import math

import pytest
import torch

from utils.probes import Parts, position_r2, ridge_r2, single_r2

N = 2000


def parts(values):
    """The first half fits, a quarter chooses, a quarter scores."""
    return Parts(*values.split((N, N // 2, N // 2)))


@pytest.fixture
def latents():
    return torch.distributions.Laplace(0.0, math.sqrt(0.5)).sample((2 * N, 8))


def hadamard(n):
    """An orthogonal matrix with entries of equal size."""
    matrix = torch.ones(1, 1)
    while len(matrix) < n:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(n)


@pytest.mark.parametrize(
    "factors, ridge, single",
    [
        (lambda z: -5 * z[:, [2, 5]] + 100, 1, 1),  # latents of their own; neither scale nor offset matters
        (lambda z: z @ hadamard(8), 1, 1 / 8),  # an equal mixture of 8 latents each
        (lambda z: z + 0.5 * torch.randn_like(z), 0.8, 0.8),  # noise: 1 of the variance 1.25
    ],
)
def test_factors_in_one_latent_in_many_and_with_noise(factors, ridge, single, latents):
    z, y = parts(7 * latents + 3), parts(factors(latents))
    assert ridge_r2(z, y).mean().item() == pytest.approx(ridge, abs=1e-6 if ridge == 1 else 0.02)
    assert single_r2(z, y).mean().item() == pytest.approx(single, abs=1e-6 if single == 1 else 0.02)


def test_no_information_scores_0_on_held_out_data():
    z, y = parts(torch.randn(2 * N, 1500)), parts(torch.randn(2 * N, 5))  # nearly as many latents as images to fit
    fitted = torch.linalg.lstsq(z.fit, y.fit).solution
    assert 1 - (y.fit - z.fit @ fitted).var() / y.fit.var() > 0.7  # what would be reported without held-out data
    assert ridge_r2(z, y).abs().max() < 0.03
    assert single_r2(z, y).abs().max() < 0.03


def test_a_few_of_many_latents_are_found():
    z = torch.randn(2 * N, 1000)
    y = z[:, :20].sum(1, keepdim=True) + 0.1 * torch.randn(2 * N, 1)
    assert ridge_r2(parts(z), parts(y)).item() > 0.99


def test_the_best_latent_is_chosen_without_the_scores(latents):
    y = latents[:, 3:4].clone()
    y[N + N // 2 :] = latents[N + N // 2 :, 4:5]  # in the scoring part the label has moved to another latent
    score = single_r2(parts(latents), parts(y)).item()
    assert score == pytest.approx(-1, abs=0.2)  # slope 1 on an independent latent: error variance 2 over 1


def test_constant_latents_are_harmless(latents):
    z = torch.cat((torch.full((2 * N, 3), 4.0), latents), 1)
    assert ridge_r2(parts(z), parts(latents)).min() > 0.999
    assert single_r2(parts(z), parts(latents)).min() > 0.999
    by_position = parts(z[:, :9].reshape(2 * N, 3, 3))
    chosen, scored = position_r2(by_position, parts(latents[:, :6]))
    assert scored[0] == pytest.approx([0] * 6, abs=0.02)
    torch.testing.assert_close(scored[1:], torch.eye(2).repeat_interleave(3, 1), atol=0.02, rtol=0)
    assert (chosen - scored).abs().max() < 0.02


def test_positions_against_least_squares(latents):
    y = torch.randn(2 * N, 2) + latents[:, [0, 7]]
    z = parts(latents.reshape(2 * N, 2, 4))
    expected = torch.empty(2, 2)
    for position in range(2):
        ones = [torch.cat((part[:, position], torch.ones(len(part), 1)), 1) for part in z]
        fitted = torch.linalg.lstsq(ones[0], y[:N]).solution
        errors = (parts(y).score - ones[2] @ fitted).square().sum(0)
        expected[position] = 1 - errors / (parts(y).score - y[:N].mean(0)).square().sum(0)
    torch.testing.assert_close(position_r2(z, parts(y))[1], expected, atol=1e-6, rtol=1e-6)


def test_float32_latents_are_taken_in_float64(latents):
    z = Parts(*(part.float() for part in parts(latents + 1e3)))
    assert single_r2(z, parts(latents)).min() > 0.9999
