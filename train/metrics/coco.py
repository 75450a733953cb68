"""COCO's average precision and recall of boxes and masks, over any number of processes.

The numbers equal those of pycocotools exactly. If faster-coco-eval is installed, it computes them several times as
fast. Metrics are in percent. Also computed: the metrics of every class, precision over recall, and the mistakes on each
image.
"""

import importlib.util
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from ..data.coco_json import encode_mask, has_mask
from ..runtime.checkpoint import write_text
from ..runtime.distributed import rank, sync_errors, world_size
from ..runtime.errors import UserError

KINDS = dict(box="bbox", mask="segm")
IOUS, RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
# name -> (precision or recall, IoU, sizes, detections of an image and class); None: the mean over all IoUs
SUMMARY = dict(
    ap=("precision", None, 0, 2),
    ap50=("precision", 0, 0, 2),
    ap75=("precision", 5, 0, 2),
    ap_small=("precision", None, 1, 2),
    ap_medium=("precision", None, 2, 2),
    ap_large=("precision", None, 3, 2),
    ar1=("recall", None, 0, 0),
    ar10=("recall", None, 0, 1),
    ar100=("recall", None, 0, 2),
    ar_small=("recall", None, 1, 2),
    ar_medium=("recall", None, 2, 2),
    ar_large=("recall", None, 3, 2),
)
SURE, OVERLAP = 0.5, 0.5  # for `mistakes`: least score of a detection, and least IoU with an object to match it


class CocoMetric:
    """Collect the detections of a split. Every process adds its own; `result` gathers them.

    truth: the content of the split's JSON file (saccade.train.data.coco.Coco.truth). classes: names in the order of the
    labels 1 … K, which is that of the category ids. masks: whether to evaluate masks too. faster: whether to use
    faster-coco-eval; None: if it is installed. Raises UserError if masks are missing in the JSON file.
    """

    def __init__(self, truth: dict[str, Any], classes: Sequence[str], masks: bool, faster: bool | None = None):
        self.truth, self.classes, self.masks = truth, list(classes), masks
        self.faster = importlib.util.find_spec("faster_coco_eval") is not None if faster is None else faster
        self.categories = sorted(category["id"] for category in truth["categories"])
        if len(self.categories) != len(self.classes):
            raise ValueError(f"classes must be the json's {len(self.categories)} categories, got {len(self.classes)}")
        without = [a["id"] for a in truth.get("annotations", ()) if masks and not has_mask(a.get("segmentation"))]
        if without:
            raise UserError(
                f"masks are evaluated, but {len(without)} annotations have none, for example the one with id "
                f"{without[0]}: add their segmentation, or train a detector of boxes"
            )
        self.seen: dict[int, list[dict[str, Any]]] = {}  # image id -> detections, in COCO's submission format

    def update(self, image_ids: Sequence[int] | Tensor, outputs: Sequence[dict[str, Tensor]]) -> None:
        """Add the detections on some images.

        outputs: per image boxes (n, 4) as x1 y1 x2 y2 in pixels of the original image, scores (n,), labels (n,) from 1
        and, with masks, masks (n, 1, H, W) or (n, H, W) of probabilities; n may be 0. Masks are encoded immediately,
        since they need a thousand times the memory.
        Raises UserError if boxes or scores are not finite.
        """
        for image_id, output in zip(map(int, image_ids), outputs):
            boxes, scores = (output[name].detach().double().cpu() for name in ("boxes", "scores"))
            if not (boxes.isfinite().all() and scores.isfinite().all()):
                raise UserError(
                    f"the model's boxes or scores on image {image_id} are not finite numbers: "
                    "evaluate with precision=fp32 or train it again"
                )
            boxes[:, 2:] -= boxes[:, :2]
            rows = zip(output["labels"].tolist(), boxes.tolist(), scores.tolist())
            detections = [
                dict(image_id=image_id, category_id=self.categories[label - 1], bbox=box, score=score)
                for label, box, score in rows
            ]
            if self.masks:
                for entry, mask in zip(detections, output["masks"].flatten(0, -3).gt(0.5).cpu()):
                    entry["segmentation"] = encode(mask)
            self.seen[image_id] = detections

    def result(self) -> tuple[dict[str, float], dict[str, Any] | None]:
        """Return ({box_ap, box_ap50, …, mask_ap, …, images}, detail) over all processes, which must all call it.

        Averages are over the images that were added; NaN if there is nothing to average (for example no large object).
        detail, only in process 0 (None in others):
        results    the detections, in COCO's submission format (see write_results)
        classes    a row for each class: class, images, objects, box_ap, box_ap50, …; see as_csv
        precision  box and mask: (10 IoUs, 101 recalls, K), -1 where a class has no object: IOUS and RECALLS
        mistakes   those on each image, worst first: see the function `mistakes`
        Without annotations in the JSON file, there are only the results.
        """
        parts: list = [self.seen]
        if world_size() > 1:
            parts = [None] * world_size()
            dist.gather_object(self.seen, parts if rank() == 0 else None)
        metrics, detail = None, None
        with sync_errors():
            if rank() == 0:
                metrics, detail = self._evaluate({image: rows for part in parts for image, rows in part.items()})
        if world_size() > 1:
            shared = [metrics]
            dist.broadcast_object_list(shared)
            (metrics,) = shared
        return metrics, detail

    def _evaluate(self, seen: dict[int, list[dict[str, Any]]]) -> tuple[dict[str, float], dict[str, Any]]:
        images = sorted(seen)
        results = [entry for image in images for entry in seen[image]]
        metrics: dict[str, float] = {}
        detail: dict[str, Any] = dict(results=results, classes=[], precision={}, mistakes=[])
        mine = [a for a in self.truth.get("annotations", ()) if a["image_id"] in seen and not a["iscrowd"]]
        for name, number in zip(self.classes, self.categories):
            objects = [a["image_id"] for a in mine if a["category_id"] == number]
            detail["classes"].append({"class": name, "images": len(set(objects)), "objects": len(objects)})
        if "annotations" in self.truth:
            for kind in ("box", "mask") if self.masks else ("box",):
                evaluated = evaluate(self.truth, results, images, KINDS[kind], self.faster)
                metrics |= {f"{kind}_{name}": value for name, value in summary(evaluated).items()}
                detail["precision"][kind] = evaluated["precision"][..., 0, 2]
                for k, row in enumerate(detail["classes"]):
                    one = summary({name: evaluated[name][..., k : k + 1, :, :] for name in ("precision", "recall")})
                    row |= {f"{kind}_{name}": None if np.isnan(value) else value for name, value in one.items()}
            detail["mistakes"] = mistakes(self.truth, seen)
        return metrics | dict(images=len(images)), detail


