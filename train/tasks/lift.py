"""Detection in a bird's-eye view: from the images of several cameras to boxes around the ego."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...backbones.dfa3d import convert
from ...backbones.resnet_dcn import ResNetDCN
from ..metrics.nuscenes import NuScenesMetric
from ..models import published
from ..models.bev import BevDetector, from_published, make_head
from ..models.build import create
from ..models.class_names import find_labels, fit_head
from ..models.weights import Weights
from ..runtime.checkpoint import write_json, write_text
from ..runtime.config import Fraction, NonNegative
from ..runtime.errors import UserError
from .task import Predictor, Task


class Lift(Task):
    """Boxes from the bird's-eye view of a lifter, whose name and arguments are the model section.

    A sample is dict(frames, boxes (n, 9), labels (n,), index): frames, oldest first, are dicts of what a lifter takes
    (images, lidar2img, and as there are depth, motion, can_bus, cameras, scene_start), boxes those of the last one, as
    saccade.train.metrics.nuscenes has them.

    head: "centre" (CenterPoint's) or "decoder" (DETR's, as published); head_args: its arguments, see
    saccade.train.models.bev. depth_weight: of the depth network's loss, where samples have depth. known_depth: depth is
    given to the lifter, in testing too, and no network estimates it. min_score: of boxes that are drawn.
    """

    scores = ("NDS", "mAP", "mAP_2m")
    of_lifters = True

    def __init__(
        self,
        data: Any,
        /,
        head: Literal["centre", "decoder"] = "centre",
        head_args: dict[str, Any] | None = None,
        depth_weight: NonNegative = 0.5,
        known_depth: bool = False,
        min_score: Fraction = 0.3,
    ):
        self.data, self.class_names = data, list(data.class_names)
        self.head, self.head_args = head, head_args or {}
        self.depth_weight, self.known_depth, self.min_score = depth_weight, known_depth, min_score

    def model(
        self, name: str, checkpoint: Any = None, new_head: bool = False, pretrained: bool = False, **kwargs: Any
    ) -> nn.Module:
        """Build the detector.

        checkpoint: of this task, or a published detector's file. With new_head, layers of the classes' size may differ;
        and for the backbone resnet101_dcn the file may be of another detector with it (FCOS3D), as OpenMMLab writes
        them: the backbone is taken, and the neck if it fits.
        """
        lifter = create(name, 0, pretrained=pretrained, **kwargs)
        if not hasattr(lifter, "lift"):
            raise UserError(f"model.name={name} is no lifter: take dfa3d_bev_s or dfa3d_bev_b")
        if self.known_depth and lifter.depth is not None:
            raise UserError("task.known_depth=True needs model.depth_network=False: depth is given, none is estimated")
        if lifter.lift_depth and lifter.depth is None and not self.known_depth:
            raise UserError("model.depth_network=False needs task.known_depth=True: depth must come from somewhere")
        head = make_head(self.head, lifter, len(self.class_names), **self.head_args)
        net = BevDetector(lifter, head, self.known_depth, self.depth_weight)
        if checkpoint is not None:
            self._load(net, published.read_published(checkpoint), new_head)
        net.pretrained_cfg, net.num_classes = lifter.pretrained_cfg, len(self.class_names)
        return net

    def _load(self, net: BevDetector, weights: Weights, new_head: bool) -> None:
        """Load the weights of a file; see `model`."""
        file, tensors = weights.file, weights.tensors
        if published.is_lifter(tensors):
            is_same = isinstance(net.lifter.backbone, ResNetDCN)
            if not is_same or self.head != "decoder":
                needed = "model.backbone=resnet101_dcn" if not is_same else "task.head=decoder"
                raise UserError(f"checkpoint {file} is of a published detector in a bird's-eye view: it needs {needed}")
            tensors = from_published(tensors, net)
        elif not any(key.startswith("lifter.") for key in tensors):
            if not (new_head and isinstance(net.lifter.backbone, ResNetDCN)):
                kind = published.describe(tensors)
                raise UserError(f"checkpoint {file} is of {kind}, not of a whole detector in a bird's-eye view")
            taken = load_start(net.lifter, tensors, file)
            self.messages += (f"{file} is of {published.describe(tensors)}: {taken} taken, all else starts anew",)
            return
        if new_head and not self.match_head(weights, reorders=False)[0]:
            own = net.state_dict()
            tensors = fit_head(tensors, list(filter(published.SIZED_BY_CLASS.search, own)), own, None)
        published.load_heads(net, tensors, file, new_head)

    def probe(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run the model on one camera's black image. Raises UserError with its message if it fails."""
        device, training = next(model.parameters()).device, model.training
        C, H, W = inputs["input_size"]
        frame = dict(
            images=torch.zeros(1, 1, C, H, W, device=device), lidar2img=torch.eye(4, device=device)[None, None]
        )
        frame["depth"] = torch.zeros(1, 1, H, W, device=device)
        try:
            with torch.no_grad():
                model.eval()([frame])
        except (ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"the model can't take images of {H}x{W}: {error}; change data.img_size") from error
        model.train(training)

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        outputs, codes = model(batch["frames"])
        inner = getattr(model, "module", model)
        losses = inner.head.loss(outputs, batch["boxes"], batch["labels"])
        depth = batch["frames"][-1].get("depth")
        if codes is not None and depth is not None and self.depth_weight:
            losses["depth"] = inner.depth_loss(codes, depth)
        return sum(losses.values()), {name: value.detach() for name, value in losses.items() if "_" not in name}

    def select_classes(self, model: nn.Module, indices: Sequence[int]) -> None:
        """Have the head predict boxes of its classes `indices` only, numbered in that order."""
        decode = model.head.boxes

        def renumber(outputs: Any) -> list[tuple[Tensor, ...]]:
            selected = []
            for boxes, scores, labels in decode(outputs):
                positions = find_labels(labels, indices)
                selected.append((boxes[positions >= 0], scores[positions >= 0], positions[positions >= 0]))
            return selected

        model.head.boxes = renumber

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], dict[str, Any]]:
        """Return nuScenes' metrics in percent; the metrics of each class, and this process's detections.

        Batches that have "streams" are of one sample each, in the order of time: the view of one is the next one's
        previous view, until a frame whose scene_start is true.
        """
        metric = NuScenesMetric(self.class_names)
        detections: dict[int, tuple[Tensor, ...]] = {}
        memory, last = None, None
        for batch in batches:
            if last is not None and int(batch["index"][0]) != last + 1:  # the frame before could not be read
                memory = None
            if batch.get("streams"):
                outputs, _, memory = model(batch["frames"], memory, return_view=True)
                last = int(batch["index"][-1])
            else:
                outputs, _ = model(batch["frames"])
            for i, predicted in enumerate(model.head.boxes(outputs)):
                index = int(batch["index"][i])
                attributes = batch["attributes"][i] if "attributes" in batch else None
                metric.update(index, predicted, batch["boxes"][i], batch["labels"][i], attributes)
                detections[index] = tuple(t.cpu() for t in predicted)
        metrics, classes = metric.result()
        return metrics, dict(classes=classes, detections=detections)

    def draw_batch(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        from ..visual import bev

        return bev.draw_batch(batch, self.class_names, inputs, folder / "pictures" / "batch.png")

    def report(self, folder: Path, detail: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Write classes.csv, and where the data know nuScenes' tokens, its submission file results_nusc.json."""
        rows = [
            ["class", *(f"AP_{d}m" for d in next(iter(detail["classes"].values()))["ap"]), "ATE", "ASE", "AOE", "AVE"]
        ]
        lines = []
        for name, one in detail["classes"].items():
            values = [*one["ap"].values(), *list(one["errors"].values())[:4]]
            rows.append([name, *(f"{value:.4g}" for value in values)])
            lines.append(f"  {name}: " + ", ".join(f"{v:.1f} % at {d} m" for d, v in one["ap"].items()))
        write_text(folder / "classes.csv", "".join(",".join(row) + "\n" for row in rows))
        if hasattr(self.data, "submission"):
            write_json(folder / "results_nusc.json", self.data.submission(detail["detections"]))
        return dict(
            classes={name: dict(ap=one["ap"], errors=one["errors"]) for name, one in detail["classes"].items()}
        ), lines

    def draw_results(self, folder: Path, model: nn.Module, dataset: Any, detail: Any) -> list[Path]:
        """Draw the detections of the first samples on the cameras' images and from above."""
        from ..visual import bev

        return [
            bev.draw_sample(
                dataset[i],
                detail["detections"][i],
                self.class_names,
                self.min_score,
                dataset.inputs,
                folder / "pictures" / f"sample_{i}.png",
            )
            for i in range(min(4, len(dataset)))
            if i in detail["detections"]
        ]

    @classmethod
    def predictor(cls, folder: Path, settings: dict[str, Any], device: torch.device, **options: Any) -> Predictor:
        raise UserError("a lifter needs all cameras of a sample and their matrices: see docs/bev.md")


def load_start(lifter: nn.Module, tensors: dict[str, Tensor], file: Path) -> str:
    """Load the backbone of another published detector into a lifter's, and its neck if it fits.

    tensors: under OpenMMLab's names, with or without `img_`. Returns what was taken. Raises UserError where the
    backbone does not fit.
    """
    kind = published.describe(tensors)
    tensors = {re.sub(r"^(backbone|neck)\.", r"img_\1.", key): value for key, value in tensors.items()}
    if not any(key.startswith("img_backbone.") for key in tensors):
        tensors = {f"img_backbone.{key}": value for key, value in tensors.items()}
    tensors = convert(tensors, lifter)
    own = {key: value.shape for key, value in lifter.state_dict().items() if not key.endswith("num_batches_tracked")}
    wanted = {key for key in own if key.startswith("backbone.")}
    unlike = [key for key in sorted(wanted) if key not in tensors or tensors[key].shape != own[key]]
    if unlike:
        has = tuple(tensors[unlike[0]].shape) if unlike[0] in tensors else "missing"
        raise UserError(
            f"checkpoint {file} is of {kind} whose backbone is not a ResNet-101 with deformable convolutions: "
            f"{unlike[0]} is {has} there and {tuple(own[unlike[0]])} here, and {len(unlike) - 1} more differ"
        )
    neck = {key for key in own if key.startswith(("fpn.", "extra."))}
    has_neck = all(key in tensors and tensors[key].shape == own[key] for key in neck)
    lifter.load_state_dict({key: tensors[key] for key in wanted | (neck if has_neck else set())}, strict=False)
    return "its backbone and its neck are" if has_neck else "its backbone is"
