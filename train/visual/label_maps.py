"""Label maps as images: colors, overlays, legends, and contact sheets beside labels and predictions."""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..runtime.checkpoint import atomic_write
from .captions import add_legend, prepare_text

IGNORED = 255
SIDE = 240  # pixels, at most, of an image on a contact sheet


def class_colors(num_classes: int) -> np.ndarray:
    """Return (256, 3) uint8: a color for each class, neighbours in number far apart in hue; black for the rest.

    The first class, often the background, is grey.
    """
    colors = np.zeros((256, 3), np.uint8)
    colors[0] = 110
    for i in range(1, num_classes):
        hue, ring = (i * 0.61803398875) % 1.0, i % 3  # the golden ratio spreads any number of hues evenly
        colors[i] = [round(255 * x) for x in colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[ring], (0.95, 1.0, 0.7)[ring])]
    return colors


def draw_overlay(image: np.ndarray, labels: np.ndarray, num_classes: int, strength: float = 0.65) -> np.ndarray:
    """Blend an image (H, W, 3) uint8 with the colors of its labels (H, W); ignored pixels are left dark."""
    color = class_colors(num_classes)[labels].astype(np.float32)
    return np.round((1 - strength) * image + strength * color).astype(np.uint8)


def draw_outlined(image: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Draw an overlay, with the borders between labels in white."""
    drawn = draw_overlay(image, labels, num_classes)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    drawn[border] = 255
    return drawn


def add_class_legend(
    image: Image.Image, labels: Sequence[int], class_names: Sequence[str], size: int = 12
) -> Image.Image:
    """Return the image with the colors and names of the classes `labels` below it."""
    palette = class_colors(len(class_names)).tolist()
    return add_legend(image, [("#{:02x}{:02x}{:02x}".format(*palette[c]), class_names[c]) for c in labels], size)


def present_labels(*maps: np.ndarray) -> list[int]:
    """Return the classes in label maps, in order."""
    return sorted({int(c) for labels in maps for c in np.unique(labels)} - {IGNORED})


def save_contact_sheet(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray | None]]],
    headings: Sequence[str],
    class_names: Sequence[str],
    file: Path,
    columns: int = 1,
) -> Path:
    """Write rows of images as a PNG. A row has, for each of `headings`, an image (H, W, 3) and its labels or None.

    columns: rows beside each other.
    """
    cells = [[_draw_cell(image, labels, len(class_names)) for image, labels in row] for row in rows]
    width = max(cell.width for row in cells for cell in row) + 4
    height = max(cell.height for row in cells for cell in row) + 4
    group, lines = width * len(headings) + 12, math.ceil(len(cells) / columns)
    page = Image.new("RGB", (group * columns, 18 + height * lines), "white")
    draw = ImageDraw.Draw(page)
    for number, row in enumerate(cells):
        left, top = group * (number % columns), 18 + height * (number // columns)
        for i, cell in enumerate(row):
            page.paste(cell, (left + i * width + 2, top + 2))
            if top == 18:
                text, font = prepare_text(headings[i], 12)
                draw.text((left + i * width + 4, 2), text, fill="#222222", font=font)
    shown = present_labels(*(labels for row in rows for _, labels in row if labels is not None))
    page = add_class_legend(page, shown, class_names)
    with atomic_write(file) as temporary:
        page.save(temporary, "PNG")
    return file


def _draw_cell(image: np.ndarray, labels: np.ndarray | None, num_classes: int) -> Image.Image:
    drawn = Image.fromarray(image if labels is None else draw_overlay(image, labels, num_classes))
    scale = SIDE / max(drawn.size)
    return drawn.resize([max(1, round(scale * side)) for side in drawn.size], Image.Resampling.BILINEAR)