def encode(mask: Tensor) -> dict[str, Any]:
    """Run-length encode the pixels above 0.5 of a mask (H, W) of probabilities or bool."""
    from pycocotools import mask as coder

    encoded = coder.encode(np.asfortranarray((mask > 0.5).cpu().numpy(), np.uint8))
    return dict(size=encoded["size"], counts=encoded["counts"].decode())


def evaluate(
    truth: dict[str, Any], results: list[dict[str, Any]], images: Sequence[int], kind: str, faster: bool
) -> dict[str, np.ndarray]:
    """Return precision (10 IoUs, 101 recalls, K, 4 sizes, 3 counts of detections) and recall (without the 101).

    kind: bbox or segm. Sizes are all, small, medium, large; counts are 1, 10, 100 per image.
    """
    if faster:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    truth, results, images = _renumber(truth, results, images, kind)
    with redirect_stdout(io.StringIO()):
        real, predicted = COCO(), COCO()
        real.dataset = truth
        real.createIndex()
        if results:
            predicted = real.loadRes(results)
        else:
            predicted.dataset = truth | dict(annotations=[])
            predicted.createIndex()
        judge = COCOeval(real, predicted, kind)
        judge.params.imgIds = images
        if faster:
            objects = _objects(truth, judge.params.areaRng)
            judge.params.recThrs = np.union1d(RECALLS, 1.5 / objects)
        judge.evaluate()
        judge.accumulate()
    precision, recall = (np.asarray(judge.eval[name]) for name in ("precision", "recall"))
    if faster:
        # pycocotools' precision is tp / (tp + fp + 2.2e-16), which matters if only the first detection is correct.
        places = np.searchsorted(judge.params.recThrs, 1.5 / objects)  # between the first object found and the second
        k, size = np.indices(places.shape)
        second = precision[:, places, k, size]
        precision = precision[:, np.searchsorted(judge.params.recThrs, RECALLS)]
        precision[(precision == 1) & (second < 1)[:, None]] = 1 / (1 + np.spacing(1.0))
    return dict(precision=precision, recall=recall)


