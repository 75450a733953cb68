"""NAT, DiNAT and DiNAT_s: four-stage pyramids whose blocks attend to a neighborhood of every pixel.

Papers: "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143, and "Dilated Neighborhood Attention
Transformer", arXiv 2209.15001. Published code: SHI-Labs/Neighborhood-Attention-Transformer@d334f5b (MIT), with
SHI-Labs/NATTEN 0.14 (MIT) for the attention. Parameters map one to one (`checkpoint_filter_fn`), outputs are equal.

NAT and DiNAT have overlapping convolutions as stem and between stages; DiNAT_s has Swin's patches. DiNAT alternates
local and dilated blocks. Dilations have no parameters: the published detectors and segmenters take the ImageNet weights
with other `dilations`. Names end in m (mini), t, s, b, l; `dinats_*` is DiNAT_s.

Maps travel as (B, H, W, C) through the blocks, and as NCHW views of the same memory between them.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..ops import neighborhood_attention
from ..ops.dispatch import at_most
from ..ops.neighborhood_attention.reference import neighbors
from .attention_maps import AttentionMap, describe, hidden_unless, softmax_map, split_heads
from .base import Pyramid, Stage, create_model, init_linear, make_cfg, map_norms
from .layers import CachedMlp, channels_last, must_pad, project
from .published import Rules, complete, rename_key, unwrap

EPS = 1e-5  # of every LayerNorm


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name} must be an integer of at least 1 or two of them, got {value}")
    return pair


# Padding depends on the size of the input, so torch.fx treats this layer as a leaf.
@register_notrace_module
class NeighborhoodAttention(nn.Module):
    """Attention of every pixel to a window around it: (B, H, W, dim) -> (B, H, W, dim), for any H and W.

    A layer for any network. Arguments, state dict (`qkv`, `proj`, `rpb`) and outputs are those of NATTEN's
    `NeighborhoodAttention2D`; unlike NATTEN since 0.20 it has the bias and pads small maps.

    A map smaller than kernel_size · dilation is padded with zeros at the bottom and right before the projection, as
    NATTEN 0.14 does. So padding tokens have the projection's bias as query, key and value, take part as keys, and
    windows are shifted at the border of the padded map.

    Args:
        dim: number of channels.
        num_heads: number of heads, a divisor of dim.
        kernel_size: keys per query along both axes, or (rows, columns). Odd, unless the stride is over 1.
        dilation: pixels from one key to the next, one number or two.
        stride: neighbouring queries that share a window, one number or two, at most kernel_size.
        rel_pos_bias: add a learned bias per head and distance, `rpb` (num_heads, 2k-1, 2k-1), indexed by key - query.
        bias: NATTEN 0.14's name of rel_pos_bias, which it overrides unless None.
        qkv_bias: give the projection to queries, keys and values a bias.
        qk_scale: scale of the logits; (dim / num_heads) ** -0.5 if None.
        proj_drop: dropout after the output projection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int],
        dilation: int | Sequence[int] | None = 1,
        stride: int | Sequence[int] = 1,
        rel_pos_bias: bool = True,
        bias: bool | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads}")
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.kernel_size, self.stride = _pair("kernel_size", kernel_size), _pair("stride", stride)
        self.dilation = _pair("dilation", 1 if dilation is None else dilation)
        for k, s in zip(self.kernel_size, self.stride):
            if s > k:
                raise ValueError(f"stride must be at most kernel_size = {kernel_size}, got {stride}")
            if s == 1 and k % 2 == 0:
                raise ValueError(f"kernel_size must be odd where stride is 1, got {kernel_size}")
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = None
        if rel_pos_bias if bias is None else bias:
            kh, kw = self.kernel_size
            self.rpb = nn.Parameter(torch.empty(num_heads, 2 * kh - 1, 2 * kw - 1, **dd))
            trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        sizes = f"kernel_size={self.kernel_size}, dilation={self.dilation}, stride={self.stride}"
        return f"num_heads={self.num_heads}, {sizes}, rel_pos_bias={self.rpb is not None}"

    def forward(self, x: Tensor) -> Tensor:
        H, W, C = x.shape[1], x.shape[2], x.shape[3]
        height, width = self.kernel_size[0] * self.dilation[0], self.kernel_size[1] * self.dilation[1]
        down, right = height - at_most(H, height), width - at_most(W, width)
        padded = must_pad(down, right)
        if padded:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        qkv = qkv.view(x.shape[0], x.shape[1], x.shape[2], 3, C)  # unflatten has one batch size in legacy ONNX
        x = neighborhood_attention(
            qkv, self.num_heads, self.kernel_size, self.rpb, self.dilation, self.stride, self.scale
        )
        if padded:
            x = x[:, :H, :W]
        return self.proj_drop(self.proj(x) if torch.jit.is_scripting() else project(self.proj, x))


