"""Detection in a bird's-eye view: several cameras' images to boxes around the ego."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..metrics.nuscenes import NuScenesMetric
from ..models.bev import BevDetector, make_head
from ..models.body import load_whole
from ..models.build import create, read_weights
from ..models.class_names import class_sized, find_labels, fit_head
from ..runtime.checkpoint import write_json, write_text
from ..runtime.config import Fraction, NonNegative
from ..runtime.errors import UserError
from .task import Predictor, Task


class Lift(Task):
    """Boxes from the bird's-eye view of a lifter, whose name and arguments are the model section.

    A sample is dict(frames, boxes (n, 9), labels (n,), index): frames, oldest first, are dicts of what a lifter takes
    (images, lidar2img, and as there are depth, motion, can_bus, cameras), boxes those of the last one, as
    saccade.train.metrics.nuscenes has them.

    head: "centre" (CenterPoint's) or "decoder" (DETR's, as published); head_args: its arguments, see
    saccade.train.models.bev. depth_weight: of the depth network's loss, where samples have depth. known_depth: depth is
    given to the lifter, in testing too, and no network estimates it. min_score: of boxes that are drawn.
    """

    scores = ("NDS", "mAP", "mAP_2m")

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
        """Build the detector. checkpoint: of this task; with new_head, layers of the classes' size may differ."""
        lifter = create(name, 0, pretrained=pretrained, **kwargs)
        if not hasattr(lifter, "lift"):
            raise UserError(f"model.name={name} is no lifter: take dfa3d_bev_s or dfa3d_bev_b")
        if self.known_depth and lifter.depth is not None:
            raise UserError("task.known_depth=True needs model.depth_network=False: depth is given, none is estimated")
        if lifter.lift_depth and lifter.depth is None and not self.known_depth:
            raise UserError("model.depth_network=False needs task.known_depth=True: depth must come from somewhere")
        head = make_head(self.head, lifter, len(self.class_names), **self.head_args)
        net = BevDetector(lifter, head, self.known_depth)
        if checkpoint is not None:
            file = Path(checkpoint)
            tensors = read_weights(file)
            if new_head and not self.match_head(file, reorders=False)[0]:
                other = BevDetector(lifter, make_head(self.head, lifter, len(self.class_names) + 1, **self.head_args))
                tensors = fit_head(tensors, class_sized(net, other), net.state_dict(), None)
            load_whole(net, tensors, file, new_head)
        net.pretrained_cfg, net.num_classes = lifter.pretrained_cfg, len(self.class_names)
        return net

    def probe(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Show the model one camera's black image; raises UserError in its own words if it can't take it."""
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
            losses["depth"] = self.depth_weight * depth_loss(codes, inner.lifter.depth_codes(depth))
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
        """Return nuScenes' metrics in percent; its numbers for each class, and this process's detections."""
        metric = NuScenesMetric(self.class_names)
        detections: dict[int, tuple[Tensor, ...]] = {}
        for batch in batches:
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


def depth_loss(codes: Tensor, target: Tensor) -> Tensor:
    """Return the binary cross-entropy of probabilities (B, N, codes, H, W): summed over the codes, averaged over the
    cells that have a target."""
    has = target.amax(2) > 0
    with torch.autocast(codes.device.type, enabled=False):
        loss = nn.functional.binary_cross_entropy(codes, target, reduction="none").sum(2)
    return (loss * has).sum() / has.sum().clamp(min=1)
