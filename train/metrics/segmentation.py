"""Mean IoU and accuracies from the confusion counts of a whole split, as mmsegmentation defines them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime.distributed import all_reduce_sum, world_size


class Confusion:
    """Count pixels (true class, predicted) over a split. Every process adds its own; `result` sums them.

    Pixels with the label `ignored` are not counted. worst: how many of the worst images `result` returns.
    """

    def __init__(self, classes: int, device: torch.device, ignored: int = 255, worst: int = 12):
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.ignored, self.worst = ignored, worst
        self.images = torch.zeros((), dtype=torch.int64, device=device)
        self._rows: list[tuple[float, int]] = []  # (mean IoU, index) of the worst images

    def update(self, labels: Tensor, predicted: Tensor, index: int) -> None:
        """Count an image: labels and predicted classes, both (H, W) int64; index: the image's index in the split."""
        counts = confusion(labels, predicted, len(self.counts), self.ignored)
        self.counts += counts
        self.images += 1
        iou = per_class(counts)["iou"]
        if not iou.isnan().all():
            self._rows = sorted([*self._rows, (float(iou.nanmean()), index)])[: self.worst]

    def result(self) -> tuple[dict[str, float], dict[str, object]]:
        """Return ({miou, macc, aacc (percent), images}, {confusion: counts, worst: indices of images, worst first}).

        Metrics are NaN if there are no labelled pixels.
        """
        counts, images = all_reduce_sum(self.counts).cpu(), int(all_reduce_sum(self.images))
        classes, pixels = per_class(counts), int(counts.sum())
        aacc = 100 * int(counts.trace()) / pixels if pixels else float("nan")
        metrics = dict(miou=_mean(classes["iou"]), macc=_mean(classes["acc"]), aacc=aacc, images=images)
        return metrics, dict(confusion=counts, worst=[index for _, index in self._all_rows()])

    def _all_rows(self) -> list[tuple[float, int]]:
        """Return the worst images of all processes."""
        rows = torch.full((self.worst, 2), float("inf"), dtype=torch.float64)
        if self._rows:
            rows[: len(self._rows)] = torch.tensor(self._rows, dtype=torch.float64)
        gathered = gather(rows.to(self.counts.device))
        worst = sorted((value, int(index)) for value, index in gathered.tolist() if value != float("inf"))
        return worst[: self.worst]


def gather(rows: Tensor) -> Tensor:
    """Return the rows of all processes, concatenated."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def confusion(labels: Tensor, predicted: Tensor, classes: int, ignored: int = 255) -> Tensor:
    """Return the number of pixels by (true class, predicted)."""
    kept = labels != ignored
    return torch.bincount(labels[kept] * classes + predicted[kept], minlength=classes**2).view(classes, classes)


def per_class(counts: Tensor) -> dict[str, Tensor]:
    """Return iou and acc (recall) of each class in float64, 0 … 1, and its pixels, from counts (true class, predicted).

    NaN if a class is neither labelled nor predicted (iou) or not labelled (acc).
    """
    right, labelled, predicted = (n.double() for n in (counts.diagonal(), counts.sum(1), counts.sum(0)))
    return dict(iou=right / (labelled + predicted - right), acc=right / labelled, pixels=counts.sum(1))


def table(counts: Tensor, names: Sequence[str]) -> list[dict]:
    """Return a row for each class: class, iou and acc (percent; None where undefined), pixels, taken_for most often."""
    scores = per_class(counts)
    rows = []
    for i, name in enumerate(names):
        iou, acc = (None if scores[key][i].isnan() else 100 * float(scores[key][i]) for key in ("iou", "acc"))
        wrong = counts[i].clone()
        wrong[i] = 0
        times, other = wrong.max(0)
        taken = names[int(other)] if times else None
        rows.append({"class": name, "iou": iou, "acc": acc, "pixels": int(scores["pixels"][i]), "taken_for": taken})
    return rows


def _mean(values: Tensor) -> float:
    """Return the mean in percent over the classes where it is defined; NaN if there are none."""
    return 100 * float(values.nanmean())
