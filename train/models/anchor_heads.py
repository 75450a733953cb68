"""Heads that score and shift anchors: the region proposal network (arXiv:1506.01497) and RetinaNet's (1708.02002).

Maps come finest first. An image's own padded size decides which anchors take part in training, as in MMDetection.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .body import keep_full_precision
from .boxes import (
    COUNT_EPS,
    Detections,
    assign,
    decode,
    encode,
    focal_sum,
    nms_by_class,
    sample,
    smooth_l1_sum,
)
from .fpn import ConvUnit

RATIOS = (0.5, 1.0, 2.0)  # of anchors, height / width


class Anchors:
    """The anchors of maps: centred at (x, y) times the map's stride, ratios outermost, then scales.

    scales: an anchor's side at ratio 1, in strides.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]):
        self.strides, self.scales = list(strides), list(scales)

    @property
    def count(self) -> int:
        """Return the number of anchors per cell."""
        return len(RATIOS) * len(self.scales)

    def base(self, stride: int) -> Tensor:
        """Return the anchors (A, 4) of the cell at the origin, float64."""
        ratios = torch.tensor(RATIOS, dtype=torch.float64).sqrt()[:, None]
        sides = stride * torch.tensor(self.scales, dtype=torch.float64)
        half = torch.stack((sides / ratios, sides * ratios), -1).flatten(0, 1) / 2
        return torch.cat((-half, half), 1)

    def __call__(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return, for each map (B, C, H, W), its anchors (H · W · A, 4) by row, column and anchor, in its dtype."""
        levels = []
        for stride, x in zip(self.strides, maps):
            y, x_ = torch.meshgrid(*(stride * torch.arange(n) for n in x.shape[2:]), indexing="ij")
            cells = torch.stack((x_, y, x_, y), -1).to(torch.float64).view(-1, 1, 4)
            levels.append((cells + self.base(stride)).view(-1, 4).to(x))
        return levels

    def valid(self, maps: Sequence[Tensor], padded: Sequence[int]) -> Tensor:
        """Return which of all maps' anchors (N,) have their cell inside an image padded to (height, width)."""
        masks = []
        for stride, x in zip(self.strides, maps):
            inside = torch.zeros(x.shape[2:], dtype=torch.bool, device=x.device)
            inside[: math.ceil(padded[0] / stride), : math.ceil(padded[1] / stride)] = True
            masks.append(inside.flatten().repeat_interleave(self.count))
        return torch.cat(masks)


def flatten_maps(maps: Sequence[Tensor], size: int) -> list[Tensor]:
    """Reshape maps (B, A · size, H, W) to (B, H · W · A, size)."""
    return [x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, size)) for x in maps]


