"""Detectors and segmenters that saccade 0.1 trained, their parameters under today's names."""

import re
import warnings

import torch
from torch import Tensor

RULES = (
    (r"^backbone\.body\.", "backbone."),
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^backbone\.fpn\.extra_blocks\.p(\d)\.", lambda m: f"neck.fpn_convs.{int(m[1]) - 3}.conv."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_head.rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_head.rpn_cls."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_head.rpn_reg."),
    (r"^head\.classification_head\.conv\.(\d)\.0\.", r"bbox_head.cls_convs.\1.conv."),
    (r"^head\.regression_head\.conv\.(\d)\.0\.", r"bbox_head.reg_convs.\1.conv."),
    (r"^head\.classification_head\.cls_logits\.", "bbox_head.retina_cls."),
    (r"^head\.regression_head\.bbox_reg\.", "bbox_head.retina_reg."),
    (r"^roi_heads\.box_head\.fc6\.", "roi_head.bbox_head.shared_fcs.0."),
    (r"^roi_heads\.box_head\.fc7\.", "roi_head.bbox_head.shared_fcs.1."),
    (r"^roi_heads\.box_heads\.(\d)\.([0-3])\.0\.", r"roi_head.bbox_head.\1.shared_convs.\2.conv."),
    (r"^roi_heads\.box_heads\.(\d)\.([0-3])\.1\.", r"roi_head.bbox_head.\1.shared_convs.\2.bn."),
    (r"^roi_heads\.box_heads\.(\d)\.5\.", r"roi_head.bbox_head.\1.shared_fcs.0."),
    (r"^roi_heads\.box_predictor\.", "roi_head.bbox_head."),
    (r"^roi_heads\.box_predictors\.(\d)\.", r"roi_head.bbox_head.\1."),
    (r"^roi_heads\.mask_heads\.(\d)\.0\.", r"roi_head.mask_head.\1."),
    (r"^roi_heads\.mask_heads\.(\d)\.1\.", r"roi_head.mask_head.\1."),
    (r"^roi_heads\.mask_head\.", "roi_head.mask_head."),
    (r"^roi_heads\.mask_predictor\.", "roi_head.mask_head."),
    (r"^(roi_head\.mask_head\.(?:\d\.)?)(\d)\.0\.", r"\1convs.\2.conv."),
    (r"^head\.pooling\.pools\.", "decode_head.psp_modules."),
    (r"^head\.pooling\.fuse\.", "decode_head.bottleneck."),
    (r"^head\.laterals\.", "decode_head.lateral_convs."),
    (r"^head\.smooth\.", "decode_head.fpn_convs."),
    (r"^head\.fuse\.", "decode_head.fpn_bottleneck."),
    (r"^head\.classifier\.1\.", "decode_head.conv_seg."),
    (r"^head\.pyramid\.inner_blocks\.(\d)\.0\.", r"neck.lateral_convs.\1.conv."),
    (r"^head\.pyramid\.layer_blocks\.(\d)\.0\.", r"neck.fpn_convs.\1.conv."),
    (r"^head\.scales\.(\d)\.(\d)\.", lambda m: f"decode_head.scale_heads.{m[1]}.{2 * int(m[2])}."),
    (r"^auxiliary\.conv\.", "auxiliary_head.convs.0."),
    (r"^auxiliary\.classifier\.1\.", "auxiliary_head.conv_seg."),
    (r"\.conv5_mask\.", ".upsample."),
    (r"\.mask_fcn_logits\.", ".conv_logits."),
    (r"\.cls_score\.", ".fc_cls."),
    (r"\.bbox_pred\.", ".fc_reg."),
)


def is_legacy(tensors: dict[str, Tensor]) -> bool:
    """Return whether tensors are those of a detector or segmenter that saccade 0.1 trained."""
    return any(key.startswith(("backbone.fpn.", "head.classifier.")) for key in tensors)


def convert(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Return the tensors under today's names and label order, and the arguments of `detectors.create` they need.

    Warns that results differ slightly: version 0.1 resized images otherwise, and its anchors and RoIAlign were
    torchvision's.
    """
    warnings.warn(
        "this model was trained by saccade 0.1, which resized images otherwise and had torchvision's anchors and "
        "RoIAlign: it opens, but its results differ slightly, and a short training brings it back to its best",
        stacklevel=2,
    )
    converted = {}
    for key, value in tensors.items():
        if key in ("mean", "std"):  # of the images, from the config since
            continue
        for pattern, replacement in RULES:
            key = re.sub(pattern, replacement, key)
        converted[key] = value
    agnostic = False
    for key, value in converted.items():
        if ".fc_cls." in key:  # the background was the first class
            converted[key] = torch.cat((value[1:], value[:1]))
        elif ".fc_reg." in key:
            agnostic |= len(value) == 4
            converted[key] = value if len(value) == 4 else value[4:]
        elif ".conv_logits." in key:
            converted[key] = value[1:]
        elif "bbox_head.retina_cls." in key:
            anchors = len(converted[key.replace("retina_cls", "retina_reg")]) // 4
            converted[key] = value.unflatten(0, (anchors, -1))[:, 1:].flatten(0, 1)
    arguments = dict(class_agnostic=agnostic) if any("bbox_head.2." in key for key in converted) else {}
    if any("bbox_head.retina_cls" in key for key in converted):
        arguments["relu_before_extra"] = True
    return converted, arguments
