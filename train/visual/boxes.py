"""Images of detections: boxes and masks, mistakes, and precision against recall."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_segmentation_masks

from ..data.images import to_rgb
from ..runtime.checkpoint import atomic_write
from .captions import add_legend, draw_captions, prepare_text

MIN_SIDE = 480  # pixels of a drawing's longer side: smaller images are enlarged by an integer factor
COLORS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#911eb4", "#46f0f0")
COLORS += ("#f032e6", "#bcf60c", "#fabebe", "#008080", "#e6beff", "#9a6324", "#fffac8")
COLORS += ("#800000", "#aaffc3", "#808000", "#ffd8b1", "#000075", "#808080")


def class_color(label: int) -> str:
    """Return the color of a class, by its index."""
    return COLORS[label % len(COLORS)]


def draw_boxes(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    captions: Sequence[str],
    colors: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
) -> Image.Image:
    """Draw boxes (left, top, right, bottom in the image's pixels) with captions, and masks (H, W) of the image's size.

    Lines and letters grow with the image.
    """
    scale = max(1, math.ceil(MIN_SIDE / max(image.size)))
    drawn = to_rgb(image).resize((scale * image.width, scale * image.height), Image.Resampling.BICUBIC)
    if not len(boxes):
        return drawn
    if masks is not None:
        grown = torch.from_numpy(np.stack(masks).astype(bool)).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        drawn = to_pil_image(draw_segmentation_masks(pil_to_tensor(drawn), grown, alpha=0.45, colors=list(colors)))
    corners = np.asarray(boxes, np.float64) * scale
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2])
    draw = ImageDraw.Draw(drawn)
    for corner, color in zip(corners.tolist(), colors):
        draw.rectangle(corner, outline=color, width=max(2, max(drawn.size) // 400))
    draw_captions(draw, drawn.size, corners.tolist(), captions, colors, font_size(drawn))
    return drawn


def font_size(image: Image.Image) -> int:
    """Return the size of letters, in pixels, that can be read on an image."""
    return min(40, max(13, max(image.size) // 48))


def draw_detections(
    image: Image.Image,
    objects: Sequence[dict[str, Any]],
    class_names: Sequence[str],
    limit: int = 50,
    legend: bool = True,
) -> Image.Image:
    """Draw objects (name, score, box and perhaps a run-length encoded mask), the `limit` of them that score highest.

    legend: write the classes below the image, and how many objects of each there are.
    """
    from pycocotools import mask as coder

    shown = sorted(objects, key=lambda o: -o["score"])[:limit]
    colors = {name: class_color(i) for i, name in enumerate(class_names)}
    drawn = draw_boxes(
        image,
        [o["box"] for o in shown],
        [f"{o['name']} {o['score']:.2f}" for o in shown],
        [colors[o["name"]] for o in shown],
        [coder.decode(o["mask"]) for o in shown if "mask" in o] or None,
    )
    if not legend:
        return drawn
    counts = Counter(o["name"] for o in objects)
    entries = [(colors[name], f"{name}: {count}") for name, count in counts.most_common()]
    if len(shown) < len(objects):
        entries.append(("white", f"the {len(shown)} with the highest scores of {len(objects)} are drawn"))
    return add_legend(drawn, entries, font_size(drawn))


def save_tiles(
    tiles: Sequence[tuple[Image.Image, str]],
    file: Path,
    columns: int = 4,
    side: int = 360,
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> Path:
    """Write images, each in a square of `side` pixels with up to two lines of text below it, as one PNG."""
    text_height = 34
    columns = min(columns, len(tiles))
    page = Image.new("RGB", (columns * side, math.ceil(len(tiles) / columns) * (side + text_height)), "white")
    draw = ImageDraw.Draw(page)
    for i, (tile, caption) in enumerate(tiles):
        x, y = i % columns * side, i // columns * (side + text_height)
        scale = (side - 6) / max(tile.size)
        size = max(1, round(tile.width * scale)), max(1, round(tile.height * scale))
        page.paste(tile.resize(size, resample), (x + 3, y + 3))
        text, font = prepare_text(caption, 12)
        draw.multiline_text((x + 5, y + side), text, fill="#333333", font=font, spacing=2)
    with atomic_write(file) as temporary:
        page.save(temporary, "PNG")
    return file


def plot_precision_recall(precision: dict[str, np.ndarray], names: Sequence[str], file: Path) -> Path:
    """Plot precision against recall at overlaps of 0.5 and 0.75: the mean over the classes and, up to 20, each class.

    precision: {"box" or "mask": (10 overlaps, 101 recalls, classes)}, 0 … 1, -1 where a class has no object.
    """
    from . import figure as plots  # matplotlib takes a second to import
    from .captions import figure_text

    figure, axes = plots.plt.subplots(
        1, len(precision), figsize=(5.2 * len(precision), 4.4), squeeze=False, layout="constrained"
    )
    recalls = np.linspace(0, 100, 101)
    for axis, (kind, table) in zip(axes[0], precision.items()):
        present = np.flatnonzero((table[0] > -1).all(0))
        if len(present) <= 20:
            for k in present:
                label = figure_text(names[k])
                axis.plot(recalls, 100 * table[0, :, k], color=class_color(k), lw=0.9, alpha=0.8, label=label)
        for row, overlap, color in ((0, "0.5", plots.BLUE), (5, "0.75", plots.ORANGE)):
            mean = 100 * table[row][:, present].mean(1) if len(present) else np.zeros(101)
            axis.plot(recalls, mean, color=color, lw=2.6, label=f"all, overlap {overlap}: {mean.mean():.1f} %")
        axis.set(xlabel="recall (%)", ylabel="precision (%)", title=f"{kind}es" if kind == "box" else f"{kind}s")
        axis.set(xlim=(0, 100), ylim=(0, 101))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=7, loc="lower left", ncols=2)
    return plots.save_figure(figure, file)


def draw_mistakes(image: Image.Image, row: dict[str, Any], names: dict[int, str]) -> tuple[Image.Image, str]:
    """Draw an image's missed objects (yellow), false detections (red) and confused ones (violet); add a caption.

    row: of saccade.train.metrics.coco.mistakes. names: of category ids.
    """
    missed, false, confused = row["missed"], row["false"], row["confused"]
    entries = [(a["bbox"], names[a["category_id"]], "#ffd400") for a in missed]
    entries += [(r["bbox"], f"{names[r['category_id']]} {r['score']:.2f}", "#ff2d2d") for r in false]
    for result, truth in confused:
        text = f"{names[result['category_id']]} {result['score']:.2f}, is {names[truth['category_id']]}"
        entries.append((result["bbox"], text, "#b03cff"))
    boxes = [(x, y, x + w, y + h) for (x, y, w, h), _, _ in entries]
    drawn = draw_boxes(image, boxes, [text for _, text, _ in entries], [color for _, _, color in entries])
    counts = f"{row['found']} detections, {len(missed)} missed (yellow),"
    return drawn, f"{row['file_name']}: {counts}\n{len(false)} false (red), {len(confused)} confused (violet)"
