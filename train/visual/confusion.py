"""Plots of a classifier's confusion matrix and of its calibration."""

from pathlib import Path

import numpy as np
from torch import Tensor

from .captions import figure_text
from .figure import BLUE, GREY, ORANGE, plt, save_figure


def plot_confusion(counts: Tensor, names: list[str], file: Path) -> Path:
    """Plot a confusion matrix, counts (true class, predicted class); with many classes, only the 20 most confused."""
    counts = counts.cpu().numpy()
    shown = np.arange(len(names))
    if len(names) > 20:
        wrong = counts - np.diag(np.diag(counts))
        shown = np.sort(np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")[:20])
    part, names = counts[np.ix_(shown, shown)], [figure_text(names[i]) for i in shown]
    share = part / np.maximum(counts[shown].sum(1, keepdims=True), 1)
    side = max(4.0, 0.5 * len(shown) + 1.5) + 0.08 * max(map(len, names))
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    axis.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)  # the root makes a mistake in a hundred visible
    for i, j in np.argwhere(part > 0):
        axis.text(j, i, str(part[i, j]), ha="center", va="center", color="white" if share[i, j] > 0.35 else "#333333")
    axis.set_xticks(range(len(shown)), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axis.set_yticks(range(len(shown)), names)
    accuracy = np.trace(counts) / max(counts.sum(), 1)
    subset = f", the {len(shown)} most confused of {len(counts)} classes" if len(shown) < len(counts) else ""
    axis.set(
        xlabel="predicted", ylabel="true", title=f"{int(counts.sum())} images, {100 * accuracy:.2f} % right{subset}"
    )
    return save_figure(figure, file)


def plot_reliability(bins: list[dict[str, float]], file: Path) -> Path:
    """Plot accuracy against confidence, in percent, for the bins of metrics.calibration.Calibration."""
    low, high, images, accuracy, confidence = (
        np.array([row[key] for row in bins]) for key in ("low", "high", "images", "top1", "confidence")
    )
    share = images / images.sum()
    error = (np.abs(accuracy - confidence) * share).sum()
    figure, (top, axis) = plt.subplots(
        2, 1, figsize=(4.6, 5.8), height_ratios=(1, 3), sharex=True, layout="constrained"
    )
    bars = dict(x=low, width=high - low, align="edge", edgecolor="white", linewidth=0.8)
    top.bar(height=100 * share, color=GREY, **bars)
    top.set(ylabel="images (%)", title=f"calibration error {error:.2f} % (ECE), {images.sum()} images")
    axis.bar(height=accuracy, color=BLUE, alpha=0.75, label="accuracy", **bars)
    axis.hlines(confidence, low, high, color=ORANGE, lw=2.5, label="mean confidence")
    axis.vlines(
        (low + high) / 2, np.minimum(accuracy, confidence), np.maximum(accuracy, confidence), color=ORANGE, lw=1
    )
    axis.plot([0, 100], [0, 100], color="#333333", lw=0.8, ls="--")
    axis.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    for one in (top, axis):
        one.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, file)
