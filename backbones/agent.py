"""Agent-DeiT, Agent-PVT, Agent-Swin and Agent-CSwin: four networks with agent attention instead of softmax attention.

Paper: "Agent Attention: On the Integration of Softmax and Linear Attention", ECCV 2024, arXiv 2312.08874.
Published code: LeapLabTHU/Agent-Attention@207ce3e, without a licence; this file is written from the paper and a
description. Parameters map one to one (`checkpoint_filter_fn`), outputs are equal.

Agents are a p x p grid of pooled queries. The biases are learned for one map size and number of agents; for others they
are resized as in the published detection backbones, so that images of any size are accepted. Maps are stored as tokens
(B, h·w, C), row-major: the same memory as (B, h, w, C).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerNorm2d,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..ops import agent_attention, pool_agents, resize_agent_bias, window_attention
from ..ops.agent_attention.tables import whole
from ..ops.attention import full_attention
from ..ops.dispatch import at_most, is_any_size, is_exporting
from ..ops.precision import full
from .attention_maps import AttentionMap, QueryMap, describe, softmax_map, split_heads, window_map
from .base import Isotropic, Pyramid, TokenHead, checked_size, create_model, init_linear, make_cfg, map_norms
from .layers import (
    CachedMlp,
    DepthwiseConv,
    MapNorm,
    as_nchw,
    as_nhwc,
    can_fuse,
    channels_last,
    must_pad,
    position_table,
    project,
    resize_positions,
)
from .published import Rules, complete, rename_key, unwrap

TABLE = 7  # side of the tables of block biases, for any map size


def square_root(agents: int) -> int:
    if math.isqrt(agents) ** 2 != agents or agents < 1:
        raise ValueError(f"agents must be square numbers, as they form a grid, got {agents}")
    return math.isqrt(agents)


# Control flow depends on shapes, so torch.fx treats this layer, and others like it, as a leaf.
@register_notrace_module
class AgentAttention(nn.Module):
    """Agent attention (paper, section 3.2) with its biases and depthwise convolution: (B, [1 +] h·w, C) -> same.

    Args:
        dim: number of channels.
        heads: number of heads.
        size: (h, w) of the maps that the biases are learned for; they are resized for others.
        agents: number of agents that the biases are learned for, a square.
        run_agents: number of agents to use, None for `agents`.
        token: whether a class token comes first. It is excluded from the pooling of agents and from the convolution.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        size: tuple[int, int],
        agents: int,
        run_agents: int | None = None,
        token: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        side = square_root(run_agents or agents)
        self.heads, self.size, self.grid, self.tokens = heads, tuple(size), (side, side), int(token)
        self.resize_agents = square_root(agents) != side
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dwc = DepthwiseConv(dim, **dd)

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(heads, agents, *shape, **dd))

        self.key_block, self.key_rows, self.key_columns = table(TABLE, TABLE), table(size[0]), table(size[1])
        self.query_block, self.query_rows, self.query_columns = table(TABLE, TABLE), table(size[0]), table(size[1])
        self.key_token = table() if token else None
        self.query_token = table() if token else None
        for p in self.parameters(recurse=False):
            trunc_normal_(p, std=0.02)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, size={self.size}, grid={self.grid}"

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if torch.jit.is_scripting():
            q, k, v = self.qkv(x).chunk(3, -1)
        elif is_exporting() and can_fuse(self.qkv) and self.qkv.bias is not None:
            # Three products of constants: OpenVINO copies the parts of a split on the last axis.
            parts = zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3))
            q, k, v = (F.linear(x, weight, bias) for weight, bias in parts)
        else:
            q, k, v = project(self.qkv, x).chunk(3, -1)
        return q, k, v

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        q, k, v = self._project(x)
        agents = pool_agents(q[:, self.tokens :].unflatten(1, size), self.grid)
        key_bias = (self.key_block, self.key_rows, self.key_columns)
        query_bias = (self.query_block, self.query_rows, self.query_columns)
        resize = self.resize_agents or is_any_size(size[0], size[1])
        if resize or size[0] != self.size[0] or size[1] != self.size[1]:
            key_bias = resize_agent_bias(key_bias, size, self.grid)  # type: ignore[assignment]
            query_bias = resize_agent_bias(query_bias, size, self.grid)  # type: ignore[assignment]
        token_bias: tuple[Tensor, Tensor] | None = None
        if self.key_token is not None:
            token_bias = (self.key_token, self.query_token)  # type: ignore[assignment]
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if can_fuse(self.dwc):
                dwc = self.dwc.weight, self.dwc.bias
                out = agent_attention(q, k, v, agents, key_bias, query_bias, self.heads, token_bias, *dwc)
                return project(self.proj, out)
        out = agent_attention(q, k, v, agents, key_bias, query_bias, self.heads, token_bias)
        conv = self.dwc(v[:, self.tokens :].transpose(1, 2).unflatten(2, size)).flatten(2).transpose(1, 2)
        return self.proj(out + F.pad(conv, (0, 0, self.tokens, 0)))


