"""Training batches: order, flips, the last partial batch."""

import numpy as np
import pytest
import torch

from data.batches import Batches
from utils.random import generator


@pytest.fixture
def images():
    """22 images; pixel (i, j) of image n is 8 n + 4 i + j, so that every batch tells where it came from."""
    n, i, j = np.ogrid[:22, :2, :4]
    return (8 * n + 4 * i + j).astype(np.uint8)[:, None]


def epoch(batches, number):
    steps = range(number * batches.steps_per_epoch, (number + 1) * batches.steps_per_epoch)
    return torch.cat([batches.train(step, generator(0, "step", step)) for step in steps])


def numbers(batch):
    return (batch[:, 0, 0].min(1).values // 8).tolist()


def test_every_epoch_is_an_order_of_its_own(images):
    batches = Batches(images, 5, "cpu", seed=0)
    assert batches.steps_per_epoch == 4  # the last two images are dropped
    first, second = numbers(epoch(batches, 0)), numbers(epoch(batches, 1))
    for order in (first, second):
        assert len(order) == len(set(order)) == 20
    assert first != second
    assert numbers(epoch(batches, 0)) == first
    assert numbers(epoch(Batches(images, 5, "cpu", seed=1), 0)) != first
    seen = {number for k in range(6) for number in numbers(epoch(batches, k))}
    assert seen == set(range(22))


def test_images_are_unchanged_without_flips(images):
    batch = epoch(Batches(images, 5, "cpu", seed=0), 0)
    assert torch.equal(batch, torch.from_numpy(images)[numbers(batch)])


def test_flips_are_horizontal_and_half_of_all(images):
    batches = Batches(images, 5, "cpu", seed=0, flips=True)
    flipped = 0
    for k in range(50):
        batch = epoch(batches, k)
        plain = torch.from_numpy(images)[numbers(batch)]
        mirrored = plain.flip(3)
        for image, one, other in zip(batch, plain, mirrored, strict=True):
            assert torch.equal(image, one) or torch.equal(image, other)
            flipped += torch.equal(image, other)
    assert 440 < flipped < 560  # of 1,000; 60 is 3.8 standard deviations


def test_too_few_images(images):
    with pytest.raises(ValueError, match="batch_size 23: must be at most the 22"):
        Batches(images, 23, "cpu", seed=0)
