"""NAT and DiNAT with gathered neighborhoods: the keys and values of every query copied, logits stored (2204.07143).

The peer of saccade's `nat_m/t` and `dinat_m/t` in tools/benchmark.py; takes the same state dict. `attend="flex"` is
PyTorch's FlexAttention as it runs without torch.compile, the only other form that runs on a CPU today: inference only.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = dict(m=(3, 4, 6, 5), t=(3, 4, 18, 5))
KERNEL = 7


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # what is kept serves training, too
def neighbors(L: int, d: int) -> tuple[Tensor, Tensor]:
    """(L, k) each: the positions that every position sees along an axis, and the indices of their biases."""
    x, k = torch.arange(L), KERNEL
    g, i = x % d, x // d
    n = (L - g + d - 1) // d
    keys = torch.minimum((i - k // 2).clamp(min=0), n - k)[:, None] + torch.arange(k)
    return g[:, None] + d * keys, keys - i[:, None] + k - 1


def gathered(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, d: int) -> Tensor:  # (B, heads, H, W, D) each
    (rows, dy), (columns, dx) = neighbors(q.shape[2], d), neighbors(q.shape[3], d)
    k, v = (z[:, :, rows][:, :, :, :, columns].transpose(3, 4).flatten(4, 5) for z in (k, v))  # (…, H, W, k², D)
    bias = rpb[:, dy[:, None, :, None], dx[None, :, None, :]].flatten(3)
    p = ((k @ q[..., None]).squeeze(-1) + bias).softmax(-1)
    return (p[..., None, :] @ v).squeeze(-2)


def flex(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor, d: int) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    W = q.shape[3]
    (rows, _), (columns, _) = neighbors(q.shape[2], d), neighbors(W, d)
    top, left, side = rows[:, 0], columns[:, 0], KERNEL * d

    def score(s, b, head, i, j):
        y, x, ky, kx = i // W, i % W, j // W, j % W
        dy, dx = ky - top[y], kx - left[x]
        seen = (dy >= 0) & (dy < side) & (dy % d == 0) & (dx >= 0) & (dx < side) & (dx % d == 0)
        entry = ((z // d + KERNEL - 1).clamp(0, 2 * KERNEL - 2) for z in (ky - y, kx - x))
        return torch.where(seen, s + rpb[head, next(entry), next(entry)], -torch.inf)

    return flex_attention(*(z.flatten(2, 3) for z in (q, k, v)), score_mod=score, scale=1.0).view(q.shape)


class Attention(nn.Module):
    def __init__(self, dim: int, dilation: int, attend):
        super().__init__()
        self.heads, self.dilation, self.attend = dim // 32, dilation, attend
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.zeros(self.heads, 2 * KERNEL - 1, 2 * KERNEL - 1))

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        _, H, W, _ = x.shape
        side = KERNEL * self.dilation
        x = F.pad(x, (0, 0, 0, max(0, side - W), 0, max(0, side - H)))
        q, k, v = self.qkv(x).unflatten(3, (3, self.heads, 32)).permute(3, 0, 4, 1, 2, 5)
        out = self.attend(q * 32**-0.5, k, v, self.rpb, self.dilation)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(3)[:, :H, :W])


class Block(nn.Module):
    def __init__(self, dim: int, dilation: int, attend):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, dilation, attend)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 3 * dim), "fc2": nn.Linear(3 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Downsample(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PublishedNAT(nn.Module):
    def __init__(self, depths: tuple[int, ...], dilations: tuple[int, ...], attend):
        super().__init__()
        self.stem = nn.ModuleDict(
            {
                "proj": nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1)),
                "norm": nn.LayerNorm(64),
            }
        )
        self.stages = nn.ModuleList()
        for i, (depth, d) in enumerate(zip(depths, dilations)):
            blocks = nn.Sequential(*(Block(64 << i, d if j % 2 else 1, attend) for j in range(depth)))
            downsample = Downsample(32 << i) if i else nn.Identity()
            self.stages.append(nn.ModuleDict({"downsample": downsample, "blocks": blocks}))
        self.norm, self.head = nn.LayerNorm(512), nn.ModuleDict({"fc": nn.Linear(512, 1000)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem["norm"](self.stem["proj"](x).permute(0, 2, 3, 1))
        for stage in self.stages:
            x = stage["blocks"](stage["downsample"](x))
        return self.head["fc"](self.norm(x).flatten(1, 2).mean(1))

    def load(self, ours: nn.Module) -> "PublishedNAT":
        self.load_state_dict(ours.state_dict())
        return self


def build(name: str, attend: str = "gather") -> PublishedNAT:
    family, size = name.split("_")
    dilations = (8, 4, 2, 1) if family == "dinat" else (1, 1, 1, 1)
    return PublishedNAT(DEPTHS[size], dilations, dict(gather=gathered, flex=flex)[attend])
