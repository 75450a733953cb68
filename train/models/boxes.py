"""Boxes (left, top, right, bottom) as OpenMMLab's detectors handle them: deltas, assignment, sampling, NMS, losses.

MMDetection 2.25's rules, which the published detectors were trained and tested with. All functions keep the dtype of
their inputs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

MAX_LOG_RATIO = abs(math.log(16 / 1000))  # a box changes its width and height at most by this factor's logarithm
COUNT_EPS = 2.0**-23  # MMDetection adds float32's epsilon to every count that it divides by


def encode(boxes: Tensor, targets: Tensor, stds: Sequence[float] = (1, 1, 1, 1)) -> Tensor:
    """Return the deltas (N, 4) that turn `boxes` (N, 4) into `targets` (N, 4), divided by `stds`."""
    size, target_size = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = (targets[:, :2] + targets[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / size
    return torch.cat((shift, (target_size / size).log()), 1) / boxes.new_tensor(stds)


def decode(
    boxes: Tensor, deltas: Tensor, stds: Sequence[float] = (1, 1, 1, 1), clip: Sequence[int] | None = None
) -> Tensor:
    """Apply deltas (N, 4) or (N, C, 4) to boxes (N, 4), clipping the results to an image of (height, width) `clip`."""
    boxes = boxes if deltas.dim() == 2 else boxes[:, None]
    deltas = deltas * deltas.new_tensor(stds)
    size = boxes[..., 2:] - boxes[..., :2]
    center = (boxes[..., :2] + boxes[..., 2:]) / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() / 2
    decoded = torch.cat((center - half, center + half), -1)
    return decoded if clip is None else clip_boxes(decoded, clip)


def clip_boxes(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Clip boxes (..., 4) to an image of (height, width)."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack((x, y), -1).flatten(-2)


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over union (N, M) of boxes (N, 4) and others (M, 4); unions are at least 1e-6."""
    area, other_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, others))
    corner = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    sides = (torch.minimum(boxes[:, None, 2:], others[None, :, 2:]) - corner).clamp(min=0)
    inner = sides[..., 0] * sides[..., 1]
    return inner / (area[:, None] + other_area - inner).clamp(min=1e-6)


def assign(
    boxes: Tensor, targets: Tensor, positive: float, negative: float, low_quality: float | None = None
) -> Tensor:
    """Assign each of boxes (N, 4) to one of the ground-truth boxes `targets` (M, 4), by overlap.

    Returns (N,) int64: the target's index, -1 for background (overlap with every target below `negative`), -2 for
    boxes to ignore (between `negative` and `positive`). low_quality: every target whose best overlap is at least this
    is given to all the boxes that reach that overlap, later targets winning; None: no such rule.
    """
    assigned = boxes.new_full((len(boxes),), -1, dtype=torch.int64)
    if not len(targets) or not len(boxes):
        return assigned
    overlap = box_iou(targets, boxes)
    best, index = overlap.max(0)
    assigned = torch.where(best >= negative, -2, assigned)
    assigned = torch.where(best >= positive, index, assigned)
    if low_quality is not None:
        reached = overlap.max(1).values
        for i in torch.where(reached >= low_quality)[0].tolist():
            assigned[overlap[i] == reached[i]] = i
    return assigned


def sample(assigned: Tensor, count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Draw positives, at most `fraction` of `count`, and negatives that fill `count`; returns their indices.

    assigned: from `assign`. If there are fewer than wanted, all are drawn.
    """

    def draw(candidates: Tensor, most: int) -> Tensor:
        if len(candidates) <= most:
            return candidates
        return candidates[torch.randperm(len(candidates), device=candidates.device)[:most]]

    positive = draw(torch.where(assigned >= 0)[0], int(count * fraction))
    return positive, draw(torch.where(assigned == -1)[0], count - len(positive))


class Detections(NamedTuple):
    boxes: Tensor  # (n, 4), best score first
    scores: Tensor  # (n,)
    labels: Tensor  # (n,) int64, of `nms_by_class` from 0


def nms_by_class(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, limit: int) -> Detections:
    """Suppress boxes that overlap a better one of the same label by more than `threshold`; keep the best `limit`."""
    kept = batched_nms(boxes, scores, labels, threshold)[:limit]
    return Detections(boxes[kept], scores[kept], labels[kept])


def select_detections(boxes: Tensor, scores: Tensor, threshold: float, limit: int, iou: float = 0.5) -> Detections:
    """Return the detections of an image by class: scores above `threshold`, NMS at overlap `iou`, the best `limit`.

    boxes: (N, classes, 4), or (N, 1, 4) where all classes share one. scores: (N, classes), no background.
    """
    kept, labels = torch.where(scores > threshold)
    chosen = boxes[kept, labels] if boxes.shape[1] > 1 else boxes[kept, 0]
    return nms_by_class(chosen, scores[kept, labels], labels, iou, limit)


def smooth_l1_sum(deltas: Tensor, targets: Tensor, beta: float = 0.0) -> Tensor:
    """Return the summed L1 loss, quadratic below `beta`."""
    return F.smooth_l1_loss(deltas, targets, reduction="sum", beta=beta)


def focal_sum(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the summed focal loss (arXiv:1708.02002) of logits (N, classes), targets (N, classes) being 0 or 1."""
    p = logits.sigmoid()
    miss = p * (1 - targets) + (1 - p) * targets
    weight = (alpha * targets + (1 - alpha) * (1 - targets)) * miss**gamma
    return (weight * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")).sum()


def giou_sum(boxes: Tensor, targets: Tensor) -> Tensor:
    """Return the summed 1 - GIoU (arXiv:1902.09630) of boxes (N, 4) with theirs; areas divided by are at least 1e-6."""
    area, target_area = ((b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (boxes, targets))
    sides = (torch.minimum(boxes[:, 2:], targets[:, 2:]) - torch.maximum(boxes[:, :2], targets[:, :2])).clamp(min=0)
    hull = torch.maximum(boxes[:, 2:], targets[:, 2:]) - torch.minimum(boxes[:, :2], targets[:, :2])
    inner = sides[:, 0] * sides[:, 1]
    union = (area + target_area - inner).clamp(min=1e-6)
    enclosing = (hull[:, 0].clamp(min=0) * hull[:, 1].clamp(min=0)).clamp(min=1e-6)
    return (1 - inner / union + (enclosing - union) / enclosing).sum()
