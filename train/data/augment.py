"""timm's training transform on the bytes of a file, with its first steps on the tensor that a JPEG is decoded to.

These are the random resized crop and the flips. PIL's resizing takes as long as decoding the whole JPEG; torch's, in
the memory layout of the decoder, a fifth of that. The random numbers are drawn in the same order, so the crops equal
timm's and the pixels differ only by the rounding of the resize.

Of a JPEG, only the crop need be decoded ("cropped", saccade.train.data.turbojpeg): the pixels are the same. Large JPEGs
can be decoded at a half, a quarter or an eighth of their size, where that leaves the crop at least as large as the
output ("scaled"): libjpeg then computes smaller inverse transforms, which average the pixels of a block.
"""

import io
import math
import random
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from timm.data.transforms import RandomResizedCropAndInterpolation as RandomResizedCrop
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg
from torchvision.transforms import (
    ColorJitter,
    Compose,
    InterpolationMode,
    Normalize,
    RandomHorizontalFlip,
    RandomVerticalFlip,
)

from . import turbojpeg

Decode = Literal["exact", "cropped", "scaled"]

_MODES = {InterpolationMode.BILINEAR: "bilinear", InterpolationMode.BICUBIC: "bicubic"}
_RESAMPLING = {
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
    InterpolationMode.BICUBIC: Image.Resampling.BICUBIC,
}


class Augment:
    """Apply `create_transform(**arguments, is_training=True)` to the bytes of a file, giving (3, H, W).

    If normalisation is the last step, the output is uint8, in channels-last memory layout, and is normalised on the
    model's device, which moves a quarter of the bytes; if another step follows (random erasing), it is float32.
    decode(data, name): decodes bytes that are not a plain JPEG to a PIL image, or raises. how: "exact": whole JPEGs are
    decoded; "cropped": only their crop, to the same pixels; "scaled": large JPEGs at a fraction of their size, and
    pixels then differ from timm's by more than rounding.
    """

    def __init__(
        self,
        decode: Callable[[bytes, Callable[[], str]], Image.Image],
        how: Decode = "exact",
        **arguments: Any,
    ):
        self.decode, self.how = decode, how
        steps = create_transform(**arguments, is_training=True).transforms
        last = next(i for i, step in enumerate(steps) if isinstance(step, Normalize))
        # The step from PIL image to tensor is between these. Steps that change nothing would still need a PIL image.
        before, self.after = [step for step in steps[: last - 1] if not _is_idle(step)], steps[last:]
        on_tensors = next((i for i, step in enumerate(before) if not _takes_tensors(step)), len(before))
        self.on_tensors, self.on_pil = before[:on_tensors], Compose(before[on_tensors:])
        for step in self.on_pil.transforms:
            # RandAugment at magnitude 10 keeps no bits, which makes the image black. Pillow 13 refuses that.
            for op in (*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))):
                if op.aug_fn is posterize:
                    op.aug_fn = _posterize

    @property
    def gives_uint8(self) -> bool:
        """Whether normalisation is left to the device."""
        return len(self.after) == 1

    def __call__(self, data: bytes, name: Callable[[], str]) -> Tensor:
        first = self.on_tensors[0] if self.on_tensors else None
        pixels = None
        if self.how != "exact" and isinstance(first, RandomResizedCrop):
            pixels = _scaled_crop(first, data) if self.how == "scaled" else _cropped(first, data)
        steps = self.on_tensors if pixels is None else self.on_tensors[1:]
        if pixels is None:
            pixels = _jpeg(data)
        if pixels is None:
            pixels = _pixels(self.decode(data, name))
        for step in steps:
            pixels = _resized_crop(step, pixels) if isinstance(step, RandomResizedCrop) else step(pixels)
        if self.on_pil.transforms:
            pixels = _pixels(self.on_pil(Image.fromarray(pixels.permute(1, 2, 0).numpy())))
        if self.gives_uint8:
            return pixels
        image = pixels.float().div_(255)
        for step in self.after:
            image = step(image)
        return image.contiguous()


def _is_idle(step: Any) -> bool:
    """Return whether a step changes nothing: timm adds a ColorJitter for color_jitter=0."""
    idle = isinstance(step, ColorJitter)
    return idle and not any((step.brightness, step.contrast, step.saturation, step.hue))


def _takes_tensors(step: Any) -> bool:
    if isinstance(step, RandomResizedCrop):
        modes = step.interpolation if isinstance(step.interpolation, (list, tuple)) else [step.interpolation]
        return set(modes) <= _MODES.keys()
    return isinstance(step, (RandomHorizontalFlip, RandomVerticalFlip))


