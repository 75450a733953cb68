"""ULSAM: the channels of a map are divided into subspaces, each gated by one attention map over its positions.

Paper: "ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks", WACV 2020,
arXiv 2006.15102.
Published code: Nandan91/ULSAM@9a07d68 (no licence; written here from the paper), of the layer only. Parameters map to
ours (`merge_subspaces`), outputs are equal. `saccade.backbones.insert` inserts the layer into any network; the models
here are timm's MobileNets with some layers replaced or followed by it.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..ops import subspace_gate
from .attention_maps import AttentionMap, GateMap, describe
from .base import create_model, make_cfg
from .layers import can_fuse
from .mobilenet import MobileNet, map_state_dict
from .published import unwrap


@register_notrace_module
class ULSAM(nn.Module):
    """x_n · (1 + A_n) in each subspace n of channels, A_n one softmax over all positions: (B, C, H, W) -> same.

    Args:
        dim: C.
        subspaces: number of subspaces g, which divides C.
        momentum: of the BatchNorms, as in PyTorch. With the published 0.9, probably meant as in TensorFlow, the running
            statistics are those of the last few batches.
    """

    def __init__(self, dim: int, subspaces: int = 4, momentum: float = 0.9, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if subspaces < 1 or dim % subspaces:
            raise ValueError(f"subspaces must divide the {dim} channels, got {subspaces}")
        self.conv = nn.Conv2d(dim, dim, 1, groups=dim, **dd)
        self.norm = nn.BatchNorm2d(dim, momentum=momentum, **dd)
        self.point = nn.Conv2d(dim, subspaces, 1, groups=subspaces, **dd)
        self.point_norm = nn.BatchNorm2d(subspaces, momentum=momentum, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if can_fuse(self.conv, self.norm, self.point, self.point_norm):
                return self._gated(x)
        a = self.maps(x)
        return x + (x.unflatten(1, [a.shape[1], -1]) * a.unsqueeze(2)).flatten(1, 2)

    def maps(self, x: Tensor) -> Tensor:
        """Return the attention map of each subspace, (B, subspaces, H, W): it sums to 1 over the positions."""
        s = self.point_norm(self.point(F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 1, 1)))
        return F.relu(s).flatten(2).softmax(2).view_as(s).to(x.dtype)

    def feature_info(self, location: str) -> dict:
        """Return the information that timm's EfficientNet needs about its blocks."""
        return dict(module="", num_chs=self.conv.out_channels)

    @torch.jit.unused
    def _gated(self, x: Tensor) -> Tensor:
        conv, norm, point, point_norm = self.conv, self.norm, self.point, self.point_norm
        if norm.training:
            norm.num_batches_tracked.add_(1)
            point_norm.num_batches_tracked.add_(1)
        return subspace_gate(
            x,
            conv.weight.flatten(),
            conv.bias,  # type: ignore[arg-type]
            norm.weight,
            norm.bias,
            point.weight.flatten(),
            point.bias,  # type: ignore[arg-type]
            point_norm.weight,
            point_norm.bias,
            norm.running_mean,
            norm.running_var,
            point_norm.running_mean,
            point_norm.running_var,
            norm.training,
            norm.momentum,  # type: ignore[arg-type]
            norm.eps,
        )


@describe.register(ULSAM)
def _(mixer: ULSAM, x: Tensor) -> Iterator[AttentionMap]:
    maps = mixer.maps(x)
    yield GateMap(kind="subspaces", grid=(x.shape[2], x.shape[3]), heads=maps.shape[1], images=len(x), gate=maps)


