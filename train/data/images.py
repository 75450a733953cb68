"""Images with labels: reading, decoding and transforming them to the tensors of a batch.

A layout (folder, tars, shards) defines the images of a split and where their bytes are; the rest is shared here.
"""

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset

from ..runtime import ranges
from ..runtime.config import check
from ..runtime.distributed import rank
from ..runtime.errors import UserError
from . import turbojpeg
from .augment import Augment, Decode, scale_of
from .bad_images import BadImage
from .files import note, note_classes
from .mapped import Mapped

_TRANSFORM = ("input_size", "is_training", "mean", "std", "crop_pct", "crop_mode")  # set by `inputs`
_INTERPOLATIONS = ("random", "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_NO_CHOICE = ("use_prefetcher", "normalize", "separate", "naflex")  # they change the format of a sample


class Strings(Sequence):
    """Many strings in two arrays. Python strings would be copied to each worker process by their reference counts."""

    def __init__(self, strings: Iterable[str]):
        encoded = [os.fsencode(string) for string in strings]
        self.ends = np.cumsum([0, *map(len, encoded)])
        self.text = np.frombuffer(b"".join(encoded), np.uint8)

    @classmethod
    def of_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "Strings":
        """Return the strings in `text`, bytes one after another; ends (N + 1,): where each ends, after a 0."""
        strings = cls(())
        strings.text, strings.ends = text, ends
        return strings

    def part(self, begin: int, end: int) -> "Strings":
        """Return the strings from `begin` to before `end`."""
        ends = self.ends[begin : end + 1]
        return Strings.of_arrays(self.text[ends[0] : ends[-1]], ends - ends[0])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())


class Files:
    """Images in files."""

    def __init__(self, paths: Iterable[str]):
        self.paths = Strings(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    base = name

    def read(self, index: int) -> bytes:
        with open(self.paths[index], "rb") as file:
            return file.read()


class Images(Dataset):
    """A dataset of (image (3, H, W), label): normalised float32, or uint8, which `finish` normalises.

    files: has __len__, name(index), base(index) (ends with the file name) and read(index) (the file's bytes).
    labels (N,), which may be mapped. transforms: first epoch -> function of a file's bytes and of a function that
    returns its name. image_bytes: of the largest image that they return; 0: unknown.
    """

    def __init__(
        self,
        files: Any,
        labels: Sequence[int],
        transforms: dict[int, Callable[[bytes, Callable[[], str]], Tensor]],
        mean: Sequence[float],
        std: Sequence[float],
        image_bytes: int = 0,
    ):
        self.files, self.transforms, self.image_bytes = files, transforms, image_bytes
        self.labels = labels if isinstance(labels, Mapped) else np.asarray(labels, np.int64)
        self.mean, self.std = mean, std
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Use the transform of this epoch from now on."""
        self.transform = self.transforms[max(first for first in self.transforms if first <= epoch)]

    def __len__(self) -> int:
        return len(self.files)

    def filename(self, index: int) -> str:
        """Return the base name of an image's file or tar member."""
        return self.files.base(index).rpartition("/")[2]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            data = self.files.read(index)
        except OSError as error:
            raise BadImage(self.files.name(index), describe_error(error)) from error
        return self.transform(data, lambda: self.files.name(index)), int(self.labels[index])

    def batch_bytes(self, images: int) -> int:
        """Return the bytes that a batch takes at most, with its labels, each aligned."""
        return images * (self.image_bytes + 8) + 128

    @staticmethod
    def collate(samples: Sequence[tuple[Tensor, int]], empty: Callable[..., Tensor] = torch.empty) -> list[Tensor]:
        """Return images (N, 3, H, W) and labels (N,), in tensors that empty(shape, dtype=…) makes.

        uint8 images keep the channels-last memory layout that they were decoded to.
        """
        images, numbers = zip(*samples)
        first = images[0]
        if first.dtype == torch.uint8:
            batch = empty((len(images), *first.shape[1:], len(first)), dtype=first.dtype)
            torch.stack([image.permute(1, 2, 0) for image in images], out=batch)
            batch = batch.permute(0, 3, 1, 2)
        else:
            batch = torch.stack(images, out=empty((len(images), *first.shape), dtype=first.dtype))
        labels = empty((len(numbers),), dtype=torch.int64)
        return [batch, labels.copy_(torch.tensor(numbers))]

    def finish(self, batch: Sequence) -> Sequence:
        """Normalise the images of a batch, on their device, to the contiguous memory layout."""
        images, *rest = batch
        if images.dtype == torch.uint8:
            mean, std = (torch.tensor(n, device=images.device).mul(255).view(-1, 1, 1) for n in (self.mean, self.std))
            normalised = torch.empty(images.shape, device=images.device)
            # To float32 on the way: large batches are slow to allocate.
            images = torch.sub(images, mean, out=normalised).div_(std)
        return [images, *rest]


# The transpose that turns an image upright, by its EXIF orientation (1: it is upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


SWAPS_SIDES = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)


