"""ImageNet's validation images with the reassessed labels (ReaL), of which an image may have several.

Beyer et al. 2020 (arXiv 2006.07159): real.json lists the accepted classes of ILSVRC2012_val_00000001, …_00000002 and so
on. Images without an accepted class are not counted.
"""

import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..runtime.distributed import all_reduce_sum
from ..runtime.errors import UserError


def read_labels(file: str, classes: int) -> list[list[int]]:
    """Read the lists of a real.json, or with "timm" those of timm's copy. Raises UserError for an invalid file."""
    try:
        text = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") if file == "timm" else None
        labels = json.loads(text if text is not None else Path(file).read_text(encoding="utf-8"))
        largest = max(label for accepted in labels for label in accepted)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"--real {file} can't be read ({error}): give real.json, a list of lists of class numbers, or timm"
        ) from error
    if largest >= classes:
        raise UserError(
            f"--real {file} has class {largest}, but the model is tested on {classes} classes: "
            "these labels are for classifiers of ImageNet's 1000 classes"
        )
    return labels


class Accepted(Dataset):
    """A dataset of (image, label) with a third item, the mask of accepted classes, (classes,) bool.

    file: see read_labels. Raises UserError if the data's images have no file names.
    """

    def __init__(self, dataset: Any, file: str, classes: int):
        if not hasattr(dataset, "filename"):
            raise UserError(
                "--real needs the images' file names, which this data does not have: use a folder of images"
            )
        self.dataset, self.labels, self.classes = dataset, read_labels(file, classes), classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int, Tensor]:
        name = self.dataset.filename(index)
        number = re.match(r"ILSVRC2012_val_(\d{8})(?!\d)", name)
        place = int(number[1]) - 1 if number else -1
        if not 0 <= place < len(self.labels):
            raise UserError(
                f"--real has no labels for the image {name}: "
                f"they are for ILSVRC2012_val_00000001 … ILSVRC2012_val_{len(self.labels):08d}"
            )
        accepted = torch.zeros(self.classes, dtype=torch.bool)
        accepted[self.labels[place]] = True
        return *self.dataset[index], accepted


class Real:
    """Count over the images that have accepted labels. Every process adds its own; `result` sums them."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # top-1 correct, top-5 correct, images

    def update(self, logits: Tensor, accepted: Tensor) -> None:
        """Count a batch: logits (B, classes), accepted (B, classes) bool."""
        hits = accepted.gather(1, logits.float().topk(min(5, logits.shape[1])).indices)
        self.counts += torch.stack([hits[:, 0].sum(), hits.any(1).sum(), accepted.any(1).sum()])

    def result(self) -> tuple[dict[str, float], int]:
        """Return (real_top1 and real_top5 in percent, number of images that count); no metrics if there are none."""
        top1, top5, images = all_reduce_sum(self.counts).tolist()
        return (dict(real_top1=100 * top1 / images, real_top5=100 * top5 / images) if images else {}), images
