"""BiFormer with the published arithmetic: NCHW between blocks, copied windows, gathered keys and values (2303.08810).

The peer of saccade's `biformer_t/s/b` in tools/benchmark.py; takes the same state dict.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = {"biformer_t": (2, 2, 8, 2), "biformer_s": (4, 4, 18, 4), "biformer_b": (4, 4, 18, 4)}
DIMS = {"biformer_t": (64, 128, 256, 512), "biformer_s": (64, 128, 256, 512), "biformer_b": (96, 192, 384, 768)}


class RoutedAttention(nn.Module):
    """Tokens of a window attend to those of the `topk` windows whose mean keys match its mean query best."""

    def __init__(self, dim: int, heads: int, n_win: int, topk: int):
        super().__init__()
        self.heads, self.n_win, self.topk, self.scale = heads, n_win, topk, dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        n = self.n_win
        B, h, w, C = len(x), x.shape[1] // n, x.shape[2] // n, x.shape[3]
        windows = x.unflatten(2, (n, w)).unflatten(1, (n, h)).transpose(2, 3)  # (B, n, n, h, w, C)
        q, kv = self.qkv(windows.reshape(B, n * n, h * w, C)).split((C, 2 * C), 3)
        k, v = kv.chunk(2, 3)
        with torch.no_grad():
            match = self.scale * q.mean(2) @ k.mean(2).mT  # (B, n², n²)
            routes = match.topk(self.topk).indices
        index = routes[..., None, None].expand(-1, -1, -1, h * w, 2 * C)
        routed = kv.unsqueeze(1).expand(-1, n * n, -1, -1, -1).gather(2, index)  # (B, n², topk, h · w, 2C)
        keys, values = (self.split(t) for t in routed.flatten(2, 3).chunk(2, 3))
        out = (self.split(q * self.scale) @ keys.mT).softmax(-1) @ values  # (B, n², heads, h · w, D)
        out = self.map(out.transpose(2, 3).flatten(3), h, w)
        local = self.lepe(self.map(v, h, w).permute(0, 3, 1, 2).contiguous())  # over a copy in NCHW
        return self.proj(out + local.permute(0, 2, 3, 1))

    def split(self, x: Tensor) -> Tensor:  # (B, n², N, C) -> (B, n², heads, N, D)
        return x.unflatten(3, (self.heads, -1)).transpose(2, 3)

    def map(self, x: Tensor, h: int, w: int) -> Tensor:  # (B, n², h · w, C) -> (B, H, W, C)
        x = x.unflatten(2, (h, w)).unflatten(1, (self.n_win, -1)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)


class FullAttention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.heads, self.scale = 8, (dim // 8) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        lepe = self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        q, k, v = self.qkv(x.reshape(B, H * W, C)).reshape(B, H * W, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(B, H, W, C) + lepe)


class Block(nn.Module):
    def __init__(self, dim: int, mlp_ratio: int, attn: nn.Module):
        super().__init__()
        self.pos = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn = attn
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, mlp_ratio * dim), "fc2": nn.Linear(mlp_ratio * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W)
        x = x + self.pos(x)
        x = x.permute(0, 2, 3, 1)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))
        return x.permute(0, 3, 1, 2)


class BiFormer(nn.Module):
    def __init__(self, name: str, n_win: int = 7, topks=(1, 4, 16), num_classes: int = 1000):
        super().__init__()
        dims = DIMS[name]
        c = dims[0] // 2
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3, 2, 1), nn.BatchNorm2d(c), nn.GELU())
        self.downsamples, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, (depth, dim) in enumerate(zip(DEPTHS[name], dims)):
            self.downsamples.append(nn.Sequential(nn.Conv2d(c, dim, 3, 2, 1), nn.BatchNorm2d(dim)))
            attn = [
                RoutedAttention(dim, dim // 32, n_win, topks[i]) if i < 3 else FullAttention(dim) for _ in range(depth)
            ]
            self.stages.append(nn.Sequential(*[Block(dim, 3, a) for a in attn]))
            c = dim
        self.norm, self.head = nn.BatchNorm2d(c), nn.Linear(c, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for downsample, stage in zip(self.downsamples, self.stages):
            x = stage(downsample(x))
        return self.head(self.norm(x).mean((2, 3)))

    def load(self, ours: nn.Module) -> "BiFormer":
        """Load the weights of saccade's model of the same name."""
        state = {}
        for key, value in ours.state_dict().items():
            key = re.sub(r"^stem\.([34])\.", lambda m: f"downsamples.0.{int(m[1]) - 3}.", key)
            key = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsamples.\1.", key)
            key = re.sub(r"^stages\.(\d+)\.blocks\.", r"stages.\1.", key)
            state[key.replace("pos_embed", "pos").replace("head.fc", "head")] = value
        self.load_state_dict(state)
        return self


def build(name: str) -> BiFormer:
    return BiFormer(name)
