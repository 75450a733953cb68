"""Image classification: what a batch, a loss, a prediction and a metric are."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import Mixup, create_transform, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ..metrics.calibration import Calibration
from ..metrics.confusion import as_csv, confused, per_class, worst
from ..metrics.real import Real
from ..metrics.topk import TopK
from ..models.build import create, export
from ..runtime.checkpoint import label_names, write_text
from ..runtime.errors import UserError
from ..visual.contact_sheet import contact_sheet
from .task import Predictor, Task


class Classify(Task):
    """One label an image; a batch is (images (B, 3, H, W), labels (B,)).

    smoothing: of the labels. mixup, cutmix: their alpha (0: off), chosen between by switch_prob, applied to a batch
    with probability mix_prob. bce: binary cross-entropy of each class instead of a softmax over them.
    """

    scores = ("top1",)

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
        """The classifier, sized to the data; see saccade.train.models.build.create."""
        return create(name, **{"num_classes": len(self.class_names), "img_size": self.img_size, **kwargs})

    def restore(self, folder: Path, model: dict[str, Any], **kwargs: Any) -> nn.Module:
        return self.model(f"local-dir:{folder}", **kwargs, pretrained=True)

    def published(self, model: dict[str, Any], **kwargs: Any) -> nn.Module:
        net = self.model(**model, **kwargs)
        if (published := net.pretrained_cfg["num_classes"]) != net.num_classes:
            raise UserError(
                f"the weights that are published for {model['name']} have {published} classes, and "
                f"{net.num_classes} are needed: train first, or test on other images"
            )
        return net

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

    def sample(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        """Its images augmented and mixed, with labels or shares of them; it draws random numbers as `targets` does."""
        images, targets = self.targets([part.clone() for part in batch])
        if targets.dim() == 1:
            captions = [self.class_names[label] for label in targets.tolist()]
        else:
            shares, labels = targets.topk(min(2, targets.shape[1]))
            captions = [
                "\n".join(f"{self.class_names[label]}: {share:.0%}" for share, label in zip(*pair))
                for pair in zip(shares.tolist(), labels.tolist())
            ]
        return contact_sheet(images, captions, inputs["mean"], inputs["std"], folder / "pictures" / "batch.png")

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], dict[str, Any]]:
        """top1, top5, ece (percent), loss and images over all processes; confusion counts, and accuracy by confidence.

        Batches with a third part, the classes that are accepted (saccade.train.metrics.real), give real_top1 and
        real_top5 too.
        """
        place = next(model.parameters()).device
        counts, calibration, real = TopK(len(self.class_names), place), Calibration(place), Real(place)
        for images, labels, *accepted in batches:
            logits = model(images)
            counts.update(logits, labels)
            calibration.update(logits, labels)
            if accepted:
                real.update(logits, *accepted)
        metrics, confusion = counts.result()
        metrics["ece"], bins = calibration.result()
        beside, counted = real.result()
        return metrics | beside, dict(confusion=confusion, calibration=bins, real_images=counted)

    def report(self, folder: Path, detail: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Write folder/classes.csv, the accuracy of every class; returns what metrics.json is to say beside the
        metrics, and lines for people: the worst classes."""
        rows = per_class(detail["confusion"], self.class_names)
        write_text(folder / "classes.csv", as_csv(rows))
        beside = dict(confused=confused(detail["confusion"], self.class_names), calibration=detail["calibration"])
        if detail["real_images"]:
            beside["real_images"] = detail["real_images"]
        return beside, worst(rows)

    def pictures(
        self, folder: Path, model: nn.Module | None = None, images: Any = None, detail: Any = None
    ) -> list[Path]:
        """After testing: the confusion counts, the reliability, and what the model attends to on some images."""
        if model is None:
            return super().pictures(folder)
        # matplotlib takes a second to import, and only this needs it.
        from ..visual.attention import draw_attention
        from ..visual.confusion import plot_confusion, plot_reliability

        place = folder / "pictures"
        drawn = [
            plot_confusion(detail["confusion"], self.class_names, place / "confusion.png"),
            plot_reliability(detail["calibration"], place / "reliability.png"),
            draw_attention(model, images, self.class_names, place / "attended.png"),
        ]
        return [file for file in drawn if file is not None]

    def export(self, model: nn.Module, folder: Path, inputs: dict[str, Any], class_names: list[str]) -> None:
        """Write what timm.create_model("local-dir:FOLDER", pretrained=True) reads."""
        export(model, folder, inputs, class_names)

    @classmethod
    def predictor(cls, folder: Path, settings: dict[str, Any], place: torch.device, top: int = 3) -> "ClassPredictor":
        """top: classes to name for each picture."""
        return ClassPredictor(folder, place, top)


class ClassPredictor(Predictor):
    """The likeliest classes of a picture: {"classes": [{"name": …, "probability": …}, …]}, the likeliest first.

    folder: a finished run's, or any that timm's `local-dir:` reads and that names its classes.
    """

    def __init__(self, folder: Path, place: torch.device, top: int = 3):
        self.names = label_names(folder)
        self.model = create(f"local-dir:{folder}", len(self.names), pretrained=True).to(place).eval()
        self.transform = create_transform(**resolve_data_config(model=self.model))
        self.place, self.top = place, min(top, len(self.names))

    def batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        x = torch.stack([self.transform(image) for image in images]).to(self.place)
        likeliest = self.model(x).float().softmax(-1).cpu().topk(self.top)
        rows = zip(likeliest.indices.tolist(), likeliest.values.tolist())
        return [dict(classes=[dict(name=self.names[i], probability=p) for i, p in zip(*row)]) for row in rows]

    def say(self, record: dict[str, Any]) -> str:
        return ", ".join(f"{found['name']} {100 * found['probability']:.1f} %" for found in record["classes"])
