"""Bits per dimension of a split, round trip and samples: against a flow whose errors are known, and `main.py`'s log."""

import math

import numpy as np
import pytest
import torch
from runs import records

from flow import evaluation, load
from flow.base import Flow
from flow.hierarchy import level_map
from utils.random import generator

C, L, M = 1, 8, 4


class Leaky(Flow):
    """f(x) = 2 x, and an inverse that is off by 0.1 at level 0 and 0.03 at level 1."""

    def __init__(self, leaks=(0.1, 0.03), prior="gaussian"):
        super().__init__(C, L, M, level_map(L, M), prior)
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.leak = torch.tensor(leaks)[self.level_map]

    def forward(self, x):
        return 2 * x, x.new_full((len(x),), C * L * L * math.log(2))

    def inverse(self, z):
        return z / 2 + self.leak.to(z.dtype), z.new_full((len(z),), -C * L * L * math.log(2))


def random_images(n=10):
    return np.random.default_rng(0).integers(0, 256, (n, C, L, L), dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_errors_of_a_known_flow(dtype):
    """x -> z -> x is off by the leak, z -> x -> z by twice as much, at each level its own. The flow stays as it is."""
    flow = Leaky()
    errors = evaluation.round_trip_errors(flow, random_images(), dtype)
    for source in ("data", "samples"):
        assert [errors[source]["image"], *errors[source]["levels"]] == pytest.approx([0.1, 0.2, 0.06], rel=1e-4)
    assert flow.anchor.dtype == torch.float64 and flow.training
    errors = evaluation.round_trip_errors(Leaky((0.0, math.inf)), random_images(), dtype)["data"]
    assert errors == {"image": None, "levels": [0, None]}  # what is not finite


def test_the_largest_round_trip_error_of_all_batches(monkeypatch):
    """Only one image, neither in the first batch nor in the last, is wrong."""

    class OneBad(Leaky):
        def inverse(self, z):
            x, log_det = super().inverse(z)
            bright = (x > 2).any((1, 2, 3), keepdim=True)  # of grey levels above 236 only
            return x + bright * 0.5 * self.level_map, log_det

    monkeypatch.setattr(evaluation, "BATCH", 4)
    images, bright = (random_images() // 2 for _ in range(2))
    bright[5] = 255
    for given, largest in ((images, [0, 0, 0]), (bright, [0.5, 0, 1])):
        errors = evaluation.round_trip_errors(OneBad((0.0, 0.0)), given, torch.float64)["data"]
        assert [errors["image"], *errors["levels"]] == pytest.approx(largest, abs=1e-12)


@pytest.mark.parametrize("seed, draw", [(0, 0), (0, 1), (3, 1)])
@pytest.mark.parametrize("prior", ["gaussian", "laplace"])
def test_bits_per_dim_against_the_closed_form(monkeypatch, prior, seed, draw):
    """f(x) = 2 x, in numpy. Noise is a function of seed, draw and the first image of a batch. Parts make the whole."""
    monkeypatch.setattr(evaluation, "BATCH", 4)
    images, batches = random_images(), ((0, 4), (4, 4), (8, 2))
    generators = [generator(seed, "test", 10 * draw + start) for start, _ in batches]
    u = torch.cat([torch.rand(n, C, L, L, generator=g) for (_, n), g in zip(batches, generators, strict=True)]).numpy()
    y = 0.05 + 0.9 * (images + u) / 256
    z = 2 * (np.log(y) - np.log1p(-y))
    density = {"gaussian": 0.5 * (z**2 + np.log(2 * np.pi)), "laplace": np.sqrt(2) * abs(z) + np.log(2) / 2}[prior]
    nats = density - np.log(2) - np.log(0.9 / 256 / (y * (1 - y)))
    ours = [evaluation.bits_per_dim_of_all(Leaky(prior=prior), images, seed, draw, part, 2) for part in (0, 1)]
    assert sum(ours).numpy() == pytest.approx(nats.mean((1, 2, 3)) / np.log(2), rel=1e-12)
    assert (ours[1] == 0).tolist() == [True] * 4 + [False] * 4 + [True] * 2


def test_the_first_draw_is_what_training_reports(start):
    run = start("--max_steps 3")
    flow, _ = load(run.folder / "last.state")
    values = evaluation.bits_per_dim_of_all(flow, run.dataset.test)
    reported = records(run, "test")[-1]
    assert evaluation.mean_and_stderr(values) == (reported["bpd"], reported["bpd_stderr"])


def test_statistics_of_values():
    values = torch.randn(50)
    expected = np.mean(values.numpy()), np.std(values.numpy(), ddof=1) / 50**0.5
    assert evaluation.mean_and_stderr(values) == pytest.approx(expected)
    assert evaluation.mean_and_stderr(values[:1]) == (values[0].item(), 0)
    for values, expected in (([0.0, 1.0], None), ([0.0, math.inf, math.nan], 1)):
        assert evaluation.first_nonfinite(torch.tensor(values)) == expected


def test_samples_are_8_bit_images_with_the_statistics_of_the_model():
    """x = z / 2 with z normal, of deviation sqrt(T): 15.87 % lie more than one deviation below 0, which is grey 128."""
    flow = Leaky((0.0, 0.0))
    for T in (1.0, 0.04):
        images = evaluation.sample_uint8(flow, 600, T)
        assert images.shape == (600, C, L, L) and images.dtype == torch.uint8
        limit = 256 * (1 / (1 + math.exp(math.sqrt(T) / 2)) - 0.05) / 0.9
        assert (images < limit).double().mean().item() == pytest.approx(0.1587, abs=0.01)
        assert images.double().median().item() == pytest.approx(128, abs=2)
    first, again, other = (evaluation.sample_uint8(flow, 500, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first[:250], first[250:])
    with pytest.raises(FloatingPointError, match="samples 0 to 2"):
        evaluation.sample_uint8(Leaky((0.0, math.nan)), 3)
