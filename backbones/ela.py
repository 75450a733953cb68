"""ELA: the rows and columns of a map are gated by a 1D convolution of their means.

Paper: "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", arXiv 2403.01123.
Published code: Xuwei86/ELA_Code@cd4594d (Apache-2.0 for MobileNetV2, no licence for the rest; written here from the
paper). `saccade.backbones.insert` inserts the layer `ELA` into any network; the models here are timm's, with the layer
at the published positions. Outputs are equal, and parameters map one to one (`checkpoint_filter_fn`).
timm's own `create_attn("ela")` is another module.
"""

from collections.abc import Iterator
from typing import Any

import torch
from timm.models import ResNet, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from ..ops import strip_gate
from .attention_maps import AttentionMap, GateMap, HasAttentionMaps, describe
from .base import create_model, make_cfg
from .layers import can_fuse
from .mobilenet import MobileNet, map_state_dict
from .published import complete, rename_key, unwrap

VERSIONS = dict(t=(5, 1, 32), b=(7, 1, 16), s=(5, 8, 16), l=(7, 8, 16))  # kernel, channels per group, norm groups


@register_notrace_module
class ELA(nn.Module):
    """x · a_h · a_w with a = sigmoid(GroupNorm(conv(mean over the other axis))): (B, C, H, W) -> same.

    Args:
        dim: C, a multiple of 16, or of 32 for version "t".
        version: "t", "b", "s" or "l", from the smallest to the largest.
        residual: add x. Without it a new layer scales its input by about 1/4, since sigmoids start near 1/2: use it
            when inserting the layer into a trained network.
    """

    def __init__(self, dim: int, version: str = "s", residual: bool = False, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if version not in VERSIONS:
            raise ValueError(f"version must be one of {', '.join(map(repr, VERSIONS))}, got {version!r}")
        kernel, per_group, norm_groups = VERSIONS[version]
        if dim % norm_groups:
            raise ValueError(f"ELA {version!r} takes a multiple of {norm_groups} channels, got {dim}")
        self.residual = residual
        self.conv = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim // per_group, bias=False, **dd)
        self.gn = nn.GroupNorm(norm_groups, dim, **dd)

    def extra_repr(self) -> str:
        return f"residual={self.residual}"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            gn = self.gn
            if can_fuse(self.conv, gn, fusible=(nn.Conv1d, nn.GroupNorm)) and self.conv.bias is None:
                return strip_gate(x, self.conv.weight, gn.weight, gn.bias, gn.num_groups, gn.eps, self.residual)
        rows, columns = self.gates(x)
        y = x * rows * columns
        return x + y if self.residual else y

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gates of rows (B, C, H, 1) and columns (B, C, 1, W)."""
        return self.gate(x.mean(3)).unsqueeze(3), self.gate(x.mean(2)).unsqueeze(2)

    def gate(self, mean: Tensor) -> Tensor:  # (B, C, L) -> same
        return self.gn(self.conv(mean)).sigmoid().to(mean.dtype)


@describe.register(ELA)
def _(mixer: ELA, x: Tensor) -> Iterator[AttentionMap]:
    rows, columns = mixer.gates(x)
    yield GateMap(kind="gate", grid=(x.shape[2], x.shape[3]), heads=x.shape[1], images=len(x), gate=rows * columns)


class ELAResNet(HasAttentionMaps, ResNet):
    """timm's ResNet with ELA in each block: after the 3x3 convolution of a bottleneck (with its norm and activation),
    or last in the branch of a basic block.

    Args:
        block: BasicBlock or Bottleneck of timm.
        layers: blocks per stage.
        version: ELA's, "t", "b", "s" or "l".
        residual: whether ELA adds its input, as in the published networks.
        in_chans, num_classes, global_pool, output_stride, channels, drop_rate, drop_path_rate, zero_init_last: timm's.
    """

    def __init__(
        self,
        block: type[nn.Module],
        layers: tuple[int, ...],
        version: str = "s",
        residual: bool = True,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        channels: tuple[int, ...] = (64, 128, 256, 512),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = True,
        device=None,
        dtype=None,
    ):
        dd = dict(device=device, dtype=dtype)
        super().__init__(
            block,  # type: ignore[arg-type]
            layers,
            num_classes=num_classes,
            in_chans=in_chans,
            output_stride=output_stride,
            global_pool=global_pool,
            channels=channels,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            **dd,
        )
        for m in self.modules():  # into places that timm's blocks have, empty otherwise
            if isinstance(m, BasicBlock):
                m.se = ELA(m.conv2.out_channels, version, residual, **dd)
            elif isinstance(m, Bottleneck):
                m.aa = ELA(m.conv2.out_channels, version, residual, **dd)


class ELAMobileNetV2(MobileNet):
    """timm's MobileNetV2 with ELA after the depthwise convolution of each block that expands.

    Args:
        version: ELA's, "b", "s" or "l"; "t" does not fit the channels.
        residual: whether ELA adds its input, unlike in the published network.
        width: factor of the paper's channels.
        in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate: timm's.
    """

    def __init__(
        self,
        version: str = "l",
        residual: bool = False,
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
        super().__init__(2, width, in_chans, num_classes, global_pool, output_stride, drop_rate, drop_path_rate, **dd)
        for stage in self.blocks[1:]:  # type: ignore[attr-defined]  # all but the first, which does not expand
            for block in stage:
                block.se = ELA(block.conv_dw.out_channels, version, residual, **dd)


FIRST = {"0": "conv_dw", "1": "bn1", "3": "conv_pw", "4": "bn2"}  # our names of the published MobileNetV2's parts
OTHERS = {"0": "conv_pw", "1": "bn1", "3": "conv_dw", "4": "bn2", "6": "se", "7": "conv_pwl", "8": "bn3"}


def checkpoint_filter_fn(state_dict: dict, model: ELAResNet | ELAMobileNetV2) -> dict[str, Tensor]:
    """Convert weights under the published names to ours. If the file has no classifier, the model's own is kept."""
    state_dict = unwrap(state_dict)
    if isinstance(model, ELAMobileNetV2):
        return map_state_dict(state_dict, model, FIRST, OTHERS)
    rules = [(r"\.feat0\.", ".se."), (r"\.feat1\.", ".aa.")]  # all else is torchvision's, and timm's
    out = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
    out |= {rename_key(key, rules): value for key, value in state_dict.items()}
    for layer in ("layer1.", "layer2.", "layer3.", "layer4."):
        out = complete(out, model, layer)
    return out


VARIANTS: dict[str, dict[str, Any]] = dict(
    ela_resnet18=dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    ela_resnet34=dict(block=BasicBlock, layers=(3, 4, 6, 3)),
    ela_resnet50=dict(block=Bottleneck, layers=(3, 4, 6, 3)),
    ela_resnet101=dict(block=Bottleneck, layers=(3, 4, 23, 3)),
    ela_mobilenetv2=dict(),
)
# The paper's tables do not define positions and versions clearly. Each model has the version of the published file.
PUBLISHED = dict(  # ImageNet-1K top-1 and its source
    ela_mobilenetv2=(71.9, "best of the published logs, which do not name the version"),
)


def _cfg(name: str) -> dict:
    layers: dict[str, Any] = dict(first_conv="conv1", classifier="fc")
    if "mobilenet" in name:  # of the published code, that for MobileNetV2 has a license
        layers = dict(first_conv="conv_stem", classifier="classifier", license="apache-2.0")
    return make_cfg(
        interpolation="bilinear",  # torchvision's default, which the published script leaves as it is
        origin_url="https://github.com/Xuwei86/ELA_Code",
        paper_name="ELA: Efficient Local Attention for Deep Convolutional Neural Networks",
        paper_ids="arXiv:2403.01123",
        **layers,
    )


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(name) for name in VARIANTS})


def _create(name: str, pretrained: bool, **kwargs) -> Any:
    kwargs = VARIANTS[name] | kwargs
    cls = ELAResNet if "layers" in kwargs else ELAMobileNetV2
    return create_model(cls, name, pretrained, checkpoint_filter_fn, None, (0, 1, 2, 3, 4), **kwargs)


@register_model
def ela_resnet18(pretrained: bool = False, **kwargs) -> ELAResNet:
    return _create("ela_resnet18", pretrained, **kwargs)


@register_model
def ela_resnet34(pretrained: bool = False, **kwargs) -> ELAResNet:
    return _create("ela_resnet34", pretrained, **kwargs)


@register_model
def ela_resnet50(pretrained: bool = False, **kwargs) -> ELAResNet:
    return _create("ela_resnet50", pretrained, **kwargs)


@register_model
def ela_resnet101(pretrained: bool = False, **kwargs) -> ELAResNet:
    return _create("ela_resnet101", pretrained, **kwargs)


@register_model
def ela_mobilenetv2(pretrained: bool = False, **kwargs) -> ELAMobileNetV2:
    return _create("ela_mobilenetv2", pretrained, **kwargs)
