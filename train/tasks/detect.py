"""Object detection and instance segmentation: boxes, and masks where the detector has them."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ..metrics.coco import SURE, CocoMetric, encode, write_results
from ..metrics.confusion import as_csv
from ..models import detectors
from ..models.body import OnBody, load_whole
from ..models.build import create_features, probe, read_weights
from ..runtime.checkpoint import label_names, write_text
from ..runtime.distributed import world_size
from ..visual import boxes
from .task import Predictor, Task

SHOWN = 12  # pictures on a sheet


class Detect(Task):
    """A batch is (images, targets), two lists. See saccade.train.models.detectors for what a detector takes.

    An image is (3, H, W) float32, 0 … 1: in training at its final size, in evaluation as it is. A target has boxes
    (n, 4) float32 (left, top, right, bottom in pixels), labels (n,) int64 from 1, masks (n, H, W) uint8 and image_id.
    The config's model section is the backbone: a timm model's name and arguments, `out_indices` among them. A model of
    ours that can have `out_norms` gets them, but for Agent-PVT's, which are published without.
    """

    def __init__(
        self,
        data: Any,
        /,
        detector: Literal["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"] = "mask_rcnn",
        channels: int = 256,
        hidden: int = 1024,
        rois: int = 512,
        proposals: int = 1000,
        anchor_scale: float | None = None,
        test_size: Sequence[int] = (800, 1333),
        score_thresh: float = 0.05,
        detections: int = 100,
        norm_eval: bool = False,
        no_decay: Sequence[str] = (),
    ):
        self.data, self.class_names, self.detector = data, list(data.class_names), detector
        self.masks = "mask" in detector
        self.scores = (*(("mask_ap", "mask_ap50") if self.masks else ()), "box_ap", "box_ap50")
        self.settings = dict(channels=channels, hidden=hidden, rois=rois, proposals=proposals)
        self.settings |= dict(anchor_scale=anchor_scale, test_size=tuple(test_size), score_thresh=score_thresh)
        self.settings |= dict(detections=detections, norm_eval=norm_eval, no_decay=tuple(no_decay))

    def model(
        self, name: str, checkpoint: Any = None, new_head: bool = False, pretrained: bool = False, **kwargs: Any
    ) -> OnBody:
        """The detector on the timm model `name`, which gets kwargs.

        checkpoint: of a whole detector, or a classifier's for the backbone.
        """
        tensors = read_weights(checkpoint) if checkpoint is not None else {}
        whole = any(key.startswith(f"{OnBody.body_path}.") for key in tensors)
        levels = kwargs.pop("out_indices", None) or partial(detectors.levels, self.detector)
        weights = None if whole else checkpoint
        body = create_features(name, levels, weights, pretrained and not whole, norms=True, **kwargs)
        model = detectors.create(self.detector, body, len(self.class_names), **self.settings)
        if whole:
            load_whole(model, tensors, Path(checkpoint), new_head)
        return model

    def probe(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Show the detector a black picture; raises UserError in its own words if it can't take it."""
        probe(_Listed(model), inputs["input_size"])

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(the sum of the detector's losses, each of them)."""
        losses = model(*batch)
        return sum(losses.values()), {name.removeprefix("loss_"): loss.detach() for name, loss in losses.items()}

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], dict[str, Any] | None]:
        """COCO's numbers in percent; see saccade.train.metrics.coco, which says what the detail has."""
        metric = None
        for images, targets in batches:
            if metric is None:
                metric = self._metric(targets[0]["split"])
            metric.update([target["image_id"] for target in targets], model(images))
        if world_size() > 1:  # a process may have no batch
            splits: list = [None] * world_size()
            dist.all_gather_object(splits, metric and metric.split)
            metric = metric or self._metric(next(split for split in splits if split))
        metrics, detail = metric.result()
        return metrics, detail and detail | dict(split=metric.split)

    def _metric(self, split: str) -> CocoMetric:
        metric = CocoMetric(self.data.truth(split), self.class_names, self.masks)
        metric.split = split
        return metric

    def sample(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        """Draw a training batch, as the detector gets it, into folder/pictures/batch.png."""
        tiles = []
        for image, target in list(zip(*batch))[:16]:
            labels = [int(label) - 1 for label in target["labels"]]
            masks = list(target["masks"].cpu().numpy()) if "masks" in target and labels else None
            names, colours = [self.class_names[k] for k in labels], [boxes.class_color(k) for k in labels]
            drawn = boxes.draw_boxes(to_pil_image(image.cpu()), target["boxes"].tolist(), names, colours, masks)
            tiles.append((drawn, f"{image.shape[2]}x{image.shape[1]}, {len(labels)} objects"))
        return boxes.save_tiles(tiles, folder / "pictures" / "batch.png")

    def report(self, folder: Path, detail: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Write classes.csv, every class's numbers, and detections.json, in COCO's submission format."""
        write_text(folder / "classes.csv", as_csv(detail["classes"]))
        write_results(folder / "detections.json", detail["results"])
        kind = "mask_ap" if self.masks else "box_ap"
        known = [row for row in detail["classes"] if row.get(kind) is not None]
        worst = sorted(known, key=lambda row: row[kind])[:5]
        said = [f"  {row['class']}: {kind} {row[kind]:.1f} ({row['objects']} objects)" for row in worst]
        wrong = {name: sum(len(row[name]) for row in detail["pictures"]) for name in ("missed", "false", "confused")}
        return dict(mistakes=wrong), ["the hardest classes:", *said] if len(known) > 5 else said

    def pictures(
        self, folder: Path, model: nn.Module | None = None, images: Any = None, detail: Any = None
    ) -> list[Path]:
        """After training: curves. After testing: detections on pictures, the worst ones, precision against recall."""
        if model is None:
            return super().pictures(folder)
        place, drawn = folder / "pictures", []
        numbers = {category["id"]: category["name"] for category in self.data.truth(detail["split"])["categories"]}
        found: dict[int, list] = {}
        for result in detail["results"]:
            if result["score"] >= SURE:
                found.setdefault(result["image_id"], []).append(result)
        ids = sorted(row["image_id"] for row in detail["pictures"])
        tiles = []
        for image_id in ids[:: max(1, len(ids) // SHOWN)][:SHOWN]:
            record = [_object(numbers[r["category_id"]], r) for r in found.get(image_id, ())]
            picture = images.picture(image_id)
            tiles.append((draw(picture, record, self.class_names), f"image {image_id}: {len(record)} found"))
        if tiles:
            drawn.append(boxes.save_tiles(tiles, place / "detections.png"))
        rows = [row for row in detail["pictures"] if row["missed"] or row["false"] or row["confused"]][:SHOWN]
        if rows:
            tiles = [boxes.draw_mistake(images.picture(row["image_id"]), row, numbers) for row in rows]
            drawn.append(boxes.save_tiles(tiles, place / "worst.png"))
        if detail["precision"]:
            file = place / "precision_recall.png"
            drawn.append(boxes.plot_precision_recall(detail["precision"], self.class_names, file))
        return drawn

    @classmethod
    def predictor(
        cls, folder: Path, settings: dict[str, Any], place: torch.device, threshold: float = 0.5
    ) -> "DetectionPredictor":
        """threshold: the least score of what is shown."""
        return DetectionPredictor(cls, folder, settings, place, threshold)


class _Listed(nn.Module):
    """A detector that takes images (B, 3, H, W)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        return self.model(list(images))


class DetectionPredictor(Predictor):
    """The objects on a picture: {"objects": [{"name", "score", "box": [left, top, right, bottom], "mask"}, …]}.

    A mask is COCO's run-length encoding: {"size": [H, W], "counts": text}.
    """

    def __init__(self, task: type[Detect], folder: Path, settings: dict, place: torch.device, threshold: float):
        self.names = label_names(folder)
        arguments = {key: value for key, value in settings["task"].items() if key != "type"}
        job = task(SimpleNamespace(class_names=self.names), **arguments)
        self.model = job.restore(folder, settings["model"]).to(place).eval()
        self.place, self.threshold = place, threshold

    def batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        pixels = [pil_to_tensor(image.convert("RGB")).to(self.place).float() / 255 for image in images]
        records = []
        for output in self.model(pixels):
            kept = output["scores"] >= self.threshold
            columns = {key: values[kept].cpu() for key, values in output.items()}
            objects = []
            for i, label in enumerate(columns["labels"].tolist()):
                found = dict(name=self.names[label - 1], score=columns["scores"][i].item())
                found["box"] = columns["boxes"][i].tolist()
                if "masks" in columns:
                    found["mask"] = encode(columns["masks"][i, 0])
                objects.append(found)
            records.append(dict(objects=objects))
        return records

    def say(self, record: dict[str, Any]) -> str:
        return ", ".join(f"{o['name']} {100 * o['score']:.0f} %" for o in record["objects"]) or "nothing"

    def draw(self, image: Image.Image, record: dict[str, Any]) -> Image.Image:
        return draw(image, record["objects"], self.names)


def _object(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """A detection in COCO's submission format as the predictor has it."""
    x, y, width, height = result["bbox"]
    found = dict(name=name, score=result["score"], box=[x, y, x + width, y + height])
    return found | (dict(mask=result["segmentation"]) if "segmentation" in result else {})


def draw(image: Image.Image, objects: Sequence[dict[str, Any]], names: Sequence[str]) -> Image.Image:
    """A picture with the objects that the predictor found on it."""
    from pycocotools import mask as coder

    masks = [coder.decode(o["mask"]) for o in objects if "mask" in o]
    colours = [boxes.class_color(names.index(o["name"])) for o in objects]
    captions = [f"{o['name']} {o['score']:.2f}" for o in objects]
    return boxes.draw_boxes(image, [o["box"] for o in objects], captions, colours, masks or None)
