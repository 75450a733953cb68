"""The heads of Cascade R-CNN (arXiv 1712.00726): three stages, each sampled and trained on the boxes of the one before.

Each stage's head is four convolutions with BatchNorm and a linear layer, its boxes those of no class in particular and
learned by GIoU, as the recipes of Swin and its followers have it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import _utils as parts
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.roi_heads import maskrcnn_inference, maskrcnn_loss
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, generalized_box_iou_loss, remove_small_boxes

from .body import float32

# Of each stage: the least overlap of a positive, the loss's weight, and one over the deviations of the box deltas.
STAGES = ((0.5, 1.0, (10, 10, 5, 5)), (0.6, 0.5, (20, 20, 10, 10)), (0.7, 0.25, (30, 30, 15, 15)))
GIOU = 10.0  # the weight of the boxes' loss


class BoxPredictor(nn.Module):
    """(N, hidden) -> class logits (N, classes + 1), box deltas (N, 4)."""

    def __init__(self, hidden: int, classes: int):
        super().__init__()
        self.cls_score, self.bbox_pred = nn.Linear(hidden, classes + 1), nn.Linear(hidden, 4)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class CascadeHeads(nn.Module):
    """In torchvision's RoIHeads' place: (features, proposals, image sizes, targets) -> (detections, losses).

    rois: that are sampled from an image for each stage, a quarter of them positive. score_thresh, detections: the least
    score, and the most boxes, of a picture. make_mask_head: makes a stage's mask head and predictor (None: no masks).
    """

    def __init__(
        self,
        box_roi_pool: nn.Module,
        channels: int,
        hidden: int,
        classes: int,
        rois: int,
        score_thresh: float,
        detections: int,
        mask_roi_pool: nn.Module | None = None,
        make_mask_head: Callable | None = None,
    ):
        super().__init__()
        self.score_thresh, self.detections = score_thresh, detections
        self.box_roi_pool, self.mask_roi_pool = box_roi_pool, mask_roi_pool
        self.box_heads, self.box_predictors, self.mask_heads = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in STAGES:
            head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [hidden], norm_layer=nn.BatchNorm2d)
            self.box_heads.append(head)
            self.box_predictors.append(float32(BoxPredictor(hidden, classes)))
            if make_mask_head is not None:
                self.mask_heads.append(nn.Sequential(*make_mask_head()))
        self.sampler = parts.BalancedPositiveNegativeSampler(rois, 0.25)
        self.matchers = [parts.Matcher(overlap, overlap, allow_low_quality_matches=False) for overlap, _, _ in STAGES]
        self.coders = [parts.BoxCoder(weights) for _, _, weights in STAGES]

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        losses: dict[str, Tensor] = {}
        scores = []
        for stage, (_, weight, _) in enumerate(STAGES):
            if self.training:
                proposals, matched, labels, added = self._sample(stage, proposals, targets)
            pooled = self.box_roi_pool(features, proposals, sizes)
            logits, deltas = self.box_predictors[stage](self.box_heads[stage](pooled))
            boxes = self.coders[stage].decode(deltas, proposals).squeeze(1)  # (N, 4)
            if self.training:
                found = self._losses(stage, features, sizes, targets, proposals, matched, labels, logits, boxes)
                losses |= {f"{name}_{stage + 1}": weight * loss for name, loss in found.items()}
            scores.append(logits.softmax(1))
            refined = boxes.detach().split([p.shape[0] for p in proposals])
            proposals = [clip_boxes_to_image(b, size) for b, size in zip(refined, sizes)]
            if self.training:  # true boxes are no proposals of the next stage, which gets them anyway
                proposals = [b[~true] for b, true in zip(proposals, added)]
        if self.training:
            return [], losses
        mean = torch.stack(scores).mean(0).split([p.shape[0] for p in proposals])
        found = [self._detect(boxes, score) for boxes, score in zip(proposals, mean)]
        if self.mask_heads:
            boxes, labels = [d["boxes"] for d in found], [d["labels"] for d in found]
            pooled = self.mask_roi_pool(features, boxes, sizes)
            probable = [maskrcnn_inference(head(pooled), labels) for head in self.mask_heads]
            for i, detections in enumerate(found):
                detections["masks"] = torch.stack([masks[i] for masks in probable]).mean(0)
        return found, losses

    def _sample(self, stage: int, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[list, ...]:
        """Of each image: sampled boxes, their true boxes' numbers, labels, and whether a box is itself a true one."""
        sampled = []
        for boxes, target in zip(proposals, targets):
            boxes, true = torch.cat((boxes, target["boxes"])), len(boxes)
            if len(target["boxes"]):
                matched = self.matchers[stage](box_iou(target["boxes"], boxes))
                labels = target["labels"][matched.clamp(min=0)].where(matched >= 0, 0)
                matched = matched.clamp(min=0)
            else:
                labels = matched = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            positive, negative = self.sampler([labels])
            chosen = torch.where(positive[0] | negative[0])[0]
            sampled.append((boxes[chosen], matched[chosen], labels[chosen], chosen >= true))
        return tuple(map(list, zip(*sampled)))

    def _losses(
        self,
        stage: int,
        features: dict[str, Tensor],
        sizes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        logits: Tensor,
        boxes: Tensor,
    ) -> dict[str, Tensor]:
        positive = [label > 0 for label in labels]
        true = torch.cat([t["boxes"][m[p]] for t, m, p in zip(targets, matched, positive)])
        classes = torch.cat(labels)
        giou = generalized_box_iou_loss(boxes[classes > 0], true, reduction="sum")
        losses = dict(loss_classifier=F.cross_entropy(logits, classes), loss_box_reg=GIOU * giou / max(1, len(classes)))
        if self.mask_heads:
            inside = [p[chosen] for p, chosen in zip(proposals, positive)]
            mask_logits = self.mask_heads[stage](self.mask_roi_pool(features, inside, sizes))
            masks, numbers = [t["masks"] for t in targets], [t["labels"] for t in targets]
            whose = [m[chosen] for m, chosen in zip(matched, positive)]
            losses["loss_mask"] = maskrcnn_loss(mask_logits, inside, masks, numbers, whose)
        return losses

    def _detect(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """The detections of one image: boxes (N, 4), scores (N, classes + 1), background first."""
        kept, labels = torch.where(scores[:, 1:] > self.score_thresh)
        labels = labels + 1
        boxes, scores = boxes[kept], scores[kept, labels]
        large = remove_small_boxes(boxes, 1e-2)
        boxes, labels, scores = boxes[large], labels[large], scores[large]
        best = batched_nms(boxes, scores, labels, 0.5)[: self.detections]
        return dict(boxes=boxes[best], labels=labels[best], scores=scores[best])
