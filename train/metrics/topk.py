"""Top-1 and top-5 accuracy, mean loss and confusion counts, exact over any number of processes."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..runtime.distributed import all_reduce_sum
from ..runtime.errors import UserError


class TopK:
    """Count over the images of a split. Every process adds its own; `result` sums them."""

    def __init__(self, classes: int, device: torch.device):
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.top5 = torch.zeros((), dtype=torch.int64, device=device)
        self.loss = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, classes), labels (B,)."""
        logits = logits.float()
        classes = len(self.confusion)
        best = logits.topk(min(5, classes)).indices
        self.confusion += torch.bincount(labels * classes + best[:, 0], minlength=classes**2).view(classes, classes)
        self.top5 += (best == labels[:, None]).sum()
        self.loss += cross_entropy(logits, labels, reduction="sum").double()

    def result(self) -> tuple[dict[str, float], Tensor]:
        """Return (top1 and top5 in percent, mean cross-entropy loss, images), confusion counts (true class, predicted).

        Without images the metrics are NaN. Raises UserError if the model's outputs are not finite.
        """
        confusion, top5, loss = all_reduce_sum(self.confusion), all_reduce_sum(self.top5), all_reduce_sum(self.loss)
        images = int(confusion.sum())
        if not images:  # none can be read, or the evaluation was interrupted
            return dict.fromkeys(("top1", "top5", "loss"), float("nan")) | dict(images=0), confusion.cpu()
        if not torch.isfinite(loss):
            raise UserError(
                "the model's outputs are not finite numbers: evaluate with precision=fp32 or train it again"
            )
        metrics = dict(
            top1=100 * int(confusion.trace()) / images,
            top5=100 * int(top5) / images,
            loss=float(loss) / images,
            images=images,
        )
        return metrics, confusion.cpu()