def _jpeg(data: bytes) -> Tensor | None:
    """Decode a greyscale or colour JPEG to uint8 (3, H, W); return None for anything else, and for a damaged file."""
    if data[:2] != b"\xff\xd8" or _read_header(data)[0] > (Image.MAX_IMAGE_PIXELS or math.inf):
        return None
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), apply_exif_orientation=True)
    except RuntimeError:
        return None
    if len(pixels) == 1:
        return pixels.expand(3, -1, -1)
    return pixels if len(pixels) == 3 else None  # PIL converts CMYK differently from torchvision


def _read_header(data: bytes) -> tuple[int, bool]:
    """Return what a JPEG's header says: the number of pixels, 0 where it does not, and whether there are EXIF data.

    A few bytes may claim gigabytes of pixels.
    """
    pixels, has_exif, at = 0, False, 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xDA:  # pixels follow
            break
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC) and not pixels:  # a frame's header
            pixels = int.from_bytes(data[at + 5 : at + 7], "big") * int.from_bytes(data[at + 7 : at + 9], "big")
        has_exif = has_exif or (kind == 0xE1 and data[at + 4 : at + 8] == b"Exif")
        at += 1 if kind == 0xFF else 2 + length  # any number of 0xFF may stand before a marker
    return pixels, has_exif


def _pixels(image: Image.Image) -> Tensor:
    """Return the pixels (3, H, W), uint8, in channels-last memory layout."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _draw_crop(step: RandomResizedCrop, image: Any) -> tuple[int, int, int, int, InterpolationMode]:
    """Draw the top, left, height, width and interpolation of a crop, as `step` does."""
    several = isinstance(step.interpolation, (list, tuple))
    box = step.get_params(image, step.scale, step.ratio)
    return *box, random.choice(step.interpolation) if several else step.interpolation


def _scaled_crop(step: RandomResizedCrop, data: bytes) -> Tensor | None:
    """Apply `step` to a JPEG that is decoded at a fraction of its size.

    Returns None, and draws nothing, for a file that is no plain upright JPEG, and where its full size is needed.
    """
    if data[:2] != b"\xff\xd8":
        return None
    state = random.getstate()
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if image.format != "JPEG" or image.mode not in ("RGB", "L") or turned:
                return None
            top, left, height, width, mode = _draw_crop(step, image)
            scale = scale_of((height, width), step.size)
            before = image.size
            if scale == 1 or image.draft(image.mode, (before[0] // scale, before[1] // scale)) is None:
                random.setstate(state)
                return None
            x, y = image.width / before[0], image.height / before[1]
            box = left * x, top * y, (left + width) * x, (top + height) * y
            crop = image.convert("RGB").resize(step.size[::-1], _RESAMPLING[mode], box)
            return _pixels(crop)
    except Exception:  # damaged: the decoder of whole images says how
        random.setstate(state)
        return None


def scale_of(size: Sequence[int], least: Sequence[int]) -> int:
    """Return the largest of 8, 4, 2 and 1 by which `size` can be divided so that it is still `least` or more."""
    return next((s for s in (8, 4, 2) if all(a >= s * b for a, b in zip(size, least))), 1)


def _cropped(step: RandomResizedCrop, data: bytes) -> Tensor | None:
    """Apply `step` to a JPEG of which no more than the crop is decoded.

    Returns None, and draws nothing, for a file that is no plain upright JPEG, and for a damaged or truncated one.
    """
    # The marker at the end: what is missing below the crop would not be noticed.
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return None
    pixels, has_exif = _read_header(data)
    if pixels > (Image.MAX_IMAGE_PIXELS or math.inf) or (has_exif and _is_turned(data)):
        return None
    state = random.getstate()
    try:
        jpeg = turbojpeg.Jpeg(data)
        if jpeg.height * jpeg.width != pixels:
            return None
        *box, mode = _draw_crop(step, torch.empty(1).expand(3, jpeg.height, jpeg.width))
        return _resize(jpeg.crop(*box).permute(2, 0, 1), step.size, mode)
    except ValueError:
        random.setstate(state)
        return None


def _is_turned(data: bytes) -> bool:
    """Tell whether a JPEG with EXIF data may have an orientation other than upright."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # damaged
        return True


def _resized_crop(step: RandomResizedCrop, pixels: Tensor) -> Tensor:
    """Apply `step` to a tensor as it would be applied to a PIL image."""
    top, left, height, width, mode = _draw_crop(step, pixels)
    return _resize(pixels[:, top : top + height, left : left + width], step.size, mode)


def _resize(crop: Tensor, size: Sequence[int], mode: InterpolationMode) -> Tensor:
    crop = crop[None].contiguous(memory_format=torch.channels_last)
    return interpolate(crop, size=size, mode=_MODES[mode], antialias=True)[0]


def _posterize(image: Image.Image, bits: int, **fill: Any) -> Image.Image:
    return Image.new(image.mode, image.size) if bits == 0 else posterize(image, bits, **fill)
