"""Object detection and instance segmentation: boxes, and masks where the detector has them."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ..data.bad_images import BadImage
from ..data.images import to_rgb
from ..metrics.coco import SURE, CocoMetric, encode, write_results
from ..metrics.confusion import as_csv
from ..models import detectors, legacy, published
from ..models.body import OnBody
from ..models.build import create_features, probe, save_whole
from ..models.class_names import find_labels, fit_head
from ..models.weights import read_weights
from ..runtime.checkpoint import label_names, write_text
from ..runtime.distributed import all_gather_object, world_size
from ..runtime.errors import UserError
from ..visual import boxes
from .task import Predictor, Task, format_counts

MAX_TILES = 12  # images on a contact sheet


class Detect(Task):
    """A batch is (images, targets), two lists. See saccade.train.models.detectors for what a detector takes.

    An image is (3, H, W) float32, 0 … 1: in training at its final size, in evaluation as it is. A target has boxes
    (n, 4) float32 (left, top, right, bottom in pixels), labels (n,) int64 from 1, masks (n, H, W) uint8 and image_id.
    The config's model section is the backbone: a timm model's name and arguments, `out_indices` among them. A model of
    ours that can have `out_norms` gets them, but for Agent-PVT's, which are published without. settings: arguments of
    saccade.train.models.detectors.create.
    """

    passes_to = (detectors.create,)
    documented_in = (detectors.Detector,)

    def __init__(
        self,
        data: Any,
        /,
        detector: Literal["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"] = "mask_rcnn",
        **settings: Any,
    ):
        self.data, self.class_names, self.detector = data, list(data.class_names), detector
        self.masks = "mask" in detector
        if self.masks and not getattr(data, "masks", True):
            raise UserError(f"task.detector={detector} learns masks: set data.masks=True, or take a detector of boxes")
        data.masks = self.masks  # boxes without a mask are for detectors of boxes
        self.scores = (*(("mask_ap", "mask_ap50") if self.masks else ()), "box_ap", "box_ap50")
        self.settings = settings

    def model(
        self, name: str, checkpoint: Any = None, new_head: bool = False, pretrained: bool = False, **kwargs: Any
    ) -> OnBody:
        """Build the detector on the timm model `name`, which gets kwargs.

        checkpoint: a detector's, or a classifier's for the backbone.
        """
        levels = kwargs.pop("out_indices", None) or partial(detectors.levels, self.detector)
        checkpoint = None if checkpoint is None else read_weights(checkpoint)
        tensors, settings = {} if checkpoint is None else checkpoint.tensors, self.settings
        if legacy.is_legacy(tensors):
            tensors, needed = legacy.convert(tensors)
            settings = settings | needed
        if not published.is_dense(tensors):
            body = create_features(name, levels, checkpoint, pretrained, norms=True, **kwargs)
            return detectors.create(self.detector, body, len(self.class_names), **self.settings)
        first_norm = self.detector != "retinanet"
        body = published.load_backbone(name, levels, tensors, checkpoint, first_norm, **kwargs)
        model = detectors.create(self.detector, body, len(self.class_names), **settings)
        if new_head and not self.match_head(checkpoint, reorders=False)[0]:
            own = model.state_dict()
            tensors = fit_head(tensors, list(filter(published.SIZED_BY_CLASS.search, own)), own, None)
        published.load_heads(model, tensors, checkpoint, new_head)
        return model

    def probe(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run the detector on a black image. Raises UserError with its message if it fails."""
        probe(_Listed(model), inputs["input_size"])

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (the sum of the detector's losses, each of them)."""
        losses = model(*batch)
        return sum(losses.values()), {name.removeprefix("loss_"): loss.detach() for name, loss in losses.items()}

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Return COCO's metrics in percent; see saccade.train.metrics.coco, which says what the detail has."""
        metric = None
        for images, targets in batches:
            if metric is None:
                metric = self._metric(targets[0]["split"])
            metric.update([target["image_id"] for target in targets], model(images))
        if world_size() > 1:  # a process may have no batch
            splits = all_gather_object(metric and metric.split)
            metric = metric or self._metric(next(split for split in splits if split))
        metrics, detail = metric.result()
        return metrics, detail and detail | dict(split=metric.split)

    def _metric(self, split: str) -> CocoMetric:
        metric = CocoMetric(self.data.truth(split), self.class_names, self.masks)
        metric.split = split
        return metric

    def select_classes(self, model: nn.Module, indices: Sequence[int]) -> None:
        """Have the model predict its classes `indices` only, numbered in that order; other detections are dropped."""

        def renumber(module: nn.Module, images: Any, outputs: Any) -> Any:
            if module.training:
                return outputs
            selected = []
            for output in outputs:
                positions = find_labels(output["labels"] - 1, indices)  # labels count from 1
                kept = positions >= 0
                selected.append({k: v[kept] for k, v in output.items()} | dict(labels=positions[kept] + 1))
            return selected

        model.register_forward_hook(renumber)

    def draw_batch(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        """Draw a training batch, as the detector gets it, into folder/pictures/batch.png."""
        tiles = []
        for image, target in list(zip(*batch))[:16]:
            labels = [int(label) - 1 for label in target["labels"]]
            masks = list(target["masks"].cpu().numpy()) if "masks" in target and labels else None
            names, colors = [self.class_names[k] for k in labels], [boxes.class_color(k) for k in labels]
            drawn = boxes.draw_boxes(to_pil_image(image.cpu()), target["boxes"].tolist(), names, colors, masks)
            tiles.append((drawn, f"{image.shape[2]}x{image.shape[1]}, {len(labels)} objects"))
        return boxes.save_tiles(tiles, folder / "pictures" / "batch.png")

    def export(self, model: nn.Module, folder: Path, inputs: dict[str, Any], class_names: list[str]) -> None:
        """Write model.safetensors and config.json, which names the classes and their ids in the data's json."""
        save_whole(model, folder, inputs, class_names, category_ids=list(self.data.categories))

    def report(self, folder: Path, detail: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Write classes.csv, every class's numbers, and detections.json, in COCO's submission format."""
        write_text(folder / "classes.csv", as_csv(detail["classes"]))
        write_results(folder / "detections.json", detail["results"])
        kind = "mask_ap" if self.masks else "box_ap"
        known = [row for row in detail["classes"] if row.get(kind) is not None]
        worst = sorted(known, key=lambda row: row[kind])[:5]
        lines = [f"  {row['class']}: {kind} {row[kind]:.1f} ({row['objects']} objects)" for row in worst]
        mistakes = {name: sum(len(row[name]) for row in detail["mistakes"]) for name in ("missed", "false", "confused")}
        return dict(mistakes=mistakes), ["the worst classes:", *lines] if len(known) > 5 else lines

    def draw_results(self, folder: Path, model: nn.Module, dataset: Any, detail: Any) -> list[Path]:
        """Draw detections on some images, the images with most mistakes, and precision against recall."""
        figures, files = folder / "pictures", []
        names = {category["id"]: category["name"] for category in self.data.truth(detail["split"])["categories"]}
        detections: dict[int, list] = {}
        for result in detail["results"]:
            if result["score"] >= SURE:
                detections.setdefault(result["image_id"], []).append(result)
        ids = sorted(row["image_id"] for row in detail["mistakes"])
        tiles = []
        for image_id in ids[:: max(1, len(ids) // MAX_TILES)][:MAX_TILES]:
            objects = [_to_object(names[r["category_id"]], r) for r in detections.get(image_id, ())]
            with suppress(BadImage):
                drawn = boxes.draw_detections(dataset.load_image(image_id), objects, self.class_names, legend=False)
                tiles.append((drawn, f"image {image_id}: {len(objects)} detections"))
        if tiles:
            files.append(boxes.save_tiles(tiles, figures / "detections.png"))
        rows = [row for row in detail["mistakes"] if row["missed"] or row["false"] or row["confused"]]
        tiles = []
        for row in rows[:MAX_TILES]:
            with suppress(BadImage):
                tiles.append(boxes.draw_mistakes(dataset.load_image(row["image_id"]), row, names))
        if tiles:
            files.append(boxes.save_tiles(tiles, figures / "worst.png"))
        if detail["precision"]:
            file = figures / "precision_recall.png"
            files.append(boxes.plot_precision_recall(detail["precision"], self.class_names, file))
        return files

    @classmethod
    def predictor(
        cls, folder: Path, settings: dict[str, Any], device: torch.device, threshold: float = 0.5
    ) -> "DetectionPredictor":
        """threshold: the lowest score, from 0 to 1, of the objects that are predicted."""
        return DetectionPredictor(cls, folder, settings, device, threshold)


class _Listed(nn.Module):
    """A detector that takes images (B, 3, H, W)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        return self.model(list(images))


class DetectionPredictor(Predictor):
    """Predicts the objects on an image: {"objects": [{"name", "score", "box": [left, top, right, bottom], "mask"}, …]}.

    A mask is COCO's run-length encoding: {"size": [H, W], "counts": text}.
    """

    def __init__(self, task: type[Detect], folder: Path, settings: dict, device: torch.device, threshold: float):
        if not 0 <= threshold <= 1:
            percent = f" (did you mean {threshold / 100:g}?)" if 1 < threshold <= 100 else ""
            raise UserError(f"--threshold must be a score from 0 to 1, got {threshold:g}{percent}")
        self.class_names = label_names(folder)
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.category_ids = content.get("category_ids", range(1, len(self.class_names) + 1))
        arguments = {key: value for key, value in settings["task"].items() if key != "type"}
        restored = task(SimpleNamespace(class_names=self.class_names), **arguments)
        self.model = restored.restore(folder, settings["model"]).to(device).eval()
        self.device, self.threshold = device, threshold

    def predict(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        tensors = [pil_to_tensor(to_rgb(image)).to(self.device).float() / 255 for image in images]
        records = []
        for output in self.model(tensors):
            kept = output["scores"] >= self.threshold
            columns = {key: values[kept].cpu() for key, values in output.items()}
            objects = []
            for i, label in enumerate(columns["labels"].tolist()):
                one = dict(name=self.class_names[label - 1], score=columns["scores"][i].item())
                one["box"] = columns["boxes"][i].tolist()
                if "masks" in columns:
                    one["mask"] = encode(columns["masks"][i, 0])
                objects.append(one)
            records.append(dict(objects=objects))
        return records

    def describe(self, record: dict[str, Any]) -> str:
        return ", ".join(f"{o['name']} {100 * o['score']:.0f} %" for o in record["objects"]) or "nothing"

    def summarize(self, records: Sequence[dict[str, Any]]) -> str:
        counts = Counter(o["name"] for record in records for o in record["objects"])
        empty = sum(not record["objects"] for record in records)
        return f"{counts.total()} objects: {format_counts(counts)}" + (f"; {empty} images without any" * (empty > 0))

    def draw(self, image: Image.Image, record: dict[str, Any], limit: int = 50) -> Image.Image:
        return boxes.draw_detections(image, record["objects"], self.class_names, limit)

    def to_coco(self, records: Sequence[tuple[Path, tuple[int, int], dict[str, Any]]]) -> dict[str, Any]:
        """Return a dict of COCO's images, categories and annotations, these with a score.

        An image's id is its file's number where all names are different numbers (000000000139.jpg), else its position.
        """
        numbers = [int(path.stem) if path.stem.isascii() and path.stem.isdecimal() else None for path, *_ in records]
        if None in numbers or len(set(numbers)) < len(numbers):
            numbers = range(1, len(records) + 1)
        ids = dict(zip(self.class_names, self.category_ids))
        images, annotations = [], []
        for number, (path, (width, height), record) in zip(numbers, records):
            images.append(dict(id=number, file_name=str(path), width=width, height=height))
            for one in record["objects"]:
                left, top, right, bottom = one["box"]
                annotation = dict(id=len(annotations) + 1, image_id=number, category_id=ids[one["name"]], iscrowd=0)
                annotation |= dict(bbox=[left, top, right - left, bottom - top], score=one["score"])
                annotation["area"] = (right - left) * (bottom - top)
                if "mask" in one:
                    annotation |= dict(segmentation=one["mask"], area=mask_area(one["mask"]))
                annotations.append(annotation)
        categories = [dict(id=number, name=name) for name, number in ids.items()]
        return dict(images=images, categories=categories, annotations=annotations)


def _to_object(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return a detection of COCO's results format as the predictor has it."""
    x, y, width, height = result["bbox"]
    one = dict(name=name, score=result["score"], box=[x, y, x + width, y + height])
    return one | (dict(mask=result["segmentation"]) if "segmentation" in result else {})


def mask_area(mask: dict[str, Any]) -> int:
    """Return the number of pixels of a run-length encoded mask."""
    from pycocotools import mask as coder

    return int(coder.area(mask))
