"""Linear probes where R^2 is known in closed form."""

import math

import pytest
import torch

from utils.probes import Parts, position_r2, ridge_r2, single_r2

N = 2000
PAIR = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
HADAMARD = torch.kron(PAIR, torch.kron(PAIR, PAIR))  # orthogonal, with entries of equal size


def parts(values):
    """The first half fits, a quarter chooses, a quarter scores."""
    return Parts(*values.split((N, N // 2, N // 2)))


@pytest.fixture
def latents():
    return torch.distributions.Laplace(0.0, math.sqrt(0.5)).sample((2 * N, 8))


@pytest.mark.parametrize(
    "factors, ridge, single",
    [
        (lambda z: -5 * z[:, [2, 5]] + 100, 1, 1),  # latents of their own; neither scale nor offset matters
        (lambda z: z @ HADAMARD, 1, 1 / 8),  # an equal mixture of 8 latents each
        (lambda z: z + 0.5 * torch.randn_like(z), 0.8, 0.8),  # noise: 1 of the variance 1.25
    ],
)
def test_factors_in_one_latent_in_many_and_with_noise(factors, ridge, single, latents):
    z, y = parts(7 * latents + 3), parts(factors(latents))
    for function, expected in ((ridge_r2, ridge), (single_r2, single)):
        assert function(z, y).mean().item() == pytest.approx(expected, abs=1e-6 if expected == 1 else 0.02)


def test_no_information_scores_0_on_held_out_data():
    z, y = parts(torch.randn(2 * N, 1500)), parts(torch.randn(2 * N, 5))  # nearly as many latents as images to fit
    fitted = torch.linalg.lstsq(z.fit, y.fit).solution
    assert 1 - (y.fit - z.fit @ fitted).var() / y.fit.var() > 0.7  # what would be reported without held-out data
    assert max(ridge_r2(z, y).abs().max(), single_r2(z, y).abs().max()) < 0.03


def test_a_few_of_many_latents_are_found():
    z = torch.randn(2 * N, 1000)
    y = z[:, :20].sum(1, keepdim=True) + 0.1 * torch.randn(2 * N, 1)
    assert ridge_r2(parts(z), parts(y)).item() > 0.99


def test_the_best_latent_is_chosen_without_the_scores(latents):
    y = latents[:, 3:4].clone()
    y[N + N // 2 :] = latents[N + N // 2 :, 4:5]  # in the scoring part the label has moved to another latent
    score = single_r2(parts(latents), parts(y)).item()
    assert score == pytest.approx(-1, abs=0.2)  # slope 1 on an independent latent: error variance 2 over 1


def test_constant_and_float32_latents_are_harmless(latents):
    z = torch.cat((torch.full((2 * N, 3), 4.0), latents), 1)
    for inputs in (z, (z + 1e3).float()):
        assert min(each(parts(inputs), parts(latents)).min() for each in (ridge_r2, single_r2)) > 0.999
    expected = torch.eye(3)[:, 1:].repeat_interleave(3, 1)
    for found in position_r2(parts(z[:, :9].reshape(2 * N, 3, 3)), parts(latents[:, :6])):
        torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_positions_against_least_squares(latents):
    y = torch.randn(2 * N, 2) + latents[:, [0, 7]]
    z = parts(latents.reshape(2 * N, 2, 4))
    for position, found in enumerate(position_r2(z, parts(y))[1]):
        fit, _, score = (torch.cat((part[:, position], torch.ones(len(part), 1)), 1) for part in z)
        errors = (parts(y).score - score @ torch.linalg.lstsq(fit, y[:N]).solution).square().sum(0)
        expected = 1 - errors / (parts(y).score - y[:N].mean(0)).square().sum(0)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
