"""ELA with the published arithmetic, two means and two products over the map (arXiv 2403.01123).

The peers of saccade's `ela_*` in tools/benchmark.py; they take the same state dict. The networks are timm's in both.
"""

import timm
from saccade.backbones.ela import ELA
from torch import Tensor, nn


class PublishedELA(nn.Module):
    def __init__(self, like: ELA):
        super().__init__()
        self.conv, self.gn, self.residual = like.conv, like.gn, like.residual

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        def gate(axis: int) -> Tensor:
            return self.gn(self.conv(x.mean(axis))).sigmoid().unsqueeze(axis)

        y = x * gate(3) * gate(2)
        return x + y if self.residual else y


class Network(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.net = timm.create_model(name)
        for key, layer in list(self.net.named_modules()):
            if isinstance(layer, ELA):
                self.net.set_submodule(key, PublishedELA(layer))
        if hasattr(self.net, "conv_stem"):
            self.net.conv_stem.__class__ = nn.Conv2d  # NCHW in memory, as the published networks

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def load(self, ours: nn.Module) -> "Network":
        """Load the weights of saccade's model of the same name."""
        self.net.load_state_dict(ours.state_dict())
        return self


def build(name: str) -> Network:
    return Network(name)
