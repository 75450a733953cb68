"""Heads on regions: the box and mask heads of Faster, Mask (arXiv:1703.06870) and Cascade R-CNN (1712.00726).

As MMDetection computes them; parameters have the names of its files. Labels of targets count from 1, those of
`Detections` from 0, and the last of a box head's C + 1 logits is the background.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .body import keep_full_precision
from .boxes import (
    COUNT_EPS,
    Detections,
    assign,
    clip_boxes,
    decode,
    encode,
    giou_sum,
    sample,
    select_detections,
    smooth_l1_sum,
)
from .fpn import ConvUnit
from .roi_align import roi_align

STDS = (0.1, 0.1, 0.2, 0.2)  # of box deltas
# Cascade stages: the overlap that makes a positive, the weight of the losses, the deviations of the box deltas.
STAGES = ((0.5, 1.0, STDS), (0.6, 0.5, (0.05, 0.05, 0.1, 0.1)), (0.7, 0.25, (0.033, 0.033, 0.067, 0.067)))
GIOU_WEIGHT = 10.0


class Sampled(NamedTuple):
    """The regions of one image that a stage is trained on, positives first."""

    boxes: Tensor  # (n, 4)
    labels: Tensor  # (n,) int64 from 0; the number of classes for background
    target: Tensor  # (positives,) int64: the index of each positive's ground truth
    is_truth: Tensor  # (n,) bool: the region is itself a ground-truth box


def pool_regions(
    maps: Sequence[Tensor], boxes: Sequence[Tensor], strides: Sequence[int], side: int
) -> tuple[Tensor, Tensor]:
    """RoIAlign of each image's boxes (n, 4) from the map that fits their size.

    A box whose area is 112 x 112 pixels or more is taken from the second map, one level more for each doubling. Returns
    the regions (all boxes, C, side, side), those of one map after another, and the row of each box. A head's outputs
    are smaller than what it takes, so it is these that are brought into the boxes' order.
    """
    rois = torch.cat([torch.cat((torch.full_like(b[:, :1], i), b), 1) for i, b in enumerate(boxes)])
    area = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0)
    level = (area.sqrt() / 56 + 1e-6).log2().floor().clamp(0, len(strides) - 1)
    pooled, order = [], []
    for i, (x, stride) in enumerate(zip(maps, strides)):
        chosen = torch.where(level == i)[0]
        pooled.append(roi_align(x, rois[chosen].to(x), side, 1 / stride))
        order.append(chosen)
    return torch.cat(pooled), torch.cat(order).argsort()


class BoxHead(nn.Module):
    """Pooled regions (N, channels, 7, 7) to class logits (N, C + 1) and box deltas (N, 4 C), or (N, 4) class-agnostic.

    convs: how many convolutions with BatchNorm come before the linear layers, of which there are two without and one
    with them.
    """

    def __init__(self, channels: int, hidden: int, num_classes: int, convs: int = 0, class_agnostic: bool = False):
        super().__init__()
        if convs:
            self.shared_convs = nn.ModuleList(
                ConvUnit(channels, channels, 3, norm=True, relu=True) for _ in range(convs)
            )
        self.convs = convs
        widths = [49 * channels, hidden] if convs else [49 * channels, hidden, hidden]
        self.shared_fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.fc_cls = nn.Linear(hidden, num_classes + 1)
        self.fc_reg = nn.Linear(hidden, 4 if class_agnostic else 4 * num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for layer in self.shared_fcs:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer, std in ((self.fc_cls, 0.01), (self.fc_reg, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        keep_full_precision(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.convs:
            for conv in self.shared_convs:
                x = conv(x)
        x = x.flatten(1)
        for layer in self.shared_fcs:
            x = layer(x).relu_()
        return self.fc_cls(x), self.fc_reg(x)


class MaskHead(nn.Module):
    """Pooled regions (N, channels, 14, 14) of labels (N,) to mask logits (N, 28, 28).

    Of the C masks that `conv_logits` has weights for, only the one of each region's class is computed.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.convs = nn.ModuleList(ConvUnit(channels, channels, 3, relu=True) for _ in range(4))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv_logits = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        keep_full_precision(self)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
        x = self.upsample(x).relu_()
        weight, bias = self.conv_logits.weight[labels].flatten(2), self.conv_logits.bias[labels]
        return (weight.transpose(1, 2) @ x.flatten(2) + bias[:, None, None]).unflatten(2, (28, 28))[:, 0]


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, side: int = 28) -> Tensor:
    """Crop and resize a mask per box: of masks (m, H, W) 0/1, that of its object, to 0/1 targets (n, side, side).

    boxes: (n, 4). objects: (n,) int64, an index of `masks` each.
    """
    used, index = objects.unique(return_inverse=True)
    rois = torch.cat((index[:, None].to(boxes), clip_boxes(boxes, masks.shape[1:])), 1)
    share = roi_align(masks[used, None].to(boxes), rois, side, 1.0)
    return (share[:, 0] >= 0.5).to(boxes)