@describe.register(AgentAttention)
def _(mixer: AgentAttention, x: Tensor, size: tuple[int, int]) -> Iterator[AttentionMap]:
    """gather: what an agent takes from each position; give: how much each position takes from an agent; tokens: the
    product, from position to position. The query of the first two is an agent's place in their grid."""
    T, grid = mixer.tokens, (size[0], size[1])
    qkv = mixer.qkv(x)
    q, k, v = split_heads(qkv, mixer.heads)
    packed = qkv[:, T:, : qkv.shape[2] // 3].unflatten(1, grid)
    agents = pool_agents(packed, mixer.grid).unflatten(2, (mixer.heads, -1)).transpose(1, 2)
    biases = []
    for factors, token in (
        ((mixer.key_block, mixer.key_rows, mixer.key_columns), mixer.key_token),
        ((mixer.query_block, mixer.query_rows, mixer.query_columns), mixer.query_token),
    ):
        bias = whole(resize_agent_bias(factors, grid, mixer.grid))  # (heads, agents, h·w)
        biases.append(bias if token is None else torch.cat((token.unsqueeze(2), bias), 2))
    wide = full(q)
    wide_q, wide_agents = q.to(wide), agents.to(wide)
    giving = (q.shape[3] ** -0.5 * wide_q @ wide_agents.mT + biases[1].mT).softmax(-1)  # (B, heads, [1 +] h·w, agents)
    gather = softmax_map("gather", agents, k, v, grid, bias=lambda i: biases[0][:, i], query_grid=mixer.grid, tokens=T)
    gathering = gather.weights(torch.arange(agents.shape[2]))
    common = dict(grid=grid, heads=mixer.heads, images=len(x), tokens=T)
    yield gather
    yield QueryMap(
        kind="give",
        query_grid=mixer.grid,
        weights=lambda i: giving[..., i.to(x.device)].mT,
        normalized=False,
        **common,  # type: ignore[arg-type]
    )
    yield QueryMap(
        kind="tokens",
        query_grid=grid,
        query_tokens=T,
        weights=lambda i: giving[:, :, i.to(x.device)] @ gathering,
        values=v,
        **common,  # type: ignore[arg-type]
    )


@register_notrace_module
class WindowAttention(nn.Module):
    """Swin's attention within windows, shifted in every other block: (B, h·w, C) -> same.

    A map that windows do not divide is padded with zeros before the projection, so that padding tokens have the biases
    as queries, keys and values; they are attended to like any other.

    Args:
        dim: number of channels.
        heads: number of heads.
        window: (h, w) of a window.
        shift: whether windows are shifted by half their size.
        always_shift: shift even if one window covers the map, as in the published detection backbone, unlike in the
            classifier.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: tuple[int, int],
        shift: bool,
        always_shift: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.heads, self.window, self.always_shift = heads, (window[0], window[1]), always_shift
        self.shift = (window[0] // 2, window[1] // 2) if shift else (0, 0)
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.relative_bias = nn.Parameter(torch.empty(heads, 2 * window[0] - 1, 2 * window[1] - 1, **dd))
        trunc_normal_(self.relative_bias, std=0.02)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}, shift={self.shift}"

    def shift_for(self, size: tuple[int, int]) -> tuple[int, int]:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if is_any_size(size[0], size[1]) and not self.always_shift:  # n > w as a part of the graph
                s_h, s_w = (s * at_most(n // (w + 1), 1) for s, n, w in zip(self.shift, size, self.window))
                return s_h, s_w
        s_h = self.shift[0] * int(self.always_shift or size[0] > self.window[0])
        s_w = self.shift[1] * int(self.always_shift or size[1] > self.window[1])
        return s_h, s_w

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        s_h, s_w = self.shift_for(size)
        x = x.reshape(x.shape[0], size[0], size[1], x.shape[2])  # no unflatten, after which ONNX has one batch size
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if can_fuse(self.qkv) and self.qkv.bias is not None:
                split = (3, x.shape[3])
                qkv = project(self.qkv, x).view(x.shape[0], size[0], size[1], *split)
                pad = self.qkv.bias.view(split)
                out = window_attention(qkv, self.heads, self.window, (s_h, s_w), self.relative_bias, pad)
                return project(self.proj, out.flatten(1, 2))
        x = F.pad(x, (0, 0, 0, -size[1] % self.window[1], 0, -size[0] % self.window[0]))
        qkv = self.qkv(x).unflatten(3, (3, -1))
        out = window_attention(qkv, self.heads, self.window, (s_h, s_w), self.relative_bias)
        return self.proj(out[:, : size[0], : size[1]].flatten(1, 2))


@describe.register(WindowAttention)
def _(mixer: WindowAttention, x: Tensor, size: tuple[int, int]) -> Iterator[AttentionMap]:
    (H, W), (h, w) = size, mixer.window
    qkv = mixer.qkv(F.pad(x.unflatten(1, (H, W)), (0, 0, 0, -W % w, 0, -H % h)))
    yield window_map(qkv, mixer.heads, (H, W), mixer.window, mixer.shift_for((H, W)), mixer.relative_bias)


@register_notrace_module
class StripeAttention(nn.Module):
    """CSwin's attention: half of the heads within vertical stripes, half within horizontal: (B, h·w, C) -> same.

    The values' depthwise convolution (LePE) ends at the border of a stripe. A map that stripes do not divide is padded
    with zeros before the projection, as for Swin's windows.

    Args:
        dim: number of channels.
        heads: number of heads of both halves together.
        stripe: (columns of a vertical stripe, rows of a horizontal one).
    """

    def __init__(self, dim: int, heads: int, stripe: tuple[int, int], device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if heads % 2:
            raise ValueError(f"heads of striped blocks must be even, half for each direction, got {heads}")
        self.heads, self.stripe = heads, (stripe[0], stripe[1])
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dwc = DepthwiseConv(dim // 2, **dd)  # of vertical stripes
        self.dwc_rows = DepthwiseConv(dim // 2, **dd)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, stripe={self.stripe}"

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        (B, N, C), (h, w), (columns, rows) = x.shape, size, self.stripe
        down, right = -h % rows, -w % columns
        x = x.view(B, h, w, C)
        if must_pad(down, right):
            x = F.pad(x, (0, 0, 0, right, 0, down))
        H, W = h + down, w + right
        qkv = (self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)).view(B, H, W, 3, C)
        half = C // 2
        vertical = window_attention(qkv[..., :half], self.heads // 2, (H, columns))
        horizontal = window_attention(qkv[..., half:], self.heads // 2, (rows, W))
        v = qkv[:, :, :, 2, :half].unflatten(2, (W // columns, columns)).permute(0, 2, 4, 1, 3).flatten(0, 1)
        lepe = self.dwc(v).unflatten(0, (B, W // columns)).permute(0, 3, 1, 4, 2).reshape(B, H, W, half)
        v = qkv[:, :, :, 2, half:].unflatten(1, (H // rows, rows)).permute(0, 1, 4, 2, 3).flatten(0, 1)
        lepe_rows = self.dwc_rows(v).unflatten(0, (B, H // rows)).permute(0, 1, 3, 4, 2).reshape(B, H, W, half)
        out = torch.cat((vertical + lepe, horizontal + lepe_rows), 3)
        if must_pad(down, right):
            out = out[:, :h, :w]
        out = out.reshape(B, N, C)
        return self.proj(out) if torch.jit.is_scripting() else project(self.proj, out)


@describe.register(StripeAttention)
def _(mixer: StripeAttention, x: Tensor, size: tuple[int, int]) -> Iterator[AttentionMap]:
    """One map for the half of the heads in vertical stripes, one for the half in horizontal ones."""
    (H, W), (columns, rows), half = size, mixer.stripe, x.shape[2] // 2
    x = F.pad(x.unflatten(1, (H, W)), (0, 0, 0, -W % columns, 0, -H % rows))
    qkv = mixer.qkv(x).unflatten(3, (3, -1))
    for kind, part, window in (
        ("vertical", qkv[..., :half], (x.shape[1], columns)),
        ("horizontal", qkv[..., half:], (rows, x.shape[2])),
    ):
        yield window_map(part.flatten(3), mixer.heads // 2, (H, W), window, kind=kind)


@register_notrace_module
class FullAttention(nn.Module):
    """Softmax attention over all tokens, optionally with CSwin's depthwise convolution of v: (B, N, C) -> same."""

    def __init__(self, dim: int, heads: int, dwc: bool = False, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.dwc = DepthwiseConv(dim, **dd) if dwc else None

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        q, k, v = qkv.view(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = full_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        if self.dwc is not None:
            v = qkv[..., 2 * C :].view(B, size[0], size[1], C).permute(0, 3, 1, 2)
            out = out + self.dwc(v).flatten(2).transpose(1, 2)
        return self.proj(out) if torch.jit.is_scripting() else project(self.proj, out)


@describe.register(FullAttention)
def _(mixer: FullAttention, x: Tensor, size: tuple[int, int]) -> Iterator[AttentionMap]:
    T = x.shape[1] - size[0] * size[1]
    yield softmax_map("tokens", *split_heads(mixer.qkv(x), mixer.heads), grid=size, tokens=T, query_tokens=T)


class Block(nn.Module):
    """Attention and MLP with residual connections: tokens of a map of `size`, (B, [1 +] h·w, C) -> same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, eps: float, drop_path: float, **dd):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = CachedMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self.residuals, x, size)
        return self.residuals(x, size)

    def residuals(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


@register_notrace_module
class Patches(nn.Module):
    """A strided convolution, then LayerNorm if `norm`: (B, C, H, W) -> (B, dim, h, w), channels-last in memory.

    With `pad`, the map is padded with zeros at the right and bottom to multiples of the stride; without, the remainder
    is dropped, but there is always at least one patch.
    """

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, norm: bool, pad: bool, **dd):
        super().__init__()
        margin = (kernel - stride + 1) // 2
        self.stride, self.pad, self.least = stride, pad, kernel - 2 * margin
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, margin, **dd)
        self.norm = MapNorm(dim, eps=1e-5, **dd) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pad:
            down, right = -x.shape[2] % self.stride, -x.shape[3] % self.stride
        else:
            down, right = max(0, self.least - x.shape[2]), max(0, self.least - x.shape[3])
        if must_pad(down, right):
            x = F.pad(x, (0, right, 0, down))
        x = self.proj(channels_last(x))
        return self.norm(channels_last(x))


@register_notrace_module
class Merging(nn.Module):
    """Swin's patch merging, odd sides padded with zeros: (B, C, H, W) -> (B, out_dim, ceil(H / 2), ceil(W / 2))."""

    def __init__(self, dim: int, out_dim: int, **dd):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=1e-5, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = as_nhwc(x)
        down, right = x.shape[1] % 2, x.shape[2] % 2
        if must_pad(down, right):
            x = F.pad(x, (0, 0, 0, right, 0, down))
        B, h, w, C = x.shape
        x = x.reshape(B, h // 2, 2, w // 2, 2, C).permute(0, 1, 3, 4, 2, 5)  # of four, the row changes first
        return as_nchw(self.reduction(self.norm(x.reshape(B, h // 2, w // 2, 4 * C))))


class TokenStage(nn.Module):
    """Downsampling, position embeddings (PVT's, learned for maps of `size`), blocks: NCHW -> NCHW, channels-last."""

    def __init__(
        self, downsample: nn.Module, pos_embed: nn.Parameter | None, size: tuple[int, int], blocks: list[Block]
    ):
        super().__init__()
        self.size = size
        self.downsample, self.pos_embed, self.blocks = downsample, pos_embed, nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, self.size, size, "bilinear")
        for block in self.blocks:
            x = block(x, size)
        return as_nchw(x.reshape(x.shape[0], size[0], size[1], x.shape[2]))


class AgentPyramid(Pyramid):
    """Agent-PVT, Agent-Swin or Agent-CSwin: images (B, in_chans, H, W) of any size to logits (B, num_classes), or to
    four maps of strides 4, 8, 16 and 32.

    Args:
        host: "pvt", "swin" or "cswin".
        img_size: the size, a multiple of 32, that biases, windows, stripes and position embeddings are learned for. For
            others, biases and position embeddings are resized, and windows and stripes pad the map.
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for pooled features.
        global_pool: name of the pooling over the last map, as in timm; '' for none.
        dims: number of channels per stage.
        depths: number of blocks per stage.
        heads: number of heads per stage.
        mlp_ratios: per stage, hidden channels of the MLPs over their input channels.
        agents: per stage, the number of agents that the biases are learned for, a square.
        agent_blocks: per stage, how many of the first blocks have agent attention, None for all; the others have the
            original attention (the published AABB is all blocks of the first two stages; AAMB2 also has two blocks of
            the third). PVT only supports None.
        dense_agents: () for the classifier. If given, the network is that of the published detection and segmentation
            backbones: per stage, the number of agents to use, with biases resized from `agents`; and Swin's odd blocks
            always shift their windows. `features_only` sets it to the published numbers by default.
        out_norms: a LayerNorm for each stage's map in `forward_intermediates` and `features_only`, as the published
            Swin has for detection and segmentation. The next stage gets the map without it.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
    """

    def __init__(
        self,
        host: str,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        mlp_ratios: tuple[float, ...] = (4, 4, 4, 4),
        agents: tuple[int, ...] = (9, 16, 49, 49),
        agent_blocks: tuple[int, ...] | None = None,
        dense_agents: tuple[int, ...] = (),
        out_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if host not in ("pvt", "swin", "cswin"):
            raise ValueError(f"host must be 'pvt', 'swin' or 'cswin', got {host!r}")
        per_stage = dict(dims=dims, depths=depths, heads=heads, mlp_ratios=mlp_ratios, agents=agents)
        per_stage |= dict(agent_blocks=agent_blocks or depths, dense_agents=dense_agents or agents)
        for name, values in per_stage.items():
            if len(values) != 4:
                raise ValueError(f"{name} must have one entry for each of the four stages, got {values}")
        if bad := [(dim, n) for dim, n in zip(dims, heads) if dim % n]:
            raise ValueError(f"heads must divide dims, got {bad[0][1]} heads for {bad[0][0]} channels")
        if host == "pvt" and agent_blocks is not None and tuple(agent_blocks) != tuple(depths):
            raise ValueError(f"agent_blocks must be None for 'pvt', which has no other attention, got {agent_blocks}")
        img_size = checked_size(img_size, 32)
        self.host, self.in_chans, self.num_classes = host, in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = drop_rate

        kernel, pad = (7, False) if host == "cswin" else (4, host == "swin")
        self.stem = Patches(in_chans, dims[0], kernel, 4, norm=True, pad=pad, **dd)
        rates: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        self.feature_info = []
        for i, dim in enumerate(dims):
            stride = 4 * 2**i
            size = (img_size[0] // stride, img_size[1] // stride)
            downsample: nn.Module
            if i == 0:
                downsample = nn.Identity()
            elif host == "swin":
                downsample = Merging(dims[i - 1], dim, **dd)
            else:
                downsample = Patches(dims[i - 1], dim, 2 if host == "pvt" else 3, 2, norm=True, pad=False, **dd)
            blocks: list[Block] = []
            attn: nn.Module
            for j in range(depths[i]):
                if j < per_stage["agent_blocks"][i]:
                    attn = AgentAttention(dim, heads[i], size, agents[i], per_stage["dense_agents"][i], **dd)  # type: ignore[arg-type]
                elif host == "swin":
                    window = tuple(min(max(7, n // 32), side) for n, side in zip(img_size, size))
                    attn = WindowAttention(dim, heads[i], window, j % 2 == 1, bool(dense_agents), **dd)
                elif i == 3:
                    attn = FullAttention(dim, heads[i], dwc=True, **dd)
                else:
                    stripe = ((1, 2, img_size[1] // 32)[i], (1, 2, img_size[0] // 32)[i])
                    attn = StripeAttention(dim, heads[i], stripe, **dd)
                eps = 1e-6 if host == "pvt" else 1e-5
                blocks.append(Block(dim, attn, mlp_ratios[i], eps, next(rates), **dd))
            pos_embed = position_table(size[0] * size[1], dim, **dd) if host == "pvt" else None
            stages.append(TokenStage(downsample, pos_embed, size, blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=stride, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.out_norms = map_norms(dims, 1e-5, **dd) if out_norms else None
        self.norm = nn.Identity() if host == "pvt" else LayerNorm2d(dims[-1], eps=1e-5, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        init_linear(self)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("relative_bias")}


class AgentDeiT(Isotropic):
    """Agent-DeiT: images (B, in_chans, H, W) of any size to logits (B, num_classes), or to maps of stride 16.

    Args:
        img_size: the size, a multiple of 16, that biases and position embeddings are learned for. For others they are
            resized, and images are padded with zeros to multiples of 16.
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for pooled features.
        global_pool: "token" (the class token's features), "avg" (the mean over the map's tokens) or "" (all tokens).
        dim: number of channels.
        depth: number of blocks.
        heads: number of heads.
        mlp_ratio: hidden channels of the MLPs over their input channels.
        agents: number of agents, a square.
        agent_blocks: how many of the first blocks have agent attention, None for all; the others have full attention.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
    """

    STRIDE = 16

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        agents: int = 49,
        agent_blocks: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} heads for {dim} channels")
        h, w = checked_size(img_size, self.STRIDE)
        self.size = size = h // self.STRIDE, w // self.STRIDE
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = dim
        self.stem = Patches(in_chans, dim, self.STRIDE, self.STRIDE, norm=False, pad=True, **dd)
        self.cls_token = position_table(1, dim, **dd)
        self.pos_embed = position_table(1 + size[0] * size[1], dim, **dd)
        blocks = []
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            if agent_blocks is None or i < agent_blocks:
                attn = AgentAttention(dim, heads, size, agents, token=True, **dd)
            else:
                attn = FullAttention(dim, heads, **dd)  # type: ignore[assignment]
            blocks.append(Block(dim, attn, mlp_ratio, 1e-6, rate, **dd))  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [dict(num_chs=dim, reduction=self.STRIDE, module=f"blocks.{i}") for i in range(depth)]
        self.norm = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.head = TokenHead(dim, num_classes, global_pool, drop_rate, **dd)
        init_linear(self)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.stem(x)
        size = (x.shape[2], x.shape[3])
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)), 1)
        return x + resize_positions(self.pos_embed, self.size, size, "bicubic"), size


PUBLISHED_KEYS: Rules = [  # published name -> ours, applied in order
    (r"^patch_embed1?\.(proj|norm)\.", r"stem.\1."),  # PVT counts its four from 1
    (r"^stage1_conv_embed\.0\.", "stem.proj."),
    (r"^stage1_conv_embed\.2\.", "stem.norm."),
    (r"^patch_embed(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.downsample."),
    (r"^merge(\d)\.conv\.", r"stages.\1.downsample.proj."),
    (r"^merge(\d)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^pos_embed(\d)$", lambda m: f"stages.{int(m[1]) - 1}.pos_embed"),
    (r"^layers\.(\d)\.blocks\.", r"stages.\1.blocks."),
    (r"^(?:block|stage)(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.blocks.{m[2]}."),
    (r"^(stages\.\d\.blocks\.\d+)\.(qkv|proj)\.", r"\1.attn.\2."),  # CSwin's blocks own these
    (r"\.attns\.0\.get_v\.", ".attn.dwc."),
    (r"\.attns\.1\.get_v\.", ".attn.dwc_rows."),
    (r"\.attns\.0\.", ".attn."),
    (r"\.relative_position_bias_table$", ".relative_bias"),
    (r"\.an_bias$", ".key_block"),
    (r"\.ah_bias$", ".key_rows"),
    (r"\.aw_bias$", ".key_columns"),
    (r"\.ac_bias$", ".key_token"),
    (r"\.na_bias$", ".query_block"),
    (r"\.ha_bias$", ".query_rows"),
    (r"\.wa_bias$", ".query_columns"),
    (r"\.ca_bias$", ".query_token"),
    (r"^norm(\d)\.", r"out_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def rename(key: str) -> str:
    """Return our name for a key of a published state dict; our own keys stay unchanged."""
    return rename_key(key, PUBLISHED_KEYS)


TABLES = {  # of biases, from the published layout to ours
    "key_rows": lambda t: t[0, ..., 0],  # (1, heads, agents, h, 1)
    "key_columns": lambda t: t[0, :, :, 0],  # (1, heads, agents, 1, w)
    "key_token": lambda t: t[0, ..., 0],  # (1, heads, agents, 1)
    "query_rows": lambda t: t[0, :, :, 0].mT,  # (1, heads, h, 1, agents)
    "query_columns": lambda t: t[0, :, 0].mT,  # (1, heads, 1, w, agents)
    "query_token": lambda t: t[0, :, 0],  # (1, heads, 1, agents)
}


def _resized(key: str, given: dict[str, Tensor], own: dict[str, Tensor]) -> Tensor:
    """Return given[key], resized as the published loader does if own[key] is for another resolution."""
    value, shape = given[key], own[key].shape
    first = key.removesuffix("pos_embed") + "blocks.0.attn.key_"
    if value.shape == shape:
        return value
    if key.endswith("pos_embed") and value.shape[2] == shape[2] and f"{first}rows" in given:
        old, new = ((d[f"{first}rows"].shape[2], d[f"{first}columns"].shape[2]) for d in (given, own))
        return resize_positions(value, old, new, "bicubic")
    if key.endswith(("_rows", "_columns")) and value.shape[:2] == shape[:2]:
        return F.interpolate(value, shape[2:], mode="linear", align_corners=False)
    if key.endswith("relative_bias") and value.shape[0] == shape[0]:
        return F.interpolate(value[None], shape[1:], mode="bicubic", align_corners=False)[0]
    return value


def checkpoint_filter_fn(state_dict: dict, model: nn.Module) -> dict[str, Tensor]:
    """Convert weights under the published names (classification, detection or segmentation files) to ours.

    CSwin's published accuracy is that of 'state_dict_ema'. Parameters for another resolution are resized as in the
    published loader: biases of rows and columns linearly, relative and absolute position embeddings bicubically.
    """
    out = {}
    for key, value in unwrap(state_dict, ("state_dict_ema", "state_dict", "model")).items():
        key = rename(key)
        name = key.rpartition(".")[2]
        if name in ("relative_position_index", "attn_mask"):
            continue
        if name in TABLES and value.ndim >= 4:
            value = TABLES[name](value)
        elif name == "relative_bias" and value.ndim == 2:
            side = math.isqrt(len(value))
            value = value.mT.reshape(-1, side, side)
        out[key] = value
    for key in [key for key in out if ".attn.q." in key]:
        out[key.replace(".q.", ".qkv.")] = torch.cat((out.pop(key), out.pop(key.replace(".q.", ".kv."))))
    own = model.state_dict()
    out = {key: _resized(key, out, own) if key in own else value for key, value in out.items()}
    return complete(out, model, "blocks." if isinstance(model, AgentDeiT) else "stages.")


def _cfg(size: int = 224, **kwargs) -> dict:
    return make_cfg(
        size,
        crop_mode="squash",
        first_conv="stem.proj",
        origin_url="https://github.com/LeapLabTHU/Agent-Attention",  # without a license
        paper_name="Agent Attention: On the Integration of Softmax and Linear Attention",
        paper_ids="arXiv:2312.08874",
        fixed_input_size=size != 224,  # by which timm passes the size on as `img_size`
        **kwargs,
    )


PVT = dict(host="pvt", dims=(64, 128, 320, 512), heads=(1, 2, 5, 8), mlp_ratios=(8, 8, 4, 4))
SWIN = dict(host="swin", dims=(96, 192, 384, 768), heads=(3, 6, 12, 24))
SWIN_B = dict(host="swin", dims=(128, 256, 512, 1024), heads=(4, 8, 16, 32))
CSWIN = dict(host="cswin", dims=(64, 128, 256, 512), heads=(2, 4, 8, 16))
CSWIN_B = dict(host="cswin", dims=(96, 192, 384, 768), heads=(4, 8, 16, 32))
VARIANTS: dict[str, dict[str, Any]] = dict(
    agent_deit_t=dict(dim=192, heads=3),
    agent_deit_s=dict(dim=384, heads=6),
    agent_deit_b=dict(dim=768, heads=12, agents=81, agent_blocks=4),
    agent_pvt_t=dict(PVT, depths=(2, 2, 2, 2)),
    agent_pvt_s=dict(PVT, depths=(3, 4, 6, 3)),
    agent_pvt_m=dict(PVT, depths=(3, 4, 18, 3)),
    agent_pvt_l=dict(PVT, depths=(3, 8, 27, 3)),
    agent_swin_t=dict(SWIN, depths=(2, 2, 6, 2), agent_blocks=(2, 2, 6, 0)),
    agent_swin_s=dict(SWIN, depths=(2, 2, 18, 2), agent_blocks=(2, 2, 0, 0)),
    agent_swin_b=dict(SWIN_B, depths=(2, 2, 18, 2), agent_blocks=(2, 2, 2, 0)),
    agent_cswin_t=dict(CSWIN, depths=(2, 4, 18, 1), agent_blocks=(2, 4, 0, 0)),
    agent_cswin_s=dict(CSWIN, depths=(3, 6, 29, 2), agent_blocks=(3, 6, 0, 0)),
    agent_cswin_b=dict(CSWIN_B, depths=(3, 6, 29, 2), agent_blocks=(3, 6, 0, 0)),
)
DENSE_AGENTS = dict(pvt=(144, 256, 784, 784), swin=(81, 144, 196, 49))  # of the published detection backbones
README = "README of the published code"
PUBLISHED = dict(  # ImageNet-1K top-1 and its source
    agent_deit_t=(74.9, README),
    agent_deit_s=(80.5, README),
    agent_deit_b=(82.0, README),
    agent_pvt_t=(78.4, README),
    agent_pvt_s=(82.2, README),
    agent_pvt_m=(83.4, README),
    agent_pvt_l=(83.7, README),
    agent_swin_t=(82.6, README),
    agent_swin_s=(83.7, README),
    agent_swin_b=(84.0, README),
    agent_cswin_t=(83.1, README),
    agent_cswin_s=(83.9, README),
    agent_cswin_b=(84.7, README),
)
WEIGHTS = dict.fromkeys(VARIANTS, "share links in the authors' README: https://github.com/LeapLabTHU/Agent-Attention")
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg(stride=16 if "deit" in name else 32) for name in VARIANTS}  # type: ignore[arg-type]
    | {
        "agent_deit_s.untrained_448": _cfg(448, stride=16),
        "agent_pvt_m.untrained_256": _cfg(256),
        "agent_swin_s.untrained_288": _cfg(288, crop_pct=1.0),
        "agent_swin_b.untrained_384": _cfg(384, crop_pct=1.0),
        "agent_cswin_b.untrained_384": _cfg(384),
    }
)


def _create(name: str, pretrained: bool, **kwargs) -> Any:
    kwargs = VARIANTS[name] | kwargs
    if kwargs.get("features_only") and kwargs.get("host") in DENSE_AGENTS:
        kwargs.setdefault("dense_agents", DENSE_AGENTS[kwargs["host"]])
    cls, out_indices = (AgentPyramid, (0, 1, 2, 3)) if "host" in kwargs else (AgentDeiT, 3)
    return create_model(cls, name, pretrained, checkpoint_filter_fn, WEIGHTS[name], out_indices, **kwargs)


@register_model
def agent_deit_t(pretrained: bool = False, **kwargs) -> AgentDeiT:
    return _create("agent_deit_t", pretrained, **kwargs)


@register_model
def agent_deit_s(pretrained: bool = False, **kwargs) -> AgentDeiT:
    return _create("agent_deit_s", pretrained, **kwargs)


@register_model
def agent_deit_b(pretrained: bool = False, **kwargs) -> AgentDeiT:
    return _create("agent_deit_b", pretrained, **kwargs)


@register_model
def agent_pvt_t(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_pvt_t", pretrained, **kwargs)


@register_model
def agent_pvt_s(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_pvt_s", pretrained, **kwargs)


@register_model
def agent_pvt_m(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_pvt_m", pretrained, **kwargs)


@register_model
def agent_pvt_l(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_pvt_l", pretrained, **kwargs)


@register_model
def agent_swin_t(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_swin_t", pretrained, **kwargs)


@register_model
def agent_swin_s(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_swin_s", pretrained, **kwargs)


@register_model
def agent_swin_b(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_swin_b", pretrained, **kwargs)


@register_model
def agent_cswin_t(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_cswin_t", pretrained, **kwargs)


@register_model
def agent_cswin_s(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_cswin_s", pretrained, **kwargs)


@register_model
def agent_cswin_b(pretrained: bool = False, **kwargs) -> AgentPyramid:
    return _create("agent_cswin_b", pretrained, **kwargs)
