"""Figures of what a model attends to."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import nn

from ..data.bad_images import BadImage
from .captions import figure_text
from .figure import ORANGE, plt, save_figure


@torch.no_grad()
def plot_attention(model: nn.Module, images: Any, names: list[str], file: Path, rows: int = 6) -> Path | None:
    """Plot what the model attends to: for some of `images` and one query region of each, the regions it attends to.

    `images` is a dataset of (image (3, H, W), label). A model that has something to show has
    `attended_regions(x) -> {layer: dict(grid, pixels, idx (B, P, K) or share (B, P, P))}`: the regions that each is
    routed to, or the share of the heads that attend to them; with other models this returns None. The query is the
    region with the highest contrast. Of each stage the last layer is drawn; of a model without stages, four layers.
    """
    if not hasattr(model, "attended_regions") or not len(images):
        return None
    device = next(model.parameters()).device
    chosen = {}  # an image of each of `rows` classes
    for i in np.linspace(0, len(images) - 1, min(20 * rows, len(images))).round().astype(int):
        with suppress(BadImage):
            image, label = images[int(i)]
            if len(chosen) < rows:
                chosen.setdefault(label, image)
    labels, x = list(chosen), torch.stack(list(chosen.values())).to(device)
    predicted = model.eval()(x).argmax(1).tolist()
    captions = []
    for label, other in zip(labels, predicted):
        name = figure_text(names[label])
        captions.append(name if label == other else f"{name}, taken for {figure_text(names[other])}")
    return plot_attended_regions(model, x, captions, file, [a != b for a, b in zip(labels, predicted)])


@torch.no_grad()
def plot_attended_regions(
    model: nn.Module, x: torch.Tensor, captions: Sequence[str], file: Path, wrong: Sequence[bool] = ()
) -> Path:
    """Plot what a model with `attended_regions` attends to on images x (B, 3, H, W), a row per image.

    wrong: the rows whose captions are red.
    """
    layers = model.eval().attended_regions(x)
    last = {name.rsplit(".blocks.", 1)[0]: layer for name, layer in layers.items()}  # of each stage
    if len(last) > 4:
        last = {
            name: last[name] for name in (list(last)[i] for i in np.linspace(0, len(last) - 1, 4).round().astype(int))
        }
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    pixels = ((x - low) / (high - low).clamp_min(1e-6)).permute(0, 2, 3, 1).cpu().numpy()

    size = (1.7 * (1 + len(last)) + 0.6, 1.72 * len(x) + 0.6)
    figure, axes = plt.subplots(len(x), 1 + len(last), figsize=size, squeeze=False, layout="constrained")
    for b, row in enumerate(axes):
        row[0].imshow(pixels[b], interpolation="nearest")
        row[0].set_ylabel(captions[b], color="#c0392b" if any(wrong[b : b + 1]) else "black", fontsize=9)
        for axis, (stage, layer) in zip(row[1:], last.items()):
            _plot_regions(axis, pixels[b], attention_shares(layer, b), layer["grid"], layer["pixels"])
            if b == 0:
                count = layer["grid"][0] * layer["grid"][1]
                text = f"{layer['idx'].shape[2]} of {count} regions" if "idx" in layer else "by heads"
                axis.set_title(f"{stage}\n{text}", fontsize=9)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("image", fontsize=9)
    figure.supxlabel("orange frame: the query region; bright: the regions it attends to", fontsize=9)
    return save_figure(figure, file)


def attention_shares(layer: dict, b: int) -> np.ndarray:
    """Return (P, P): the share, 0 … 1, of the attention of each query region of image b that each region gets."""
    if "share" in layer:
        return layer["share"][b].cpu().numpy()
    idx = layer["idx"][b].cpu()
    return torch.zeros(len(idx), len(idx)).scatter(1, idx, 1.0).numpy()


def _plot_regions(axis: plt.Axes, image: np.ndarray, shares: np.ndarray, grid: tuple, pixels: tuple) -> None:
    """Plot an image (H, W, 3), each region as bright as its share of the query's attention.

    grid: regions (down, across). pixels: of a region (height, width).
    """
    (R, S), (h, w) = grid, pixels
    H, W = image.shape[:2]

    def box(region: int) -> tuple[slice, slice]:
        i, j = divmod(int(region), S)
        return slice(i * h, min((i + 1) * h, H)), slice(j * w, min((j + 1) * w, W))

    inside = [r for r in range(R * S) if image[box(r)].size]  # the padding of an uneven map lies outside
    query = max(inside, key=lambda r: image[box(r)].std())
    light = np.full((H, W, 1), 0.22)
    for region in inside:
        light[box(region)] += 0.78 * shares[query, region]
    tint = np.array([0.30, 0.45, 0.75])
    axis.imshow(np.clip(image * light + (1 - light) * 0.18 * tint, 0, 1), interpolation="nearest")
    for i in range(1, R):
        axis.axhline(i * h - 0.5, color="white", lw=0.4, alpha=0.35)
    for j in range(1, S):
        axis.axvline(j * w - 0.5, color="white", lw=0.4, alpha=0.35)
    rows, cols = box(query)
    corner = (cols.start - 0.5, rows.start - 0.5)
    frame = Rectangle(corner, cols.stop - cols.start, rows.stop - rows.start, fill=False, ec=ORANGE, lw=2.2)
    axis.add_patch(frame)
    axis.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5))
