"""Which images each process sees at each step, and how they get there.

Every random number is a function of (seed, epoch or step, image or process), never of history. The order of an epoch
is a function of (seed, epoch); step s takes the next `batch_size` images of it, each process its contiguous part;
what augmentation does to an image is a function of (seed, epoch, image). So a run is the same with any number of
loader workers and of processes, and starts in the middle of an epoch as if it had been there from the beginning.
"""

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..distributed import derive, rank, world
from ..errors import UserError


class Seeded(Dataset):
    """A dataset addressed by (epoch, index), whose random numbers come from (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> list:
        """The samples of a batch. Python's, numpy's and torch's generators are left as they were found."""
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        samples = []
        try:
            for epoch, index in keys:
                seed = derive("image", self.seed, epoch, index)
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.default_generator.manual_seed(seed)
                samples.append(self.dataset[index])
        except UserError as error:  # a worker process can only hand it over as a value
            return [error]
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        return samples


def steps_per_epoch(images: int, batch_size: int, accumulate: int = 1) -> int:
    """Full batches in an epoch. Raises UserError where there is none, or the processes can't share a batch equally."""
    parts = world() * accumulate
    if batch_size % parts:
        raise UserError(
            f"batch_size={batch_size} must be a multiple of {parts} ({world()} processes, accumulate={accumulate})"
        )
    if images < batch_size:
        raise UserError(f"batch_size={batch_size} is more than the {images} training images: make it smaller")
    return images // batch_size


class TrainingOrder:
    """Batches of (epoch, index) for steps start … stop - 1 of this process, `accumulate` batches a step."""

    def __init__(self, images: int, batch_size: int, seed: int, start: int, stop: int, accumulate: int = 1):
        self.images, self.batch_size, self.seed, self.start, self.stop = images, batch_size, seed, start, stop
        self.accumulate, self.per_epoch = accumulate, steps_per_epoch(images, batch_size, accumulate)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        own = self.batch_size // world()
        part = own // self.accumulate
        shuffled = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.per_epoch)
            if shuffled != epoch:
                generator = torch.Generator().manual_seed(derive("order", self.seed, epoch))
                order, shuffled = torch.randperm(self.images, generator=generator).tolist(), epoch
            first = position * self.batch_size + rank() * own
            for begin in range(first, first + own, part):
                yield [(epoch, index) for index in order[begin : begin + part]]


class EvaluationOrder:
    """Every image once over all processes, in batches of this process's share; the last ones may be short."""

    def __init__(self, images: int, batch_size: int):
        self.batches = [list(range(i, min(i + batch_size, images))) for i in range(0, images, batch_size)][
            rank() :: world()
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(0, index) for index in batch] for batch in self.batches)


def batches(dataset: Dataset, order: Iterable, seed: int, workers: int, device: torch.device) -> DataLoader:
    """A loader of the batches that `order` lists, `workers` processes reading ahead (0: this one reads)."""
    return DataLoader(
        Seeded(dataset, seed),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # its own, so that making an iterator draws nothing from the global one
    )


def _collate(samples: list) -> Any:
    return samples[0] if isinstance(samples[0], UserError) else default_collate(samples)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch's tensors, in whatever lists, tuples and dicts, on the device. Raises the UserError of its loading."""
    if isinstance(batch, UserError):
        raise batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(value, device) for value in batch]
