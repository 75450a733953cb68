"""Agent-DeiT, -PVT, -Swin and -CSwin with the published arithmetic: biases repeated over the batch, materialised logits
and probabilities, copied windows and stripes, maps permuted for every convolution (arXiv 2312.08874).

The peer of saccade's `agent_*` in tools/benchmark.py, at 224 x 224; takes the same state dict.
"""

import re

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def to_map(x: Tensor) -> Tensor:  # (B, N, C) -> (B, C, h, w)
    side = int(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], side, side).contiguous()


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def tile(x: Tensor, h: int, w: int) -> Tensor:  # (B, H, W, C) -> (B · windows, h · w, C), a copy
    x = x.unflatten(2, (-1, w)).unflatten(1, (-1, h)).transpose(2, 3)
    return x.reshape(-1, h * w, x.shape[-1])


def untile(x: Tensor, B: int, side: int, h: int, w: int) -> Tensor:  # its inverse, a copy
    x = x.unflatten(1, (h, w)).unflatten(0, (B, side // h, side // w)).transpose(2, 3)
    return x.reshape(B, side, side, -1)


def split_heads(x: Tensor, heads: int) -> Tensor:  # (..., N, C) -> (..., heads, N, D)
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √D + biases) v, materialising the logits, their sums and the probabilities."""
    logits = q * q.shape[-1] ** -0.5 @ k.mT
    for bias in biases:
        logits = logits + bias
    return logits.softmax(-1) @ v


class BiasTables(nn.Module):
    """The bias of one of the two softmaxes: a resized block per agent, plus rows, plus columns, plus a class
    token's."""

    def __init__(self, heads: int, agents: int, side: int, token: bool):
        super().__init__()
        self.block = nn.Parameter(torch.zeros(heads, agents, 7, 7))
        self.rows, self.columns = (nn.Parameter(torch.zeros(heads, agents, side)) for _ in range(2))
        self.token = nn.Parameter(torch.zeros(heads, agents)) if token else None

    def forward(self, B: int, agents_last: bool) -> Tensor:  # (B, heads, agents, N), or (B, heads, N, agents)
        cross = self.rows.unsqueeze(3) + self.columns.unsqueeze(2)
        parts = [F.interpolate(self.block, size=cross.shape[2:], mode="bilinear").flatten(2), cross.flatten(2)]
        if self.token is not None:
            parts.append(self.token.unsqueeze(2))
        if agents_last:
            parts = [part.mT for part in parts]
        block, cross, *token = (part.repeat(B, 1, 1, 1) for part in parts)  # a copy of each per image
        return torch.cat((*token, block + cross), 2 if agents_last else 3) if token else block + cross


class AgentAttention(nn.Module):
    """O = softmax(Q Aᵀ / √D + B2) (softmax(A Kᵀ / √D + B1) V) + DWConv(V), where the agents A are pooled queries."""

    def __init__(self, dim: int, heads: int, side: int, agents: int, token: bool, separate: bool):
        super().__init__()
        self.heads, self.side, self.tokens, self.grid = heads, side, int(token), int(agents**0.5)
        self.inputs = nn.ModuleList(nn.Linear(dim, n * dim) for n in ((1, 2) if separate else (3,)))
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.key, self.query = (BiasTables(heads, agents, side, token) for _ in range(2))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:  # (B, [1 +] N, C)
        q, k, v = (part for layer in self.inputs for part in layer(x).split(x.shape[2], 2))
        q_map, v_map = (t[:, self.tokens :].unflatten(1, (self.side, -1)).permute(0, 3, 1, 2) for t in (q, v))
        agents = F.adaptive_avg_pool2d(q_map, self.grid).flatten(2).mT
        q, k, v, agents = (split_heads(t, self.heads) for t in (q, k, v, agents))
        gathered = attend(agents, k, v, self.key(len(x), agents_last=False))
        out = merge_heads(attend(q, agents, gathered, self.query(len(x), agents_last=True)))
        local = self.dwc(v_map).flatten(2).mT.contiguous()
        if self.tokens:
            return self.proj(torch.cat((out[:, :1], out[:, 1:] + local), 1))
        return self.proj(out + local)


class WindowAttention(nn.Module):
    """Swin's attention in windows of 7, shifted in odd blocks if there are several windows."""

    def __init__(self, dim: int, heads: int, side: int, odd: bool):
        super().__init__()
        self.heads, self.side, self.shift = heads, side, 3 if odd and side > 7 else 0
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_bias = nn.Parameter(torch.zeros(heads, 13, 13))
        y, x = torch.arange(49) // 7, torch.arange(49) % 7
        offsets = 13 * (y[:, None] - y + 6) + x[:, None] - x + 6
        self.register_buffer("offsets", offsets, persistent=False)
        if self.shift:  # the shift brings tokens from across the map's edge into the last windows
            across = (torch.arange(side) >= side - self.shift).int()
            labels = tile((2 * across[:, None] + across)[None, :, :, None], 7, 7)  # (windows, 49, 1)
            self.register_buffer("mask", -100.0 * (labels != labels.mT).unsqueeze(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, shift = len(x), self.shift
        x = x.unflatten(1, (self.side, -1))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        qkv = self.qkv(tile(x, 7, 7)).unflatten(0, (B, -1))  # (B, windows, 49, 3C)
        biases = [self.relative_bias.flatten(1)[:, self.offsets]] + ([self.mask] if shift else [])
        out = attend(*(split_heads(t, self.heads) for t in qkv.chunk(3, -1)), *biases)
        out = untile(self.proj(merge_heads(out)).flatten(0, 1), B, self.side, 7, 7)
        if shift:
            out = out.roll((shift, shift), (1, 2))
        return out.flatten(1, 2)


class SoftmaxAttention(nn.Module):
    """DeiT's attention over all tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in self.qkv(x).chunk(3, -1))
        return self.proj(merge_heads((q @ k.mT * self.scale).softmax(-1) @ v))


class StripeAttention(nn.Module):
    """CSwin's attention: two branches of stripes with half of the channels each, or one branch of the full map; the
    convolution of the values is padded at the borders of a stripe."""

    def __init__(self, dim: int, heads: int, side: int, stripes: list[tuple[int, int]]):
        super().__init__()
        self.heads, self.side, self.stripes = heads // len(stripes), side, stripes
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        c = dim // len(stripes)
        self.dwc = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, groups=c) for _ in stripes)

    def branch(self, qkv: list[Tensor], h: int, w: int, dwc: nn.Module) -> Tensor:  # 3 of (B, N, c) -> (B, N, c)
        B, S, stripes = len(qkv[0]), self.side, []
        for t in qkv:
            t = t.mT.contiguous().unflatten(2, (S // h, h, S // w, w))  # (B, c, S/h, h, S/w, w)
            stripes.append(t.movedim((2, 4), (1, 2)).flatten(0, 2))  # (B · stripes, c, h, w), a second copy
        local = dwc(stripes[2])
        q, k, v, local = (
            t.flatten(2).unflatten(1, (self.heads, -1)).mT.contiguous() for t in (*stripes, local)
        )  # (B · stripes, heads, h · w, D), a third copy
        return untile(merge_heads(attend(q, k, v) + local), B, S, h, w).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        halves = zip(*(t.chunk(len(self.stripes), 2) for t in self.qkv(x).chunk(3, 2)))
        parts = [self.branch(qkv, *stripe, dwc) for qkv, stripe, dwc in zip(halves, self.stripes, self.dwc)]
        return self.proj(torch.cat(parts, 2) if len(parts) > 1 else parts[0])


class Block(nn.Module):
    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, eps: float):
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps), attn
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Patches(nn.Module):
    def __init__(self, proj: nn.Conv2d, norm: bool):
        super().__init__()
        self.proj = nn.Conv2d(proj.in_channels, proj.out_channels, proj.kernel_size, proj.stride, proj.padding)
        self.norm = nn.LayerNorm(proj.out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, N, C)
        return self.norm(to_tokens(self.proj(x)))


class Merging(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, C = x.shape[:2]
        x = x.permute(0, 2, 3, 1)
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1).view(B, -1, 4 * C)
        return self.reduction(self.norm(x))


def attention(ours: nn.Module, dim: int, side: int, odd: bool, family: str) -> nn.Module:
    kind, heads = type(ours).__name__, ours.heads
    if kind == "AgentAttention":
        return AgentAttention(dim, heads, side, ours.key_rows.shape[1], family == "deit", family == "pvt")
    if kind == "WindowAttention":
        return WindowAttention(dim, heads, side, odd)
    if kind == "StripeAttention":
        return StripeAttention(dim, heads, side, [(side, ours.stripe[0]), (ours.stripe[1], side)])
    return StripeAttention(dim, heads, side, [(side, side)]) if family == "cswin" else SoftmaxAttention(dim, heads)


class Agent(nn.Module):
    """The published model, with the sizes of ours."""

    def __init__(self, name: str):
        super().__init__()
        ours, self.family = timm.create_model(name, device="meta"), name.split("_")[1]
        deit = self.family == "deit"
        self.stem = Patches(ours.stem.proj, not deit)
        self.stages, self.downsamples, self.positions = nn.ModuleList(), nn.ModuleList(), nn.ParameterList()
        for i, stage in enumerate([ours] if deit else ours.stages):
            dim = stage.blocks[0].norm1.normalized_shape[0]
            blocks = [
                Block(
                    dim,
                    attention(b.attn, dim, stage.size[0], j % 2 == 1, self.family),
                    b.mlp.fc1.out_features / dim,
                    b.norm1.eps,
                )
                for j, b in enumerate(stage.blocks)
            ]
            self.stages.append(nn.Sequential(*blocks))
            if i:
                merging = self.family == "swin"
                self.downsamples.append(Merging(dim // 2) if merging else Patches(stage.downsample.proj, True))
            if stage.pos_embed is not None:
                self.positions.append(torch.zeros(stage.pos_embed.shape))
        if deit:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.norm = nn.Identity() if self.family == "pvt" else nn.LayerNorm(dim, ours.norm.eps)
        self.head = nn.Linear(dim, 1000)

    def forward(self, x: Tensor) -> Tensor:
        for i, stage in enumerate(self.stages):
            x = self.downsamples[i - 1](to_map(x)) if i else self.stem(x)
            if self.family == "deit":
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
            if len(self.positions):
                x = x + self.positions[i]
            x = stage(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.family == "deit" else x.mean(1))

    def load(self, ours: nn.Module) -> "Agent":
        """Load the weights of saccade's model of the same name."""
        state, own = {}, self.state_dict()
        for key, value in ours.state_dict().items():
            key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"downsamples.{int(m[1]) - 1}", key)
            key = re.sub(r"^stages\.(\d)\.pos_embed", r"positions.\1", key)
            key = re.sub(r"^stages\.(\d)\.blocks", r"stages.\1", key)
            key = re.sub(r"^blocks", "stages.0", key).replace("head.fc", "head")
            key = re.sub(r"\.attn\.(key|query)_", r".attn.\1.", key)
            key = "positions.0" if key == "pos_embed" else key.replace(".dwc_rows.", ".dwc.1.")
            if key.replace(".dwc.", ".dwc.0.") in own:
                key = key.replace(".dwc.", ".dwc.0.")
            if key not in own and ".attn.qkv." in key:
                inputs = [key.replace(".qkv.", f".inputs.{i}.") for i in range(2)]
                inputs = [name for name in inputs if name in own]
                state |= zip(inputs, value.split([len(own[name]) for name in inputs]))
            else:
                state[key] = value.reshape(own[key].shape)
        self.load_state_dict(state)
        return self


def build(name: str) -> Agent:
    return Agent(name)
