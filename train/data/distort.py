"""Photometric distortion of SSD (arXiv 1512.02325), as MMSegmentation and BEVFormer apply it."""

import torch
from torch import Tensor


def distort_colors(image: Tensor, hue: float, clip: bool, swap: bool = False) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image (3, H, W), 0 … 1, each with probability 0.5.

    Brightness is shifted by ± 32 / 255, contrast and saturation are multiplied by 0.5 … 1.5, contrast before or after
    the colours; saturation and hue are those of HSV. hue: the largest rotation, in turns. clip: values stay in [0, 1]
    after every step, as those of uint8 images do. swap: the channels are permuted with probability 0.5.
    """

    def limit(image: Tensor) -> Tensor:
        return image.clamp(0, 1) if clip else image

    if uniform(0, 1) < 0.5:
        image = limit(image + uniform(-32, 32) / 255)
    contrast = uniform(0.5, 1.5) if uniform(0, 1) < 0.5 else 1.0
    first = uniform(0, 1) < 0.5
    if first:
        image = limit(image * contrast)
    if uniform(0, 1) < 0.5:
        image = limit(scale_saturation(image, uniform(0.5, 1.5), clip))
    if uniform(0, 1) < 0.5:
        image = rotate_hue(image, uniform(-hue, hue))
    if not first:
        image = limit(image * contrast)
    return image[torch.randperm(3)] if swap and uniform(0, 1) < 0.5 else image


def scale_saturation(image: Tensor, factor: float, clip: bool = False) -> Tensor:
    """Multiply the saturation of HSV, (max - min) / max, of an image (3, H, W); clip: it stays 1 or less."""
    value = image.amax(0)
    away = value - image
    if clip:
        return value - torch.minimum(factor * away, away * value / away.amax(0).clamp(min=1e-12))
    return value - factor * away


def rotate_hue(image: Tensor, turn: float) -> Tensor:
    """Rotate the hue of HSV of an image (3, H, W) by a part of the circle; largest and least channel keep their
    values."""
    value, least = image.amax(0), image.amin(0)
    chroma = value - least
    red, green, blue = image
    safe = torch.where(chroma > 0, chroma, 1)
    of_green, of_blue = 2 + (blue - red) / safe, 4 + (red - green) / safe
    sector = torch.where(value == red, (green - blue) / safe, torch.where(value == green, of_green, of_blue))
    away = (sector + 6 * turn + torch.tensor([0.0, 4.0, 2.0]).view(3, 1, 1)) % 6 - 3
    return least + chroma * (away.abs() - 1).clamp(0, 1)


def uniform(low: float, high: float) -> float:
    return float(torch.empty(()).uniform_(low, high))
