"""Semantic FPN (arXiv:1901.02446): a feature pyramid's levels enlarged step by step and added.

As in MMSegmentation, with the names of its files; the pyramid is the segmenter's `neck`.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .fcn import SegmentationHead, resize
from .fpn import ConvUnit


class SemanticFPN(SegmentationHead):
    """A pyramid's maps (B, in_channels, h_i, w_i), the finest first, to logits (B, num_classes, h_0, w_0).

    strides: of the maps, in pixels of the image. channels: of the convolutions. A level that is 2^n times coarser than
    the finest has n convolutions, each followed by an enlargement to twice the size.
    """

    def __init__(
        self,
        in_channels: int,
        strides: Sequence[int],
        num_classes: int,
        channels: int = 128,
        drop_rate: float = 0.1,
    ):
        super().__init__(channels, num_classes, drop_rate)
        self.scale_heads = nn.ModuleList()
        for stride in strides:
            layers, width = [], in_channels
            halvings = round(math.log2(stride / strides[0]))
            for _ in range(max(1, halvings)):
                layers.append(ConvUnit(width, channels, 3, norm=True, relu=True))
                if halvings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
                width = channels
            self.scale_heads.append(nn.Sequential(*layers))
        self.initialize()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        total = resize(self.scale_heads[0](maps[0]), size)
        for head, x in zip(self.scale_heads[1:], maps[1:]):
            total = total + resize(head(x), size)
        return self.classify(total)
