"""The order of images, their distribution to processes and steps, and loading.

Every random number is a function of (seed, epoch or step, image or process), not of earlier ones. The order of an epoch
is a function of (seed, epoch); step s takes the next `batch_size` images, and each process a contiguous part of them.
The augmentation of an image is a function of (seed, epoch, image), and so is the replacement of an unreadable image. So
a run is the same with any number of loader workers and processes, and can resume in the middle of an epoch. Orders are
evaluated where they are needed, so that their memory does not grow with the number of images.

A sample's key is (epoch, index), or (epoch, index, copy) if an epoch has an image several times.
"""

import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from ..runtime.distributed import derive_seed, rank, world_size
from ..runtime.errors import DATA, UserError, first_line
from .bad_images import BadImage, BadImages
from .permutation import permutation
from .slots import Slots

PREFETCH = 2  # batches that each loader process loads ahead
MAX_REPLACEMENTS = 100  # images that are tried as a replacement of an unreadable one


class Seeded(Dataset):
    """A dataset that is indexed by keys, which determine all random numbers. The dataset may have set_epoch(epoch).

    replace: replace unreadable images by others; otherwise the batch is shorter.
    """

    def __init__(self, dataset: Dataset, seed: int, replace: bool):
        self.dataset, self.seed, self.replace = dataset, seed, replace

    def __getitems__(self, keys: list[tuple[int, ...]]) -> tuple[list, dict[str, str]] | UserError:
        """Return the samples of a batch, and name -> reason of the unreadable images.

        The states of Python's, NumPy's and torch's random generators are restored.
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
        """Return [sample of a key or of its replacement]; in evaluation [] if the image can't be read."""
        epoch, index = key[:2]
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        for attempt in range(MAX_REPLACEMENTS):
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
            f"{MAX_REPLACEMENTS} images in a row can't be read, {next(iter(bad))} among them: check the data", DATA
        )


def steps_per_epoch(images: int, batch_size: int, accumulate: int = 1) -> int:
    """Return the full batches in an epoch. Raises UserError for none, or if processes can't share a batch equally."""
    parts = world_size() * accumulate
    if batch_size % parts:
        raise UserError(
            f"batch_size={batch_size} must be a multiple of {parts} ({world_size()} processes, accumulate={accumulate})"
        )
    if images < batch_size:
        raise UserError(f"batch_size={batch_size} is more than the {images} training images: make it smaller")
    return images // batch_size


