"""ResNet-101 with modulated deformable convolutions in its last two stages: the image backbone of published DFA3D.

Papers: "Deep Residual Learning for Image Recognition", arXiv 1512.03385; "Deformable ConvNets v2", arXiv 1811.11168.
Written from a description of the network that MMDetection builds for BEVFormer (arXiv 2203.17270); modules have its
names, so that the `img_backbone.` part of a published file fits as it is, but for the order of the input channels.

Where a stage halves the map, its first block does so in its first 1x1 convolution ("caffe" style), as timm's and
torchvision's ResNets do not.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d

# Of published files: images are BGR from 0 to 255 less a mean; here RGB from 0 to 1, conv1's input reversed.
MEAN, STD = (123.675 / 255, 116.28 / 255, 103.53 / 255), (1 / 255,) * 3


class ModulatedDeformConv(nn.Module):
    """A 3x3 convolution each of whose taps another convolution displaces and weights: (B, C, H, W) -> same."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dim, 3, 3))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        # Of each tap, row by row, (dy, dx); then of each tap the logit of its weight.
        self.conv_offset = nn.Conv2d(dim, 27, 3, padding=1)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        offset, mask = self.conv_offset(x).split((18, 9), 1)
        return deform_conv2d(x, offset, self.weight.to(x.dtype), padding=1, mask=mask.sigmoid())


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut: (B, C, H, W) -> (B, 4 · width, H / stride, W / stride)."""

    def __init__(self, in_chans: int, width: int, stride: int, deformable: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = ModulatedDeformConv(width) if deformable else nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride > 1 or in_chans != 4 * width:
            conv = nn.Conv2d(in_chans, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return (self.bn3(self.conv3(x)) + shortcut).relu()


class ResNetDCN(nn.Module):
    """Images (B, in_chans, H, W) -> the maps of some stages, finest first.

    Args:
        out_strides: of the maps wanted, of 4, 8, 16 and 32.
        in_chans: channels of the images.
        depths: blocks of each stage; the convolutions of the last two are deformable.
        width: of the first stage's blocks inside.
    """

    strides = (4, 8, 16, 32)

    def __init__(
        self,
        out_strides: Sequence[int] = strides,
        in_chans: int = 3,
        depths: tuple[int, int, int, int] = (3, 4, 23, 3),
        width: int = 64,
    ):
        super().__init__()
        self.out_strides, self.channels = tuple(out_strides), [4 * width * s // 4 for s in out_strides]
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        dim = width
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(Bottleneck(dim, width << i, 2 if i and not j else 1, deformable=i >= 2))
                dim = 4 * width << i
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor) -> list[Tensor]:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        maps = []
        for stride, stage in zip(self.strides, (self.layer1, self.layer2, self.layer3, self.layer4)):
            for block in stage:
                recompute = self.grad_checkpointing and self.training
                x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if stride in self.out_strides:
                maps.append(x)
        return maps