def open_image(data: bytes, name: Callable[[], str], least: int | None = None) -> Image.Image:
    """Return the first frame of an image file as stored. Raises BadImage with the name if it is not an image.

    least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, with at least so many pixels at the shorter side.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if least is not None and (scale := scale_of(image.size, (least, least))) > 1:
            image.draft(image.mode, (image.width // scale, image.height // scale))  # of JPEGs alone
        image.load()
        return image
    except MemoryError:
        raise
    except Exception as error:  # damaged files make PIL's many readers raise almost anything
        raise BadImage(name(), describe_error(error)) from error


def orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the transpose that turns an image upright, by its EXIF data; None if it is upright."""
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data are ignored
        return None


def stored_size(path: str | Path) -> tuple[tuple[int, int], Image.Transpose | None]:
    """Return width and height of an image as stored, and the transpose that turns it upright, without decoding it."""
    with Image.open(path) as image:
        # Pillow turns TIFF files itself. EXIF data after the pixels of a PNG file are very rare and are not read.
        known = image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info)
        return image.size, orientation(image) if known else None


def to_rgb(image: Image.Image, name: Callable[[], str] = lambda: "the image") -> Image.Image:
    """Convert an image to RGB with 8 bits per channel, by one rule for all other formats.

    16-bit values are divided by 257 (12-bit values are first scaled to 16 bits), floats in [0, 1] are multiplied by
    255, palettes are resolved, transparency is dropped. Raises BadImage for 32-bit integers and for floats out of
    range, since their scale is unknown.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray(_from_16_bits(image)).convert("RGB")
    if image.mode == "I":
        raise BadImage(name(), "has 32-bit integers, whose range is unknown (save it with 8 or 16 bits)")
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= -0.001 and high <= 1.001):  # refuses NaN too
            raise BadImage(name(), f"has floats from {low:g} to {high:g}, which must be from 0 to 1 (scale them)")
        return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):  # of which Pillow warns
        image = image.copy()
        del image.info["transparency"]
    try:
        return image.convert("RGB")
    except ValueError as error:  # for example LAB
        raise BadImage(name(), describe_error(error)) from error


def _from_16_bits(image: Image.Image) -> np.ndarray:
    values, most = np.asarray(image).astype(np.uint32), 65535
    tags = getattr(image, "tag_v2", {})
    if tags.get(258) == (12,):  # BitsPerSample of a TIFF
        most = 4095
    if tags.get(262) == 0:  # PhotometricInterpretation: white is zero
        values = most - values
    return ((values * 255 + most // 2) // most).astype(np.uint8)


def decode(data: bytes, name: Callable[[], str], least: int | None = None) -> Image.Image:
    """Decode a file's bytes to an upright RGB image, see open_image. Raises BadImage if they are not an image."""
    image = open_image(data, name, least)
    turn = orientation(image)
    image = to_rgb(image, name)
    return image if turn is None else image.transpose(turn)


def _as_tested(
    transform: Callable[[Image.Image], Tensor], least: int | None, data: bytes, name: Callable[[], str]
) -> Tensor:
    return transform(decode(data, name, least))


def read_bytes(path: str | Path) -> bytes:
    """Return a file's bytes. Raises BadImage, naming the file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImage(str(path), describe_error(error)) from error


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as an upright RGB image. Raises BadImage, naming the file, if it can't be read."""
    return decode(read_bytes(path), lambda: str(path))


def describe_error(error: Exception) -> str:
    """Describe why an image can't be read."""
    unknown = isinstance(error, UnidentifiedImageError)  # its message contains a memory address
    reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
    return f"can't be read as an image ({'unknown format' if unknown else reason})"


