"""Draws of the priors against numerical integration; test_flows.py has the densities."""

import math
from unittest.mock import patch

import pytest
import torch

from flow.prior import PRIORS


@pytest.mark.parametrize("temperature", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("from_normal", [False, True])
@pytest.mark.parametrize("name", PRIORS)
def test_samples_follow_the_density_at_temperature(name, from_normal, temperature):
    """p_T is proportional to p^(1/T): the empirical distribution function against the integral of that."""
    prior = PRIORS[name]()
    draw, like = (prior.from_normal, torch.randn(100_000)) if from_normal else (prior.sample, torch.empty(100_000))
    draws, z = draw(like, temperature).sort().values, torch.linspace(-40, 40, 400_001)
    cdf = torch.cumulative_trapezoid((prior.log_prob(z) / temperature).exp(), z)
    cdf = cdf / cdf[-1]
    expected = cdf[((draws + 40) / 80 * 400_000).long().clamp(0, 399_999)]
    distance = (expected - (torch.arange(100_000) + 0.5) / 100_000).abs().max()
    assert distance < 1.63 / math.sqrt(100_000)  # Kolmogorov-Smirnov at the 1 % level; the seed is fixed


@pytest.mark.parametrize("name", PRIORS)
def test_float32_is_finite_and_from_normal_increasing_and_odd(name):
    draws = PRIORS[name]().sample(torch.empty(2_000_000, dtype=torch.float32))
    assert draws.dtype == torch.float32 and draws.isfinite().all()
    with patch("torch.rand", lambda *shape, generator, **how: torch.zeros(*shape, **how)):  # one draw of 2^24
        assert PRIORS["laplace"]().sample(torch.empty(1, dtype=torch.float32)).abs() < 12
    z = PRIORS[name]().from_normal(torch.linspace(-9, 9, 1001, dtype=torch.float32))
    assert z.isfinite().all() and (z.diff() > 0).all()
    torch.testing.assert_close(z, -z.flip(0))
