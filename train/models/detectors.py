"""Detectors around any timm model: RetinaNet, Faster, Mask and Cascade (Mask) R-CNN with a feature pyramid.

They compute what MMDetection 2.25 does, in tests and in training, and their parameters have the names of its files, so
that published detectors load as they are; RoIAlign and NMS are torchvision's.

In training a detector takes images at their final size and targets and returns losses; in evaluation it takes images
of any size and returns boxes, labels, scores and masks in their pixels. Images are lists of (3, H, W) float tensors,
0 … 1; labels count from 1.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from torch import Tensor, nn

from ..runtime.checkpoint import atomic_write
from ..runtime.config import Count, Fraction, Positive
from ..runtime.errors import UserError
from .anchor_heads import Anchors, RetinaHead, RPNHead
from .body import OnBody, freeze_batchnorm, to_full_precision
from .fpn import FPN
from .resize import resize_uint8, scaled_size
from .roi_heads import CascadeRoIHead, RoIHead, paste_masks


class Batch(NamedTuple):
    """Images as the network takes them; sizes are (height, width)."""

    images: Tensor  # (B, 3, H, W), normalised; zeros right of and below each
    sizes: list[tuple[int, int]]  # of each image, without padding
    padded: list[tuple[int, int]]  # with the padding that it would have alone


class Detector(OnBody):
    """A backbone and a feature pyramid: what all detectors share.

    test_size: in evaluation an image's shorter side, unless the longer one would exceed the second number.
    divisor: what padded sides are multiples of. pad_to: (height, width) that images are padded to in evaluation;
    with it an image's result does not depend on the sizes of the others in its batch.
    norm_eval: the body's BatchNorms use their running statistics in training too. no_decay: see OnBody.
    """

    def __init__(
        self,
        body: nn.Module,
        neck: nn.Module,
        test_size: Sequence[int],
        divisor: int,
        pad_to: Sequence[int] | None = None,
        norm_eval: bool = False,
        no_decay: Sequence[str] = (),
    ):
        super().__init__()
        self.backbone, self.neck = body, neck
        self.test_size, self.divisor, self.pad_to = tuple(test_size), divisor, pad_to and tuple(pad_to)
        self.norm_eval, self.no_decay = norm_eval, tuple(no_decay)
        self.pretrained_cfg = body.pretrained_cfg
        inputs = resolve_data_config(pretrained_cfg=body.pretrained_cfg)
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(inputs[name]).view(-1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        if self.norm_eval:
            freeze_batchnorm(self.body)
        return self

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses (training) or, for each image, boxes (n, 4), scores (n,), labels (n,) and masks (n, 1, H, W).

        targets: boxes (n, 4) in pixels, labels (n,), masks (n, H, W) 0/1 where the detector has them, and optionally
        iscrowd (n,): groups of objects, which are left out. Masks of the result are probabilities.
        """
        if self.training:
            batch = self.batch([255 * image for image in images])
            return self.losses(self.maps(batch.images), [without_crowds(t) for t in targets], batch)
        original = [tuple(image.shape[1:]) for image in images]
        sizes = [scaled_size(*size, self.test_size) for size in original]
        batch = self.batch([resize_uint8(255 * image, size) for image, size in zip(images, sizes)], self.pad_to)
        results = []
        for (detections, masks), (height, width), size in zip(
            self.detect(self.maps(batch.images), batch), original, batch.sizes, strict=True
        ):
            factors = detections.boxes.new_tensor([size[1] / width, size[0] / height] * 2)
            result = dict(boxes=detections.boxes / factors, scores=detections.scores, labels=detections.labels + 1)
            if masks is not None:
                result["masks"] = paste_masks(masks, result["boxes"], (height, width))[:, None]
            results.append(result)
        return results

    def batch(self, images: Sequence[Tensor], pad_to: Sequence[int] | None = None) -> Batch:
        """Normalise images (3, h, w), 0 … 255, pad them to multiples of the divisor, and stack them."""
        sizes = [tuple(image.shape[1:]) for image in images]
        padded = [tuple(-(-side // self.divisor) * self.divisor for side in size) for size in sizes]
        height, width = map(max, zip(*padded))
        if pad_to:
            if height > pad_to[0] or width > pad_to[1]:
                raise UserError(
                    f"task.pad_to={pad_to} must be at least the padded size of every image, and one has "
                    f"{(height, width)}: give a larger one, such as test_size rounded up to multiples of {self.divisor}"
                )
            height, width = pad_to
        stack = [
            F.pad((image.to(self.mean) - self.mean) / self.std, (0, width - w, 0, height - h))
            for image, (h, w) in zip(images, sizes)
        ]
        return Batch(torch.stack(stack), sizes, padded)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the pyramid's maps, finest first."""
        return to_full_precision(self.neck(self.backbone(images)))


class RetinaNet(Detector):
    """RetinaNet (arXiv:1708.02002) on maps of stride 8 and more."""

    def __init__(self, head: RetinaHead, **kwargs):
        super().__init__(**kwargs)
        self.bbox_head = head

    def losses(self, maps: list[Tensor], targets: list[dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        return self.bbox_head.loss(*self.bbox_head(maps), targets, batch.padded)

    def detect(self, maps: list[Tensor], batch: Batch) -> list[tuple]:
        return [(detections, None) for detections in self.bbox_head.detect(*self.bbox_head(maps), batch.sizes)]


class RCNN(Detector):
    """Faster (arXiv:1506.01497), Mask (1703.06870) and Cascade R-CNN (1712.00726)."""

    def __init__(self, rpn_head: RPNHead, roi_head: RoIHead, **kwargs):
        super().__init__(**kwargs)
        self.rpn_head, self.roi_head = rpn_head, roi_head

    def losses(self, maps: list[Tensor], targets: list[dict[str, Tensor]], batch: Batch) -> dict[str, Tensor]:
        outputs = self.rpn_head(maps)
        losses = self.rpn_head.loss(*outputs, targets, batch.sizes, batch.padded)
        proposals = self.rpn_head.propose(*outputs, batch.sizes)
        return losses | self.roi_head.loss(maps, proposals, targets, batch.sizes)

    def detect(self, maps: list[Tensor], batch: Batch) -> list[tuple]:
        return self.roi_head.detect(maps, self.rpn_head.propose(*self.rpn_head(maps), batch.sizes), batch.sizes)


def without_crowds(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a target's boxes, labels and masks without those of crowds."""
    kept = {name: target[name] for name in ("boxes", "labels", "masks") if name in target}
    if "iscrowd" not in target:
        return kept
    single = target["iscrowd"] == 0
    return {name: values[single] for name, values in kept.items()}


def levels(detector: str, strides: Sequence[int]) -> list[int]:
    """Return which of maps of these strides a detector takes: the last of each from 4 (RetinaNet: 8) to 32."""
    last = {stride: index for index, stride in enumerate(strides)}
    return [last[stride] for stride in sorted(last) if (8 if detector == "retinanet" else 4) <= stride <= 32]


def create(
    detector: str,
    body: nn.Module,
    num_classes: int,
    /,
    channels: Count = 256,
    hidden: Count = 1024,
    rois: Count = 512,
    rpn_samples: Count = 256,
    proposals: Count = 1000,
    anchor_scale: Positive | None = None,
    test_size: Sequence[Count] = (800, 1333),
    score_thresh: Fraction = 0.05,
    detections: Count = 100,
    pad_to: Sequence[Count] | None = None,
    norm_eval: bool = False,
    no_decay: Sequence[str] = (),
    class_agnostic: bool = False,
    relu_before_extra: bool = False,
) -> Detector:
    """Build a detector for `num_classes` classes, background not counted.

    detector: retinanet, faster_rcnn, mask_rcnn, cascade_rcnn or cascade_mask_rcnn. body: of create_features, at the
    maps that `levels` names.
    channels: of the pyramid and of the heads' convolutions. hidden: of the box heads' linear layers.
    rois, rpn_samples: regions, and anchors of the RPN, sampled per image in training. proposals: per image that reach
    the box heads; training takes twice as many of each map, and those of a cascade keep twice as many.
    anchor_scale: an anchor's side in strides (None: 8; RetinaNet 4, and two more a third of an octave apart).
    score_thresh, detections: the lowest score, and the largest number of boxes, of an image's result.
    class_agnostic: of a cascade, see CascadeRoIHead. relu_before_extra: of RetinaNet's pyramid, see FPN.
    test_size, pad_to, norm_eval, no_decay: see Detector.
    """
    strides, widths = body.feature_info.reduction(), body.feature_info.channels()
    common = dict(body=body, test_size=test_size, divisor=max(strides), pad_to=pad_to)
    common |= dict(norm_eval=norm_eval, no_decay=no_decay)
    if detector == "retinanet":
        scales = [(anchor_scale or 4) * 2 ** (i / 3) for i in range(3)]
        anchors = Anchors([*strides, 2 * strides[-1], 4 * strides[-1]], scales)
        head = RetinaHead(channels, anchors, num_classes, score_thresh, detections)
        model: Detector = RetinaNet(head, neck=FPN(widths, channels, "conv", relu_before_extra), **common)
    else:
        cascade = detector.startswith("cascade")
        anchors = Anchors([*strides, 2 * strides[-1]], [anchor_scale or 8])
        rpn_head = RPNHead(channels, anchors, proposals, rpn_samples, of_cascade=cascade)
        make = partial(CascadeRoIHead, class_agnostic=class_agnostic) if cascade else RoIHead
        masks = "mask" in detector
        roi_head = make(strides, channels, hidden, num_classes, rois, score_thresh, detections, masks)
        model = RCNN(rpn_head, roi_head, neck=FPN(widths, channels, "pool"), **common)
    return model.train()


def to_onnx(model: Detector, size: tuple[int, int], file: Path) -> Path:
    """Write a detector as ONNX, for images of one height and width.

    Its input is `image`, (3, H, W) float32 from 0 to 1; its outputs are boxes (n, 4) in the image's pixels, scores
    (n,), labels (n,) from 1 and, where the detector has them, masks (n, 1, H, W), probabilities.
    """
    has_masks = isinstance(model, RCNN) and model.roi_head.has_masks
    names = ["boxes", "scores", "labels", *(["masks"] if has_masks else [])]
    with atomic_write(file) as temporary, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, on all that the size fixes
        options = dict(input_names=["image"], output_names=names, opset_version=17, dynamo=False)
        torch.onnx.export(of_one_image(model.cpu()), (torch.rand(3, *size),), str(temporary), **options)
    return file


def of_one_image(model: Detector) -> nn.Module:
    """Return a detector as a function of an image (3, H, W) that returns boxes, scores, labels and, if any, masks."""
    has_masks = isinstance(model, RCNN) and model.roi_head.has_masks
    return _OfOneImage(model, ["boxes", "scores", "labels", *(["masks"] if has_masks else [])]).eval()


class _OfOneImage(nn.Module):
    """A detector of one image, as a function of tensors."""

    def __init__(self, model: Detector, names: Sequence[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        (result,) = self.model([image])
        return tuple(result[name] for name in self.names)
