"""Pictures of a run: curves, confusion, and what the model attends to. PNG files, drawn without a display."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from .data.bad import BadImage

BLUE, ORANGE, GREY = "#2a6fbb", "#e07b39", "#8a8f98"
# What a line on training has beside its loss and the parts of that.
_NO_PARTS = {
    "kind",
    "step",
    "epoch",
    "loss",
    "top1",
    "acc",
    "lr",
    "images_per_s",
    "data_share",
    "memory_gib",
    "seconds",
}


def _save(figure: plt.Figure, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file


def curves(log: Path, file: Path, scores: Sequence[str] = ("top1",)) -> Path | None:
    """Losses, scores and learning rate over the epochs of a run's log.jsonl; None where it has no lines yet.

    scores: names of metrics in percent, the one that chooses the best checkpoint first.
    """
    records = [json.loads(line) for line in log.read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    val = [r for r in records if r["kind"] == "val"]
    if not train:
        return None
    figure, (loss, score, rate) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")

    def line(axis: plt.Axes, rows: list[dict], key: str, label: str, color: Any, **style: Any) -> None:
        rows = [r for r in rows if key in r]
        if rows:
            axis.plot([r["epoch"] for r in rows], [r[key] for r in rows], color=color, label=label, **style)

    line(loss, train, "loss", "training, as optimised", GREY)
    parts = [key for key in train[0] if key not in _NO_PARTS and key not in scores]
    for i, key in enumerate(parts):
        line(loss, train, key, key, plt.get_cmap("tab20")(i % 20), lw=0.8)
    line(loss, val, "loss", "validation", BLUE, marker=".")
    line(loss, val, "ema_loss", "validation, averaged weights", ORANGE, marker=".")
    loss.set(title="loss", xlabel="epoch", yscale="log")
    first, *others = scores
    line(score, train, first, "training", GREY)
    line(score, val, first, "validation", BLUE, marker=".")
    line(score, val, f"ema_{first}", "validation, averaged weights", ORANGE, marker=".")
    for i, key in enumerate(others):
        line(score, val, key, key, plt.get_cmap("tab20")(2 * i + 4), marker=".", lw=0.8)
    score.set(title="top-1 accuracy (%)" if first == "top1" else f"{first} (%)", xlabel="epoch")
    if found := [max(r[first], r.get(f"ema_{first}", 0.0)) for r in val if first in r]:
        best = max(found)
        score.axhline(best, color=BLUE, lw=0.7, ls=":")
        place = dict(xycoords=("axes fraction", "data"), textcoords="offset points")
        score.annotate(f"best {best:.2f} %", (0.02, best), (0, 3), va="bottom", color=BLUE, **place)
    line(rate, train, "lr", "learning rate", BLUE)
    rate.set(title="learning rate", xlabel="epoch")
    for axis in (loss, score):
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=9 if not parts else 7)
    for axis in (loss, score, rate):
        axis.spines[["top", "right"]].set_visible(False)
    return _save(figure, file)


def confusion(counts: Tensor, names: list[str], file: Path) -> Path:
    """Counts (classes, classes), rows the true class; of many classes, the 20 most confused ones."""
    counts = counts.cpu().numpy()
    shown = np.arange(len(names))
    if len(names) > 20:
        wrong = counts - np.diag(np.diag(counts))
        shown = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:20])
    part, names = counts[np.ix_(shown, shown)], [names[i] for i in shown]
    share = part / np.maximum(counts[shown].sum(1, keepdims=True), 1)
    side = max(4.0, 0.5 * len(shown) + 1.5)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    axis.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the root, since one mistake in a hundred should show
    for i, j in np.argwhere(part > 0):
        axis.text(j, i, str(part[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.35 else "#333333")
    turn = 90 if max(map(len, names)) > 3 else 0
    axis.set_xticks(range(len(shown)), names, rotation=turn)
    axis.set_yticks(range(len(shown)), names)
    right = np.trace(counts) / max(counts.sum(), 1)
    subset = f", the {len(shown)} most confused of {len(counts)} classes" if len(shown) < len(counts) else ""
    axis.set(xlabel="predicted", ylabel="true", title=f"{int(counts.sum())} images, {100 * right:.2f} % right{subset}")
    return _save(figure, file)


def reliability(bins: list[dict[str, float]], file: Path) -> Path:
    """Accuracy against confidence, of the bins that metrics.calibration.Calibration fills, all in percent."""
    low, high, images, right, confidence = (
        np.array([row[key] for row in bins]) for key in ("low", "high", "images", "top1", "confidence")
    )
    share = images / images.sum()
    error = (np.abs(right - confidence) * share).sum()
    figure, (top, axis) = plt.subplots(
        2, 1, figsize=(4.6, 5.8), height_ratios=(1, 3), sharex=True, layout="constrained"
    )
    place = dict(x=low, width=high - low, align="edge", edgecolor="white", linewidth=0.8)
    top.bar(height=100 * share, color=GREY, **place)
    top.set(ylabel="images (%)", title=f"calibration error {error:.2f} % (ECE), {images.sum()} images")
    axis.bar(height=right, color=BLUE, alpha=0.75, label="accuracy", **place)
    axis.hlines(confidence, low, high, color=ORANGE, lw=2.5, label="mean confidence")
    axis.vlines((low + high) / 2, np.minimum(right, confidence), np.maximum(right, confidence), color=ORANGE, lw=1)
    axis.plot([0, 100], [0, 100], color="#333333", lw=0.8, ls="--")
    axis.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    for one in (top, axis):
        one.spines[["top", "right"]].set_visible(False)
    return _save(figure, file)


@torch.no_grad()
def attended(model: nn.Module, images: Any, names: list[str], file: Path, rows: int = 6) -> Path | None:
    """What the model attends to: for some of `images` and one query region of each, the regions it attends to.

    `images` is a dataset of (image (3, H, W), label). A model that has something to show has
    `attended_regions(x) -> {layer: dict(grid, pixels, idx (B, P, K) or share (B, P, P))}`: the regions that each is
    routed to, or the share of the heads that attend to them; with others this returns None. The query is the region
    with most contrast. Of each stage the last layer is drawn, of a model without stages four.
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
    found = model.eval().attended_regions(x)
    last = {name.rsplit(".blocks.", 1)[0]: layer for name, layer in found.items()}  # of each stage
    if len(last) > 4:
        last = {
            name: last[name] for name in (list(last)[i] for i in np.linspace(0, len(last) - 1, 4).round().astype(int))
        }
    guess = model(x).argmax(1).tolist()
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    pictures = ((x - low) / (high - low).clamp_min(1e-6)).permute(0, 2, 3, 1).cpu().numpy()

    size = (1.7 * (1 + len(last)) + 0.6, 1.72 * len(x) + 0.6)
    figure, axes = plt.subplots(len(x), 1 + len(last), figsize=size, squeeze=False, layout="constrained")
    for b, row in enumerate(axes):
        row[0].imshow(pictures[b], interpolation="nearest")
        right = guess[b] == labels[b]
        said = f"{names[labels[b]]}" if right else f"{names[labels[b]]}, taken for {names[guess[b]]}"
        row[0].set_ylabel(said, color="black" if right else "#c0392b", fontsize=9)
        for axis, (stage, layer) in zip(row[1:], last.items()):
            _regions(axis, pictures[b], _shares(layer, b), layer["grid"], layer["pixels"])
            if b == 0:
                count = layer["grid"][0] * layer["grid"][1]
                said = f"{layer['idx'].shape[2]} of {count} regions" if "idx" in layer else "by heads"
                axis.set_title(f"{stage}\n{said}", fontsize=9)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("image", fontsize=9)
    figure.supxlabel("orange frame: the query region; bright: the regions it attends to", fontsize=9)
    return _save(figure, file)


