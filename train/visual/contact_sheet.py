"""A contact sheet: the first images of a batch, as the model gets them, with a caption each."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .boxes import save_tiles

SIDE = 160  # pixels of an image


def save_contact_sheet(images: Tensor, captions: Sequence[str], mean: Sequence, std: Sequence, file: Path) -> Path:
    """Write images (B, 3 or 1, H, W), normalised by mean and std, as a PNG; of each caption two lines are shown."""
    shown = min(len(images), 32)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    pixels = (images[:shown].detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    tiles = [(Image.fromarray(image), caption) for image, caption in zip(pixels, captions)]
    return save_tiles(tiles, file, columns=8, side=SIDE, resample=Image.Resampling.NEAREST)