class TrainingOrder:
    """Batches of keys for steps start … stop - 1 of this process, `accumulate` batches per step.

    repeats: how many times an epoch has each of its images (repeated augmentation, arXiv 1901.09335), consecutively.
    The length of an epoch is unchanged, so it has images / repeats different images. The batch of a step is then
    distributed image by image, so that copies go to different processes, as in DeiT.
    aspects: (images,) height / width. The batch of a step is then distributed sorted by it, so that its parts, each
    padded to one size, need little padding. The contents of a batch stay random, and the parts alternate between the
    processes.
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
            raise UserError(f"repeats={repeats} can't be combined with images of different sizes: leave it at 1")

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    @property
    def largest(self) -> int:
        """The number of images in a batch, at most."""
        return self.batch_size // world_size() // self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        own = self.batch_size // world_size()
        part = own // self.accumulate
        shuffled = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.per_epoch)
            if shuffled != epoch:
                order, shuffled = permutation(self.images, derive_seed("order", self.seed, epoch)), epoch
            places = np.arange(position * self.batch_size, (position + 1) * self.batch_size)
            mine: list[tuple[int, ...]]
            if self.aspects is not None:
                batch = sorted(order(places).tolist(), key=lambda i: self.aspects[i])
                shift = step % (world_size() * self.accumulate) * part
                batch = batch[shift:] + batch[:shift]
                mine = [(epoch, i) for i in batch[rank() * own : (rank() + 1) * own]]
            elif self.repeats == 1:
                mine = [(epoch, i) for i in order(places[rank() * own : (rank() + 1) * own]).tolist()]
            else:
                images, copies = np.divmod(places[rank() :: world_size()], self.repeats)
                mine = [(epoch, i, copy) for i, copy in zip(order(images).tolist(), copies.tolist())]
            for begin in range(0, own, part):
                yield mine[begin : begin + part]


class EvaluationOrder:
    """Batches of this process, such that all processes together have every image once; the last may be smaller.

    sequences: lists of indices that one process must get in order, in batches of one image; None: none.
    """

    def __init__(self, images: int, batch_size: int, sequences: list[list[int]] | None = None):
        self.images, self.batch_size, self.largest = images, batch_size, batch_size
        self.starts = range(0, images, batch_size)[rank() :: world_size()]
        self.single = None if sequences is None else [i for each in sequences[rank() :: world_size()] for i in each]

    def __len__(self) -> int:
        return len(self.starts if self.single is None else self.single)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        if self.single is not None:
            return ([(0, index)] for index in self.single)
        return ([(0, i) for i in range(start, min(start + self.batch_size, self.images))] for start in self.starts)


class Batches:
    """The collated batches of a loader, on a device. skipped: number of unreadable images left out in the last pass.

    finish: a function applied to each batch on the device. slots: memory in which the loader's processes hand it over.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        bad: BadImages | None,
        finish: Callable[[Any], Any] | None,
        slots: Slots | None = None,
    ):
        self.loader, self.device, self.bad, self.finish, self.skipped = loader, device, bad, finish, 0
        self.slots = slots

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self.skipped = 0
        for loaded in self._loaded():
            if isinstance(loaded, UserError):
                raise loaded
            batch, errors = loaded
            if errors and self.bad is None:
                raise BadImage(*next(iter(errors.items())))
            if errors:
                self.bad.note({name: (reason, 1) for name, reason in errors.items()})
                self.skipped += len(errors)
            if batch is not None:
                batch = to_device(batch, self.device)
                batch = batch if self.finish is None else self.finish(batch)
                yield batch if self.slots is None else self.slots.released(batch)

    def _loaded(self) -> Iterator[Any]:
        """Yield what the loader does. Raises UserError where the system has ended one of its processes."""
        loaded = iter(self.loader)
        while True:
            try:
                batch = next(loaded)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError) as error:  # by when the process ended
                by_dataset = not self.loader.num_workers or str(error).startswith("Caught ")
                if by_dataset or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
                    raise
                _end_workers(loaded)
                self.loader._iterator = None  # another pass starts processes of its own
                raise UserError(
                    f"a loader process was killed ({first_line(error)}), perhaps for lack of memory: continue with "
                    "--resume, with fewer workers, or with a smaller batch_size"
                ) from error
            yield batch


def _end_workers(loaded: Any) -> None:
    """End the processes of a loader's iterator, of which one was killed.

    PyTorch's handler of SIGCHLD raises an error for it, also while the others are ended: their pipes would stay open.
    """
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, lambda *_: None) if main else None
    try:
        loaded._shutdown_workers()
    finally:
        if main:
            signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)


def batches(
    dataset: Dataset, order: Iterable, seed: int, workers: int, device: torch.device, bad: BadImages | None = None
) -> Batches:
    """Return the batches of `order`, with `workers` processes loading ahead (0: this process loads).

    A dataset may have `collate(samples)`, which makes a batch, and `finish(batch)`, applied on the device. With
    `batch_bytes(images)`, the largest size of a batch, it hands over batches in memory that is kept (Slots), and
    `collate(samples, empty)` makes its tensors by empty(shape, dtype=…).
    bad: where unreadable images are recorded; None: the first one raises. In training they are replaced by others.
    Iteration raises the UserError of an error in a worker.
    """
    slots = None
    if workers and hasattr(dataset, "batch_bytes") and hasattr(order, "largest") and Slots.work():
        slots = Slots(workers, PREFETCH, dataset.batch_bytes(order.largest))
    loader = DataLoader(
        Seeded(dataset, seed, replace=isinstance(order, TrainingOrder)),
        batch_sampler=order,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        collate_fn=partial(_collate, getattr(dataset, "collate", default_collate), slots),
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # its own, so that making an iterator draws nothing from the global one
    )
    return Batches(loader, device, bad, getattr(dataset, "finish", None), slots)


def _ignore_interrupts(worker: int) -> None:
    """Ignore Ctrl-C in a worker, which the terminal sends to it too: the main process handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(collate: Callable[..., Any], slots: Slots | None, loaded: Any) -> Any:
    if isinstance(loaded, UserError):
        return loaded
    samples, errors = loaded
    if slots is None:
        return collate(samples) if samples else None, errors
    slots.begin()
    return slots.sent(collate(samples, slots.empty)) if samples else None, errors


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors in a batch, in any lists, tuples and dicts, to the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch
