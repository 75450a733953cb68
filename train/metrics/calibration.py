"""The expected calibration error, over any number of processes: how far a model's confidence is from its accuracy."""

import torch
from torch import Tensor

from ..runtime.distributed import all_reduce_sum


class Calibration:
    """Count the images of a split by confidence, the largest softmax probability of an image.

    Guo et al. 2017 (arXiv 1706.04599): bin m of M has the confidences in ((m-1)/M, m/M]. The error is the mean over all
    images of the absolute difference between accuracy and mean confidence of their bin.
    """

    def __init__(self, device: torch.device, bins: int = 15):
        self.edges = torch.arange(1, bins, dtype=torch.float64, device=device) / bins  # between the bins
        self.sums = torch.zeros(3, bins, dtype=torch.float64, device=device)  # images, correct ones, confidence

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits (B, classes), labels (B,)."""
        confidence, predicted = logits.double().softmax(1).max(1)
        counted = torch.stack([torch.ones_like(confidence), (predicted == labels).double(), confidence])
        self.sums.index_add_(1, torch.bucketize(confidence, self.edges), counted)

    def result(self) -> tuple[float, list[dict[str, float]]]:
        """Return the error in percent, NaN without images, and a row for each bin that has images.

        A row: `low` and `high`, `images`, `top1`, `confidence` (percent).
        """
        images, right, confidence = all_reduce_sum(self.sums).cpu()
        error = 100 * float((right - confidence).abs().sum() / images.sum())
        rows = [
            dict(
                low=100 * i / len(images),
                high=100 * (i + 1) / len(images),
                images=int(images[i]),
                top1=100 * float(right[i] / images[i]),
                confidence=100 * float(confidence[i] / images[i]),
            )
            for i in range(len(images))
            if images[i]
        ]
        return error, rows
