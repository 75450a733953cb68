"""Pictures of detections: boxes and masks on photographs, what went wrong, and precision against recall."""

import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from ..runtime.checkpoint import atomic_write

LEAST = 480  # pixels of a drawing's longer side: what is smaller is enlarged by a whole number
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0")
COLOURS += ("#f032e6", "#bcf60c", "#fabebe", "#008080", "#e6beff", "#9a6324", "#fffac8")
COLOURS += ("#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#808080")


def class_color(label: int) -> str:
    """Of a class, by its number."""
    return COLOURS[label % len(COLOURS)]


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    captions: Sequence[str],
    colours: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
) -> Image.Image:
    """An image with boxes (left, top, right, bottom in its pixels), a caption at each, and masks (H, W) in its size."""
    scale = max(1, math.ceil(LEAST / max(image.size)))
    large = image.convert("RGB").resize((scale * image.width, scale * image.height), Image.Resampling.BICUBIC)
    pixels = pil_to_tensor(large)
    if not len(boxes):
        return large
    if masks is not None:
        grown = torch.from_numpy(np.stack(masks).astype(bool)).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        pixels = draw_segmentation_masks(pixels, grown, alpha=0.45, colors=list(colours))
    corners = torch.as_tensor(np.asarray(boxes, np.float32)) * scale
    corners[:, 2:] = torch.maximum(corners[:, 2:], corners[:, :2])
    return to_pil_image(
        draw_bounding_boxes(pixels, corners, list(captions), list(colours), width=2, font=_font(), font_size=16)
    )


@cache
def _font() -> str:
    """matplotlib's own, found without importing it."""
    return str(Path(find_spec("matplotlib").origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf")


def save_tiles(tiles: Sequence[tuple[Image.Image, str]], file: Path, columns: int = 4, side: int = 360) -> Path:
    """Write drawings, each in a square of `side` pixels with up to two lines below it, as one PNG."""
    text = 34
    columns = min(columns, len(tiles))
    page = Image.new("RGB", (columns * side, math.ceil(len(tiles) / columns) * (side + text)), "white")
    pen = ImageDraw.Draw(page)
    for i, (tile, caption) in enumerate(tiles):
        x, y = i % columns * side, i // columns * (side + text)
        scale = (side - 6) / max(tile.size)
        size = max(1, round(tile.width * scale)), max(1, round(tile.height * scale))
        page.paste(tile.resize(size, Image.Resampling.LANCZOS), (x + 3, y + 3))
        pen.multiline_text((x + 5, y + side), caption, fill="#333333", spacing=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        page.save(temporary, "PNG")
    return file


def plot_precision_recall(precision: dict[str, np.ndarray], names: Sequence[str], file: Path) -> Path:
    """Precision against recall at overlaps of 0.5 and 0.75, the mean over the classes and, up to 20, each class.

    precision: {"box" or "mask": (10 overlaps, 101 recalls, classes)}, 0 … 1, -1 where a class has no object.
    """
    from . import figure as plots  # matplotlib takes a second to import

    figure, axes = plots.plt.subplots(
        1, len(precision), figsize=(5.2 * len(precision), 4.4), squeeze=False, layout="constrained"
    )
    recalls = np.linspace(0, 100, 101)
    for axis, (kind, table) in zip(axes[0], precision.items()):
        there = np.flatnonzero((table[0] > -1).all(0))
        if len(there) <= 20:
            for k in there:
                axis.plot(recalls, 100 * table[0, :, k], color=class_color(k), lw=0.9, alpha=0.8, label=names[k])
        for row, said, tint in ((0, "0.5", plots.BLUE), (5, "0.75", plots.ORANGE)):
            mean = 100 * table[row][:, there].mean(1) if len(there) else np.zeros(101)
            axis.plot(recalls, mean, color=tint, lw=2.6, label=f"all, overlap {said}: {mean.mean():.1f} %")
        axis.set(xlabel="recall (%)", ylabel="precision (%)", title=f"{kind}es" if kind == "box" else f"{kind}s")
        axis.set(xlim=(0, 100), ylim=(0, 101))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, loc="lower left", ncols=2)
    return plots.save_figure(figure, file)


def draw_mistake(image: Image.Image, row: dict[str, Any], names: dict[int, str]) -> tuple[Image.Image, str]:
    """A picture with what went wrong on it, and a caption. row: of saccade.train.metrics.coco.mistakes.

    names: of category ids. Objects that were missed are yellow, false detections red, confused ones violet.
    """
    missed, false, confused = row["missed"], row["false"], row["confused"]
    entries = [(a["bbox"], names[a["category_id"]], "#ffd400") for a in missed]
    entries += [(r["bbox"], f"{names[r['category_id']]} {r['score']:.2f}", "#ff2d2d") for r in false]
    for result, truth in confused:
        said = f"{names[result['category_id']]} {result['score']:.2f}, is {names[truth['category_id']]}"
        entries.append((result["bbox"], said, "#b03cff"))
    boxes = [(x, y, x + w, y + h) for (x, y, w, h), _, _ in entries]
    drawn = draw_boxes(image, boxes, [said for _, said, _ in entries], [tint for _, _, tint in entries])
    counts = f"{row['found']} found, {len(missed)} missed (yellow),"
    return drawn, f"{row['file_name']}: {counts}\n{len(false)} false (red), {len(confused)} confused (violet)"