@describe.register(NeighborhoodAttention)
def _(mixer: NeighborhoodAttention, x: Tensor) -> Iterator[AttentionMap]:
    H, W = x.shape[1], x.shape[2]
    rows, columns = (max(n, k * d) for n, k, d in zip((H, W), mixer.kernel_size, mixer.dilation))
    q, k, v = split_heads(mixer.qkv(F.pad(x, (0, 0, 0, columns - W, 0, rows - H))), mixer.num_heads)
    q = q.unflatten(2, (rows, columns))[:, :, :H, :W].flatten(2, 3)
    axes = [  # for each axis, the keys of a position and their indices in the table of biases
        neighbors(n, k, d, s, x.device)
        for n, k, d, s in zip((rows, columns), mixer.kernel_size, mixer.dilation, mixer.stride)
    ]

    def bias(index: Tensor) -> Tensor:
        seen, entry = [], []
        for n, at, (keys, entries) in zip((rows, columns), (index // W, index % W), axes):
            blank = torch.zeros(len(index), n, dtype=torch.long, device=x.device)
            seen.append(blank.bool().scatter(1, keys[at], True))
            entry.append(blank.scatter(1, keys[at], entries[at]))
        hidden = hidden_unless((seen[0][:, :, None] & seen[1][:, None]).flatten(1))
        if mixer.rpb is None:
            return hidden
        return mixer.rpb[:, entry[0][:, :, None], entry[1][:, None]].flatten(2) + hidden

    yield softmax_map("neighborhood", q, k, v, (H, W), mixer.scale, bias, frame=(rows, columns, 0, 0))


class Block(nn.Module):
    """Attention, then MLP, each with a LayerNorm before and a residual around it: (B, H, W, C) -> same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, layer_scale: float | None, drop_path: float, **dd):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = CachedMlp(dim, int(dim * mlp_ratio), **dd)
        self.gamma1 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
        self.gamma2 = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.norm1(x))
        x = x + self.drop_path(y if self.gamma1 is None else self.gamma1 * y)
        y = self.mlp(self.norm2(x))
        return x + self.drop_path(y if self.gamma2 is None else self.gamma2 * y)


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2 with nothing between them, then LayerNorm: images -> NCHW of a quarter."""

    def __init__(self, in_chans: int, dim: int, **dd):
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(channels_last(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@register_notrace_module
class PatchStem(nn.Module):
    """Patches of `patch` x `patch` pixels, then LayerNorm: images, zero-padded to multiples of it -> NCHW."""

    def __init__(self, in_chans: int, dim: int, patch: int, **dd):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch, **dd)
        self.norm = nn.LayerNorm(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        down, right = -x.shape[2] % self.patch, -x.shape[3] % self.patch
        if must_pad(down, right):
            x = F.pad(x, (0, right, 0, down))
        return self.norm(self.proj(channels_last(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvDownsample(nn.Module):
    """A 3x3 convolution of stride 2, then LayerNorm: NCHW -> NCHW of half the size, rounded up."""

    def __init__(self, dim: int, out_dim: int, **dd):
        super().__init__()
        self.reduction = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(out_dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@register_notrace_module
class PatchMerging(nn.Module):
    """Swin's: the four pixels of a 2x2 square, LayerNorm and projected: NCHW -> NCHW of half the size, rounded up.

    Padding pixels are zeros before the norm.
    """

    def __init__(self, dim: int, out_dim: int, **dd):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS, **dd)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        down, right = x.shape[1] % 2, x.shape[2] % 2
        if must_pad(down, right):
            x = F.pad(x, (0, 0, 0, right, 0, down))
        x = torch.cat((x[:, ::2, ::2], x[:, 1::2, ::2], x[:, ::2, 1::2], x[:, 1::2, 1::2]), 3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class NAT(Pyramid):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes) or to a map per stage, of strides 4, 8, 16, 32.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for pooled features.
        global_pool: timm's name of the pooling over the last map, after its norm; '' for none.
        depths: blocks per stage.
        dims: width per stage.
        head_dim: width of a head.
        mlp_ratio: hidden width of the MLPs over their input's.
        kernel_size: side of a window, in keys: odd.
        dilations: per stage, the dilation of all blocks, or those of the first blocks, repeated to its depth.
        strides: per stage, how many queries along an axis share a window (generalized neighborhood attention).
        patch_size: None for convolutions as stem and between stages, else the side of the patches of Swin's stem.
        isotropic: keep the size and width of the map in all stages, which then only say where features are taken.
        layer_scale: initial scale of the residual branches, None for none.
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
        depths: tuple[int, ...] = (3, 4, 6, 5),
        dims: tuple[int, ...] = (64, 128, 256, 512),
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Sequence[int | Sequence[int]] = (1, 1, 1, 1),
        strides: Sequence[int] = (1, 1, 1, 1),
        patch_size: int | None = None,
        isotropic: bool = False,
        layer_scale: float | None = None,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        for name, value in dict(depths=depths, dilations=dilations, strides=strides).items():
            if len(value) < len(dims) or (name == "depths" and len(value) > len(dims)):
                raise ValueError(f"{name} must have an entry for each of the {len(dims)} dims, got {value}")
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"dims must be multiples of head_dim={head_dim}, got {dims}")
        if isotropic and len(set(dims)) > 1:
            raise ValueError(f"dims must be equal in isotropic models, got {dims}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = drop_rate

        self.stem = PatchStem(in_chans, dims[0], patch_size, **dd) if patch_size else ConvStem(in_chans, dims[0], **dd)
        rates: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        downsampler = PatchMerging if patch_size else ConvDownsample
        self.isotropic = isotropic
        stages = []
        self.feature_info = []
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            given = dilations[i]
            each = [given] if isinstance(given, int) else list(given)
            blocks = []
            for j in range(depth):
                dilation, heads = each[j % len(each)], dim // head_dim
                attn = NeighborhoodAttention(dim, heads, kernel_size, dilation, strides[i], **dd)
                blocks.append(Block(dim, attn, mlp_ratio, layer_scale, next(rates), **dd))
            same = i == 0 or isotropic
            stages.append(Stage(nn.Identity() if same else downsampler(dims[i - 1], dim, **dd), blocks))
            reduction = (patch_size or 4) * (1 if isotropic else 2**i)
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.out_norms = map_norms(dims, EPS, **dd) if out_norms else None
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        init_linear(self)


PUBLISHED_KEYS: Rules = [  # published name -> ours, applied in order
    (r"^patch_embed\.", "stem."),
    (r"^(?:levels|layers)\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^(?:levels|layers)\.(\d+)\.blocks\.", r"stages.\1.blocks."),
    (r"^layers\.(\d+)\.", r"stages.0.blocks.\1."),  # isotropic: see `distribute`
    (r"^norm(\d)\.", r"out_norms.\1."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]
TRANSFORMERS_KEYS: Rules = [  # Hugging Face transformers' name -> the published one
    (r"^(?:nat|dinat)\.", ""),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^encoder\.levels\.(\d+)\.layers\.(\d+)\.", r"levels.\1.blocks.\2."),
    (r"^encoder\.", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.self\.", ".attn."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
]


def rename(key: str) -> str:
    """Return our name for a key of a published state dict; our own keys stay unchanged."""
    return rename_key(key, PUBLISHED_KEYS)


def from_transformers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of Hugging Face transformers' NAT and DiNAT to the published names."""
    out = {rename_key(key, TRANSFORMERS_KEYS): value for key, value in state_dict.items()}
    for key in [key for key in out if ".attn.query." in key]:
        parts = [out.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        out[key.replace("query", "qkv")] = torch.cat(parts)
    for key in [key for key in out if key.endswith("layer_scale_parameters")]:
        prefix, scales = key.removesuffix("layer_scale_parameters"), out.pop(key)
        out |= {f"{prefix}gamma1": scales[0], f"{prefix}gamma2": scales[1]}
    return out


def resize_table(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a bias table (heads, 2k-1, 2k-1) to that of another kernel, bicubically as Swin's tables are."""
    return F.interpolate(table[None].float(), size, mode="bicubic", align_corners=False)[0].to(table.dtype)


def distribute(key: str, depths: Sequence[int]) -> str:
    """Return the key of an isotropic model's block, given as one of the first stage, in stages of these depths."""
    if match := re.match(r"stages\.0\.blocks\.(\d+)\.", key):
        stage, block = 0, int(match[1])
        while stage < len(depths) - 1 and block >= depths[stage]:
            block -= depths[stage]
            stage += 1
        key = f"stages.{stage}.blocks.{block}.{key[match.end() :]}"
    return key


def checkpoint_filter_fn(state_dict: dict, model: NAT) -> dict[str, Tensor]:
    """Convert published weights (of classifiers, detectors or segmenters), or those of transformers, to our names.

    Bias tables of another kernel are resized.
    """
    weights = unwrap(state_dict)
    if any(key.startswith(("encoder.", "nat.", "dinat.")) for key in weights):
        weights = from_transformers(weights)
    own = model.state_dict()
    out = {}
    for key, value in weights.items():
        key = rename(key)
        if model.isotropic:
            key = distribute(key, [len(stage.blocks) for stage in model.stages])
        if key.endswith(".rpb") and key in own and own[key].shape[0] == value.shape[0]:
            size = tuple(own[key].shape[1:])
            value = value if tuple(value.shape[1:]) == size else resize_table(value, size)
        out[key] = value
    return complete(out, model)


def filling(size: int, kernel: int = 7) -> tuple[tuple[int, int], ...]:
    """Return DiNAT's dilations for classification: every second block's windows span the map of an image of `size`."""
    return tuple((1, max(1, (size >> stage) // kernel)) for stage in (2, 3, 4, 5))


CONV = dict(depths=(3, 4, 18, 5), mlp_ratio=3.0)
SWIN = dict(depths=(2, 2, 18, 2), mlp_ratio=4.0, patch_size=4)
MINI = dict(CONV, depths=(3, 4, 6, 5))
SCALED = dict(CONV, mlp_ratio=2.0, layer_scale=1e-5)
T, S, B, L = ((n, 2 * n, 4 * n, 8 * n) for n in (64, 96, 128, 192))  # dims
ISO = dict(depths=(3, 3, 3, 3), mlp_ratio=4.0, patch_size=16, isotropic=True)
ALTERNATING = ((1, 2), (2, 1), (1, 2), (2, 1))  # over the twelve blocks
VARIANTS: dict[str, dict[str, Any]] = dict(
    nat_m=dict(MINI, dims=T),
    nat_t=dict(CONV, dims=T),
    nat_s=dict(SCALED, dims=S),
    nat_b=dict(SCALED, dims=B),
    dinat_m=dict(MINI, dims=T, size=224),
    dinat_t=dict(CONV, dims=T, size=224),
    dinat_s=dict(CONV, dims=S, size=224, mlp_ratio=2.0),  # without layer scale, unlike nat_s
    dinat_b=dict(SCALED, dims=B, size=224),
    dinat_l=dict(CONV, dims=L, size=224, mlp_ratio=2.0),
    dinat_l_384=dict(CONV, dims=L, size=384, mlp_ratio=2.0),
    dinats_t=dict(SWIN, dims=S, size=224, depths=(2, 2, 6, 2)),
    dinats_s=dict(SWIN, dims=S, size=224),
    dinats_b=dict(SWIN, dims=B, size=224),
    dinats_l=dict(SWIN, dims=L, size=224),
    dinats_l_384=dict(SWIN, dims=L, size=384),
    nat_iso_s=dict(ISO, dims=(384,) * 4),
    nat_iso_b=dict(ISO, dims=(768,) * 4),
    dinat_iso_s=dict(ISO, dims=(384,) * 4, dilations=ALTERNATING),
    dinat_iso_b=dict(ISO, dims=(768,) * 4, dilations=ALTERNATING),
)
NAT_PAPER, DINAT_PAPER = "arXiv:2204.07143", "arXiv:2209.15001"
IN22K = f"{DINAT_PAPER}, pre-trained on ImageNet-22K"
PUBLISHED = dict(  # ImageNet-1K top-1 and its source
    nat_m=(81.8, NAT_PAPER),
    nat_t=(83.2, NAT_PAPER),
    nat_s=(83.7, NAT_PAPER),
    nat_b=(84.3, NAT_PAPER),
    dinat_m=(81.8, DINAT_PAPER),
    dinat_t=(82.7, DINAT_PAPER),
    dinat_s=(83.8, DINAT_PAPER),
    dinat_b=(84.4, DINAT_PAPER),
    dinat_l=(86.6, IN22K),
    dinat_l_384=(87.4, f"{IN22K}; 87.5 with kernel_size=11"),
    dinats_t=(81.8, DINAT_PAPER),
    dinats_s=(83.5, DINAT_PAPER),
    dinats_b=(83.8, DINAT_PAPER),
    dinats_l=(86.5, IN22K),
    dinats_l_384=(87.4, IN22K),
    nat_iso_s=(80.0, DINAT_PAPER),
    nat_iso_b=(81.6, DINAT_PAPER),
    dinat_iso_s=(80.8, DINAT_PAPER),
    dinat_iso_b=(82.1, DINAT_PAPER),
)
# Addresses in the authors' code; whether they still answer was not tried.
SITE = "https://shi-labs.com/projects"
FILES = dict(
    nat_m="nat/checkpoints/CLS/nat_mini",
    nat_t="nat/checkpoints/CLS/nat_tiny",
    nat_s="nat/checkpoints/CLS/nat_small",
    nat_b="nat/checkpoints/CLS/nat_base",
    dinat_m="dinat/checkpoints/imagenet1k/dinat_mini_in1k_224",
    dinat_t="dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224",
    dinat_s="dinat/checkpoints/imagenet1k/dinat_small_in1k_224",
    dinat_b="dinat/checkpoints/imagenet1k/dinat_base_in1k_224",
    dinat_l="dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_224",
    dinat_l_384="dinat/checkpoints/imagenet1k/dinat_large_in22k_in1k_384",
    dinats_t="dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224",
    dinats_s="dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224",
    dinats_b="dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224",
    dinats_l="dinat/checkpoints/imagenet1k/dinat_s_large_in1k_224",
    dinats_l_384="dinat/checkpoints/imagenet1k/dinat_s_large_in1k_384",
    nat_iso_s="dinat/checkpoints/isotropic/nat_isotropic_small_in1k_224",
    nat_iso_b="dinat/checkpoints/isotropic/nat_isotropic_base_in1k_224",
    dinat_iso_s="dinat/checkpoints/isotropic/dinat_isotropic_small_in1k_224",
    dinat_iso_b="dinat/checkpoints/isotropic/dinat_isotropic_base_in1k_224",
)
WEIGHTS = {name: f"the authors' file: {SITE}/{file}.pth" for name, file in FILES.items()}


def _cfg(name: str, **kwargs) -> dict:
    patches = "patch_size" in VARIANTS[name]
    nat = name.startswith("nat_") and "iso" not in name
    return make_cfg(
        384 if name.endswith("_384") else 224,
        16 if "iso" in name else 32,
        crop_pct=1.0 if name.endswith("_384") else 0.875,
        first_conv="stem.proj" if patches else "stem.proj.0",
        url=f"{SITE}/{FILES[name]}.pth",
        license="mit",
        origin_url="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        paper_name=f"{'' if nat else 'Dilated '}Neighborhood Attention Transformer",
        paper_ids=NAT_PAPER if nat else DINAT_PAPER,
        **kwargs,
    )


default_cfgs = generate_default_cfgs(
    {
        f"{name}.{'in22k_ft_in1k' if source.startswith(IN22K) else 'in1k'}": _cfg(name)
        for name, (_, source) in PUBLISHED.items()
    }
)


def _create(name: str, pretrained: bool, **kwargs) -> NAT:
    kwargs = VARIANTS[name] | kwargs
    size = kwargs.pop("size", None)
    if size is not None and kwargs.get("dilations") is None:
        kwargs["dilations"] = filling(size, kwargs.get("kernel_size", 7))
    stages = len(kwargs["dims"])
    return create_model(NAT, name, pretrained, checkpoint_filter_fn, WEIGHTS[name], tuple(range(stages)), **kwargs)


@register_model
def nat_m(pretrained: bool = False, **kwargs) -> NAT:
    return _create("nat_m", pretrained, **kwargs)


@register_model
def nat_t(pretrained: bool = False, **kwargs) -> NAT:
    return _create("nat_t", pretrained, **kwargs)


@register_model
def nat_s(pretrained: bool = False, **kwargs) -> NAT:
    return _create("nat_s", pretrained, **kwargs)


@register_model
def nat_b(pretrained: bool = False, **kwargs) -> NAT:
    return _create("nat_b", pretrained, **kwargs)


@register_model
def dinat_m(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinat_m", pretrained, **kwargs)


@register_model
def dinat_t(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinat_t", pretrained, **kwargs)


@register_model
def dinat_s(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinat_s", pretrained, **kwargs)


@register_model
def dinat_b(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinat_b", pretrained, **kwargs)


@register_model
def dinat_l(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinat_l", pretrained, **kwargs)


@register_model
def dinat_l_384(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinat_l_384", pretrained, **kwargs)


@register_model
def dinats_t(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinats_t", pretrained, **kwargs)


@register_model
def dinats_s(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinats_s", pretrained, **kwargs)


@register_model
def dinats_b(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinats_b", pretrained, **kwargs)


@register_model
def dinats_l(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinats_l", pretrained, **kwargs)


@register_model
def dinats_l_384(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinats_l_384", pretrained, **kwargs)


@register_model
def nat_iso_s(pretrained: bool = False, **kwargs) -> NAT:
    return _create("nat_iso_s", pretrained, **kwargs)


@register_model
def nat_iso_b(pretrained: bool = False, **kwargs) -> NAT:
    return _create("nat_iso_b", pretrained, **kwargs)


@register_model
def dinat_iso_s(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinat_iso_s", pretrained, **kwargs)


@register_model
def dinat_iso_b(pretrained: bool = False, **kwargs) -> NAT:
    return _create("dinat_iso_b", pretrained, **kwargs)
