"""Image classification: what a batch, a loss, a prediction and a metric are.

A task gives the engine what it asks of any task, and the engine knows nothing of labels:
model(…), trained(model), loss(model, batch), evaluate(model, batches), score(metrics), pictures(folder, …).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ..errors import UserError
from ..metrics.topk import TopK
from ..model import create


class Classify:
    """One label an image; a batch is (images (B, 3, H, W), labels (B,)).

    smoothing: of the labels. mixup, cutmix: their alpha (0: off), chosen between by switch_prob, applied to a batch
    with probability mix_prob. bce: binary cross-entropy of each class instead of a softmax over them.
    """

    def __init__(
        self,
        data: Any,
        /,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        bce: bool = False,
    ):
        self.class_names: list[str] = data.class_names
        self.img_size: int | None = data.img_size
        classes = len(self.class_names)
        mixing = mixup > 0 or cutmix > 0
        self._mix = (
            Mixup(mixup, cutmix, None, mix_prob, switch_prob, "batch", True, smoothing, classes) if mixing else None
        )
        if bce:
            self.criterion: nn.Module = BinaryCrossEntropy(smoothing=0.0 if mixing else smoothing)
        else:
            self.criterion = SoftTargetCrossEntropy() if mixing else LabelSmoothingCrossEntropy(smoothing)

    def model(self, name: str, **kwargs: Any) -> nn.Module:
        """The classifier, sized to the data; see saccade.train.model.create."""
        return create(name, **{"num_classes": len(self.class_names), "img_size": self.img_size, **kwargs})

    def trained(self, model: nn.Module) -> nn.Module:
        """What `loss` calls: here the model itself."""
        return model

    def targets(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and what the criterion compares logits with: mixed images and their shares of classes, or labels."""
        images, labels = batch
        if self._mix is None:
            return images, labels
        if len(images) % 2:
            raise UserError(
                f"mixup and cutmix pair images: a process's {len(images)} of a batch must be an even number"
            )
        return self._mix(images, labels)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, what to log beside it); with unmixed labels that is the batch's accuracy in percent."""
        images, targets = self.targets(batch)
        logits = model(images).float()
        loss = self.criterion(logits, targets)
        if self._mix:
            return loss, {}
        return loss, {"top1": 100 * (logits.detach().argmax(1) == targets).float().mean()}

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], Tensor]:
        """top1, top5 (percent), loss and images over all processes, and the confusion counts (classes, classes)."""
        counts = TopK(len(self.class_names), next(model.parameters()).device)
        for images, labels in batches:
            counts.update(model(images), labels)
        return counts.result()

    def score(self, metrics: dict[str, float]) -> float:
        """What the best checkpoint has most of."""
        return metrics["top1"]

    def pictures(
        self, folder: Path, model: nn.Module | None = None, images: Any = None, detail: Any = None
    ) -> list[Path]:
        """Draw what a run shows into folder/pictures; returns the files.

        After training: the curves of folder/log.jsonl. After testing, with `model`, the split's dataset `images` and
        the evaluation's `detail`: the confusion counts, and what the model attends to on some images.
        """
        from .. import pictures  # matplotlib takes a second to import, and only this needs it

        place = folder / "pictures"
        if model is None:
            drawn = [pictures.curves(folder / "log.jsonl", place / "curves.png")]
        else:
            drawn = [
                pictures.confusion(detail, self.class_names, place / "confusion.png"),
                pictures.attended(model, images, self.class_names, place / "attended.png"),
            ]
        return [file for file in drawn if file is not None]
