"""In what precision an operator computes, whatever the type of its map and whatever autocast says."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor


def full(x: Tensor) -> torch.dtype:
    """At least float32: what statistics, logits, sums and everything else that is small is computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which every tensor keeps the type that it has. Nothing where autocast is off anyway: a region of its
    own would stand in exported graphs."""
    device = "cpu" if x.is_meta else x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


@torch.no_grad()
def copy_back(updated: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
    """Copy running statistics that were updated in another type to the tensors that were given."""
    for new, old in zip(updated, given):
        if new is not None and old is not None and new is not old:
            old.copy_(new)
