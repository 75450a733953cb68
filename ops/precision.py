"""The precision that operators compute in, independent of the dtype of their inputs and of autocast."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import is_exporting


def full(x: Tensor) -> torch.dtype:
    """Return float32, or the dtype of x if that is wider: for statistics, logits, sums and other small tensors."""
    return torch.promote_types(x.dtype, torch.float32)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context manager that disables autocast. It does nothing if autocast is already off, so that exported
    graphs contain no autocast region."""
    device = "cpu" if x.is_meta else x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def no_gradients() -> contextlib.AbstractContextManager:
    """Return torch.no_grad(). It does nothing while a model is exported, for results without gradients anyway: a region
    without them becomes a subgraph of the program, which torch 2.11 loads only where the code that made it is."""
    return contextlib.nullcontext() if is_exporting() else torch.no_grad()


@torch.no_grad()
def copy_back(updated: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """Copy running statistics that were updated in another dtype back to the given tensors."""
    for new, old in zip(updated, given):
        if new is not None and old is not None and new is not old:
            old.copy_(new)