def _shares(layer: dict, b: int) -> np.ndarray:
    """(P, P): for each query region of image b, how much of each region's light it gets, 0 … 1."""
    if "share" in layer:
        return layer["share"][b].cpu().numpy()
    idx = layer["idx"][b].cpu()
    return torch.zeros(len(idx), len(idx)).scatter(1, idx, 1.0).numpy()


def _regions(axis: plt.Axes, picture: np.ndarray, shares: np.ndarray, grid: tuple, pixels: tuple) -> None:
    """One image (H, W, 3), dark but for the regions that shares[query] lights, in a grid of regions of `pixels`
    (height, width)."""
    (R, S), (h, w) = grid, pixels
    H, W = picture.shape[:2]

    def box(region: int) -> tuple[slice, slice]:
        i, j = divmod(int(region), S)
        return slice(i * h, min((i + 1) * h, H)), slice(j * w, min((j + 1) * w, W))

    inside = [r for r in range(R * S) if picture[box(r)].size]  # the padding of an uneven map lies outside
    query = max(inside, key=lambda r: picture[box(r)].std())
    light = np.full((H, W, 1), 0.22)
    for region in inside:
        light[box(region)] += 0.78 * shares[query, region]
    tint = np.array([0.30, 0.45, 0.75])
    axis.imshow(np.clip(picture * light + (1 - light) * 0.18 * tint, 0, 1), interpolation="nearest")
    for i in range(1, R):
        axis.axhline(i * h - 0.5, color="white", lw=0.4, alpha=0.35)
    for j in range(1, S):
        axis.axvline(j * w - 0.5, color="white", lw=0.4, alpha=0.35)
    rows, cols = box(query)
    corner = (cols.start - 0.5, rows.start - 0.5)
    frame = Rectangle(corner, cols.stop - cols.start, rows.stop - rows.start, fill=False, ec=ORANGE, lw=2.2)
    axis.add_patch(frame)
    axis.set(xlim=(-0.5, W - 0.5), ylim=(H - 0.5, -0.5))
