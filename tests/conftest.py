"""Tests compute in float64 with a fixed seed and one thread: the networks are tiny."""

import pytest
import torch


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
