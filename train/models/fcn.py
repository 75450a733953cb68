"""The plain head of a fully convolutional network (arXiv 1411.4038) on one map: the auxiliary head of UPerNet."""

from collections.abc import Sequence

from timm.layers import ConvNormAct
from torch import Tensor, nn
from torch.nn.functional import interpolate


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) at another size, bilinear with the corners of pixels aligned, not their centres."""
    return x if tuple(x.shape[2:]) == tuple(size) else interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def initialise(head: nn.Module) -> None:
    """Kaiming's normal for convolutions, a normal of std 0.01 for the classifier, as mmsegmentation's heads begin."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(head.classifier[1].weight, std=0.01)


def classifier(channels: int, classes: int, drop_rate: float) -> nn.Sequential:
    """Whole channels are dropped at random."""
    return nn.Sequential(nn.Dropout2d(drop_rate), nn.Conv2d(channels, classes, 1))


class FCNHead(nn.Module):
    """One of the backbone's maps to logits (B, classes, h, w) of its size, after one 3x3 convolution.

    level: which map.
    """

    def __init__(
        self, in_channels: Sequence[int], classes: int, level: int = -2, channels: int = 256, drop_rate: float = 0.1
    ):
        super().__init__()
        self.level = level
        self.conv = ConvNormAct(in_channels[level], channels, 3)
        self.classifier = classifier(channels, classes, drop_rate)
        initialise(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.classifier(self.conv(maps[self.level]))