def paste_masks(masks: Tensor, boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Resample mask probabilities (n, h, w) from their boxes (n, 4) into images (n, height, width); 0 outside."""
    with torch.autocast(masks.device.type, enabled=False):  # a border is where a probability passes 0.5
        rows = _taps(boxes[:, 1], boxes[:, 3], size[0], masks.shape[1])
        columns = _taps(boxes[:, 0], boxes[:, 2], size[1], masks.shape[2])
        return rows @ masks @ columns.transpose(1, 2)


def _taps(start: Tensor, end: Tensor, length: int, cells: int) -> Tensor:
    """Return the bilinear weights (n, length, cells) by which pixels sample cells spread evenly from start to end (n,).

    They are 0 for pixels outside, and everywhere where start and end are equal.
    """
    pixels = torch.arange(length, device=start.device).to(start) + 0.5
    place = (pixels - start[:, None]) / (end - start)[:, None] * cells - 0.5
    weights = 1 - (place[..., None] - torch.arange(cells, device=start.device)).abs()
    return torch.nan_to_num(weights, nan=0.0).clamp_(min=0)


class RoIHead(nn.Module):
    """A box head, and a mask head where there are masks, on proposals.

    strides: of the maps that regions are pooled from. rois: regions sampled per image in training, at most a quarter
    positive. score_thresh, detections: the lowest score, and the largest number of boxes, of an image's result.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: int,
        hidden: int,
        num_classes: int,
        rois: int,
        score_thresh: float,
        detections: int,
        masks: bool,
    ):
        super().__init__()
        self.strides, self.num_classes, self.rois = list(strides), num_classes, rois
        self.score_thresh, self.detections, self.has_masks = score_thresh, detections, masks
        self.make_heads(channels, hidden)

    def make_heads(self, channels: int, hidden: int) -> None:
        self.bbox_head = BoxHead(channels, hidden, self.num_classes)
        if self.has_masks:
            self.mask_head = MaskHead(channels, self.num_classes)

    def sample(self, proposals: Tensor, target: dict[str, Tensor], overlap: float, low_quality: bool) -> Sampled:
        """Sample an image's regions for training from its proposals (n, 4) and ground-truth boxes."""
        truth = target["boxes"]
        assigned = assign(proposals, truth, overlap, overlap, low_quality=overlap if low_quality else None)
        assigned = torch.cat((torch.arange(len(truth), device=truth.device), assigned))
        boxes = torch.cat((truth, proposals))
        positive, negative = sample(assigned, self.rois, 0.25)
        chosen = torch.cat((positive, negative))
        labels = torch.full_like(chosen, self.num_classes)
        labels[: len(positive)] = target["labels"][assigned[positive]] - 1
        return Sampled(boxes[chosen], labels, assigned[positive], chosen < len(truth))

    def _pooled(self, maps: Sequence[Tensor], boxes: Sequence[Tensor], side: int) -> tuple[Tensor, Tensor]:
        return pool_regions(maps[: len(self.strides)], boxes, self.strides, side)

    def _score(self, head: BoxHead, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return a box head's class logits and deltas for each image's boxes."""
        pooled, rows = self._pooled(maps, boxes, 7)
        logits, deltas = head(pooled)
        return logits[rows], deltas[rows]

    def loss(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        sizes: Sequence[Sequence[int]],
    ) -> dict[str, Tensor]:
        """Return loss_cls, loss_bbox and, with masks, loss_mask."""
        sampled = [self.sample(p, t, 0.5, low_quality=True) for p, t in zip(proposals, targets)]
        logits, deltas = self._score(self.bbox_head, maps, [s.boxes for s in sampled])
        labels = torch.cat([s.labels for s in sampled])
        positive = torch.where(labels < self.num_classes)[0]
        boxes = torch.cat([s.boxes for s in sampled])[positive]
        truth = torch.cat([t["boxes"][s.target] for s, t in zip(sampled, targets)])
        chosen = class_deltas(deltas[positive], labels[positive])
        losses = dict(
            loss_cls=classification_loss(logits, labels),
            loss_bbox=smooth_l1_sum(chosen, encode(boxes, truth, STDS)) / (len(labels) + COUNT_EPS),
        )
        if self.has_masks:
            losses["loss_mask"] = self.mask_loss(self.mask_head, maps, sampled, targets)
        return losses

    def mask_loss(
        self, head: nn.Module, maps: Sequence[Tensor], sampled: Sequence[Sampled], targets: Sequence[dict[str, Tensor]]
    ) -> Tensor:
        """Return the mean cross-entropy of the positives' masks of their true class; 0 without positives."""
        boxes = [s.boxes[: len(s.target)] for s in sampled]
        labels = torch.cat([s.labels[: len(s.target)] for s in sampled])
        pooled, rows = self._pooled(maps, boxes, 14)
        logits = head(pooled[rows], labels)
        if not len(labels):
            return logits.sum() * 0
        wanted = torch.cat([mask_targets(t["masks"], b, s.target) for s, t, b in zip(sampled, targets, boxes)])
        return F.binary_cross_entropy_with_logits(logits, wanted.to(logits))

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Sequence[int]]
    ) -> list[tuple[Detections, Tensor | None]]:
        """Return each image's detections, in the pixels of the network's input, with mask probabilities (n, 28, 28)."""
        logits, deltas = self._score(self.bbox_head, maps, proposals)
        results = self._select(logits, decode_by_class(torch.cat(list(proposals)), deltas, STDS), proposals, sizes)
        return self._with_masks(maps, results, [self.mask_head] if self.has_masks else [])

    def _select(
        self, logits: Tensor, boxes: Tensor, proposals: Sequence[Tensor], sizes: Sequence[Sequence[int]]
    ) -> list[Detections]:
        counts = [p.shape[0] for p in proposals]
        scores = logits.softmax(1)[:, :-1]
        results = []
        for score, box, size in zip(scores.split(counts), boxes.split(counts), sizes):
            results.append(select_detections(clip_boxes(box, size), score, self.score_thresh, self.detections))
        return results

    def _with_masks(
        self, maps: Sequence[Tensor], results: list[Detections], heads: Sequence[nn.Module]
    ) -> list[tuple[Detections, Tensor | None]]:
        """Pair each image's detections with the mean over `heads` of their class's mask probabilities."""
        if not heads:
            return [(detections, None) for detections in results]
        pooled, rows = self._pooled(maps, [detections.boxes for detections in results], 14)
        labels = torch.cat([detections.labels for detections in results])
        masks = torch.stack([head(pooled[rows], labels).sigmoid() for head in heads]).mean(0)
        return list(zip(results, masks.split([detections.boxes.shape[0] for detections in results])))


