"""What tests of several folders ask for."""

import pytest
import torch


@pytest.fixture
def double():
    """float64 as the default type, in which golden values are compared."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
