"""Dequantisation and logit; test_evaluation.py has bits per dimension."""

import pytest
import torch

from flow.preprocess import to_image, to_model, to_uint8


def every_value(n=4):
    """Images that hold every uint8 value."""
    return torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(n, 3, 16, 16).clone()


def test_log_det_against_autograd():
    images = every_value(1)[:, :1]
    noise = torch.rand(1, 1, 16, 16)
    continuous = ((images + noise) / 256).flatten().requires_grad_()

    def logit(x):
        y = 0.05 + 0.9 * x
        return y.log() - (1 - y).log()

    diagonal = torch.autograd.functional.jacobian(logit, continuous).diagonal()
    x, log_det = to_model(images, noise=noise)
    torch.testing.assert_close(x.flatten(), logit(continuous).detach())
    torch.testing.assert_close(log_det[0], diagonal.log().sum())


def test_images_come_back_exactly():
    for noise in (None, 1e-9, 0.5, 1 - 1e-9):
        assert torch.equal(to_uint8(to_model(every_value(), noise=noise)[0]), every_value())
    x, _ = to_model(every_value(), noise=0.5, dtype=torch.float32)
    assert x.dtype == torch.float32 and torch.equal(to_uint8(x), every_value())


def test_extremes_are_clamped_and_only_uint8_is_taken():
    assert to_image(torch.tensor([-50.0, 0.0, 50.0])).tolist() == [0, 0.5, 1]
    assert to_uint8(torch.tensor([-50.0, 50.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match="float64"):
        to_model(torch.zeros(1, 1, 4, 4))


def test_noise_is_fresh_and_a_function_of_the_generator():
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 1, 2)]
    draws = [to_model(every_value(), generator)[0] for generator in (*generators, generators[0])]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])