class CascadeRoIHead(RoIHead):
    """Three stages, each trained on the boxes of the one before, at rising overlaps.

    Box heads have four convolutions and a linear layer and learn boxes by GIoU, as in the recipes of Swin and its
    followers. class_agnostic: a stage's box serves all classes.
    """

    def __init__(self, *args, class_agnostic: bool = False, **kwargs):
        self.class_agnostic = class_agnostic
        super().__init__(*args, **kwargs)

    def make_heads(self, channels: int, hidden: int) -> None:
        self.bbox_head = nn.ModuleList(
            BoxHead(channels, hidden, self.num_classes, convs=4, class_agnostic=self.class_agnostic) for _ in STAGES
        )
        if self.has_masks:
            self.mask_head = nn.ModuleList(MaskHead(channels, self.num_classes) for _ in STAGES)

    def loss(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        sizes: Sequence[Sequence[int]],
    ) -> dict[str, Tensor]:
        """Return s0.loss_cls, s0.loss_bbox, … s2.loss_mask, weighted by stage."""
        losses = {}
        for stage, (overlap, weight, stds) in enumerate(STAGES):
            sampled = [self.sample(p, t, overlap, low_quality=False) for p, t in zip(proposals, targets)]
            logits, deltas = self._score(self.bbox_head[stage], maps, [s.boxes for s in sampled])
            labels = torch.cat([s.labels for s in sampled])
            positive = torch.where(labels < self.num_classes)[0]
            boxes = torch.cat([s.boxes for s in sampled])
            truth = torch.cat([t["boxes"][s.target] for s, t in zip(sampled, targets)])
            decoded = decode(boxes[positive], class_deltas(deltas[positive], labels[positive]), stds)
            of_stage = dict(
                loss_cls=classification_loss(logits, labels),
                loss_bbox=GIOU_WEIGHT * giou_sum(decoded, truth) / (len(labels) + COUNT_EPS),
            )
            if self.has_masks:
                of_stage["loss_mask"] = self.mask_loss(self.mask_head[stage], maps, sampled, targets)
            losses |= {f"s{stage}.{name}": weight * loss for name, loss in of_stage.items()}
            if stage < len(STAGES) - 1:
                classes = torch.where(labels < self.num_classes, labels, logits[:, :-1].argmax(1))
                counts = [len(s.boxes) for s in sampled]
                with torch.no_grad():
                    refined = self._refine(boxes, deltas, classes, stds, counts, sizes)
                proposals = [box[~s.is_truth] for box, s in zip(refined, sampled)]
        return losses

    def _refine(
        self,
        boxes: Tensor,
        deltas: Tensor,
        classes: Tensor,
        stds: Sequence[float],
        counts: Sequence[int],
        sizes: Sequence[Sequence[int]],
    ) -> list[Tensor]:
        """Move boxes (N, 4) by their class's deltas, clipped to their images; `counts` of them belong to each."""
        chosen = class_deltas(deltas, classes)
        parts = zip(boxes.split(counts), chosen.split(counts), sizes)
        return [decode(box, delta, stds, clip=size) for box, delta, size in parts]

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Sequence[int]]
    ) -> list[tuple[Detections, Tensor | None]]:
        total = 0
        proposals = list(proposals)
        for stage, (_, _, stds) in enumerate(STAGES):
            logits, deltas = self._score(self.bbox_head[stage], maps, proposals)
            total = total + logits
            boxes = torch.cat(proposals)
            if stage < len(STAGES) - 1:
                counts = [p.shape[0] for p in proposals]
                proposals = self._refine(boxes, deltas, logits[:, :-1].argmax(1), stds, counts, sizes)
        results = self._select(total / len(STAGES), decode_by_class(boxes, deltas, stds), proposals, sizes)
        return self._with_masks(maps, results, list(self.mask_head) if self.has_masks else [])


def class_deltas(deltas: Tensor, classes: Tensor) -> Tensor:
    """Pick each box's deltas (N, 4) of its class from (N, 4 C); class-agnostic ones (N, 4) are returned as they are."""
    if deltas.shape[1] == 4:
        return deltas
    return deltas.unflatten(1, (-1, 4))[torch.arange(classes.shape[0], device=classes.device), classes]


def decode_by_class(boxes: Tensor, deltas: Tensor, stds: Sequence[float]) -> Tensor:
    """Move boxes (N, 4) by deltas (N, 4 C) of every class: (N, C, 4)."""
    return decode(boxes, deltas.unflatten(1, (-1, 4)), stds)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of logits (N, C + 1), averaged over the regions."""
    return F.cross_entropy(logits, labels, reduction="sum") / (max(1, len(labels)) + COUNT_EPS)
