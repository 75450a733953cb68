"""Images with labels, from bytes that lie anywhere to the tensors of a batch.

A layout (a folder, tars, shards) says which images a split has and where their bytes are; the rest is the same for all.
"""

import io
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from ..runtime.config import check
from ..runtime.errors import UserError
from .augment import Augment
from .bad_images import BadImage

_TRANSFORM = ("input_size", "is_training", "interpolation", "mean", "std", "crop_pct", "crop_mode")  # given by `inputs`
_NO_CHOICE = ("use_prefetcher", "normalize", "separate", "naflex")  # they change what a sample is


class Strings(Sequence):
    """Many strings in two arrays. As Python objects, each worker process would come to hold its own copy of them."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.text = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())


class Files:
    """Images that are files of their own."""

    def __init__(self, paths: Iterable[str]):
        self.paths = Strings(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    base = name

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()


class Images(Dataset):
    """(image (3, H, W), label) of each index: float32 normalised, or uint8, which `finish` normalises.

    files: has __len__, name(index), base(index), which ends with the file's own name, and read(index), its bytes.
    labels (N,). transforms: of a file's bytes and a function that gives its name, by the first epoch that each is for.
    """

    def __init__(
        self,
        files: Any,
        labels: Sequence[int],
        transforms: dict[int, Callable[[bytes, Callable[[], str]], Tensor]],
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.files, self.labels, self.transforms = files, np.asarray(labels, np.int64), transforms
        self.mean, self.std = mean, std
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """From now on, images are as they should be in this epoch."""
        self.transform = self.transforms[max(first for first in self.transforms if first <= epoch)]

    def __len__(self) -> int:
        return len(self.files)

    def filename(self, index: int) -> str:
        """The base name of an image's file, or of the tar's member that it is."""
        return self.files.base(index).rpartition("/")[2]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            data = self.files.read(index)
        except OSError as error:
            raise BadImage(self.files.name(index), _says(error)) from error
        return self.transform(data, lambda: self.files.name(index)), int(self.labels[index])

    def finish(self, batch: Sequence) -> Sequence:
        """A batch with its images normalised, wherever they are."""
        images, *rest = batch
        if images.dtype == torch.uint8:
            mean, std = (torch.tensor(n, device=images.device).mul(255).view(-1, 1, 1) for n in (self.mean, self.std))
            images = torch.sub(images, mean).div_(std)  # to float32 on the way: large batches are slow to allocate
        return [images, *rest]


def decode(data: bytes, name: Callable[[], str]) -> Image.Image:
    """The image that the bytes are a file of, in RGB. Raises BadImage, with the name, where they are none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # damaged files make PIL's many readers raise almost anything
        raise BadImage(name(), _says(error)) from error


def _as_tested(transform: Callable[[Image.Image], Tensor], data: bytes, name: Callable[[], str]) -> Tensor:
    return transform(decode(data, name))


def read_image(path: str | Path) -> Image.Image:
    """The image in a file, in RGB. Raises BadImage, naming the file, where it can't be read as one."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadImage(str(path), _says(error)) from error
    return decode(data, lambda: str(path))


def _says(error: Exception) -> str:
    unknown = isinstance(error, UnidentifiedImageError)  # its own text holds an address in memory
    said = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return f"can't be read as an image ({'no known format' if unknown else said})"


class Source:
    """What sources of labelled images have in common: sizes, augmentation and the budget for bad images.

    A source gives `class_names` and `images(split)`: the files of "train", "val" or "test" (see Images), and labels.
    bad: what was found to be missing before any image was read: name -> (reason, how many samples).
    """

    class_names: list[str]

    def __init__(self, img_size: int | None, sizes: dict | None, augment: dict | None, max_bad: int):
        self.img_size, self.sizes, self.augment, self.max_bad = img_size, sizes or {}, augment or {}, max_bad
        self.bad: dict[str, tuple[str, int]] = {}
        check("data.augment", self.augment, create_transform, without=(*_TRANSFORM, *_NO_CHOICE))
        whole = all(isinstance(n, int) for pair in self.sizes.items() for n in pair)
        if self.sizes and not (whole and min(self.sizes) == 0 and min(self.sizes.values()) > 0):
            raise UserError(f"data.sizes={sizes} must say pixels from epoch 0 on, as in {{0: 192, 280: 224}}")
        if max_bad < 0:
            raise UserError(f"data.max_bad={max_bad} must be 0 or more")

    def images(self, split: str) -> tuple[Any, Sequence[int]]:
        raise NotImplementedError

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """The model's own preprocessing, at `img_size`, as timm names it."""
        inputs = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
        if self.img_size:
            inputs["input_size"] = (inputs["input_size"][0], self.img_size, self.img_size)
        return inputs

    def dataset(self, split: str, inputs: dict[str, Any], training: bool = False) -> Images:
        """The images of "train", "val" or "test", with their labels."""
        files, labels = self.images(split)
        norm = dict(mean=inputs["mean"], std=inputs["std"])
        if not training:
            return Images(files, labels, {0: partial(_as_tested, create_transform(**inputs))}, **norm)
        by_epoch = {first: inputs | dict(input_size=(inputs["input_size"][0], n, n)) for first, n in self.sizes.items()}
        transforms = {
            first: Augment(decode, **inputs, **self.augment) for first, inputs in (by_epoch or {0: inputs}).items()
        }
        return Images(files, labels, transforms, **norm)


def fit_size(height: int, width: int, scale: Sequence[int]) -> tuple[float, float]:
    """A size of the same shape whose longer side is at most the longer of `scale`, and the shorter the shorter."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return height * factor, width * factor
