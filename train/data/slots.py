"""Memory that the processes of a loader share, in which they hand over batches.

Shared memory that is made for each batch consists of new pages, which the system has to clear: for a batch of images
that takes several times as long as copying them. Here it is made once, in slots for whole batches, which each loader
process fills in turn. What the main process gets are views of a slot.

A process is given as many batches in advance as the loader prefetches, and the next one when one of them is taken. With
one slot more than that, a slot is filled again only after the batch that follows its own has been asked for: whoever
takes a batch must be done with the views by then (`released`).
"""

import mmap
import multiprocessing
from collections.abc import Callable, Sequence
from itertools import count
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_ALIGNED = 64  # bytes
_numbers = count()
_known: WeakValueDictionary[int, "Slots"] = WeakValueDictionary()  # of this process, by their number


class Slots:
    """Slots of `size` bytes for `workers` processes that prefetch as many batches each. Made before they start."""

    def __init__(self, workers: int, prefetch: int, size: int):
        self.each, self.size = prefetch + 1, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        # Without a name, so that it ends with the processes. No page is used before it is written to.
        self.memory = torch.frombuffer(mmap.mmap(-1, workers * self.each * self.size), dtype=torch.uint8)
        self.batches, self.used = 0, 0  # of this process; bytes of its slot
        self.number = next(_numbers)
        _known[self.number] = self

    @staticmethod
    def work() -> bool:
        """Tell whether loader processes are forked from this one: others don't get its memory."""
        return multiprocessing.get_start_method() == "fork"

    def begin(self) -> None:
        """Use the next slot of this loader process."""
        self.batches, self.used = self.batches + 1, 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor in the slot; elsewhere if it does not fit."""
        length = prod(shape) * dtype.itemsize
        slot = get_worker_info().id * self.each + self.batches % self.each
        begin = slot * self.size + self.used
        if self.used + length > self.size or not length:
            return torch.empty(shape, dtype=dtype)
        self.used += -(-length // _ALIGNED) * _ALIGNED
        return self.memory[begin : begin + length].view(dtype).view(shape)

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a view of a slot."""
        return tensor.untyped_storage().data_ptr() == self.memory.data_ptr()

    def sent(self, batch: Any) -> Any:
        """Return a batch as it is sent to the main process, where views of the slot are made anew."""
        return _mapped(batch, lambda t: _View(self.number, t) if self.holds(t) else t)

    def released(self, batch: Any) -> Any:
        """Return a batch that does not depend on a slot."""
        return _mapped(batch, lambda t: t.clone() if self.holds(t) else t)


class _View:
    """A tensor in a slot, pickled as its place."""

    def __init__(self, number: int, tensor: Tensor):
        self.place = number, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def __reduce__(self) -> tuple:
        return _view, self.place


def _view(number: int, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], offset: int) -> Tensor:
    return _known[number].memory.view(dtype).as_strided(shape, stride, offset)


def _mapped(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return a batch with its tensors, in any lists, tuples and dicts, replaced by what `change` returns."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, dict):
        return {key: _mapped(value, change) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [_mapped(value, change) for value in batch]
    return batch
