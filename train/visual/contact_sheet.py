"""A contact sheet: the first images of a batch, as the model gets them, with a caption each."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..runtime.checkpoint import atomic_write

SIDE, TEXT = 160, 30  # pixels of a picture, and of the two lines below it


def contact_sheet(images: Tensor, captions: Sequence[str], mean: Sequence, std: Sequence, file: Path) -> Path:
    """Write images (B, 3 or 1, H, W), normalised by mean and std, as a PNG; of each caption two lines are shown."""
    shown = min(len(images), 32)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))
    pixels = (images[:shown].detach().float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
    pixels = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    columns = min(8, shown)
    sheet = Image.new("RGB", (columns * SIDE, math.ceil(shown / columns) * (SIDE + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(zip(pixels, captions)):
        x, y = i % columns * SIDE, i // columns * (SIDE + TEXT)
        height, width = picture.shape[:2]
        scale = (SIDE - 4) / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        sheet.paste(
            Image.fromarray(np.ascontiguousarray(picture)).resize(size, Image.Resampling.NEAREST), (x + 2, y + 2)
        )
        draw.multiline_text((x + 4, y + SIDE), caption, fill="#333333", spacing=2)
    with atomic_write(file) as temporary:
        sheet.save(temporary, "PNG")
    return file
