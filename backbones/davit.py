"""DaViT: a four-stage pyramid whose blocks alternate between window attention and channel attention.

Paper: "DaViT: Dual Attention Vision Transformers", ECCV 2022, arXiv 2204.03645.
Published code: dingmyu/davit@fc79470 (MIT). Parameters map one to one (`checkpoint_filter_fn`), outputs are equal. The
state dict is that of timm's `davit_*`, so weights go from one to the other as they are.

Everything is channels-last: blocks process (B, H, W, C), their convolutions get an NCHW view of the same memory, and a
stage returns such a view.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, NormMlpClassifierHead, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..ops import channel_attention, window_attention
from ..ops.precision import full
from .attention_maps import AttentionMap, ChannelMap, describe, split_heads, window_map
from .base import Pyramid, Stage, create_model, init_linear, make_cfg, map_norms
from .layers import CachedMlp, DepthwiseConv, as_nchw, as_nhwc, can_fuse, channels_last, must_pad, project
from .published import Rules, complete, rename_key, unwrap

EPS = 1e-5  # of every LayerNorm


# The operators check shapes, so torch.fx treats this layer, and others like it, as a leaf.
@register_notrace_module
class WindowAttention(nn.Module):
    """Attention within windows of `window` x `window` tokens (paper, section 3.2): (B, H, W, C) -> (B, H, W, C).

    The published code pads x with zeros on the right and the bottom before the projection, so that a padding token
    holds the biases; it is attended to like any other.
    """

    def __init__(self, dim: int, heads: int, window: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}"

    def forward(self, x: Tensor) -> Tensor:
        H, W, split, window = x.shape[1], x.shape[2], [3, x.shape[3]], (self.window, self.window)
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if can_fuse(self.qkv) and self.qkv.bias is not None:
                qkv, pad = project(self.qkv, x).view(x.shape[0], H, W, *split), self.qkv.bias.view(split)
                return project(self.proj, window_attention(qkv, self.heads, window, pad=pad))
        x = F.pad(x, (0, 0, 0, -W % self.window, 0, -H % self.window))
        out = window_attention(self.qkv(x).unflatten(3, split), self.heads, window)
        return self.proj(out[:, :H, :W])


@register_notrace_module
class ChannelAttention(nn.Module):
    """Attention between the channels of a head, over all tokens (paper, section 3.3): (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, heads: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return project(self.proj, channel_attention(project(self.qkv, x), self.heads))
        return self.proj(channel_attention(self.qkv(x), self.heads))


@describe.register(WindowAttention)
def _(mixer: WindowAttention, x: Tensor) -> Iterator[AttentionMap]:
    (H, W), n = x.shape[1:3], mixer.window
    qkv = mixer.qkv(F.pad(x, (0, 0, 0, -W % n, 0, -H % n)))
    yield window_map(qkv, mixer.heads, (H, W), (n, n))


@describe.register(ChannelAttention)
def _(mixer: ChannelAttention, x: Tensor) -> Iterator[AttentionMap]:
    q, k, v = split_heads(mixer.qkv(x), mixer.heads)
    wide = full(k)
    weights = (k.to(wide).mT @ v.to(wide) * q.shape[3] ** -0.5).softmax(-1)
    grid = (x.shape[1], x.shape[2])
    yield ChannelMap(kind="channels", grid=grid, heads=mixer.heads, images=len(x), weights=weights, values=q)


class ConvPosEnc(nn.Module):
    """Position encoding by a depthwise 3x3 convolution, added to its input: (B, H, W, C) -> same."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.proj = DepthwiseConv(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + as_nhwc(self.proj(as_nchw(x)))


class Block(nn.Module):
    """Position encoding, attention, position encoding, MLP, each a residual (paper, figure 3): (B, H, W, C) -> same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, ffn: bool, drop_path: float, **dd):
        super().__init__()
        self.cpe1 = ConvPosEnc(dim, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.cpe2 = ConvPosEnc(dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd) if ffn else nn.Identity()
        self.mlp = CachedMlp(dim, int(dim * mlp_ratio), **dd) if ffn else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        if self.mlp is not None:
            x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class Stem(nn.Module):
    """Overlapping patches, then LayerNorm: images -> (B, ceil(H / 4), ceil(W / 4), dim) as an NCHW view.

    The published code first pads the image with zeros to a multiple of 4; the convolution's own padding reaches exactly
    as far.
    """

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **dd)
        self.norm = nn.LayerNorm(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(channels_last(x))
        return as_nchw(self.norm(as_nhwc(x)))


@register_notrace_module
class Downsample(nn.Module):
    """LayerNorm, then patches of 2x2, or 3x3 where `overlapped`: NCHW -> NCHW of half the size, rounded up.

    Zeros are padded after the norm. The overlapping convolution's own padding reaches as far as the published code's.
    """

    def __init__(self, dim: int, out_dim: int, overlapped: bool, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.overlapped = overlapped
        self.norm = nn.LayerNorm(dim, eps=EPS, **dd)
        if overlapped:
            self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        else:
            self.conv = nn.Conv2d(dim, out_dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(as_nhwc(x))
        down, right = x.shape[1] % 2, x.shape[2] % 2
        if not self.overlapped and must_pad(down, right):
            x = F.pad(x, (0, 0, 0, right, 0, down))
        return self.conv(as_nchw(x))


class DaViT(Pyramid):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes) or to four maps of strides 4, 8, 16 and 32.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for pooled features.
        global_pool: name of the pooling over the last map, as in timm; '' for none.
        depths: dual blocks per stage, each of a window block and a channel block.
        dims: number of channels per stage.
        head_dim: channels per head.
        window_size: side of a window in tokens.
        mlp_ratio: hidden channels of the MLPs over their input channels.
        ffn: whether blocks have MLPs.
        overlapped_patch: downsample by overlapping patches of 3x3, not by 2x2.
        out_norms: a LayerNorm for each stage's map in `forward_intermediates` and `features_only`, as the published
            detection and segmentation backbones have. The next stage gets the map without it.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last channel block, growing linearly from 0 in the first window block.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (1, 1, 3, 1),
        dims: tuple[int, ...] = (96, 192, 384, 768),
        head_dim: int = 32,
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        ffn: bool = True,
        overlapped_patch: bool = False,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims must be equally long, got {depths} and {dims}")
        if any(dim % head_dim for dim in dims):
            raise ValueError(f"dims must be multiples of head_dim={head_dim}, got {dims}")
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = drop_rate

        self.stem = Stem(in_chans, dims[0], **dd)
        rates: Any = iter(calculate_drop_path_rates(drop_path_rate, 2 * sum(depths)))
        stages = []
        self.feature_info = []
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            downsample = Downsample(dims[i - 1], dim, overlapped_patch, **dd) if i else nn.Identity()
            blocks = []
            for _ in range(depth):
                mixers = (
                    WindowAttention(dim, dim // head_dim, window_size, **dd),
                    ChannelAttention(dim, dim // head_dim, **dd),
                )
                blocks.append(nn.Sequential(*[Block(dim, m, mlp_ratio, ffn, next(rates), **dd) for m in mixers]))
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.out_norms = map_norms(dims, EPS, **dd) if out_norms else None
        self.norm = nn.Identity()
        # Pooling before the norm: the other order loses half a point of top-1 with the published weights.
        norm = partial(LayerNorm2d, eps=EPS)
        self.head = NormMlpClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, norm_layer=norm, **dd
        )
        init_linear(self)


PUBLISHED_KEYS: Rules = [  # published name -> ours, applied in order
    (r"^patch_embeds\.0\.proj\.", "stem.conv."),
    (r"^patch_embeds\.0\.norm\.", "stem.norm."),
    (r"^patch_embeds\.(\d+)\.proj\.", r"stages.\1.downsample.conv."),
    (r"^patch_embeds\.(\d+)\.norm\.", r"stages.\1.downsample.norm."),
    (r"^main_blocks\.(\d+)\.", r"stages.\1.blocks."),
    (r"\.cpe\.0\.", ".cpe1."),
    (r"\.cpe\.1\.", ".cpe2."),
    (r"^norm(\d)\.", r"out_norms.\1."),
    (r"^norms\.", "head.norm."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def rename(key: str) -> str:
    """Return our name for a key of a published state dict; our own keys, which are timm's, stay unchanged."""
    return rename_key(key, PUBLISHED_KEYS)


def checkpoint_filter_fn(state_dict: dict, model: DaViT) -> dict[str, Tensor]:
    """Convert weights under the published names (classification, detection or segmentation files) or timm's to ours."""
    return complete({rename(key): value for key, value in unwrap(state_dict).items()}, model)


VARIANTS: dict[str, dict[str, Any]] = dict(
    davit_t=dict(depths=(1, 1, 3, 1), dims=(96, 192, 384, 768)),
    davit_s=dict(depths=(1, 1, 9, 1), dims=(96, 192, 384, 768)),
    davit_b=dict(depths=(1, 1, 9, 1), dims=(128, 256, 512, 1024)),
    davit_l=dict(depths=(1, 1, 9, 1), dims=(192, 384, 768, 1536), window_size=12),
    davit_h=dict(depths=(1, 1, 9, 1), dims=(256, 512, 1024, 2048), window_size=16, overlapped_patch=True),
    davit_g=dict(depths=(1, 1, 12, 3), dims=(384, 768, 1536, 3072), window_size=16, overlapped_patch=True),
)
# No code is published for davit_h and davit_g: overlapping patches give the paper's 362M and 1437M parameters, and
# windows of 16 tokens at 512 pixels its 334 and 1038 GFLOPs, unlike 7, 8, 12 or 14.
PAPER = "arXiv:2204.03645"
PUBLISHED = dict(  # ImageNet-1K top-1 and its source
    davit_t=(82.8, PAPER),
    davit_s=(84.2, PAPER),
    davit_b=(84.6, PAPER),
    davit_l=(87.5, f"{PAPER}, pre-trained on ImageNet-22K"),
    davit_h=(90.2, f"{PAPER}, pre-trained on 1.5B private image-text pairs"),
    davit_g=(90.4, f"{PAPER}, pre-trained on 1.5B private image-text pairs"),
)
WEIGHTS: dict[str, str] = {}  # timm distributes the authors' weights of three variants; none of the others' are public


def _cfg(size: int = 224, **kwargs) -> dict:
    return make_cfg(
        size,
        first_conv="stem.conv",
        origin_url="https://github.com/dingmyu/davit",
        paper_name="DaViT: Dual Attention Vision Transformers",
        paper_ids="arXiv:2204.03645",
        **kwargs,
    )


def _hub(size: str) -> dict:
    return _cfg(crop_pct=0.95, hf_hub_id=f"timm/davit_{size}.msft_in1k", license="apache-2.0")


default_cfgs = generate_default_cfgs(
    {
        "davit_t.msft_in1k": _hub("tiny"),
        "davit_s.msft_in1k": _hub("small"),
        "davit_b.msft_in1k": _hub("base"),
        "davit_l.untrained": _cfg(384, crop_pct=1.0, license="mit"),  # of the published code
        "davit_h.untrained": _cfg(512, crop_pct=1.0),
        "davit_g.untrained": _cfg(512, crop_pct=1.0),
    }
)


def _create(name: str, pretrained: bool, **kwargs) -> DaViT:
    kwargs = VARIANTS[name] | kwargs
    return create_model(DaViT, name, pretrained, checkpoint_filter_fn, WEIGHTS.get(name), **kwargs)


@register_model
def davit_t(pretrained: bool = False, **kwargs) -> DaViT:
    return _create("davit_t", pretrained, **kwargs)


@register_model
def davit_s(pretrained: bool = False, **kwargs) -> DaViT:
    return _create("davit_s", pretrained, **kwargs)


@register_model
def davit_b(pretrained: bool = False, **kwargs) -> DaViT:
    return _create("davit_b", pretrained, **kwargs)


@register_model
def davit_l(pretrained: bool = False, **kwargs) -> DaViT:
    return _create("davit_l", pretrained, **kwargs)


@register_model
def davit_h(pretrained: bool = False, **kwargs) -> DaViT:
    return _create("davit_h", pretrained, **kwargs)


@register_model
def davit_g(pretrained: bool = False, **kwargs) -> DaViT:
    return _create("davit_g", pretrained, **kwargs)
