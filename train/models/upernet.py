"""UPerNet (arXiv:1807.10221): a feature pyramid, its coarsest map pooled at several sizes, fused into one map.

As in MMSegmentation, with the names of its files.
"""

from collections.abc import Sequence

from torch import Tensor, cat, nn
from torch.nn.functional import conv2d

from .fcn import SegmentationHead, resize
from .fpn import ConvUnit


class UPerNet(SegmentationHead):
    """Compute logits (B, num_classes, h_0, w_0) from the backbone's maps (B, C_i, h_i, w_i), the finest first.

    in_channels: C_i. channels: of all its convolutions. bins: the grid sizes that the last map is pooled to.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int = 512,
        bins: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
    ):
        super().__init__(channels, num_classes, drop_rate)
        *finer, last = in_channels

        def unit(width: int, kernel: int) -> ConvUnit:
            return ConvUnit(width, channels, kernel, norm=True, relu=True)

        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(n), unit(last, 1)) for n in bins)
        self.bottleneck = unit(last + len(bins) * channels, 3)
        self.lateral_convs = nn.ModuleList(unit(width, 1) for width in finer)
        self.fpn_convs = nn.ModuleList(unit(channels, 3) for _ in finer)
        self.fpn_bottleneck = unit(len(in_channels) * channels, 3)
        self.initialize()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size, last = maps[0].shape[2:], maps[-1]
        x = self.bottleneck(cat([last, *(resize(pool(last), last.shape[2:]) for pool in self.psp_modules)], 1))
        levels = [x]  # the coarsest first
        for i in reversed(range(len(self.lateral_convs))):
            x = self.lateral_convs[i](maps[i]) + resize(x, maps[i].shape[2:])
            levels.append(self.fpn_convs[i](x))
        del x
        return self.classify(self._fuse(levels[::-1], size))

    def _fuse(self, levels: list[Tensor], size: Sequence[int]) -> Tensor:
        """Resize the levels, the finest first, to `size`, concatenate them, and apply the last convolution."""
        if self.training:
            return self.fpn_bottleneck(cat([resize(x, size) for x in levels], 1))
        # Convolve and sum level by level, so that the levels of a large image are never all enlarged at once.
        conv = self.fpn_bottleneck.conv
        parts = conv.weight.chunk(len(levels), 1)
        total = None
        for part in reversed(parts):  # the coarsest level is the last of the list
            y = conv2d(resize(levels.pop(), size), part, padding=conv.padding)
            total = y if total is None else total.add_(y)
        return self.fpn_bottleneck.bn(total).relu()
