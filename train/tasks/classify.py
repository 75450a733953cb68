"""Image classification: its batches, losses, predictions and metrics."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, Mixup, create_transform, infer_imagenet_subset, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ..data.images import to_rgb
from ..metrics.calibration import Calibration
from ..metrics.confusion import as_csv, confused, per_class, worst
from ..metrics.real import Real
from ..metrics.topk import TopK
from ..models.build import create, export
from ..models.class_names import fit_head
from ..models.weights import read_weights
from ..runtime.checkpoint import label_names, write_text
from ..runtime.config import BelowOne, Fraction, NonNegative
from ..runtime.errors import UserError
from ..visual.contact_sheet import save_contact_sheet
from .task import Predictor, Task, format_counts


class Classify(Task):
    """One label per image; a batch is (images (B, 3, H, W), labels (B,)).

    smoothing: of the labels. mixup, cutmix: their alpha (0: off). switch_prob: probability of cutmix if both are on.
    mix_prob: probability that a batch is mixed. bce: binary cross-entropy of each class instead of a softmax over them.
    bce_threshold: the share of a class in a mixed image above which its target is 1, else 0 (None: the share is the
    target).
    """

    scores = ("top1",)

    def __init__(
        self,
        data: Any,
        /,
        smoothing: BelowOne = 0.0,
        mixup: NonNegative = 0.0,
        cutmix: NonNegative = 0.0,
        mix_prob: Fraction = 1.0,
        switch_prob: Fraction = 0.5,
        bce: bool = False,
        bce_threshold: BelowOne | None = None,
    ):
        self.class_names: list[str] = data.class_names
        self.img_size: int | None = data.img_size
        classes = len(self.class_names)
        mixing = mixup > 0 or cutmix > 0
        self._mix = (
            Mixup(mixup, cutmix, None, mix_prob, switch_prob, "batch", True, smoothing, classes) if mixing else None
        )
        if bce_threshold is not None and not (bce and 0 <= bce_threshold < 1):
            raise UserError(f"task.bce_threshold={bce_threshold} must be in [0, 1) and needs task.bce=True")
        if bce:
            smoothing = 0.0 if mixing else smoothing
            self.criterion: nn.Module = BinaryCrossEntropy(smoothing=smoothing, target_threshold=bce_threshold)
        else:
            self.criterion = SoftTargetCrossEntropy() if mixing else LabelSmoothingCrossEntropy(smoothing)

    def model(self, name: str, checkpoint: Any = None, new_head: bool = False, **kwargs: Any) -> nn.Module:
        """Build the classifier, sized to the data; see saccade.train.models.build.create."""
        arguments = {"num_classes": len(self.class_names), "img_size": self.img_size, **kwargs}
        checkpoint = None if checkpoint is None else read_weights(checkpoint)
        net = create(name, checkpoint=checkpoint, new_head=new_head, **arguments)
        fits, order = self.match_head(checkpoint) if checkpoint is not None and new_head else (True, None)
        if not fits:
            self._fit_head(net, order)
        return net

    def _fit_head(self, model: nn.Module, order: list[int] | None) -> None:
        """Reorder the rows of the classifier, or (None) start it anew."""
        layers = model.pretrained_cfg.get("classifier") or ()
        layers = (layers,) if isinstance(layers, str) else tuple(layers)
        state = model.state_dict()
        rows = [name for name in state if name.rpartition(".")[0] in layers]
        if order is not None and rows and all(len(state[name]) == len(order) for name in rows):
            model.load_state_dict(fit_head(state, rows, state, order))
        else:
            model.reset_classifier(len(self.class_names))

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

    def published_class_names(self, model: dict[str, Any]) -> list[str] | None:
        with torch.device("meta"):
            net = create(**{k: v for k, v in model.items() if k != "pretrained"}, num_classes=0)
        if net.pretrained_cfg.get("label_names"):
            return list(net.pretrained_cfg["label_names"])
        subset = infer_imagenet_subset(net.pretrained_cfg)
        return ImageNetInfo(subset).label_names() if subset else None

    def select_classes(self, model: nn.Module, indices: Sequence[int]) -> None:
        kept = torch.tensor(indices, device=next(model.parameters()).device)
        model.register_forward_hook(lambda module, images, logits: logits[:, kept])

    def targets(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return images and targets of the criterion: mixed images with class probabilities, or labels."""
        images, labels = batch
        if self._mix is None:
            return images, labels
        if len(images) % 2:
            raise UserError(
                f"mixup and cutmix pair images: a process's {len(images)} of a batch must be an even number"
            )
        return self._mix(images, labels)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (scalar loss, values to log); for unmixed labels these are the batch's accuracy in percent."""
        images, targets = self.targets(batch)
        logits = model(images).float()
        loss = self.criterion(logits, targets)
        if self._mix:
            return loss, {}
        return loss, {"top1": 100 * (logits.detach().argmax(1) == targets).float().mean()}

    def draw_batch(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        """Draw the augmented and mixed images of a batch with their labels; random numbers are those of `targets`."""
        images, targets = self.targets([part.clone() for part in batch])
        if targets.dim() == 1:
            captions = [self.class_names[label] for label in targets.tolist()]
        else:
            shares, labels = targets.topk(min(2, targets.shape[1]))
            captions = [
                "\n".join(f"{self.class_names[label]}: {share:.0%}" for share, label in zip(*pair))
                for pair in zip(shares.tolist(), labels.tolist())
            ]
        file = folder / "pictures" / "batch.png"
        return save_contact_sheet(images, captions, inputs["mean"], inputs["std"], file)

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], dict[str, Any]]:
        """Return top1, top5, ece (percent), loss and images over all processes; confusion counts and calibration.

        Batches with a third part, the classes that are accepted (saccade.train.metrics.real), give real_top1 and
        real_top5 too.
        """
        device = next(model.parameters()).device
        counts, calibration, real = TopK(len(self.class_names), device), Calibration(device), Real(device)
        for images, labels, *accepted in batches:
            logits = model(images)
            counts.update(logits, labels)
            calibration.update(logits, labels)
            if accepted:
                real.update(logits, *accepted)
        metrics, confusion = counts.result()
        metrics["ece"], bins = calibration.result()
        real_metrics, num_real = real.result()
        return metrics | real_metrics, dict(confusion=confusion, calibration=bins, real_images=num_real)

    def report(self, folder: Path, detail: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Write folder/classes.csv, the accuracy of every class; return further entries of metrics.json, and lines to
        print: the worst classes."""
        rows = per_class(detail["confusion"], self.class_names)
        write_text(folder / "classes.csv", as_csv(rows))
        entries = dict(confused=confused(detail["confusion"], self.class_names), calibration=detail["calibration"])
        if detail["real_images"]:
            entries["real_images"] = detail["real_images"]
        return entries, worst(rows)

    def draw_results(self, folder: Path, model: nn.Module, dataset: Any, detail: Any) -> list[Path]:
        """Plot the confusion matrix, the calibration, and the model's attention on some images."""
        # Imported here, since matplotlib takes a second to import.
        from ..visual.attention import plot_attention
        from ..visual.confusion import plot_confusion, plot_reliability

        figures = folder / "pictures"
        files = [
            plot_confusion(detail["confusion"], self.class_names, figures / "confusion.png"),
            plot_reliability(detail["calibration"], figures / "reliability.png"),
            plot_attention(model, dataset, self.class_names, figures / "attended.png"),
        ]
        return [file for file in files if file is not None]

    def export(self, model: nn.Module, folder: Path, inputs: dict[str, Any], class_names: list[str]) -> None:
        """Write what timm.create_model("local-dir:FOLDER", pretrained=True) reads."""
        export(model, folder, inputs, class_names)

    @classmethod
    def predictor(cls, folder: Path, settings: dict[str, Any], device: torch.device, top: int = 3) -> "ClassPredictor":
        """top: classes to name for each image."""
        return ClassPredictor(folder, device, top)


class ClassPredictor(Predictor):
    """Predicts the likeliest classes of an image: {"classes": [{"name": …, "probability": …}, …]}, in that order.

    folder: a finished run's, or any that timm's `local-dir:` reads and that names its classes. top: how many classes, 1
    or more; all of them where there are fewer.
    """

    def __init__(self, folder: Path, device: torch.device, top: int = 3):
        if top < 1:
            raise UserError(f"--top must be 1 or more classes, got {top}")
        self.class_names = label_names(folder)
        self.model = create(f"local-dir:{folder}", len(self.class_names), pretrained=True).to(device).eval()
        self.transform = create_transform(**resolve_data_config(model=self.model))
        self.device, self.top = device, min(top, len(self.class_names))

    def predict(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        x = torch.stack([self.transform(to_rgb(image)) for image in images]).to(self.device)
        likeliest = self.model(x).float().softmax(-1).cpu().topk(self.top)
        rows = zip(likeliest.indices.tolist(), likeliest.values.tolist())
        return [dict(classes=[dict(name=self.class_names[i], probability=p) for i, p in zip(*row)]) for row in rows]

    def describe(self, record: dict[str, Any]) -> str:
        return ", ".join(f"{row['name']} {100 * row['probability']:.1f} %" for row in record["classes"])

    def summarize(self, records: Sequence[dict[str, Any]]) -> str:
        return format_counts(Counter(record["classes"][0]["name"] for record in records))
