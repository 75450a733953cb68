"""BiFormer in its published form: NCHW between blocks, window copies, gathered keys and values (arXiv 2303.08810).

The peer of saccade's `biformer_t/s/b` in tools/benchmark.py; takes the same state dict.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = {"biformer_t": (2, 2, 8, 2), "biformer_s": (4, 4, 18, 4), "biformer_b": (4, 4, 18, 4)}
DIMS = {"biformer_t": (64, 128, 256, 512), "biformer_s": (64, 128, 256, 512), "biformer_b": (96, 192, 384, 768)}


class RoutedAttention(nn.Module):
    def __init__(self, dim: int, heads: int, n_win: int, topk: int):
        super().__init__()
        self.dim, self.heads, self.n_win, self.topk, self.scale = dim, heads, n_win, topk, dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        (B, H, W, C), n, k, M = x.shape, self.n_win, self.topk, self.heads
        P, t, D = n * n, (H // n) * (W // n), C // M
        windows = x.view(B, n, H // n, n, W // n, C).permute(0, 1, 3, 2, 4, 5).reshape(B, P, t, C)
        q, kv = self.qkv(windows).split([C, 2 * C], -1)
        v_map = kv[..., C:].view(B, n, n, H // n, W // n, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W).contiguous()
        lepe = self.lepe(v_map).permute(0, 2, 3, 1)
        routing = (self.scale * q.mean(2).detach()) @ kv[..., :C].mean(2).detach().transpose(-2, -1)  # (B, P, P)
        idx = routing.topk(k, -1).indices
        gathered = torch.gather(
            kv.view(B, 1, P, t, 2 * C).expand(-1, P, -1, -1, -1),
            2,
            idx.view(B, P, k, 1, 1).expand(-1, -1, -1, t, 2 * C),
        )  # (B, P, k, t, 2C)
        keys, values = gathered.split([C, C], -1)
        keys = keys.reshape(B * P, k * t, M, D).permute(0, 2, 3, 1)
        values = values.reshape(B * P, k * t, M, D).transpose(1, 2)
        q = q.reshape(B * P, t, M, D).transpose(1, 2)
        out = ((q * self.scale) @ keys).softmax(-1) @ values  # (B*P, M, t, D)
        out = out.view(B, n, n, M, H // n, W // n, D).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, C)
        return self.proj(out + lepe)


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
        """Take the weights of saccade's model of the same name."""
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
