"""Figures of what a model attends to, from its attention maps (saccade.backbones.attention_maps)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from ..data.bad_images import BadImage
from .captions import figure_text
from .figure import plt, save_figure

if TYPE_CHECKING:  # at run time models are asked, by their method attention_maps
    from ...backbones.attention_maps import AttentionMap

QUERY = "#00d5ff"  # of the frame around a query, far from the colors of a map
SIDE = 224  # pixels, at least, of the shorter side of an overlay


def draw_map(image: np.ndarray, values: np.ndarray, query: Sequence[float] | None = None) -> np.ndarray:
    """Draw a map over an image, from dark where it is 0 to bright where it is largest: (H', W', 3) uint8.

    image (H, W, 3) uint8, which small images are enlarged from; values (h, w), not negative: each is a cell of the
    image. query: (top, left, bottom, right) of a frame to draw, as shares of the image's sides.
    """
    scale = max(1, -(-SIDE // min(image.shape[:2])))
    image = image.repeat(scale, 0).repeat(scale, 1)
    H, W = image.shape[:2]
    rows, columns = (np.arange(n) * cells // n for n, cells in zip((H, W), values.shape))
    share = (values / max(values.max(), np.finfo(np.float32).tiny))[rows][:, columns, None]
    color = plt.get_cmap("inferno")(share[..., 0])[..., :3]
    grey = image.mean(2, keepdims=True) / 255
    strength = 0.35 + 0.4 * share
    drawn = (1 - strength) * (0.15 + 0.75 * grey) + strength * color
    drawn = np.round(255 * drawn.clip(0, 1)).astype(np.uint8)
    if query is None:
        return drawn
    picture = Image.fromarray(drawn)
    top, left, bottom, right = (side * n for side, n in zip(query, (H, W, H, W)))
    width = max(2, min(H, W) // 110)
    # At least as large as can be seen, around the middle of the query.
    y, x, half = (top + bottom) / 2, (left + right) / 2, 2.5 * width
    box = (min(left, x - half), min(top, y - half), max(right, x + half) - 1, max(bottom, y + half) - 1)
    ImageDraw.Draw(picture).rectangle(box, outline=QUERY, width=width)
    return np.array(picture)


def query_frame(record: AttentionMap, query: Sequence[int] | None) -> tuple[float, float, float, float] | None:
    """Return the frame of a query's cell for `draw_map`, None if there is none."""
    if query is None or record.query_grid is None:
        return None
    rows, columns = record.query_grid
    return query[0] / rows, query[1] / columns, (query[0] + 1) / rows, (query[1] + 1) / columns


def to_pixels(x: torch.Tensor) -> np.ndarray:
    """Convert normalised images (B, 3, H, W) to (B, H, W, 3) uint8, each from its least to its largest value."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return ((x - low) / (high - low).clamp_min(1e-6) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def choose_layers(records: Sequence[AttentionMap], count: int = 4) -> list[AttentionMap]:
    """Choose `count` maps: the last of each resolution or, of a model with one resolution, evenly from its layers.

    Maps with a query come before others of the same resolution.
    """
    with_query = {record.grid for record in records if record.has_query}
    layers = {one.layer: one for one in records if one.has_query or one.grid not in with_query}
    stages = {record.grid: record for record in layers.values()}
    chosen = list(stages.values()) if len(stages) > 1 else list(layers.values())
    places = np.linspace(0, len(chosen) - 1, min(count, len(chosen))).round().astype(int)
    return [chosen[i] for i in places]


@torch.no_grad()
def plot_attention(model: nn.Module, images: Any, names: list[str], file: Path, rows: int = 6) -> Path | None:
    """Plot what the model attends to on some of `images`, a dataset of (image (3, H, W), label), a row for each.

    Returns None for a model without attention maps. Captions of images that the model is wrong about are red.
    """
    if not hasattr(model, "attention_maps") or not len(images):
        return None
    device = next(model.parameters()).device
    chosen = {}  # an image of each of `rows` classes
    for i in np.linspace(0, len(images) - 1, min(20 * rows, len(images))).round().astype(int):
        with suppress(BadImage):
            image, label = images[int(i)]
            if len(chosen) < rows:
                chosen.setdefault(label, image)
    labels, x = list(chosen), torch.stack(list(chosen.values())).to(device)
    layers = choose_layers(model.attention_maps(x))
    predicted = model.eval()(x).argmax(1).tolist()
    captions = []
    for label, other in zip(labels, predicted):
        name = figure_text(names[label])
        captions.append(name if label == other else f"{name}, taken for {figure_text(names[other])}")
    return plot_layers(layers, to_pixels(x), captions, file, [a != b for a, b in zip(labels, predicted)])


def plot_layers(
    layers: Sequence[AttentionMap], pixels: np.ndarray, captions: Sequence[str], file: Path, wrong: Sequence[bool] = ()
) -> Path:
    """Plot maps of layers on images (B, H, W, 3) uint8: a row for each image, a column for each layer.

    The query is where an image has the highest contrast. wrong: the rows whose captions are red.
    """
    size = (1.7 * (1 + len(layers)) + 0.6, 1.72 * len(pixels) + 0.6)
    figure, axes = plt.subplots(len(pixels), 1 + len(layers), figsize=size, squeeze=False, layout="constrained")
    for b, row in enumerate(axes):
        row[0].imshow(pixels[b], interpolation="nearest")
        row[0].set_ylabel(captions[b], color="#c0392b" if any(wrong[b : b + 1]) else "black", fontsize=9)
        point = contrast_point(pixels[b])
        for axis, layer in zip(row[1:], layers):
            query = layer.query_at(*point, pixels.shape[1:3]) if layer.has_query else None
            drawn = draw_map(pixels[b], layer.map(query, image=b).numpy(), query_frame(layer, query))
            axis.imshow(drawn, interpolation="nearest")
            if b == 0:
                axis.set_title(f"{layer.layer.removesuffix('.attn')}\n{layer.kind}", fontsize=8)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("image", fontsize=9)
    if any(layer.has_query for layer in layers):
        figure.supxlabel("framed: the query; bright: what it attends to", fontsize=9)
    return save_figure(figure, file)


def contrast_point(image: np.ndarray, parts: int = 7) -> tuple[float, float]:
    """Return the middle (y, x) of the one of parts x parts tiles of an image (H, W, 3) with the highest contrast."""
    H, W = image.shape[:2]
    rows, columns = (np.linspace(0, n, min(parts, n) + 1).astype(int) for n in (H, W))
    tiles = [(y0, x0, y1, x1) for y0, y1 in pairwise(rows) for x0, x1 in pairwise(columns)]
    y0, x0, y1, x1 = max(tiles, key=lambda t: image[t[0] : t[2], t[1] : t[3]].std())
    return (y0 + y1) / 2, (x0 + x1) / 2
