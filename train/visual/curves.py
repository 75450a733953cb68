"""Plots of losses, scores and the learning rate over a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figure import BLUE, GREY, ORANGE, plt, save_figure

# Keys of a training line other than the parts of its loss.
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


def plot_curves(log: Path, file: Path, scores: Sequence[str] = ("top1",)) -> Path | None:
    """Plot losses, scores and learning rate over the epochs of a run; return None where log.jsonl has no lines yet.

    scores: names of metrics in percent, the one that chooses the best checkpoint first.
    """
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    val = [r for r in records if r["kind"] == "val"]
    if not train:
        return None
    figure, (loss, score, rate) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")

    def line(axis: plt.Axes, rows: list[dict], key: str, label: str, color: Any, **style: Any) -> None:
        rows = [r for r in rows if r.get(key) is not None]
        if rows:
            axis.plot([r["epoch"] for r in rows], [r[key] for r in rows], color=color, label=label, **style)

    line(loss, train, "loss", "training, as optimised", GREY)
    parts = [key for key in train[0] if key not in _NO_PARTS and key not in scores]
    for i, key in enumerate(parts):
        line(loss, train, key, key, plt.get_cmap("tab20")(i % 20), lw=0.8)
    line(loss, val, "loss", "validation", BLUE, marker=".")
    line(loss, val, "ema_loss", "validation, EMA weights", ORANGE, marker=".")
    loss.set(title="loss", xlabel="epoch", yscale="log")
    first, *others = scores
    line(score, train, first, "training", GREY)
    line(score, val, first, "validation", BLUE, marker=".")
    line(score, val, f"ema_{first}", "validation, EMA weights", ORANGE, marker=".")
    for i, key in enumerate(others):
        line(score, val, key, key, plt.get_cmap("tab20")(2 * i + 4), marker=".", lw=0.8)
    score.set(title="top-1 accuracy (%)" if first == "top1" else f"{first} (%)", xlabel="epoch")
    values = [r[key] for r in val for key in (first, f"ema_{first}") if r.get(key) is not None]
    if values:
        best = max(values)
        score.axhline(best, color=BLUE, lw=0.7, ls=":")
        position = dict(xycoords=("axes fraction", "data"), textcoords="offset points")
        score.annotate(f"best {best:.2f} %", (0.02, best), (0, 3), va="bottom", color=BLUE, **position)
    line(rate, train, "lr", "learning rate", BLUE)
    rate.set(title="learning rate", xlabel="epoch")
    for axis in (loss, score):
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=9 if not parts else 7)
    for axis in (loss, score, rate):
        axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, file)
