"""Detectors around any timm model: RetinaNet, Faster, Mask and Cascade R-CNN with a feature pyramid.

All parts are torchvision's but the cascade's heads. What they share: in training they take pictures of their final size
and targets and return losses; in evaluation pictures as they are, and return boxes, labels, scores and masks in the
pixels of those. Pictures are lists of (3, H, W) float tensors, 0 … 1; labels count from 1, 0 is background.
"""

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from ..runtime.checkpoint import atomic_write
from .body import OnBody, float32, freeze_batchnorm
from .cascade import CascadeHeads

RATIOS = (0.5, 1.0, 2.0)  # of anchors, height / width


class FeaturePyramid(nn.Module):
    """A body and an FPN on its maps: images (B, 3, H, W) -> {level: (B, channels, H / stride, W / stride)}.

    norm_eval: the body's BatchNorms use their running statistics in training too.
    """

    def __init__(self, body: nn.Module, channels: int, extra: nn.Module, norm_eval: bool):
        super().__init__()
        self.body, self.norm_eval, self.out_channels = body, norm_eval, channels
        self.fpn = FeaturePyramidNetwork(body.feature_info.channels(), channels, extra)
        self.strides = body.feature_info.reduction()
        float32(self)

    def train(self, mode: bool = True) -> "FeaturePyramid":
        super().train(mode)
        if self.norm_eval:
            freeze_batchnorm(self.body)
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), y) for i, y in enumerate(self.body(x))))


class RetinaNet(OnBody, detection.RetinaNet):
    pass


class FasterRCNN(OnBody, detection.FasterRCNN):
    pass


class MaskRCNN(OnBody, detection.MaskRCNN):
    pass


def levels(detector: str, strides: list[int]) -> list[int]:
    """Which of maps of these strides a detector stands on: of each from 4 (RetinaNet: 8) to 32, the last."""
    last = {stride: index for index, stride in enumerate(strides)}
    return [last[stride] for stride in sorted(last) if (8 if detector == "retinanet" else 4) <= stride <= 32]


def create(
    detector: str,
    body: nn.Module,
    classes: int,
    channels: int = 256,
    hidden: int = 1024,
    rois: int = 512,
    proposals: int = 1000,
    anchor_scale: float | None = None,
    test_size: tuple[int, int] = (800, 1333),
    score_thresh: float = 0.05,
    detections: int = 100,
    norm_eval: bool = False,
    no_decay: tuple[str, ...] = (),
) -> OnBody:
    """A detector for `classes` classes, background not counted.

    detector: retinanet, faster_rcnn, mask_rcnn, cascade_rcnn or cascade_mask_rcnn. body: of create_features, at the
    maps that `levels` names.
    channels: of the pyramid and of the heads' convolutions. hidden: of the box heads' linear layers. rois: that are
    sampled from an image in training; proposals: that reach the heads, half of what a level may propose in training.
    anchor_scale: an anchor's side in strides (None: 8; RetinaNet 4, and two more a third of an octave apart).
    test_size: a picture's shorter side in evaluation, unless the longer one would exceed the second number.
    score_thresh, detections: the least score, and the most boxes, that are returned of a picture.
    norm_eval: the body's BatchNorms keep their statistics in training. no_decay: see OnBody.
    """
    strides = body.feature_info.reduction()
    common: dict[str, Any] = dict(min_size=test_size[0], max_size=test_size[1], size_divisible=max(strides))
    inputs = resolve_data_config(pretrained_cfg=body.pretrained_cfg)
    common |= dict(image_mean=list(inputs["mean"]), image_std=list(inputs["std"]), _skip_resize=True)
    if detector == "retinanet":
        extra: nn.Module = LastLevelP6P7(body.feature_info.channels()[-1], channels)
        strides = [*strides, 2 * strides[-1], 4 * strides[-1]]
        scales = [(anchor_scale or 4) * 2 ** (i / 3) for i in range(3)]
    else:
        extra = LastLevelMaxPool()
        strides = [*strides, 2 * strides[-1]]
        scales = [anchor_scale or 8]
    pyramid = FeaturePyramid(body, channels, extra, norm_eval)
    sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
    anchors = AnchorGenerator(sizes, (RATIOS,) * len(strides))
    count = anchors.num_anchors_per_location()[0]

    if detector == "retinanet":
        head = float32(RetinaNetHead(channels, count, classes + 1))
        limits = dict(score_thresh=score_thresh, detections_per_img=detections)
        model: OnBody = RetinaNet(pyramid, None, anchor_generator=anchors, head=head, **limits, **common)
    else:
        names = [str(i) for i in range(len(strides) - 1)]
        boxes, masks = (MultiScaleRoIAlign(names, side, 2) for side in (7, 14))
        common |= dict(
            rpn_anchor_generator=anchors,
            rpn_head=float32(RPNHead(channels, count)),
            rpn_pre_nms_top_n_train=2 * proposals,
            rpn_pre_nms_top_n_test=proposals,
            rpn_post_nms_top_n_train=proposals,
            rpn_post_nms_top_n_test=proposals,
            box_score_thresh=score_thresh,
            box_detections_per_img=detections,
            box_batch_size_per_image=rois,
            box_roi_pool=boxes,
            box_head=TwoMLPHead(49 * channels, hidden),
            box_predictor=float32(FastRCNNPredictor(hidden, classes + 1)),
        )
        if detector == "mask_rcnn":
            model = MaskRCNN(pyramid, mask_roi_pool=masks, **common, **_mask_head(channels, classes))
        else:
            model = FasterRCNN(pyramid, **common)
            if detector != "faster_rcnn":
                makers = lambda: _mask_head(channels, classes).values()  # noqa: E731
                with_masks = dict(mask_roi_pool=masks, make_mask_head=makers) if "mask" in detector else {}
                limits = dict(rois=rois, score_thresh=score_thresh, detections=detections)
                model.roi_heads = CascadeHeads(boxes, channels, hidden, classes, **limits, **with_masks)
    model.no_decay = tuple(no_decay)
    model.pretrained_cfg = body.pretrained_cfg
    model.train()
    return model


def _mask_head(channels: int, classes: int) -> dict[str, nn.Module]:
    head, predictor = MaskRCNNHeads(channels, (channels,) * 4, 1), MaskRCNNPredictor(channels, channels, classes + 1)
    return dict(mask_head=head, mask_predictor=float32(predictor))


def to_onnx(model: OnBody, size: tuple[int, int], file: Path) -> Path:
    """Write a detector as ONNX, for pictures of one height and width.

    Its input is `image`, (3, H, W) float32 from 0 to 1; its outputs are boxes (n, 4) in the picture's pixels, scores
    (n,), labels (n,) from 1 and, where the detector has them, masks (n, 1, H, W), probabilities.
    """
    heads = getattr(model, "roi_heads", None)
    names = ["boxes", "scores", "labels", *(["masks"] if getattr(heads, "mask_roi_pool", None) is not None else [])]
    with atomic_write(file) as temporary, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on all that the size fixes
        options = dict(input_names=["image"], output_names=names, opset_version=17, dynamo=False)
        torch.onnx.export(_Found(model.cpu(), names).eval(), (torch.rand(3, *size),), str(temporary), **options)
    return file


class _Found(nn.Module):
    """A detector of one picture, as a function of tensors."""

    def __init__(self, model: OnBody, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (found,) = self.model([image])
        return tuple(found[name] for name in self.names)
