"""Which images each process sees at each step, and how they get there.

Every random number is a function of (seed, epoch or step, image or process), never of history. The order of an epoch
is a function of (seed, epoch); step s takes the next `batch_size` images of it, each process its contiguous part;
what augmentation does to an image is a function of (seed, epoch, image), and so is the image that stands in for one
that can't be read. So a run is the same with any number of loader workers and of processes, and starts in the middle
of an epoch as if it had been there from the beginning.

A sample's key is (epoch, index), or (epoch, index, copy) where an epoch has an image several times.
"""

import random
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..runtime.distributed import derive_seed, rank, world_size
from ..runtime.errors import DATA, UserError
from .bad_images import BadImage, BadImages

STANDINS = 100  # that are tried in a bad image's place


class Seeded(Dataset):
    """A dataset addressed by keys, from which all random numbers come. A dataset may have set_epoch(epoch).

    replace: another image takes the place of one that can't be read; otherwise the batch is shorter.
    """

    def __init__(self, dataset: Dataset, seed: int, replace: bool):
        self.dataset, self.seed, self.replace = dataset, seed, replace

    def __getitems__(self, keys: list[tuple[int, ...]]) -> tuple[list, dict[str, str]] | UserError:
        """The samples of a batch, and name -> reason of the images that can't be read.

        Python's, numpy's and torch's generators are left as they were found.
        """
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        bad: dict[str, str] = {}
        try:
            samples = [sample for key in keys for sample in self._sample(key, bad)]
        except UserError as error:  # a worker process can only hand it over as a value
            return error
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        return samples, bad

    def _sample(self, key: tuple[int, ...], bad: dict[str, str]) -> list:
        """The sample of a key or what stands in for it; none in evaluation, if it can't be read."""
        epoch, index = key[:2]
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        for attempt in range(STANDINS):
            seed = derive_seed("image", self.seed, *key)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)
            try:
                return [self.dataset[index]]
            except BadImage as error:
                bad[error.name] = error.reason
                if not self.replace:
                    return []
            index = derive_seed("instead", self.seed, epoch, key[1], attempt) % len(self.dataset)
        raise UserError(
            f"{STANDINS} images in a row can't be read, {next(iter(bad))} among them: see to the data", DATA
        )


def steps_per_epoch(images: int, batch_size: int, accumulate: int = 1) -> int:
    """Full batches in an epoch. Raises UserError where there is none, or the processes can't share a batch equally."""
    parts = world_size() * accumulate
    if batch_size % parts:
        raise UserError(
            f"batch_size={batch_size} must be a multiple of {parts} ({world_size()} processes, accumulate={accumulate})"
        )
    if images < batch_size:
        raise UserError(f"batch_size={batch_size} is more than the {images} training images: make it smaller")
    return images // batch_size


class TrainingOrder:
    """Batches of keys for steps start … stop - 1 of this process, `accumulate` batches a step.

    repeats: an epoch has each of its images so many times (repeated augmentation, arXiv 1901.09335), one copy after the
    other, and is as long as ever: it sees images / repeats of them. A step's batch is then dealt out image by image, so
    that copies go to different processes, as DeiT does it.
    aspects: (images,) height / width. A step's batch is then dealt out sorted by it, so that its parts, each padded to
    one size, are padded little. What is in the batch is as random as ever. Parts take turns: no process always
    gets the tallest.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        accumulate: int = 1,
        repeats: int = 1,
        aspects: Sequence[float] | None = None,
    ):
        self.images, self.batch_size, self.seed, self.start, self.stop = images, batch_size, seed, start, stop
        self.accumulate, self.per_epoch = accumulate, steps_per_epoch(images, batch_size, accumulate)
        self.repeats, self.aspects = repeats, aspects
        if aspects is not None and repeats > 1:
            raise UserError(f"repeats={repeats} does not go with images of many sizes: leave it at 1")

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        own = self.batch_size // world_size()
        part = own // self.accumulate
        shuffled = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.per_epoch)
            if shuffled != epoch:
                generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
                order, shuffled = torch.randperm(self.images, generator=generator).tolist(), epoch
            places = range(position * self.batch_size, (position + 1) * self.batch_size)
            if self.aspects is not None:
                batch = sorted((order[i] for i in places), key=lambda i: self.aspects[i])
                shift = step % (world_size() * self.accumulate) * part
                batch = batch[shift:] + batch[:shift]
                mine = [(epoch, i) for i in batch[rank() * own : (rank() + 1) * own]]
            elif self.repeats == 1:
                mine = [(epoch, order[i]) for i in places[rank() * own : (rank() + 1) * own]]
            else:
                mine = [(epoch, order[i // self.repeats], i % self.repeats) for i in places[rank() :: world_size()]]
            for begin in range(0, own, part):
                yield mine[begin : begin + part]


class EvaluationOrder:
    """Every image once over all processes, in batches of this process's share; the last ones may be short.

    sequences: indices of images that one process must get one after another, each a batch of its own; None: none.
    """

    def __init__(self, images: int, batch_size: int, sequences: list[list[int]] | None = None):
        self.batches = [list(range(i, min(i + batch_size, images))) for i in range(0, images, batch_size)][
            rank() :: world_size()
        ]
        if sequences is not None:
            self.batches = [[index] for sequence in sequences[rank() :: world_size()] for index in sequence]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return ([(0, index) for index in batch] for batch in self.batches)


class Batches:
    """The collated batches of a loader on a device, without bad images. skipped: how many the last pass has left out.

    finish: what is done to each batch when it is there.
    """

    def __init__(
        self, loader: DataLoader, device: torch.device, bad: BadImages | None, finish: Callable[[Any], Any] | None
    ):
        self.loader, self.device, self.bad, self.finish, self.skipped = loader, device, bad, finish, 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.skipped = 0
        for loaded in self.loader:
            if isinstance(loaded, UserError):
                raise loaded
            batch, found = loaded
            if found and self.bad is None:
                raise BadImage(*next(iter(found.items())))
            if found:
                self.bad.note({name: (reason, 1) for name, reason in found.items()})
                self.skipped += len(found)
            if batch is not None:
                batch = to_device(batch, self.device)
                yield batch if self.finish is None else self.finish(batch)


def batches(
    dataset: Dataset, order: Iterable, seed: int, workers: int, device: torch.device, bad: BadImages | None = None
) -> Batches:
    """The batches that `order` lists, `workers` processes reading ahead (0: this one reads).

    A dataset may say with `collate(samples)` what a batch of samples is, and with `finish(batch)` what is to be done to
    it on the device.
    bad: where images that can't be read are noted; None: the first one raises. In training another stands in for it.
    Iteration raises the UserError of what goes wrong in a worker.
    """
    loader = DataLoader(
        Seeded(dataset, seed, replace=isinstance(order, TrainingOrder)),
        batch_sampler=order,
        num_workers=workers,
        collate_fn=partial(_collate, getattr(dataset, "collate", default_collate)),
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # its own, so that making an iterator draws nothing from the global one
    )
    return Batches(loader, device, bad, getattr(dataset, "finish", None))


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which the terminal sends to worker processes too, to the process that reads from them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(collate: Callable[[list], Any], loaded: Any) -> Any:
    if isinstance(loaded, UserError):
        return loaded
    samples, found = loaded
    return collate(samples) if samples else None, found


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors, in whatever lists, tuples and dicts, on the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch
