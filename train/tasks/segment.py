"""Semantic segmentation: a class for each pixel, by a timm backbone with UPerNet or Semantic FPN on it."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.ade20k import IGNORED
from ..data.bad_images import BadImage
from ..data.images import to_rgb
from ..metrics.confusion import as_csv
from ..metrics.segmentation import Confusion, table
from ..models import legacy, published
from ..models.body import to_full_precision
from ..models.build import create_features
from ..models.class_names import fit_head
from ..models.fcn import resize
from ..models.segmenter import Inference, Segmenter
from ..models.weights import read_weights
from ..runtime.checkpoint import label_names, write_text
from ..runtime.config import BelowOne, Count, NonNegative, Positive
from ..runtime.distributed import is_sharded
from ..runtime.errors import UserError
from ..visual import boxes, label_maps
from .task import Predictor, Task


class Segment(Task):
    """A class for each pixel; a batch is (images (B, 3, H, W) in [0, 1], labels (B, H, W)): see train.data.ade20k.

    head: upernet or semantic_fpn; channels: of it; drop_rate: of whole channels before the classifiers. auxiliary:
    weight of the loss of an FCN head on the last map but one; 0: no such head. class_weights: of each class's pixels in
    the loss, in the order of the class list; None: all weigh the same. no_decay: patterns of parameter names without
    weight decay, beside the backbone's own ("*norm*").
    multiple, scales, flip, crop, stride: of tests, whole images or windows: see train.models.segmenter.Inference.
    """

    scores = ("miou", "macc", "aacc")

    def __init__(
        self,
        data: Any,
        /,
        head: Literal["upernet", "semantic_fpn"] = "upernet",
        channels: Count | None = None,
        drop_rate: BelowOne = 0.1,
        auxiliary: NonNegative = 0.4,
        class_weights: Sequence[NonNegative] | None = None,
        no_decay: Sequence[str] = (),
        multiple: Count = 1,
        scales: Sequence[Positive] = (1.0,),
        flip: bool = False,
        crop: Sequence[Count] | None = None,
        stride: Sequence[Count] | None = None,
    ):
        self.data, self.class_names, self.weight = data, data.class_names, auxiliary
        if class_weights is not None and (len(class_weights) != len(self.class_names) or min(class_weights) < 0):
            raise UserError(
                f"task.class_weights={tuple(class_weights)} must be {len(self.class_names)} numbers of 0 or more, "
                "one per class"
            )
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.head = dict(head=head, drop_rate=drop_rate, auxiliary=auxiliary > 0, no_decay=no_decay)
        self.head |= {} if channels is None else dict(channels=channels)
        self.inference = Inference(data.scale, multiple, scales, flip, crop, stride)

    def model(
        self, name: str, checkpoint: Any = None, new_head: bool = False, pretrained: bool = False, **kwargs: Any
    ) -> Segmenter:
        """Build the backbone, a timm model and its arguments, with the heads, sized to the data.

        checkpoint: of a segmenter; or, with new_head, of a classifier, for the backbone.
        """
        levels = kwargs.pop("out_indices", None)
        checkpoint = None if checkpoint is None else read_weights(checkpoint)
        tensors = {} if checkpoint is None else checkpoint.tensors
        if legacy.is_legacy(tensors):
            tensors, _ = legacy.convert(tensors)
        if whole := published.is_dense(tensors):
            body = published.load_backbone(name, levels, tensors, checkpoint, norms=False, **kwargs)
        elif checkpoint is not None and not new_head:
            raise UserError(f"checkpoint {checkpoint} has no segmentation head: give that of a segmenter")
        else:
            body = create_features(name, levels, checkpoint, pretrained, **kwargs)
        inputs = self.data.inputs(body.pretrained_cfg)
        net = Segmenter(
            body, len(self.class_names), mean=inputs["mean"], std=inputs["std"], inference=self.inference, **self.head
        )
        if whole:
            fits, order = self.match_head(checkpoint) if new_head else (True, None)
            if not fits:
                own = net.state_dict()
                rows = [key for key in own if ".conv_seg." in key]
                tensors = fit_head(tensors, rows, own, order)
            published.load_heads(net, tensors, checkpoint, new_head)
        return net

    def select_classes(self, model: nn.Module, indices: Sequence[int]) -> None:
        kept = torch.tensor(indices, device=next(model.parameters()).device)
        model.decode_head.register_forward_hook(lambda module, maps, logits: logits[:, kept])

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy of logits enlarged to the labels' size, by class_weights, averaged over all pixels.

        Ignored pixels count as zeros, as in mmsegmentation, so that processes with different numbers have equal weight.
        """
        if is_sharded(model):
            raise UserError("strategy=fsdp is not for segmentation, whose tests run the model unequally often: use ddp")
        images, labels = batch
        logits, auxiliary = model(images)
        logits = resize(to_full_precision(logits), labels.shape[1:])
        loss = self._cross_entropy(logits, labels)
        kept = labels != IGNORED
        correct = (logits.detach().argmax(1) == labels)[kept].float().sum()
        values = dict(acc=100 * correct / kept.sum().clamp_min(1))
        if auxiliary is not None:
            auxiliary_loss = self._cross_entropy(resize(to_full_precision(auxiliary), labels.shape[1:]), labels)
            values |= dict(head=loss.detach(), auxiliary=auxiliary_loss.detach())
            loss = loss + self.weight * auxiliary_loss
        return loss, values

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        return cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="sum") / labels.numel()

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], dict[str, Any]]:
        """Return miou, macc and aacc (percent) at the images' own sizes; confusion counts, the worst images."""
        counts = Confusion(len(self.class_names), next(model.parameters()).device, IGNORED)
        for images, labels, indices in batches:
            for image, true, index in zip(images, labels, indices):  # one by one: they have sizes of their own
                counts.update(true, model([image])[0], index)
        return counts.result()

    def draw_batch(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        """Draw the augmented images, each next to its labels in color."""
        images, labels = (part[:12].cpu() for part in batch)
        pixels = (255 * images.clamp(0, 1)).byte().permute(0, 2, 3, 1).numpy()
        rows = [[(image, None), (image, true)] for image, true in zip(pixels, labels.numpy())]
        file = folder / "pictures" / "batch.png"
        return label_maps.save_contact_sheet(rows, ("image", "labels"), self.class_names, file, columns=3)

    def report(self, folder: Path, detail: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Write folder/classes.csv, the IoU of every class; return these, and lines with the worst classes."""
        rows = table(detail["confusion"], self.class_names)
        write_text(folder / "classes.csv", as_csv(rows))
        known = sorted((row for row in rows if row["iou"] is not None), key=lambda row: row["iou"])[:5]
        width = max(len("worst classes"), *(len(row["class"]) for row in rows))
        lines = [f"  {'worst classes':{width}}     IoU  most often taken for"]
        lines += [f"  {row['class']:{width}}  {row['iou']:6.2f}  {row['taken_for'] or '-'}" for row in known]
        return dict(classes={row["class"]: row["iou"] for row in rows}), lines

    def draw_results(self, folder: Path, model: nn.Module, dataset: Any, detail: Any) -> list[Path]:
        """Draw some images of the split and the worst ones, next to labels and predictions."""
        some = np.linspace(0, len(dataset) - 1, min(8, len(dataset))).round().astype(int).tolist()
        files = []
        for name, chosen in (("overlays", dict.fromkeys(some)), ("worst", detail["worst"][:8])):
            rows = []
            for index in chosen:
                with suppress(BadImage):
                    rows.append(_draw_row(model, *dataset[index][:2]))
            if rows:
                headings = ("image", "labels", "prediction")
                file = folder / "pictures" / f"{name}.png"
                files.append(label_maps.save_contact_sheet(rows, headings, self.class_names, file, columns=2))
        return files

    @classmethod
    def predictor(cls, folder: Path, settings: dict[str, Any], device: torch.device) -> "MapPredictor":
        return MapPredictor(cls, folder, settings, device)


@torch.no_grad()
def _draw_row(model: nn.Module, image: Tensor, labels: Tensor) -> list[tuple[np.ndarray, np.ndarray | None]]:
    predicted = model([image])[0].cpu().numpy()
    pixels = image.permute(1, 2, 0).numpy()
    return [(pixels, None), (pixels, labels.numpy()), (pixels, predicted)]


class MapPredictor(Predictor):
    """Predicts the class of each pixel: {"classes": [{"name": …, "share": of the pixels}, …], "map": RLE}.

    map: {"size": [H, W], "runs": [[class number, pixels], …]}, runs of equal pixels, row by row.
    """

    def __init__(self, task: type[Segment], folder: Path, settings: dict[str, Any], device: torch.device):
        self.class_names = label_names(folder)
        inputs = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data_config"]
        data = SimpleNamespace(
            class_names=self.class_names, scale=inputs["scale"], inputs=lambda pretrained_cfg: inputs
        )
        arguments = {k: v for k, v in settings["task"].items() if k != "type"}
        self.model = task(data, **arguments).restore(folder, settings["model"]).to(device).eval()

    def predict(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        tensors = [torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1) for image in images]
        return [self._encode(labels.cpu().numpy()) for labels in self.model(tensors)]

    def describe(self, record: dict[str, Any]) -> str:
        return ", ".join(f"{row['name']} {100 * row['share']:.1f} %" for row in record["classes"][:8])

    def summarize(self, records: Sequence[dict[str, Any]]) -> str:
        """Return the share of each class among all pixels."""
        pixels: Counter[str] = Counter()
        for record in records:
            height, width = record["map"]["size"]
            pixels.update({row["name"]: row["share"] * height * width for row in record["classes"]})
        total = pixels.total()
        return ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in pixels.most_common())

    def draw(self, image: Image.Image, record: dict[str, Any], limit: int = 50) -> Image.Image:
        labels = _decode(record)
        drawn = Image.fromarray(label_maps.draw_outlined(np.array(to_rgb(image)), labels, len(self.class_names)))
        scale = max(1, math.ceil(boxes.MIN_SIDE / max(drawn.size)))
        drawn = drawn.resize((scale * drawn.width, scale * drawn.height), Image.Resampling.NEAREST)
        shown = [self.class_names.index(row["name"]) for row in record["classes"]]
        return label_maps.add_class_legend(drawn, shown, self.class_names, boxes.font_size(drawn))

    def label_map(self, record: dict[str, Any]) -> Image.Image:
        return Image.fromarray(_decode(record).astype(np.uint8))

    def _encode(self, labels: np.ndarray) -> dict[str, Any]:
        flat = labels.ravel()
        shares = np.bincount(flat, minlength=len(self.class_names)) / flat.size
        order = [c for c in np.argsort(-shares, kind="stable").tolist() if shares[c] > 0]
        starts = np.flatnonzero(np.diff(flat, prepend=-1))
        lengths = np.diff(starts, append=len(flat))
        runs = [[int(flat[start]), int(length)] for start, length in zip(starts, lengths)]
        classes = [dict(name=self.class_names[c], share=float(shares[c])) for c in order]
        return dict(classes=classes, map=dict(size=list(labels.shape), runs=runs))


def _decode(record: dict[str, Any]) -> np.ndarray:
    """Return the label map (H, W) of a record."""
    values, lengths = np.array(record["map"]["runs"]).T
    return np.repeat(values, lengths).reshape(record["map"]["size"])
