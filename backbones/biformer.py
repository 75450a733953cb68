"""BiFormer: a four-stage pyramid whose tokens attend to the few regions that their own region is routed to.

Paper: "BiFormer: Vision Transformer with Bi-Level Routing Attention", CVPR 2023, arXiv 2303.08810.
Published code: rayleizhu/BiFormer@1697bbb (MIT). Parameters map one to one (`checkpoint_filter_fn`), outputs are equal.

A map of any size is divided into n_win x n_win regions. Everything is channels-last: blocks process (B, H, W, C), and a
stage returns an NCHW view of the same memory.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..ops import bilevel_routing_attention, region_routing
from ..ops.attention import full_attention
from ..ops.dispatch import at_least_one, at_most
from .attention_maps import AttentionMap, QueryMap, describe, hidden_unless, softmax_map, split_heads
from .base import Pyramid, Stage, create_model, make_cfg, map_norms
from .layers import (
    CachedMlp,
    DepthwiseConv,
    as_nchw,
    as_nhwc,
    channels_last,
    must_pad,
    project,
)
from .published import Rules, complete, rename_key, unwrap

FULL, FULL_LEPE = -1, -2  # the published codes in `topks` for attention over the whole map, without and with LePE


# Padding depends on the size, so torch.fx treats this layer as a leaf.
@register_notrace_module
class RoutedAttention(nn.Module):
    """Bi-level routing attention (paper, section 3.2), with LePE: (B, H, W, C) -> (B, H, W, C).

    Each of the n_win x n_win regions chooses the `topk` regions whose mean keys have the largest products with its mean
    query; its tokens attend to all tokens of those. The choice has no gradient. Logits are scaled by dim**-0.5, not
    head_dim**-0.5.

    A map that n_win does not divide is padded in one of the two published ways:

    - default (ops/bra_legacy.py): x is padded with zeros at the bottom and right before the projection, so that padding
      tokens have the biases as queries, keys and values; they count in region means and are attended to like any other.
    - `pad_projected` (ops/bra_nchw.py): regions have floor(H / n_win) x floor(W / n_win) tokens, and there may be more
      than n_win**2 of them; q, k and v are padded with zeros. If the map has fewer rows than n_win, which the published
      code refuses, a region is one row (and topk at most the number of regions).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        n_win: int,
        topk: int,
        auto_pad: bool = True,
        pad_projected: bool = False,
        lepe_kernel: int = 5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if not 1 <= topk <= n_win**2:
            raise ValueError(f"topk must be between 1 and the n_win**2 = {n_win**2} regions, got {topk}")
        self.heads, self.n_win, self.topk = heads, n_win, topk
        self.scale = dim**-0.5  # a number, where a traced graph has tensors for sizes
        self.auto_pad, self.pad_projected = auto_pad, pad_projected
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.lepe = DepthwiseConv(dim, lepe_kernel, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, n_win={self.n_win}, topk={self.topk}"

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int], tuple[int, int]]:
        """Return padded qkv, v for LePE, idx, regions per column and row, tokens per column and row of a region."""
        n = self.n_win
        H, W, C = x.shape[1], x.shape[2], x.shape[3]
        if self.pad_projected:
            h, w = at_least_one(H // n), at_least_one(W // n)
            rows, cols = (H + h - 1) // h, (W + w - 1) // w
        else:
            h, w = (H + n - 1) // n, (W + n - 1) // n
            rows, cols = n, n
        down, right = rows * h - H, cols * w - W
        if not self.auto_pad and (down > 0 or right > 0):
            raise ValueError(
                f"auto_pad=False needs maps that n_win={n} divides, got one of {H}x{W}: "
                "choose another image size or auto_pad=True"
            )
        if must_pad(down, right) and not self.pad_projected:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        v = qkv[..., 2 * C :]
        idx = region_routing(qkv, (h, w), at_most(rows * cols, self.topk))
        if must_pad(down, right) and self.pad_projected:
            qkv = F.pad(qkv, (0, 0, 0, right, 0, down))
        return qkv, v, idx, (rows, cols), (h, w)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[1], x.shape[2]
        qkv, v, idx, regions, _ = self._project(x)
        lepe = as_nhwc(self.lepe(as_nchw(v)))
        out = bilevel_routing_attention(qkv, idx, self.heads, regions, self.scale)
        out = out[:, :H, :W] + lepe[:, :H, :W]
        return self.proj(out) if torch.jit.is_scripting() else project(self.proj, out)


@register_notrace_module
class FullAttention(nn.Module):
    """Attention over the whole map (the last stage), 8 heads, no qkv bias: (B, H, W, C) -> (B, H, W, C).

    LePE convolves the layer's input, or v where `lepe_on_v` (the published nchw flavour).
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        lepe: bool = True,
        lepe_on_v: bool = False,
        lepe_kernel: int = 5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of the last stage's {heads} heads, got {dim}")
        self.heads, self.lepe_on_v = heads, lepe_on_v
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.lepe = DepthwiseConv(dim, lepe_kernel, **dd) if lepe else None
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        q, k, v = qkv.reshape(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        out = full_attention(q, k, v).transpose(1, 2).reshape(B, H, W, C)
        if self.lepe is not None:
            source = qkv[..., 2 * C :] if self.lepe_on_v else x
            out = out + as_nhwc(self.lepe(as_nchw(source)))
        return self.proj(out) if torch.jit.is_scripting() else project(self.proj, out)


@describe.register(RoutedAttention)
def _(mixer: RoutedAttention, x: Tensor) -> Iterator[AttentionMap]:
    """regions: 1 in the regions that the query's region is routed to; tokens: the weights within them."""
    grid = (x.shape[1], x.shape[2])
    qkv, _, idx, (R, S), (h, w) = mixer._project(x)
    rows, columns = R * h, S * w
    y, z = torch.arange(rows, device=x.device) // h, torch.arange(columns, device=x.device) // w
    region = (y[:, None] * S + z).flatten()  # of each cell of the padded map
    of_query = region.view(rows, columns)[: grid[0], : grid[1]].flatten()
    chosen = torch.zeros(len(x), R * S, R * S, dtype=torch.bool, device=x.device).scatter(2, idx.long(), True)

    def seen(index: Tensor) -> Tensor:
        return chosen[:, None, of_query[index.to(x.device)]][..., region]

    frame = (rows, columns, 0, 0)
    common = dict(grid=grid, query_grid=grid, frame=frame)
    yield QueryMap(
        kind="regions",
        heads=1,
        images=len(x),
        weights=lambda index: seen(index).float(),
        normalized=False,
        **common,  # type: ignore[arg-type]
    )
    q, k, v = split_heads(qkv, mixer.heads)
    q = q.unflatten(2, (rows, columns))[:, :, : grid[0], : grid[1]].flatten(2, 3)
    yield softmax_map(
        "tokens",
        q,
        k,
        v,
        scale=mixer.scale,
        bias=lambda index: hidden_unless(seen(index)),
        **common,  # type: ignore[arg-type]
    )


@describe.register(FullAttention)
def _(mixer: FullAttention, x: Tensor) -> Iterator[AttentionMap]:
    yield softmax_map("tokens", *split_heads(mixer.qkv(x), mixer.heads), grid=(x.shape[1], x.shape[2]))


class Block(nn.Module):
    """Convolutional position embedding, attention and MLP with residual connections (paper, figure 3)."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, pos_embed: bool, drop_path: float, **dd):
        super().__init__()
        self.pos_embed = DepthwiseConv(dim, **dd) if pos_embed else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = CachedMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + as_nhwc(self.pos_embed(as_nchw(x)))
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stem(nn.Sequential):
    """Convolutions on the image, from here on channels-last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        x = channels_last(x)
        for layer in self:
            x = layer(x)
        return x


class BiFormer(Pyramid):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes) or to four maps of strides 4, 8, 16 and 32.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for pooled features.
        global_pool: name of the pooling over the last map, as in timm; '' for none.
        depths: number of blocks per stage.
        dims: number of channels per stage.
        topks: per stage, the number of regions a region is routed to, or -1 (attention over the whole map) or -2 (the
            same, with LePE), the published codes. At most n_win**2.
        n_win: regions per side of each map of a routed stage; 7 for classification at 224, 8 (segmentation) or 16
            (detection) in the published dense models.
        head_dim: channels per head in the routed stages (the others have 8 heads).
        mlp_ratio: hidden channels of the MLPs over their input channels.
        patchify: the Swin-like layout of the paper's ablation (`stl`): stem and downsampling by non-overlapping
            patches, no convolutional position embedding.
        pad_projected: the refactored published operator ("nchw"): see `RoutedAttention`; LePE on v in the last stage.
        auto_pad: pad maps that n_win does not divide; False refuses them, as the published classification models do.
        out_norms: a LayerNorm for each stage's map in `forward_intermediates` and `features_only`, as the published
            detection and segmentation backbones have. The next stage gets the map without it.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 8, 2),
        dims: tuple[int, ...] = (64, 128, 256, 512),
        topks: tuple[int, ...] = (1, 4, 16, FULL_LEPE),
        n_win: int = 7,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        patchify: bool = False,
        pad_projected: bool = False,
        auto_pad: bool = True,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if not len(depths) == len(dims) == len(topks):
            raise ValueError(f"depths, dims and topks must be equally long, got {depths}, {dims} and {topks}")
        if any(dim % head_dim for dim, k in zip(dims, topks) if k > 0):
            raise ValueError(f"dims of routed stages must be multiples of head_dim={head_dim}, got {dims}")
        if bad := [k for k in topks if k not in (FULL, FULL_LEPE) and not 1 <= k <= n_win**2]:
            limit = f"the n_win**2 = {n_win**2} regions"
            raise ValueError(f"topks must be -1, -2 or between 1 and {limit}, got {bad[0]} in {tuple(topks)}")
        self.in_chans, self.num_classes, self.pad_projected = in_chans, num_classes, pad_projected
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = drop_rate

        if patchify:
            layers = [nn.Conv2d(in_chans, dims[0], 4, 4, **dd), nn.BatchNorm2d(dims[0], **dd)]
        else:
            layers = [
                nn.Conv2d(in_chans, dims[0] // 2, 3, 2, 1, **dd),
                nn.BatchNorm2d(dims[0] // 2, **dd),
                nn.GELU(),
                nn.Conv2d(dims[0] // 2, dims[0], 3, 2, 1, **dd),
                nn.BatchNorm2d(dims[0], **dd),
            ]
        self.stem = Stem(*layers)
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        self.feature_info = []
        for i, (dim, topk) in enumerate(zip(dims, topks)):
            downsample: nn.Module
            if i == 0:
                downsample = nn.Identity()
            elif patchify:
                downsample = nn.Sequential(nn.BatchNorm2d(dims[i - 1], **dd), nn.Conv2d(dims[i - 1], dim, 2, 2, **dd))
            else:
                downsample = nn.Sequential(nn.Conv2d(dims[i - 1], dim, 3, 2, 1, **dd), nn.BatchNorm2d(dim, **dd))
            blocks: list[nn.Module] = []
            attn: nn.Module
            for rate in rates[i]:
                if topk > 0:
                    attn = RoutedAttention(dim, dim // head_dim, n_win, topk, auto_pad, pad_projected, **dd)
                else:
                    attn = FullAttention(dim, lepe=topk == FULL_LEPE, lepe_on_v=pad_projected, **dd)
                blocks.append(Block(dim, attn, mlp_ratio, not patchify, rate, **dd))
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.out_norms = map_norms(dims, 1e-6, **dd) if out_norms else None
        self.norm = nn.BatchNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize linear layers from a normal of std 0.02, biases with 0; convolutions keep PyTorch's default.

        The nchw flavour's projections and MLPs were 1x1 convolutions, so there torch's default stays too.
        """
        linears = [self.head.fc] if self.pad_projected else list(self.modules())
        for m in linears:
            if isinstance(m, nn.Linear):
                trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)


PUBLISHED_KEYS: Rules = [  # published name -> ours, applied in order
    (r"^downsample_layers\.0\.", "stem."),
    (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
    (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.attn\.(?:qkv\.qkv|qkv_linear)\.", ".attn.qkv."),
    (r"\.attn\.(?:wo|output_linear)\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.[23]\.", ".mlp.fc2."),
    (r"^extra_norms\.", "out_norms."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def rename(key: str) -> str:
    """Return our name for a key of a published state dict; our own keys stay unchanged."""
    return rename_key(key, PUBLISHED_KEYS)


def checkpoint_filter_fn(state_dict: dict, model: BiFormer) -> dict[str, Tensor]:
    """Convert weights under the published names (classification, detection or segmentation files) to ours."""
    out = {}
    for key, value in unwrap(state_dict).items():
        key = rename(key)
        if value.ndim == 4 and re.search(r"\.(qkv|proj|fc1|fc2)\.weight$", key):
            value = value.flatten(1)  # the nchw flavour's 1x1 convolutions
        out[key] = value
    return complete(out, model)


STL = dict(depths=(2, 2, 6, 2), dims=(96, 192, 384, 768), mlp_ratio=4.0, patchify=True)
VARIANTS: dict[str, dict[str, Any]] = dict(
    biformer_t=dict(depths=(2, 2, 8, 2), dims=(64, 128, 256, 512)),
    biformer_s=dict(depths=(4, 4, 18, 4), dims=(64, 128, 256, 512)),
    biformer_b=dict(depths=(4, 4, 18, 4), dims=(96, 192, 384, 768)),
    biformer_stl=STL,
    biformer_stl_nchw=dict(STL, pad_projected=True),
)
PAPER = "arXiv:2303.08810"
PUBLISHED = dict(  # ImageNet-1K top-1 and its source
    biformer_t=(81.4, PAPER),
    biformer_s=(83.8, PAPER),
    biformer_b=(84.3, PAPER),
    biformer_stl=(82.7, PAPER),
    biformer_stl_nchw=(82.7, "README of the published code"),
)
WEIGHTS = dict.fromkeys(
    VARIANTS, "share links in the authors' README, which users report dead: https://github.com/rayleizhu/BiFormer"
)
CFG = make_cfg(
    first_conv="stem.0",
    license="mit",
    origin_url="https://github.com/rayleizhu/BiFormer",
    paper_name="BiFormer: Vision Transformer with Bi-Level Routing Attention",
    paper_ids="arXiv:2303.08810",
)
default_cfgs = generate_default_cfgs({f"{name}.untrained": CFG for name in VARIANTS})


def _create(name: str, pretrained: bool, **kwargs) -> BiFormer:
    kwargs = VARIANTS[name] | kwargs
    return create_model(BiFormer, name, pretrained, checkpoint_filter_fn, WEIGHTS[name], **kwargs)


@register_model
def biformer_t(pretrained: bool = False, **kwargs) -> BiFormer:
    return _create("biformer_t", pretrained, **kwargs)


@register_model
def biformer_s(pretrained: bool = False, **kwargs) -> BiFormer:
    return _create("biformer_s", pretrained, **kwargs)


@register_model
def biformer_b(pretrained: bool = False, **kwargs) -> BiFormer:
    return _create("biformer_b", pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs) -> BiFormer:
    return _create("biformer_stl", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs) -> BiFormer:
    return _create("biformer_stl_nchw", pretrained, **kwargs)
