"""Every timm model, ours included, as a backbone of OpenMMLab's libraries: MMDetection and MMSegmentation.

    custom_imports = dict(imports=["saccade.integrations.mmdet"])
    model = dict(backbone=dict(type="SaccadeBackbone", name="biformer_t"), neck=dict(in_channels=[64, 128, 256, 512]))

It is registered with mmengine, which all of them use. If mmcv has no compiled extension (mmcv-lite), this module
provides a replacement that computes NMS and RoIAlign with torchvision, on any device, and raises for all other
operators. Import it before mmdet.models or mmseg.models.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import saccade.backbones  # noqa: F401  (registers ours)
import timm
import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import Format
from torch import Tensor, nn
from torchvision.ops import nms


@MODELS.register_module()
class SaccadeBackbone(BaseModule):
    """Return the maps of a timm model's stages: images (B, 3, H, W) to a tuple of (B, C, H / s, W / s).

    name, kwargs: of timm.create_model; None keeps the model's default. out_indices: the stages to return; None: all.
    checkpoint: a file of weights of the whole classifier that timm can load; pretrained: load the weights that timm
    publishes. norm_eval: keep BatchNorm in evaluation mode in training. The neck's in_channels are `channels`.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] | None = None,
        checkpoint: str | None = None,
        pretrained: bool = False,
        norm_eval: bool = False,
        init_cfg: None = None,
        **kwargs: Any,
    ):
        if init_cfg is not None:
            raise ValueError(f"init_cfg must be None, got {init_cfg}: weights come by checkpoint or pretrained")
        if not isinstance(pretrained, bool):  # the segmentors pass their own `pretrained` on
            raise ValueError(f"pretrained must be True or False, got {pretrained!r}: set the model's pretrained=None")
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise ValueError(f"checkpoint must be a file of weights, and there is no {checkpoint}")
        super().__init__()
        wanted: dict[str, Any] = {} if out_indices is None else dict(out_indices=tuple(out_indices))
        # As timm takes a whole model's file; -1: whatever its number of classes, the classifier is not here.
        overlay: dict[str, Any] = {}
        if checkpoint is not None:
            overlay = dict(pretrained_cfg_overlay=dict(file=str(checkpoint), num_classes=-1))
        given: dict[str, Any] = dict(features_only=True, pretrained=pretrained or checkpoint is not None)
        self.body = timm.create_model(name, **given, **wanted, **overlay, **kwargs)
        self.channels: list[int] = self.body.feature_info.channels()
        self.strides: list[int] = self.body.feature_info.reduction()
        self.channels_last = getattr(self.body, "output_fmt", None) == Format.NHWC  # timm's Swin, for one
        self.norm_eval = norm_eval

    def init_weights(self) -> None:
        """Keep the weights that the model has; mmengine's initialization would replace them."""

    def train(self, mode: bool = True) -> "SaccadeBackbone":
        super().train(mode)
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.permute(0, 3, 1, 2) if self.channels_last else y for y in self.body(x))


def make_extension() -> ModuleType:
    """Return a replacement for mmcv's compiled extension, for mmcv's operators to call."""

    def nms_(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
        if offset:
            raise NotImplementedError("nms with offset=1 needs mmcv with its compiled operators, got mmcv-lite")
        return nms(boxes, scores, iou_threshold)

    def sizes(pool_mode: int, scale: float, height: int, width: int) -> tuple[float, int, int]:
        if pool_mode != 1:
            raise NotImplementedError("roi_align with pool_mode=max needs mmcv with its compiled operators")
        return scale, height, width

    def forward(
        x, rois, out, _y, _x, *, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned
    ):
        at = sizes(pool_mode, spatial_scale, aligned_height, aligned_width)
        out.copy_(torch.ops.torchvision.roi_align(x, rois, *at, sampling_ratio, aligned))

    def backward(
        dy, rois, _y, _x, dx, *, aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned
    ):
        at = sizes(pool_mode, spatial_scale, aligned_height, aligned_width)
        dx.copy_(torch.ops.torchvision._roi_align_backward(dy, rois, *at, *dx.shape, sampling_ratio, aligned))

    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(f"{name} needs mmcv with its compiled operators, got mmcv-lite")

        return call

    module: Any = ModuleType("mmcv._ext")
    module.__spec__ = ModuleSpec("mmcv._ext", None)  # mmengine looks for it
    module.nms, module.roi_align_forward, module.roi_align_backward = nms_, forward, backward
    module.__getattr__ = missing
    return module


if find_spec("mmcv") is not None and find_spec("mmcv._ext") is None:
    sys.modules["mmcv._ext"] = make_extension()
