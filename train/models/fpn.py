"""The feature pyramid network (arXiv:1612.03144), with the parameter names of MMDetection's files."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ConvUnit(nn.Module):
    """A convolution, named as in OpenMMLab's files: `conv`, and `bn` where it has BatchNorm and therefore no bias.

    relu: apply ReLU last.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int = 1, norm: bool = False, relu: bool = False
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(channels)
        self.norm, self.relu = norm, relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)) if self.norm else self.conv(x)
        return x.relu_() if self.relu else x  # in place: no backward pass needs what was there


class FPN(nn.Module):
    """Fuse maps (B, C_i, H_i, W_i) of falling resolution into as many with `channels` channels, and add coarser ones.

    in_channels: C_i of each map. extra: "none"; "pool", one more map by taking every second value of the last output;
    "conv", two more by convolutions of stride 2, the first on the last input. relu_before_extra: apply ReLU between
    those two.
    """

    def __init__(self, in_channels: Sequence[int], channels: int, extra: str = "none", relu_before_extra: bool = False):
        super().__init__()
        self.extra, self.relu_before_extra = extra, relu_before_extra
        self.lateral_convs = nn.ModuleList(ConvUnit(width, channels, 1) for width in in_channels)
        self.fpn_convs = nn.ModuleList(ConvUnit(channels, channels, 3) for _ in in_channels)
        if extra == "conv":
            self.fpn_convs.extend(ConvUnit(width, channels, 3, stride=2) for width in (in_channels[-1], channels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], laterals[i - 1].shape[2:], mode="nearest")
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        if self.extra == "none":
            return outs
        if self.extra == "pool":
            return [*outs, F.max_pool2d(outs[-1], 1, stride=2)]
        sixth, seventh = self.fpn_convs[-2:]
        outs.append(sixth(maps[-1]))
        return [*outs, seventh(outs[-1].relu() if self.relu_before_extra else outs[-1])]