def _renumber(
    truth: dict[str, Any], results: list[dict[str, Any]], images: Sequence[int], kind: str
) -> tuple[dict[str, Any], list[dict[str, Any]], list[int]]:
    """Return copies with ids 1, 2, … for images, categories and annotations, in the order of their ids.

    The evaluators treat an annotation with id 0 as missing and modify their inputs. Masks become run lengths, the only
    format that is passed on; results keep only boxes or masks, since a box would determine the size of a mask.
    """
    image_of = {old: new for new, old in enumerate(sorted(images), 1)}
    category_of = {old: new for new, old in enumerate(sorted(c["id"] for c in truth["categories"]), 1)}
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"] if image["id"] in image_of}

    def renumbered(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
        ids = dict(image_id=image_of[entry["image_id"]], category_id=category_of[entry["category_id"]])
        return ids | {key: entry[key] for key in keys}

    annotations = []
    for a in truth["annotations"]:
        if a["image_id"] in image_of:
            annotations.append(dict(id=len(annotations) + 1) | renumbered(a, "bbox", "area", "iscrowd"))
            if kind == "segm":
                annotations[-1]["segmentation"] = encode_mask(a["segmentation"], *sizes[a["image_id"]])
    own = dict(
        images=[dict(id=image_of[image], height=height, width=width) for image, (height, width) in sizes.items()],
        categories=[dict(id=category_of[c["id"]], name=c["name"]) for c in truth["categories"]],
        annotations=annotations,
    )
    key = "bbox" if kind == "bbox" else "segmentation"
    return own, [renumbered(r, "score", key) for r in results], sorted(image_of.values())


def _objects(truth: dict[str, Any], sizes: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the number of objects of each class and size, (K, 4); at least 1."""
    objects = [a for a in truth["annotations"] if not a["iscrowd"]]
    category, area = (np.array([a[name] for a in objects]) for name in ("category_id", "area"))
    classes = sorted(c["id"] for c in truth["categories"])
    counts = [[((category == k) & (area >= low) & (area <= high)).sum() for low, high in sizes] for k in classes]
    return np.maximum(counts, 1)


def summary(evaluated: dict[str, np.ndarray]) -> dict[str, float]:
    """Return COCO's twelve metrics in percent from the output of `evaluate`; NaN if there is nothing to average."""
    numbers = {}
    for name, (table, iou, size, most) in SUMMARY.items():
        values = evaluated[table][..., size, most]
        values = values if iou is None else values[iou]
        values = values[values > -1]
        numbers[name] = 100 * float(np.mean(values)) if len(values) else float("nan")
    return numbers


def mistakes(truth: dict[str, Any], seen: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the mistakes on each image, by boxes, for detections with a score of SURE or more; most mistakes first.

    In order of their scores, detections are matched to the unmatched object of their class with the largest overlap, at
    least OVERLAP. A remaining detection that overlaps an unmatched object of another class is confused; the others are
    false, except on crowds of their class. Unmatched objects are missed.
    Returns per image: image_id, file_name, found (number of correct detections), and lists: missed (annotations), false
    (results), confused (pairs of result and annotation).
    """
    from pycocotools import mask as coder

    of_image: dict[int, list[dict]] = {image: [] for image in seen}
    for annotation in truth["annotations"]:
        if annotation["image_id"] in of_image:
            of_image[annotation["image_id"]].append(annotation)
    rows = []
    for image in (image for image in truth["images"] if image["id"] in seen):
        real = of_image[image["id"]]
        claims = sorted((r for r in seen[image["id"]] if r["score"] >= SURE), key=lambda r: -r["score"])
        crowd = [bool(a["iscrowd"]) for a in real]
        overlap = np.zeros((len(claims), len(real)))
        if claims and real:
            overlap = coder.iou(_boxes(claims), _boxes(real), [int(c) for c in crowd])
        same = np.array([[c["category_id"] == a["category_id"] for a in real] for c in claims], bool)
        same, free = same.reshape(overlap.shape), ~np.array(crowd, bool)
        right, confused, false = 0, [], []
        left = []
        for i in range(len(claims)):
            taken = _best(overlap[i], free & same[i])
            if taken is None:
                left.append(i)
            else:
                free[taken], right = False, right + 1
        for i in left:
            taken = _best(overlap[i], free)
            if taken is not None:
                free[taken] = False
                confused.append((claims[i], real[taken]))
            elif _best(overlap[i], np.array(crowd, bool) & same[i]) is None:
                false.append(claims[i])
        missed = [a for a, there in zip(real, free) if there]
        row = dict(image_id=image["id"], file_name=image["file_name"], found=right)
        rows.append(row | dict(missed=missed, false=false, confused=confused))
    return sorted(rows, key=lambda row: -sum(len(row[name]) for name in ("missed", "false", "confused")))


def _boxes(entries: list[dict[str, Any]]) -> np.ndarray:
    return np.array([entry["bbox"] for entry in entries], np.float64)


def _best(overlap: np.ndarray, allowed: np.ndarray) -> int | None:
    """Return the allowed object with the largest overlap, if that is OVERLAP or more."""
    if not allowed.any():
        return None
    place = int(np.where(allowed, overlap, -1).argmax())
    return place if overlap[place] >= OVERLAP else None


def write_results(file: Path, results: list[dict[str, Any]]) -> None:
    """Write the detections in COCO's submission format: [{"image_id", "category_id", "bbox", "score", …}, …]."""
    write_text(file, json.dumps(results) + "\n")
