"""UPerNet (Xiao et al., arXiv 1807.10221): a feature pyramid, with pooling of the last map, fused into one.

In mmsegmentation's form, on which the published results of the zoo's backbones rest.
"""

from collections.abc import Sequence

from timm.layers import ConvNormAct
from torch import Tensor, cat, nn
from torch.nn.functional import conv2d

from .fcn import classifier, initialise, resize


class PyramidPooling(nn.Module):
    """A map (B, C, h, w) beside its own averages over grids of `bins`: to (B, channels, h, w)."""

    def __init__(self, in_channels: int, channels: int, bins: Sequence[int]):
        super().__init__()
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), ConvNormAct(in_channels, channels)) for n in bins
        )
        self.fuse = ConvNormAct(in_channels + len(bins) * channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(cat([x, *(resize(pool(x), x.shape[2:]) for pool in self.pools)], 1))


class UPerNet(nn.Module):
    """The backbone's maps (B, C_i, h_i, w_i), the finest first, to logits (B, classes, h_0, w_0).

    in_channels: C_i. channels: of all its convolutions. bins: cells a side that the last map is pooled to.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        classes: int,
        channels: int = 512,
        bins: Sequence[int] = (1, 2, 3, 6),
        drop_rate: float = 0.1,
    ):
        super().__init__()
        self.pooling = PyramidPooling(in_channels[-1], channels, bins)
        self.laterals = nn.ModuleList(ConvNormAct(c, channels) for c in in_channels[:-1])
        self.smooth = nn.ModuleList(ConvNormAct(channels, channels, 3) for _ in in_channels[:-1])
        self.fuse = ConvNormAct(len(in_channels) * channels, channels, 3)
        self.classifier = classifier(channels, classes, drop_rate)
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        x = self.pooling(maps[-1])
        levels = [x]  # the coarsest first
        for i in reversed(range(len(self.laterals))):
            x = self.laterals[i](maps[i]) + resize(x, maps[i].shape[2:])
            levels.append(self.smooth[i](x))
        del x
        return self.classifier(self._fused(levels[::-1], size))

    def _fused(self, levels: list[Tensor], size: Sequence[int]) -> Tensor:
        """The levels, the finest first, at `size`, next to each other, through the last convolution."""
        if self.training:
            return self.fuse(cat([resize(x, size) for x in levels], 1))
        # The sum of each level's part, so that a large picture never has all of them enlarged at once.
        parts = self.fuse.conv.weight.chunk(len(levels), 1)
        total = None
        for part in reversed(parts):  # the coarsest level is the last of the list
            y = conv2d(resize(levels.pop(), size), part, padding=self.fuse.conv.padding)
            total = y if total is None else total.add_(y)
        return self.fuse.bn(total)
