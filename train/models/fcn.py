"""The head of a fully convolutional network (arXiv:1411.4038) on one map, and the base of segmentation heads.

Parameters have the names of MMSegmentation's files.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import interpolate

from .fpn import ConvUnit


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps (B, C, h, w) bilinearly, with align_corners=False."""
    return x if tuple(x.shape[2:]) == tuple(size) else interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class SegmentationHead(nn.Module):
    """A head that ends with channel dropout and `conv_seg`, a 1x1 convolution to the classes."""

    def __init__(self, channels: int, num_classes: int, drop_rate: float):
        super().__init__()
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.dropout = nn.Dropout2d(drop_rate)

    def initialize(self) -> None:
        """Draw convolutions from Kaiming's normal distribution and `conv_seg` from one of std 0.01."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.conv_seg.weight, std=0.01)

    def classify(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(x))


class FCNHead(SegmentationHead):
    """One of the backbone's maps to logits (B, num_classes, h, w) of its size, after one 3x3 convolution.

    level: which map.
    """

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, level: int = -2, channels: int = 256, drop_rate: float = 0.1
    ):
        super().__init__(channels, num_classes, drop_rate)
        self.level = level
        self.convs = nn.ModuleList([ConvUnit(in_channels[level], channels, 3, norm=True, relu=True)])
        self.initialize()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classify(self.convs[0](maps[self.level]))
