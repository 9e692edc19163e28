"""Training batches: order, flips, noise, the last partial batch."""

import numpy as np
import pytest
import torch

from data.batches import Batches
from utils.cli import UserError
from utils.random import generator

# 22 images; pixel (i, j) of image n is 8 n + 4 i + j, so that every batch tells where it came from.
IMAGES = np.arange(22 * 8, dtype=np.uint8).reshape(22, 1, 2, 4)


def epoch(batches, number):
    steps = range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch)
    return torch.cat([batches(step)[0] for step in steps])


def numbers(batch):
    return (batch[:, 0, 0].min(1).values // 8).tolist()


def test_every_epoch_is_an_order_of_its_own():
    batches = Batches(IMAGES, 5, "cpu", seed=0)
    assert batches.steps_per_epoch == 4  # the last two images are dropped
    orders = [numbers(epoch(batches, k)) for k in (0, 1, 2, 3, 4, 5, 0)]
    assert orders[1] != orders[0] == orders[-1]
    assert all(len(order) == len(set(order)) == 20 for order in orders)
    assert {number for order in orders for number in order} == set(range(22))
    assert numbers(epoch(Batches(IMAGES, 5, "cpu", seed=1), 0)) != orders[0]
    with pytest.raises(UserError, match="--batch_size 23: must be at most the 22"):
        Batches(IMAGES, 23, "cpu", seed=0)
    assert torch.equal(epoch(batches, 0), torch.from_numpy(IMAGES)[orders[0]])  # unchanged without flips


@pytest.mark.parametrize("flips", [False, True])
def test_draws_of_a_step(flips):
    """One generator per step: flips, then the noise of the whole batch, of which `rows` are a part. Runs rely on it."""
    batches = Batches(IMAGES, 5, "cpu", seed=3, flips=flips, dtype=torch.float32)
    whole, noise = batches(7)
    drawn = generator(3, "step", 7)
    if flips:
        flip = torch.rand(5, 1, 1, 1, generator=drawn, dtype=torch.get_default_dtype()) < 0.5
        plain = torch.from_numpy(IMAGES)[numbers(whole)]
        assert torch.equal(whole, torch.where(flip, plain.flip(3), plain))
    assert torch.equal(noise, torch.rand(5, 1, 2, 4, generator=drawn, dtype=torch.float32))
    part = batches(7, slice(2, 4))
    assert torch.equal(part[0], whole[2:4]) and torch.equal(part[1], noise[2:4])
