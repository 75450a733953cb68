"""scikit-learn's handwritten digits: 1,797 greyscale images of 8x8 pixels in ten classes.

They are the test set of the UCI "Optical Recognition of Handwritten Digits" data (E. Alpaydin, C. Kaynak, 1998), in a
fixed stratified split: 1,257 for training, 180 for selecting the best checkpoint, 360 for testing.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import Dataset

from ..runtime.config import Count, NonNegative

MEAN, STD = (0.3,) * 3, (0.35,) * 3


class Digits:
    """Handwritten digits as the data of a run.

    img_size: size in pixels that the images are upscaled to (bicubic). shift: random translation in training by up to
    this many pixels of the 8x8 original, filled with black.
    """

    def __init__(self, img_size: Count = 32, shift: NonNegative = 1.0):
        self.img_size, self.shift = img_size, shift
        self.class_names = [str(digit) for digit in range(10)]
        digits = load_digits()
        rest, test = train_test_split(np.arange(1797), test_size=360, random_state=0, stratify=digits.target)
        train, val = train_test_split(rest, test_size=180, random_state=0, stratify=digits.target[rest])
        self._splits = dict(train=train, val=val, test=test)
        self._grey, self._labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """Return the preprocessing with timm's keys. It depends on the data only, not on the model's pretrained_cfg."""
        size = (3, self.img_size, self.img_size)
        return dict(input_size=size, interpolation="bicubic", mean=MEAN, std=STD, crop_pct=1.0, crop_mode="center")

    def dataset(self, split: str, inputs: dict[str, Any], training: bool = False) -> Dataset:
        """Return "train", "val" or "test": (image (3, img_size, img_size), normalised float32, label) per sample."""
        size = inputs["input_size"][1:]
        chosen = self._splits[split]
        enlarged = [Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC) for image in self._grey[chosen]]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in enlarged]))
        shift = round(self.shift * size[0] / 8) if training else 0
        return _Images(pixels, self._labels[chosen].tolist(), shift, inputs["mean"], inputs["std"])


class _Images(Dataset):
    def __init__(self, pixels: Tensor, labels: list[int], shift: int, mean: tuple, std: tuple):
        self.pixels, self.labels, self.shift = pixels, labels, shift  # (N, H, W) uint8
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pixels[index]
        if self.shift:
            height, width = image.shape
            padded = torch.nn.functional.pad(image, [self.shift] * 4)
            down, right = torch.randint(2 * self.shift + 1, (2,)).tolist()
            image = padded[down : down + height, right : right + width]
        return (image.float().div(255) - self.mean) / self.std, self.labels[index]
