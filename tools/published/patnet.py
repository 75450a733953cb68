"""PATNet with the published arithmetic: NCHW, channels split and concatenated by copies, separate norms (2503.03148).

The peer of saccade's `patnet_t0` to `patnet_l` in tools/benchmark.py; takes the same state dict.
"""

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = dict(t0=(1, 2, 8, 2), t1=(1, 2, 8, 2), t2=(2, 2, 6, 4), s=(2, 2, 9, 4), m=(2, 3, 16, 4), l=(2, 3, 20, 4))
DIMS = dict(t0=32, t1=48, t2=64, s=96, m=128, l=160)


class Gate(nn.Module):
    """The gate of the channels by their means and standard deviations."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Conv2d(dim, dim, (1, 2), bias=False)
        self.gate_norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        u = torch.stack((flat.mean(-1), flat.std(-1)), -1).unsqueeze(2)  # (B, C, 1, 2)
        return x * F.hardsigmoid(self.gate_norm(self.gate(u)))


class RelativeAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj, self.drop = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim), nn.Dropout(0.1)
        self.table = nn.Parameter(torch.zeros(heads, 81))
        self.ids: dict[tuple, Tensor] = {}

    def buckets(self, H: int, W: int, device: torch.device) -> Tensor:  # (H*W, H*W)
        if (H, W, device) not in self.ids:
            y, x = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
            place = torch.stack((y.flatten(), x.flatten()), -1)
            d = (place[:, None] - place).float().square().sum(-1).sqrt().round()
            far = (20 + 20 * (d.clamp(min=20) / 20).log() / math.log(8)).round().clamp(max=40)
            self.ids[H, W, device] = (torch.where(d <= 20, d, far) + 40).long()
        return self.ids[H, W, device]

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        B, C, H, W = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).reshape(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        logits = (q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1)
        probabilities = (logits + self.table[:, self.buckets(H, W, x.device)]).softmax(-1)
        out = (self.drop(probabilities) @ v).transpose(1, 2).reshape(B, H * W, C)
        return self.drop(self.proj(out)).transpose(1, 2).reshape(B, C, H, W)


class Mixer(nn.Module):
    def __init__(self, dim: int, heads: int | None):
        super().__init__()
        self.part = dim // 4
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1, bias=False)
        rest = dim - self.part
        self.attn = Gate(rest) if heads is None else RelativeAttention(rest, heads)
        self.norm = nn.BatchNorm2d(rest) if heads is None else nn.LayerNorm(rest, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y, z = x.split([self.part, x.shape[1] - self.part], 1)
        if isinstance(self.norm, nn.BatchNorm2d):
            z = self.norm(self.attn(z))
        else:
            z = self.attn(self.norm(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return torch.cat((self.conv(y), z), 1)


class SpatialAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        part = dim - dim // 2
        self.gate, self.norm = nn.Conv2d(part, 1, 1, bias=False), nn.BatchNorm2d(part)
        self.norm2, self.conv = nn.BatchNorm2d(dim // 2), nn.Conv2d(dim // 2, dim // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        part = self.norm.num_features
        y, z = x.split([part, x.shape[1] - part], 1)
        return torch.cat((self.norm(y * F.hardsigmoid(self.gate(y))), self.conv(self.norm2(z))), 1)


class Mlp(nn.Module):
    def __init__(self, dim: int, act: nn.Module):
        super().__init__()
        self.fc1, self.norm, self.act = nn.Conv2d(dim, 2 * dim, 1, bias=False), nn.BatchNorm2d(2 * dim), act
        self.fc2 = nn.Conv2d(2 * dim, dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.norm(self.fc1(x))))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int | None, act: nn.Module, spatial: bool):
        super().__init__()
        self.residual = heads is not None
        self.mixer, self.mlp = Mixer(dim, heads), Mlp(dim, act)
        self.spatial = SpatialAttention(dim) if spatial else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x)
        if self.residual:
            x = y = x + y
        return x + self.spatial(self.mlp(y))


class Patches(nn.Module):
    def __init__(self, dim: int, out_dim: int, stride: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(dim, out_dim, stride, stride, bias=False), nn.BatchNorm2d(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PATNet(nn.Module):
    def __init__(self, size: str, spatial: bool, heads: int = 4, num_classes: int = 1000):
        super().__init__()
        act = nn.GELU() if size in ("t0", "t1") else nn.ReLU()
        layers, dim = [Patches(3, DIMS[size], 4)], DIMS[size]
        for i, depth in enumerate(DEPTHS[size]):
            if i:
                layers.append(Patches(dim, 2 * dim, 2))
                dim *= 2
            layers.append(nn.Sequential(*[Block(dim, heads if i == 3 else None, act, spatial) for _ in range(depth)]))
        self.layers, self.act = nn.Sequential(*layers), act
        self.hidden, self.head = nn.Conv2d(dim, 1280, 1, bias=False), nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x).mean((2, 3), keepdim=True)
        return self.head(self.act(self.hidden(x)).flatten(1))

    def load(self, ours: nn.Module) -> "PATNet":
        """Load the weights of saccade's model of the same name."""
        state, own = {}, self.state_dict()
        for key, value in ours.state_dict().items():
            key = re.sub(r"^stem\.", "layers.0.", key)
            key = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"layers.{2 * int(m[1])}.", key)
            key = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"layers.{2 * int(m[1]) + 1}.", key)
            key = key.replace("mixer.gate_norm", "mixer.attn.gate_norm").replace("head.hidden", "hidden")
            key = re.sub(r"mixer\.gate$", "mixer.attn.gate.weight", key).replace("head.fc", "head")
            state[key] = value.reshape(own[key].shape)
        self.load_state_dict(state)
        return self


def build(name: str) -> PATNet:
    """Build the model with the published configuration of `name`."""
    size = name.removeprefix("patnet_")
    return PATNet(size, spatial=size == "t1")