class RPNHead(nn.Module):
    """Proposals for the R-CNNs: one class, scored by a sigmoid.

    proposals: number per image for the box heads in evaluation; training takes twice as many per level before NMS.
    rpn_samples: anchors sampled per image in training, at most half of them positive.
    of_cascade: the training settings of Cascade R-CNN: twice the proposals after NMS too, smooth L1, and no anchors
    that extend beyond the image.
    """

    def __init__(self, channels: int, anchors: Anchors, proposals: int, rpn_samples: int, of_cascade: bool):
        super().__init__()
        self.anchors, self.proposals, self.rpn_samples, self.of_cascade = anchors, proposals, rpn_samples, of_cascade
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, anchors.count, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * anchors.count, 1)
        for conv in (self.rpn_conv, self.rpn_cls, self.rpn_reg):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)
        keep_full_precision(self)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return of each map the logits (B, A, H, W) and the deltas (B, 4 A, H, W)."""
        features = [self.rpn_conv(x).relu_() for x in maps]
        return [self.rpn_cls(x) for x in features], [self.rpn_reg(x) for x in features]

    def propose(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Return the proposals (n, 4) of each image, of (height, width), best first; no gradient goes through them."""
        anchors = self.anchors(logits)
        per_level = self.proposals * (2 if self.training else 1)
        limit = per_level if self.of_cascade else self.proposals
        scores = [x[..., 0].detach().sigmoid() for x in flatten_maps(logits, 1)]
        shifts = [x.detach() for x in flatten_maps(deltas, 4)]
        proposals = []
        for i, size in enumerate(sizes):
            boxes, best, levels = [], [], []
            for level, (anchor, score, shift) in enumerate(zip(anchors, scores, shifts)):
                kept = score[i].topk(min(per_level, score.shape[1])).indices
                boxes.append(decode(anchor[kept], shift[i, kept], clip=size))
                best.append(score[i, kept])
                levels.append(torch.full_like(kept, level))
            box, score, level = torch.cat(boxes), torch.cat(best), torch.cat(levels)
            kept = torch.where((box[:, 2:] > box[:, :2]).all(1))[0]
            proposals.append(nms_by_class(box[kept], score[kept], level[kept], 0.7, limit).boxes)
        return proposals

    def loss(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        sizes: Sequence[Sequence[int]],
        padded: Sequence[Sequence[int]],
    ) -> dict[str, Tensor]:
        """Return loss_rpn_cls and loss_rpn_bbox. sizes, padded: (height, width) of each image, and with its padding."""
        anchors = torch.cat(self.anchors(logits))
        scores, shifts = torch.cat(flatten_maps(logits, 1), 1)[..., 0], torch.cat(flatten_maps(deltas, 4), 1)
        classification, regression, count = 0.0, 0.0, 0
        for i, target in enumerate(targets):
            takes_part = self.anchors.valid(logits, padded[i])
            if self.of_cascade:
                height, width = sizes[i]
                takes_part &= (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
            used = torch.where(takes_part)[0]
            assigned = assign(anchors[used], target["boxes"], 0.7, 0.3, low_quality=0.3)
            positive, negative = sample(assigned, self.rpn_samples, 0.5)
            chosen = used[torch.cat((positive, negative))]
            truth = (torch.arange(len(chosen), device=chosen.device) < len(positive)).to(scores)
            classification += F.binary_cross_entropy_with_logits(scores[i, chosen], truth, reduction="sum")
            wanted = encode(anchors[used[positive]], target["boxes"][assigned[positive]])
            beta = 1 / 9 if self.of_cascade else 0.0
            regression += smooth_l1_sum(shifts[i, used[positive]], wanted, beta)
            count += max(1, len(positive)) + max(1, len(negative))
        return dict(loss_rpn_cls=classification / (count + COUNT_EPS), loss_rpn_bbox=regression / (count + COUNT_EPS))


class RetinaHead(nn.Module):
    """RetinaNet's classification and regression towers, shared by all maps.

    score_thresh, detections: the lowest score, and the largest number of boxes, of an image's result.
    """

    def __init__(self, channels: int, anchors: Anchors, num_classes: int, score_thresh: float, detections: int):
        super().__init__()
        self.anchors, self.num_classes = anchors, num_classes
        self.score_thresh, self.detections = score_thresh, detections
        self.cls_convs = nn.ModuleList(ConvUnit(channels, channels, 3, relu=True) for _ in range(4))
        self.reg_convs = nn.ModuleList(ConvUnit(channels, channels, 3, relu=True) for _ in range(4))
        self.retina_cls = nn.Conv2d(channels, anchors.count * num_classes, 3, padding=1)
        self.retina_reg = nn.Conv2d(channels, anchors.count * 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.retina_cls.bias, -math.log((1 - 0.01) / 0.01))  # every class starts at 1 %
        keep_full_precision(self)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return of each map the logits (B, A · classes, H, W) and the deltas (B, 4 A, H, W)."""
        logits, deltas = [], []
        for x in maps:
            y = x
            for conv in self.cls_convs:
                x = conv(x)
            for conv in self.reg_convs:
                y = conv(y)
            logits.append(self.retina_cls(x))
            deltas.append(self.retina_reg(y))
        return logits, deltas

    def detect(
        self, logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Sequence[Sequence[int]]
    ) -> list[Detections]:
        """Return the detections of each image, of (height, width), in its pixels."""
        anchors = self.anchors(logits)
        scores = [x.sigmoid() for x in flatten_maps(logits, self.num_classes)]
        shifts = flatten_maps(deltas, 4)
        results = []
        for i, size in enumerate(sizes):
            boxes, best, labels = [], [], []
            for anchor, score, shift in zip(anchors, scores, shifts):
                pairs = score[i].flatten()
                above = torch.where(pairs > self.score_thresh)[0]
                chosen = above[pairs[above].argsort(descending=True)[:1000]]
                cell = torch.div(chosen, self.num_classes, rounding_mode="floor")
                boxes.append(decode(anchor[cell], shift[i, cell], clip=size))
                best.append(pairs[chosen])
                labels.append(chosen - cell * self.num_classes)
            results.append(nms_by_class(torch.cat(boxes), torch.cat(best), torch.cat(labels), 0.5, self.detections))
        return results

    def loss(
        self,
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        targets: Sequence[dict[str, Tensor]],
        padded: Sequence[Sequence[int]],
    ) -> dict[str, Tensor]:
        """Return loss_cls and loss_bbox; `padded` has each image's (height, width) with its padding."""
        anchors = torch.cat(self.anchors(logits))
        scores = torch.cat(flatten_maps(logits, self.num_classes), 1)
        shifts = torch.cat(flatten_maps(deltas, 4), 1)
        classification, regression, count = 0.0, 0.0, 0
        for i, target in enumerate(targets):
            used = torch.where(self.anchors.valid(logits, padded[i]))[0]
            assigned = assign(anchors[used], target["boxes"], 0.5, 0.4, low_quality=0.0)
            positive = torch.where(assigned >= 0)[0]
            counted = torch.where(assigned > -2)[0]
            truth = scores.new_zeros(len(used), self.num_classes)
            truth[positive, target["labels"][assigned[positive]] - 1] = 1
            classification += focal_sum(scores[i, used[counted]], truth[counted])
            wanted = encode(anchors[used[positive]], target["boxes"][assigned[positive]])
            regression += smooth_l1_sum(shifts[i, used[positive]], wanted)
            count += max(1, len(positive))
        return dict(loss_cls=classification / (count + COUNT_EPS), loss_bbox=regression / (count + COUNT_EPS))
