"""Agent-DeiT, -PVT, -Swin and -CSwin in their published form: biases repeated over the batch, logits and probabilities
in memory, windows and stripes copied, maps turned for every convolution (arXiv 2312.08874).

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


class AgentAttention(nn.Module):
    def __init__(self, dim: int, heads: int, side: int, agents: int, token: bool, split: bool):
        super().__init__()
        self.heads, self.scale, self.side, self.token = heads, (dim // heads) ** -0.5, side, token
        if split:
            self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.split = split
        self.proj = nn.Linear(dim, dim)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.pool = nn.AdaptiveAvgPool2d(int(agents**0.5))
        self.an, self.na = (nn.Parameter(torch.zeros(heads, agents, 7, 7)) for _ in range(2))
        self.ah = nn.Parameter(torch.zeros(1, heads, agents, side, 1))
        self.aw = nn.Parameter(torch.zeros(1, heads, agents, 1, side))
        self.ha = nn.Parameter(torch.zeros(1, heads, side, 1, agents))
        self.wa = nn.Parameter(torch.zeros(1, heads, 1, side, agents))
        if token:
            self.ac = nn.Parameter(torch.zeros(1, heads, agents, 1))
            self.ca = nn.Parameter(torch.zeros(1, heads, 1, agents))

    def forward(self, x: Tensor) -> Tensor:
        (B, N, C), M, T, S = x.shape, self.heads, int(self.token), self.side
        if self.split:
            q, (k, v) = self.q(x), self.kv(x).reshape(B, N, 2, C).permute(2, 0, 1, 3)
        else:
            q, k, v = self.qkv(x).reshape(B, N, 3, C).permute(2, 0, 1, 3)
        agents = self.pool(q[:, T:].reshape(B, S, S, C).permute(0, 3, 1, 2)).reshape(B, C, -1).permute(0, 2, 1)
        a = agents.shape[1]
        q, k, v, agents = (t.reshape(B, -1, M, C // M).permute(0, 2, 1, 3) for t in (q, k, v, agents))

        block = F.interpolate(self.an, size=(S, S), mode="bilinear").reshape(1, M, a, -1).repeat(B, 1, 1, 1)
        bias = block + (self.ah + self.aw).reshape(1, M, a, -1).repeat(B, 1, 1, 1)
        if T:
            bias = torch.cat([self.ac.repeat(B, 1, 1, 1), bias], -1)
        gathered = ((agents * self.scale) @ k.transpose(-2, -1) + bias).softmax(-1) @ v

        block = F.interpolate(self.na, size=(S, S), mode="bilinear")
        block = block.reshape(1, M, a, -1).permute(0, 1, 3, 2).repeat(B, 1, 1, 1)
        bias = block + (self.ha + self.wa).reshape(1, M, -1, a).repeat(B, 1, 1, 1)
        if T:
            bias = torch.cat([self.ca.repeat(B, 1, 1, 1), bias], -2)
        out = ((q * self.scale) @ agents.transpose(-2, -1) + bias).softmax(-1) @ gathered
        out = out.transpose(1, 2).reshape(B, N, C)
        v = v[:, :, T:].transpose(1, 2).reshape(B, S, S, C).permute(0, 3, 1, 2)
        conv = self.dwc(v).permute(0, 2, 3, 1).reshape(B, N - T, C)
        out = torch.cat([out[:, :1], out[:, 1:] + conv], 1) if T else out + conv
        return self.proj(out)


class WindowAttention(nn.Module):
    """Swin's: windows of 7, shifted in odd blocks where there are several."""

    def __init__(self, dim: int, heads: int, side: int, odd: bool):
        super().__init__()
        self.heads, self.scale, self.side, self.shift = (
            heads,
            (dim // heads) ** -0.5,
            side,
            3 if odd and side > 7 else 0,
        )
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.zeros(169, heads))
        at = torch.stack(torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")).flatten(1)
        dy, dx = at[:, :, None] - at[:, None] + 6
        self.register_buffer("index", dy * 13 + dx, persistent=False)
        part = (torch.arange(side) >= side - 7).int() + (torch.arange(side) >= side - self.shift).int()
        part = self.windows((3 * part[:, None] + part)[None, :, :, None].float()).squeeze(-1)
        mask = torch.where(part[:, None] == part[:, :, None], 0.0, -100.0)
        self.register_buffer("mask", mask if self.shift else None, persistent=False)

    def windows(self, x: Tensor) -> Tensor:  # (B, H, W, C) -> (B·windows, 49, C)
        B, H, W, C = x.shape
        return x.view(B, H // 7, 7, W // 7, 7, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 49, C)

    def forward(self, x: Tensor) -> Tensor:
        (B, N, C), S, M = x.shape, self.side, self.heads
        x = x.view(B, S, S, C)
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self.windows(x)
        q, k, v = self.qkv(x).reshape(-1, 49, 3, M, C // M).permute(2, 0, 3, 1, 4)
        logits = (q * self.scale) @ k.transpose(-2, -1)
        logits = logits + self.table[self.index.view(-1)].view(49, 49, M).permute(2, 0, 1).contiguous()
        if self.shift:
            logits = logits.view(B, -1, M, 49, 49) + self.mask[:, None]
            logits = logits.view(-1, M, 49, 49)
        x = self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(-1, 49, C))
        x = x.view(B, S // 7, S // 7, 7, 7, C).permute(0, 1, 3, 2, 4, 5).contiguous().view(B, S, S, C)
        if self.shift:
            x = torch.roll(x, (self.shift, self.shift), (1, 2))
        return x.view(B, N, C)


class StripeAttention(nn.Module):
    """CSwin's: two branches of stripes, or one of the whole map; also DeiT's softmax attention, without convolution."""

    def __init__(self, dim: int, heads: int, side: int, stripes: list[tuple[int, int]], conv: bool = True):
        super().__init__()
        self.heads, self.scale, self.side, self.stripes = heads // len(stripes), (dim // heads) ** -0.5, side, stripes
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        c = dim // len(stripes)
        self.dwc = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1, groups=c) for _ in stripes) if conv else None

    def branch(self, q: Tensor, k: Tensor, v: Tensor, stripe: tuple[int, int], dwc: nn.Module | None) -> Tensor:
        (B, N, C), S, (h, w), M = q.shape, self.side, stripe, self.heads
        if dwc is None:
            q, k, v = (t.reshape(B, N, M, C // M).transpose(1, 2) for t in (q, k, v))
            return ((q @ k.transpose(-2, -1)) * self.scale).softmax(-1).matmul(v).transpose(1, 2).reshape(B, N, C)

        def windows(t: Tensor) -> Tensor:  # (B·windows, C, h, w)
            t = t.transpose(-2, -1).contiguous().view(B, C, S // h, h, S // w, w)
            return t.permute(0, 2, 4, 1, 3, 5).contiguous().reshape(-1, C, h, w)

        def heads(t: Tensor) -> Tensor:  # (B·windows, M, h·w, D)
            return t.reshape(-1, M, C // M, h * w).permute(0, 1, 3, 2).contiguous()

        q, k, v = windows(q), windows(k), windows(v)
        lepe = heads(dwc(v))
        out = ((heads(q) * self.scale) @ heads(k).transpose(-2, -1)).softmax(-1) @ heads(v) + lepe
        out = out.transpose(1, 2).reshape(B, S // h, S // w, h, w, C)
        return out.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, N, C)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv, n = self.qkv(x).reshape(B, N, 3, C).permute(2, 0, 1, 3), len(self.stripes)
        convs, c = self.dwc or [None], C // n
        parts = [
            self.branch(*qkv[..., i * c : (i + 1) * c], s, dwc) for i, (s, dwc) in enumerate(zip(self.stripes, convs))
        ]
        return self.proj(torch.cat(parts, 2) if n > 1 else parts[0])


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
    return StripeAttention(dim, heads, side, [(side, side)], family == "cswin")


class Agent(nn.Module):
    """The published model of the same sizes as ours."""

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
        """Take the weights of saccade's model of the same name."""
        state, own = {}, self.state_dict()
        for key, value in ours.state_dict().items():
            key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"downsamples.{int(m[1]) - 1}", key)
            key = re.sub(r"^stages\.(\d)\.pos_embed", r"positions.\1", key).replace(".relative_bias", ".table")
            key = re.sub(r"^stages\.(\d)\.blocks", r"stages.\1", key)
            key = re.sub(r"^blocks", "stages.0", key).replace("head.fc", "head")
            key = "positions.0" if key == "pos_embed" else key
            if "attn.key" in key or "attn.query" in key:
                letters = dict(key_block="an", key_rows="ah", key_columns="aw", key_token="ac")
                letters |= dict(query_block="na", query_rows="ha", query_columns="wa", query_token="ca")
                at, _, table = key.rpartition(".")
                key = f"{at}.{letters[table]}"
                value = value.mT if table in ("query_rows", "query_columns") else value
            if key.endswith("table"):
                value = value.flatten(1).mT
            if f"{key.replace('.dwc.', '.dwc.0.')}" in own:
                key = key.replace(".dwc.", ".dwc.0.")
            key = key.replace(".dwc_rows.", ".dwc.1.")
            if ".attn.qkv." in key and key not in own:
                q = key.replace(".qkv.", ".q.")
                state[q], state[key.replace(".qkv.", ".kv.")] = value.split([len(value) // 3, 2 * len(value) // 3])
            else:
                state[key] = value.reshape(own[key].shape)
        self.load_state_dict(state)
        return self


def build(name: str) -> Agent:
    return Agent(name)
