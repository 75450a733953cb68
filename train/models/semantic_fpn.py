"""Semantic FPN (Kirillov et al., arXiv 1901.02446): a feature pyramid whose levels are enlarged in steps and added."""

import math
from collections.abc import Sequence

from timm.layers import ConvNormAct
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from .fcn import classifier, initialise, resize


class SemanticFPN(nn.Module):
    """The backbone's maps (B, C_i, h_i, w_i), the finest first, to logits (B, classes, h_0, w_0).

    in_channels: C_i. strides: of the maps, in pixels of the picture. pyramid: channels of the feature pyramid.
    channels: of the head behind it.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        classes: int,
        pyramid: int = 256,
        channels: int = 128,
        drop_rate: float = 0.1,
    ):
        super().__init__()
        halvings = [round(math.log2(stride / strides[0])) for stride in strides]
        self.scales = nn.ModuleList(
            nn.ModuleList(ConvNormAct(pyramid if i == 0 else channels, channels, 3) for i in range(max(1, n)))
            for n in halvings
        )
        self.classifier = classifier(channels, classes, drop_rate)
        initialise(self)
        self.pyramid = FeaturePyramidNetwork(list(in_channels), pyramid)
        for module in self.pyramid.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[0].shape[2:]
        total = 0
        for i, x in enumerate(self.pyramid({str(i): x for i, x in enumerate(maps)}).values()):
            for conv in self.scales[i]:
                x = conv(x)
                if tuple(x.shape[2:]) != tuple(size):  # twice as large after each, at last of the first map's size
                    x = resize(x, [2 * n for n in x.shape[2:]])
            total = total + resize(x, size)
        return self.classifier(total)
