"""Dequantisation and back; test_evaluation.py has the logit, its log-determinant and bits per dimension."""

import pytest
import torch

from flow.preprocess import to_image, to_model, to_uint8

IMAGES = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(4, 3, 16, 16)  # every value


def test_images_come_back_exactly():
    for noise in (None, 1e-9, 0.5, 1 - 1e-9):
        assert torch.equal(to_uint8(to_model(IMAGES, noise=noise)[0]), IMAGES)
    x, _ = to_model(IMAGES, noise=0.5, dtype=torch.float32)
    assert x.dtype == torch.float32 and torch.equal(to_uint8(x), IMAGES)


def test_extremes_are_clamped_and_only_uint8_is_taken():
    assert to_image(torch.tensor([-50.0, 0.0, 50.0])).tolist() == [0, 0.5, 1]
    assert to_uint8(torch.tensor([-50.0, 50.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="float64"):
        to_model(torch.zeros(1, 1, 4, 4))


def test_noise_is_fresh_and_a_function_of_the_generator():
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    first, same, *others = (to_model(IMAGES, generator)[0] for generator in (*generators, generators[0]))
    assert torch.equal(first, same) and not any(torch.equal(first, other) for other in others)
