"""Semantic segmentation: a class for each pixel, by a backbone of the zoo with UPerNet or Semantic FPN on it."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..data.ade20k import IGNORED
from ..metrics.confusion import as_csv
from ..metrics.segmentation import Confusion, table
from ..models.body import load_whole
from ..models.build import create_features, read_weights
from ..models.fcn import resize
from ..models.segmenter import Inference, Segmenter
from ..runtime.checkpoint import label_names, write_text
from ..runtime.distributed import is_sharded
from ..runtime.errors import UserError
from ..visual import label_maps
from .task import Predictor, Task


class Segment(Task):
    """A class for each pixel; a batch is (images (B, 3, H, W) in [0, 1], labels (B, H, W)): see train.data.ade20k.

    head: upernet or semantic_fpn; channels: of it; drop_rate: of whole channels before the classifiers. auxiliary:
    weight of the loss of an FCN head on the last map but one; 0: no such head. class_weights: of each class's pixels in
    the loss, in the order of the class list; None: all weigh the same. no_decay: patterns of parameter names without
    weight decay, beside the backbone's own ("*norm*").
    multiple, scales, flip, crop, stride: of tests, whole pictures or windows: see train.models.segmenter.Inference.
    """

    scores = ("miou", "macc", "aacc")

    def __init__(
        self,
        data: Any,
        /,
        head: Literal["upernet", "semantic_fpn"] = "upernet",
        channels: int | None = None,
        drop_rate: float = 0.1,
        auxiliary: float = 0.4,
        class_weights: Sequence[float] | None = None,
        no_decay: Sequence[str] = (),
        multiple: int = 1,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        crop: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
    ):
        self.data, self.class_names, self.weight = data, data.class_names, auxiliary
        if class_weights is not None and (len(class_weights) != len(self.class_names) or min(class_weights) < 0):
            raise UserError(
                f"task.class_weights={tuple(class_weights)} must be {len(self.class_names)} numbers of 0 or more, "
                "one a class"
            )
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.head = dict(head=head, drop_rate=drop_rate, auxiliary=auxiliary > 0, no_decay=no_decay)
        self.head |= {} if channels is None else dict(channels=channels)
        self.inference = Inference(data.scale, multiple, scales, flip, crop, stride)

    def model(
        self, name: str, checkpoint: Any = None, new_head: bool = False, pretrained: bool = False, **kwargs: Any
    ) -> Segmenter:
        """The backbone, a timm model and its arguments, with the heads, sized to the data.

        checkpoint: of a whole segmenter; or, with new_head, of a classifier, for the backbone.
        """
        tensors = None if checkpoint is None else _whole(Path(checkpoint))
        file = None if tensors is not None else checkpoint
        if file is not None and not new_head:
            raise UserError(f"checkpoint {file} has no segmentation head: give that of a segmenter")
        body = create_features(name, checkpoint=file, pretrained=pretrained, **kwargs)
        inputs = self.data.inputs(body.pretrained_cfg)
        net = Segmenter(
            body, len(self.class_names), mean=inputs["mean"], std=inputs["std"], inference=self.inference, **self.head
        )
        if tensors is not None:
            load_whole(net, tensors, Path(checkpoint), new_head)
        return net

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the logits enlarged to the labels' size, by class_weights, averaged over all pixels.

        Ignored pixels count as zeros, as in mmsegmentation: so processes with different numbers of them weigh alike.
        """
        if is_sharded(model):
            raise UserError("strategy=fsdp is not for segmentation, whose tests run the model unequally often: use ddp")
        images, labels = batch
        logits, auxiliary = model(images)
        logits = resize(logits.float(), labels.shape[1:])
        loss = self._cross_entropy(logits, labels)
        kept = labels != IGNORED
        right = (logits.detach().argmax(1) == labels)[kept].float().sum()
        said = dict(acc=100 * right / kept.sum().clamp_min(1))
        if auxiliary is not None:
            beside = self._cross_entropy(resize(auxiliary.float(), labels.shape[1:]), labels)
            said |= dict(head=loss.detach(), auxiliary=beside.detach())
            loss = loss + self.weight * beside
        return loss, said

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = None if self.class_weights is None else self.class_weights.to(logits.device)
        return cross_entropy(logits, labels, weights, ignore_index=IGNORED, reduction="sum") / labels.numel()

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], dict[str, Any]]:
        """miou, macc and aacc (percent) at the pictures' own sizes; confusion counts, the worst pictures."""
        counts = Confusion(len(self.class_names), next(model.parameters()).device, IGNORED)
        for pictures, labels, indices in batches:
            for picture, true, index in zip(pictures, labels, indices):  # one by one: they have sizes of their own
                counts.update(true, model([picture])[0], index)
        return counts.result()

    def sample(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        """The augmented pictures, and under their labels' colours."""
        images, labels = (part[:12].cpu() for part in batch)
        pictures = (255 * images.clamp(0, 1)).byte().permute(0, 2, 3, 1).numpy()
        rows = [[(picture, None), (picture, true)] for picture, true in zip(pictures, labels.numpy())]
        file = folder / "pictures" / "batch.png"
        return label_maps.save_contact_sheet(rows, ("picture", "labels"), self.class_names, file, columns=3)

    def report(self, folder: Path, detail: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Write folder/classes.csv, the IoU of every class; the worst classes for people."""
        rows = table(detail["confusion"], self.class_names)
        write_text(folder / "classes.csv", as_csv(rows))
        known = sorted((row for row in rows if row["iou"] is not None), key=lambda row: row["iou"])[:5]
        width = max(len("worst classes"), *(len(row["class"]) for row in rows))
        lines = [f"  {'worst classes':{width}}     IoU  most often taken for"]
        lines += [f"  {row['class']:{width}}  {row['iou']:6.2f}  {row['taken_for'] or '-'}" for row in known]
        return dict(classes={row["class"]: row["iou"] for row in rows}), lines

    def pictures(
        self, folder: Path, model: nn.Module | None = None, images: Any = None, detail: Any = None
    ) -> list[Path]:
        """After testing: pictures of the split, and the worst of them, beside labels and predictions."""
        if model is None:
            return super().pictures(folder)
        some = np.linspace(0, len(images) - 1, min(8, len(images))).round().astype(int).tolist()
        drawn = []
        for name, chosen in (("overlays", dict.fromkeys(some)), ("worst", detail["worst"][:8])):
            rows = [_row(model, *images[index][:2]) for index in chosen]
            if rows:
                heads = ("picture", "labels", "prediction")
                file = folder / "pictures" / f"{name}.png"
                drawn.append(label_maps.save_contact_sheet(rows, heads, self.class_names, file, columns=2))
        return drawn

    @classmethod
    def predictor(cls, folder: Path, settings: dict[str, Any], place: torch.device) -> "MapPredictor":
        return MapPredictor(cls, folder, settings, place)


def _whole(file: Path) -> dict[str, Tensor] | None:
    """The tensors of a file of a whole segmenter; None where it is something else, such as a classifier."""
    tensors = read_weights(file)
    return tensors if any(name.startswith("head.classifier.") for name in tensors) else None


@torch.no_grad()
def _row(model: nn.Module, picture: Tensor, labels: Tensor) -> list[tuple[np.ndarray, np.ndarray | None]]:
    found = model([picture])[0].cpu().numpy()
    image = picture.permute(1, 2, 0).numpy()
    return [(image, None), (image, labels.numpy()), (image, found)]


class MapPredictor(Predictor):
    """The class of each pixel: {"classes": [{"name": …, "share": of the picture's pixels}, …], "map": RLE}.

    map: {"size": [H, W], "runs": [[class number, pixels], …]}, runs of equal pixels, row by row.
    """

    def __init__(self, task: type[Segment], folder: Path, settings: dict[str, Any], place: torch.device):
        self.names = label_names(folder)
        inputs = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data_config"]
        data = SimpleNamespace(class_names=self.names, scale=inputs["scale"], inputs=lambda pretrained_cfg: inputs)
        job = task(data, **{k: v for k, v in settings["task"].items() if k != "type"})
        self.model = job.restore(folder, settings["model"]).to(place).eval()

    def batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        pictures = [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]
        return [self._record(labels.cpu().numpy()) for labels in self.model(pictures)]

    def say(self, record: dict[str, Any]) -> str:
        return ", ".join(f"{found['name']} {100 * found['share']:.1f} %" for found in record["classes"][:8])

    def draw(self, image: Image.Image, record: dict[str, Any]) -> Image.Image:
        values, lengths = np.array(record["map"]["runs"]).T
        labels = np.repeat(values, lengths).reshape(record["map"]["size"])
        drawn = label_maps.draw_outlined(np.array(image.convert("RGB")), labels, len(self.names))
        shown = [self.names.index(found["name"]) for found in record["classes"]]
        return label_maps.add_legend(Image.fromarray(drawn), shown, self.names)

    def _record(self, labels: np.ndarray) -> dict[str, Any]:
        shares = np.bincount(labels.ravel(), minlength=len(self.names)) / labels.size
        order = [c for c in np.argsort(-shares, kind="stable").tolist() if shares[c] > 0]
        flat = labels.ravel()
        starts = np.flatnonzero(np.diff(flat, prepend=-1))
        lengths = np.diff(starts, append=len(flat))
        runs = [[int(flat[start]), int(length)] for start, length in zip(starts, lengths)]
        classes = [dict(name=self.names[c], share=float(shares[c])) for c in order]
        return dict(classes=classes, map=dict(size=list(labels.shape), runs=runs))
