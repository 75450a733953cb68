"""Fixtures of several folders."""

import pytest
import torch


@pytest.fixture
def double():
    """Make float64 the default dtype, in which golden values are compared."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
