"""Label maps as pictures: colours, overlays, legends, and sheets of pictures beside labels and predictions."""

import colorsys
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..runtime.checkpoint import atomic_write

IGNORED = 255
SIDE = 240  # pixels, at most, of a picture on a sheet


def colours(classes: int) -> np.ndarray:
    """(256, 3) uint8: a colour for each class, neighbours in number far apart in hue; black for the rest.

    The first class, often the background, is grey.
    """
    found = np.zeros((256, 3), np.uint8)
    found[0] = 110
    for i in range(1, classes):
        hue, ring = (i * 0.61803398875) % 1.0, i % 3  # the golden ratio spreads any number of hues evenly
        found[i] = [round(255 * x) for x in colorsys.hsv_to_rgb(hue, (0.85, 0.6, 1.0)[ring], (0.95, 1.0, 0.7)[ring])]
    return found


def overlay(image: np.ndarray, labels: np.ndarray, classes: int, strength: float = 0.65) -> np.ndarray:
    """A picture (H, W, 3) uint8 under the colours of its labels (H, W); ignored pixels are left dark."""
    colour = colours(classes)[labels].astype(np.float32)
    return np.round((1 - strength) * image + strength * colour).astype(np.uint8)


def draw_outlined(image: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """`overlay` with borders between labels drawn in white."""
    drawn = overlay(image, labels, classes)
    border = np.zeros(labels.shape, bool)
    border[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    border[1:] |= labels[1:] != labels[:-1]
    drawn[border] = 255
    return drawn


def add_legend(image: Image.Image, shown: Sequence[int], names: Sequence[str]) -> Image.Image:
    """The picture above the colours and names of the classes `shown`."""
    font = ImageFont.load_default(size=12)
    palette = colours(len(names))
    widths = [26 + math.ceil(font.getlength(names[c])) for c in shown]
    places, x, y = [], 4, 4
    for width in widths:
        if x > 4 and x + width > image.width:
            x, y = 4, y + 18
        places.append((x, y))
        x += width
    wide = max([image.width, *(x + width for (x, _), width in zip(places, widths))])
    page = Image.new("RGB", (wide, image.height + (y + 20 if shown else 0)), "white")
    page.paste(image, (0, 0))
    draw = ImageDraw.Draw(page)
    for c, (x, y) in zip(shown, places):
        y += image.height
        draw.rectangle((x, y + 1, x + 12, y + 13), fill=tuple(palette[c].tolist()), outline="#333333")
        draw.text((x + 17, y), names[c], fill="#222222", font=font)
    return page


def present_labels(*maps: np.ndarray) -> list[int]:
    """The classes in label maps, in order."""
    return sorted({int(c) for labels in maps for c in np.unique(labels)} - {IGNORED})


def save_contact_sheet(
    rows: Sequence[Sequence[tuple[np.ndarray, np.ndarray | None]]],
    heads: Sequence[str],
    names: Sequence[str],
    file: Path,
    columns: int = 1,
) -> Path:
    """Write rows of pictures as a PNG. A row has, for each of `heads`, a picture (H, W, 3) and its labels or None.

    columns: rows beside each other.
    """
    cells = [[_cell(image, labels, len(names)) for image, labels in row] for row in rows]
    wide = max(cell.width for row in cells for cell in row) + 4
    tall = max(cell.height for row in cells for cell in row) + 4
    group, lines = wide * len(heads) + 12, math.ceil(len(cells) / columns)
    page = Image.new("RGB", (group * columns, 18 + tall * lines), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for number, row in enumerate(cells):
        left, top = group * (number % columns), 18 + tall * (number // columns)
        for i, cell in enumerate(row):
            page.paste(cell, (left + i * wide + 2, top + 2))
            if top == 18:
                draw.text((left + i * wide + 4, 2), heads[i], fill="#222222", font=font)
    shown = present_labels(*(labels for row in rows for _, labels in row if labels is not None))
    page = add_legend(page, shown, names)
    with atomic_write(file) as temporary:
        page.save(temporary, "PNG")
    return file


def _cell(image: np.ndarray, labels: np.ndarray | None, classes: int) -> Image.Image:
    picture = Image.fromarray(image if labels is None else overlay(image, labels, classes))
    scale = SIDE / max(picture.size)
    return picture.resize([max(1, round(scale * side)) for side in picture.size], Image.Resampling.BILINEAR)