def note_conversions(read: Callable[[int], bytes], count: int, where: str, sample: int = 64) -> None:
    """Tell the user how unusual images are converted, judging by up to `sample` images, evenly spaced.

    read: returns the bytes of an image's file. where: a description of the images.
    """
    if rank() > 0:
        return
    seen: Counter[str] = Counter()
    chosen = sorted(set(np.linspace(0, count - 1, min(sample, count)).round().astype(int).tolist()))
    for index in chosen:
        try:
            with Image.open(io.BytesIO(read(index))) as image:
                if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                    seen["have 16 bits per pixel, which are divided by 257"] += 1
                if image.mode == "F":
                    seen["have float values, which are multiplied by 255"] += 1
                if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                    seen["have several frames, of which the first is used"] += 1
                if image.format != "TIFF" and orientation(image) is not None:
                    seen["are rotated by their EXIF orientation"] += 1
        except Exception:  # unreadable images are counted when they are used
            continue
    for rule, times in seen.items():
        of = f"{times} of {len(chosen)} {where}" + (" that were checked" if len(chosen) < count else "")
        note(f"{of} {rule}")


class Source:
    """Base class for sources of labelled images: sizes, augmentation and the budget for unreadable images.

    Subclasses have `class_names` and `images(split)`: the files of "train", "val" or "test" (see Images), and labels.
    bad: samples found missing before any image was read: name -> (reason, number of samples).
    """

    class_names: list[str]

    def __init__(
        self, img_size: int | None, sizes: dict | None, augment: dict | None, max_bad: int, decode: Decode = "exact"
    ):
        self.decode: Decode = decode
        if decode == "cropped":
            turbojpeg.require()
        self.img_size, self.sizes, self.augment, self.max_bad = img_size, sizes or {}, augment or {}, max_bad
        self.bad: dict[str, tuple[str, int]] = {}
        check("data.augment", self.augment, create_transform, without=(*_TRANSFORM, *_NO_CHOICE), ranges=ranges.AUGMENT)
        interpolation = self.augment.get("interpolation", "random")
        if interpolation not in _INTERPOLATIONS:
            known = ", ".join(_INTERPOLATIONS)
            raise UserError(f"data.augment.interpolation={interpolation!r} must be one of {known}")
        whole = all(isinstance(n, int) for pair in self.sizes.items() for n in pair)
        if self.sizes and not (whole and min(self.sizes) == 0 and min(self.sizes.values()) > 0):
            raise UserError(
                f"data.sizes={sizes} must give sizes in pixels from epoch 0 on, for example {{0: 192, 280: 224}}"
            )
        if max_bad < 0:
            raise UserError(f"data.max_bad={max_bad} must be 0 or more")

    def images(self, split: str) -> tuple[Any, Sequence[int]]:
        raise NotImplementedError

    def class_counts(self, split: str) -> Sequence[int] | None:
        """Return the number of images of each class, after images(split), if it is known without reading all labels."""
        return None

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """Return the model's own preprocessing at `img_size`, with timm's keys."""
        inputs = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
        if self.img_size:
            inputs["input_size"] = (inputs["input_size"][0], self.img_size, self.img_size)
        return inputs

    def dataset(self, split: str, inputs: dict[str, Any], training: bool = False) -> Images:
        """Return the images of "train", "val" or "test", with their labels."""
        files, labels = self.images(split)
        note_conversions(files.read, len(files), f"{split} images")
        counts = self.class_counts(split)
        if counts is None:
            counts = np.bincount(labels, minlength=len(self.class_names)).tolist()
        note_classes(split, counts, self.class_names, "images", 2 * training)
        norm = dict(mean=inputs["mean"], std=inputs["std"])
        channels, height, width = inputs["input_size"]
        if not training:
            least = math.ceil(max(inputs["input_size"][1:]) / inputs["crop_pct"]) if self.decode == "scaled" else None
            transforms = {0: partial(_as_tested, create_transform(**inputs), least)}
            return Images(files, labels, transforms, **norm, image_bytes=4 * channels * height * width)
        by_epoch = {first: inputs | dict(input_size=(inputs["input_size"][0], n, n)) for first, n in self.sizes.items()}
        transforms = {
            first: Augment(decode, self.decode, **(inputs | self.augment))
            for first, inputs in (by_epoch or {0: inputs}).items()
        }
        pixels = max((n * n for n in self.sizes.values()), default=height * width)
        each = 1 if all(transform.gives_uint8 for transform in transforms.values()) else 4
        return Images(files, labels, transforms, **norm, image_bytes=each * channels * pixels)


def fit_size(height: int, width: int, scale: Sequence[int]) -> tuple[float, float]:
    """Return the largest size with the same aspect ratio that fits `scale`, longer side within the longer number."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return height * factor, width * factor
