"""ULSAM with the published arithmetic, a loop over the subspaces (arXiv 2006.15102).

The peers of saccade's `ulsam_*` in tools/benchmark.py; they take the same weights. The networks are timm's in both.
"""

import timm
import torch
import torch.nn.functional as F
from saccade.backbones.ulsam import ULSAM
from torch import Tensor, nn


class Subspace(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, dim, 1, groups=dim), nn.BatchNorm2d(dim, momentum=0.9)
        self.point, self.point_norm = nn.Conv2d(dim, 1, 1), nn.BatchNorm2d(1, momentum=0.9)

    def forward(self, x: Tensor) -> Tensor:
        out = F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, stride=1, padding=1)
        out = F.relu(self.point_norm(self.point(out)))
        b, c, h, w = x.shape
        out = out.view(b, 1, h * w).softmax(2).view(b, 1, h, w)
        return out.expand(b, c, h, w) * x + x


class PublishedULSAM(nn.Module):
    def __init__(self, dim: int, subspaces: int):
        super().__init__()
        self.subspaces = nn.ModuleList(Subspace(dim // subspaces) for _ in range(subspaces))

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.chunk(len(self.subspaces), 1)
        return torch.cat([f(chunk) for f, chunk in zip(self.subspaces, chunks)], 1)

    def load(self, ours: ULSAM) -> None:
        g = len(self.subspaces)
        for key, value in ours.state_dict().items():
            for subspace, part in zip(self.subspaces, value.chunk(g) if value.ndim else [value] * g):
                subspace.state_dict()[key].copy_(part)


class Network(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.net = timm.create_model(name)
        for key, layer in list(self.net.named_modules()):
            if isinstance(layer, ULSAM):
                self.net.set_submodule(key, PublishedULSAM(layer.conv.out_channels, layer.point.out_channels))
        self.net.conv_stem.__class__ = nn.Conv2d  # NCHW in memory, as MobileNet usually is

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def load(self, ours: nn.Module) -> "Network":
        """Load the weights of saccade's model of the same name."""
        self.net.load_state_dict(ours.state_dict(), strict=False)
        for key, layer in ours.named_modules():
            if isinstance(layer, ULSAM):
                self.net.get_submodule(key).load(layer)
        return self


def build(name: str) -> Network:
    return Network(name)