class ULSAMMobileNet(MobileNet):
    """timm's MobileNetV1 or V2 with ULSAM instead of or after some layers. Layers are counted as in the paper; the stem
    is 1.

    Args:
        generation: 1 or 2.
        replaced: layers that ULSAM replaces, including the shortcut; they must keep width and resolution.
        inserted: layers that ULSAM follows, as a separate block.
        subspaces: ULSAM's g, which divides the width of those layers.
        momentum: of ULSAM's BatchNorms.
        width: factor of the paper's channels.
        in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate: timm's.
    """

    def __init__(
        self,
        generation: int,
        replaced: tuple[int, ...] = (),
        inserted: tuple[int, ...] = (),
        subspaces: int = 4,
        momentum: float = 0.9,
        width: float = 1.0,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        super().__init__(
            generation, width, in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate, **dd
        )
        number, replaceable = 1, []
        for i, stage in enumerate(self.blocks):
            blocks = []
            for j, block in enumerate(stage):  # type: ignore[arg-type, var-annotated]
                number += 1
                dim = block.feature_info("")["num_chs"]
                if j:  # the first layer of a stage changes width or resolution
                    replaceable.append(number)
                blocks.append(ULSAM(dim, subspaces, momentum, **dd) if j and number in replaced else block)
                if number in inserted:
                    blocks.append(ULSAM(dim, subspaces, momentum, **dd))
            self.blocks[i] = nn.Sequential(*blocks)
        if not {*replaced} <= {*replaceable}:
            raise ValueError(f"replaced may have the layers {', '.join(map(str, replaceable))}, got {replaced}")
        if not {*inserted} <= {*range(2, number + 1)}:
            raise ValueError(f"inserted may have the layers from 2 to {number}, got {inserted}")


PARTS = {"conv_dws": "conv", "bn_dws": "norm", "conv_point": "point", "bn_point": "point_norm"}


def merge_subspaces(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the keys of published ULSAMs, which have a module for each subspace, to ours."""
    out: dict[str, Tensor] = {}
    for key, value in state_dict.items():  # subspace by subspace, in their order
        if match := re.fullmatch(rf"(.*?)subspaces\.\d+\.({'|'.join(PARTS)})\.(\w+)", key):
            key = f"{match[1]}{PARTS[match[2]]}.{match[3]}"
            if key in out:  # the count of batches is the same in all
                value = out[key] if value.ndim == 0 else torch.cat((out[key], value))
        out[key] = value
    return out


FIRST = {
    "0.0": "conv_dw",
    "0.1": "bn1",
    "1": "conv_pw",
    "2": "bn2",
}  # our names of torchvision's parts of a MobileNetV2
OTHERS = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}


def checkpoint_filter_fn(state_dict: dict, model: ULSAMMobileNet) -> dict[str, Tensor]:
    """Convert weights of torchvision's or timm's MobileNet with the published layer to ours."""
    return map_state_dict(merge_subspaces(unwrap(state_dict)), model, FIRST, OTHERS)


VARIANTS: dict[str, dict[str, Any]] = dict(  # the rows a to f of the paper's table, of which e is the plain name
    ulsam_mobilenet_v1=dict(generation=1, replaced=(12,)),
    ulsam_mobilenet_v1_075=dict(generation=1, replaced=(12,), width=0.75),
    ulsam_mobilenet_v1_050=dict(generation=1, replaced=(12,), width=0.5),
    ulsam_mobilenet_v2=dict(generation=2, replaced=(14, 17)),
    ulsam_mobilenet_v2_a=dict(generation=2, replaced=(14,)),
    ulsam_mobilenet_v2_b=dict(generation=2, replaced=(17,)),
    ulsam_mobilenet_v2_c=dict(generation=2, replaced=(11, 14)),
    ulsam_mobilenet_v2_d=dict(generation=2, replaced=(16, 17)),
    ulsam_mobilenet_v2_f=dict(generation=2, replaced=(13, 14, 16, 17)),
)
# The paper names the replaced layers of V2, but for c one of several equal choices. Of V1's five equal layers, 8 to 12,
# it does not say which.
POSTER = "poster of the published code, 4 subspaces"
PUBLISHED = dict(  # ImageNet-1K top-1 and its source
    ulsam_mobilenet_v1=(70.43, POSTER),
    ulsam_mobilenet_v1_075=(67.81, POSTER),
    ulsam_mobilenet_v1_050=(63.25, POSTER),
    ulsam_mobilenet_v2=(71.52, POSTER),
    ulsam_mobilenet_v2_d=(70.74, POSTER),
    ulsam_mobilenet_v2_f=(69.72, POSTER),
)
CFG = make_cfg(
    first_conv="conv_stem",
    classifier="classifier",
    origin_url="https://github.com/Nandan91/ULSAM",  # without a license, and without weights
    paper_name="ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional Neural Networks",
    paper_ids="arXiv:2006.15102",
)
default_cfgs = generate_default_cfgs({f"{name}.untrained": CFG for name in VARIANTS})


def _create(name: str, pretrained: bool, **kwargs) -> ULSAMMobileNet:
    kwargs = VARIANTS[name] | kwargs
    return create_model(ULSAMMobileNet, name, pretrained, checkpoint_filter_fn, None, (0, 1, 2, 3, 4), **kwargs)


@register_model
def ulsam_mobilenet_v1(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v1", pretrained, **kwargs)


@register_model
def ulsam_mobilenet_v1_075(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v1_075", pretrained, **kwargs)


@register_model
def ulsam_mobilenet_v1_050(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v1_050", pretrained, **kwargs)


@register_model
def ulsam_mobilenet_v2(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v2", pretrained, **kwargs)


@register_model
def ulsam_mobilenet_v2_a(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v2_a", pretrained, **kwargs)


@register_model
def ulsam_mobilenet_v2_b(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v2_b", pretrained, **kwargs)


@register_model
def ulsam_mobilenet_v2_c(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v2_c", pretrained, **kwargs)


@register_model
def ulsam_mobilenet_v2_d(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v2_d", pretrained, **kwargs)


@register_model
def ulsam_mobilenet_v2_f(pretrained: bool = False, **kwargs) -> ULSAMMobileNet:
    return _create("ulsam_mobilenet_v2_f", pretrained, **kwargs)
