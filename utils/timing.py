"""Seconds that functions take, and how much they scatter."""

import statistics
import time

import torch


def synchronize(device):
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function, device, seconds):
    """`function`, made to append the seconds that each call takes on `device` to the list `seconds`."""

    def call(*arguments):
        synchronize(device)
        start = time.perf_counter()
        result = function(*arguments)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
        return result

    return call


def spread(seconds):
    """Largest minus smallest over the median."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)
