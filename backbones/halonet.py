"""HaloNet: a ResNet whose 3x3 convolutions are attention of pixel blocks to themselves and a halo around them.

Paper: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021, arXiv 2103.12731. Its authors
published no code. `halo_h0` … `halo_h7` are its family: the parameter counts of its table decide all but a few
questions, which are answered as timm answers them (see `HaloNet`). The others are the hybrids that timm trained,
huggingface/pytorch-image-models@1.0.31 (Apache-2.0): outputs are equal, timm's weights load.

Maps are NCHW, channels-last in memory from the stem to the head.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import (
    BatchNormAct2d,
    ClassifierHead,
    ConvNormAct,
    DropPath,
    EcaModule,
    SEModule,
    calculate_drop_path_rates,
    create_act_layer,
    get_device_dtype,
    make_divisible,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_module
from torch import Tensor, nn

from ..ops import halo_attention
from .attention_maps import AttentionMap, describe, hidden_unless, softmax_map
from .base import Backbone, create_model, make_cfg
from .layers import channels_last, project
from .published import Rules, rename_key, unwrap


# Padding depends on the size, so torch.fx treats this layer as a leaf.
@register_notrace_module
class HaloAttention(nn.Module):
    """Blocks of `block` x `block` pixels attend to windows `halo` pixels wider on each side (paper, section 2.2).

    (B, dim, H, W) -> (B, dim_out, ceil(H / stride), ceil(W / stride)), for any H x W: a map that the block does not
    divide is as if padded with zeros on the bottom and the right. Cells outside the image are keys and values of zero,
    not masked: they take part in the softmax with their position's logit.

    Queries are strided. Where the block does not divide by the stride, all pixels ask, and the mean of each stride x
    stride square of answers follows.

    Args:
        dim: channels of the input.
        dim_out: channels of the values, and of the output.
        heads: number of heads.
        head_dim: channels of a head's queries and keys.
        block: side of a block of queries, in pixels of the input.
        halo: pixels that a window sees around its block.
        stride: 1 or 2.
        scale_pos: scale the position logits too, by head_dim ** -0.5.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        heads: int,
        head_dim: int,
        block: int = 8,
        halo: int = 3,
        stride: int = 1,
        scale_pos: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if dim_out % heads:
            raise ValueError(f"heads must divide the {dim_out} channels of the values, got {heads}")
        self.heads, self.block, self.halo, self.scale_pos = heads, block, halo, scale_pos
        self.pool = stride if block % stride else 1
        self.stride = stride if block % stride == 0 else 1
        self.q = nn.Conv2d(dim, heads * head_dim, 1, self.stride, bias=False, **dd)
        self.kv = nn.Conv2d(dim, heads * head_dim + dim_out, 1, bias=False, **dd)  # per head: keys, then values
        positions = 2 * (block + 2 * halo) - 1
        self.height_rel = nn.Parameter(torch.empty(positions, head_dim, **dd))  # both shared by heads and blocks
        self.width_rel = nn.Parameter(torch.empty(positions, head_dim, **dd))
        self.init_weights()

    def extra_repr(self) -> str:
        return f"heads={self.heads}, block={self.block}, halo={self.halo}, stride={self.stride * self.pool}"

    def init_weights(self) -> None:
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=projection.in_channels**-0.5)
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=table.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        out = halo_attention(
            self.q(x) if torch.jit.is_scripting() else project(self.q, x),
            self.kv(x) if torch.jit.is_scripting() else project(self.kv, x),
            self.height_rel,
            self.width_rel,
            self.heads,
            self.block,
            self.halo,
            self.stride,
            scale_pos=self.scale_pos,
        )
        if self.pool > 1:
            out = F.avg_pool2d(out, self.pool, ceil_mode=True)  # at an odd edge the mean is over the pixels there are
        return out


@describe.register(HaloAttention)
def _(mixer: HaloAttention, x: Tensor) -> Iterator[AttentionMap]:
    """Before the mean of answers, where there is one. Cells outside the image take part, as in the layer."""
    q, kv = mixer.q(x).unflatten(1, (mixer.heads, -1)), mixer.kv(x)
    H, W, (h, w) = x.shape[2], x.shape[3], q.shape[3:]
    block, halo, D = mixer.block, mixer.halo, q.shape[2]
    tile, side = block // mixer.stride, block + 2 * halo
    rows, columns = (-(-n // block) * block + 2 * halo for n in (H, W))
    kv = F.pad(kv, (halo, columns - halo - W, halo, rows - halo - H)).unflatten(1, (mixer.heads, -1)).flatten(3).mT
    q, scale = q.flatten(3).mT, D**-0.5
    tables = mixer.height_rel, mixer.width_rel

    def bias(index: Tensor) -> Tensor:
        of = q[:, :, index]  # (B, heads, n, D)
        seen, logits = [], []
        for at, n, table in zip((index // w, index % w), (rows, columns), tables):
            i = torch.arange(n, device=x.device) - (at // tile * block)[:, None]  # in the query's window
            seen.append((i >= 0) & (i < side))
            entry = (i - (at % tile)[:, None] + side - 1).clamp(0, 2 * side - 2)
            logits.append((of @ table.to(of).T).gather(3, entry.expand(*of.shape[:2], -1, -1)))
        position = logits[0][..., :, None] + logits[1][..., None, :]
        hidden = hidden_unless(seen[0][:, :, None] & seen[1][:, None])
        return ((scale if mixer.scale_pos else 1.0) * position + hidden).flatten(3)

    frame, k, v = (rows, columns, halo, halo), kv[..., :D], kv[..., D:]
    yield softmax_map("halo", q, k, v, (H, W), scale, bias, query_grid=(h, w), frame=frame)


class PointwiseNormAct(ConvNormAct):
    """A 1x1 convolution, norm and activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x) if torch.jit.is_scripting() else project(self.conv, x))


class Bottleneck(nn.Module):
    """1x1 convolution, spatial mixing, 1x1 convolution, and a shortcut: (B, dim, H, W) -> (B, dim_out, H', W').

    Args:
        dim: channels of the input.
        width: channels that `mix` gets.
        mix: attention or a 3x3 convolution with its norm and activation; its stride is the block's.
        mixed: channels that `mix` returns.
        dim_out: channels of the output.
        stride: 1 or 2.
        act: the activation's name.
        inverted: as in RegNet-Z: linear at the end, and no shortcut where the shape changes.
        drop_path: stochastic depth of the branch.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        mix: nn.Module,
        mixed: int,
        dim_out: int,
        stride: int,
        act: str,
        inverted: bool,
        drop_path: float,
        **dd,
    ):
        super().__init__()
        self.conv1 = PointwiseNormAct(dim, width, 1, act_layer=act, **dd)
        self.mix = mix
        self.conv3 = PointwiseNormAct(mixed, dim_out, 1, apply_act=False, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        if dim == dim_out and stride == 1:
            self.shortcut = nn.Identity()
        else:
            self.shortcut = None if inverted else PointwiseNormAct(dim, dim_out, 1, stride, apply_act=False, **dd)  # type: ignore[assignment]
        self.act = nn.Identity() if inverted else create_act_layer(act, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.drop_path(self.conv3(self.mix(self.conv1(x))))
        if self.shortcut is not None:
            out = out + self.shortcut(x)
        return self.act(out)


STEMS = {  # channels of the convolutions, their kernel, and whether a max pool follows
    "7x7": ((64,), 7, True),
    "tiered": ((24, 32, 64), 3, True),
    "tiered_nopool": ((24, 32, 64), 3, False),
    "3x3": ((32,), 3, False),
}


class HaloNet(Backbone):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes) or to five maps of strides 2, 4, 8, 16 and 32.

    Details that the paper does not specify are as in timm: a norm and an activation follow the attention, shortcuts
    that change the shape are strided 1x1 convolutions, positions of strided queries count queries, and there is no
    output projection.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for pooled features.
        global_pool: name of the pooling over the last map, as in timm; '' for none.
        output_stride: 32, 16 or 8. Stages that would go beyond have stride 1 and dilated convolutions; attention is not
            dilated.
        stem: a key of `STEMS`. "3x3" has stride 2, and the first stage has stride 2 too; the others have stride 4.
        blocks: per stage, one letter per block: A for attention, C for a convolution.
        dims: per stage, channels of the blocks' outputs: the paper's r_b times 64, 128, 256, 512.
        widths: per stage, channels inside the blocks, of queries and keys.
        expansion: if not 0, inverted bottlenecks (RegNet-Z) with this many times the channels of their input.
        value_ratio: channels of the values over those of the block, the paper's r_v.
        heads: per stage, heads of the attention.
        qk_dim: channels of queries and keys per head, None for `qk_ratio`.
        qk_ratio: channels of queries and keys over those of the values divided by `value_ratio`.
        block: side of a block of queries, the paper's b.
        halo: pixels that a window extends beyond its block, the paper's h.
        scale_pos: scale the position logits by head_dim ** -0.5 too. timm does not; the paper does not specify it.
        act_layer: timm's name of the activation.
        gate: channel gates of the convolutional blocks: "se", "eca" or None.
        gate_ratio: hidden channels of an "se" gate over its input channels.
        group_width: channels per group of the 3x3 convolutions, None for one group.
        num_features: channels of a 1x1 convolution before the pooling, the paper's d_f; None for no such convolution.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        stem: str = "7x7",
        blocks: tuple[str, ...] = ("AAA", "AAA", "AAAAAAA", "AAA"),
        dims: tuple[int, ...] = (32, 64, 128, 256),
        widths: tuple[int, ...] = (64, 128, 256, 512),
        expansion: int = 0,
        value_ratio: float = 1.0,
        heads: tuple[int, ...] = (4, 8, 8, 8),
        qk_dim: int | None = None,
        qk_ratio: float = 1.0,
        block: int = 8,
        halo: int = 3,
        scale_pos: bool = False,
        act_layer: str = "relu",
        gate: str | None = None,
        gate_ratio: float = 1 / 16,
        group_width: int | None = None,
        num_features: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if not len(blocks) == len(dims) == len(widths) == len(heads):
            lengths = f"{blocks}, {dims}, {widths} and {heads}"
            raise ValueError(f"blocks, dims, widths and heads must be equally long, got {lengths}")
        if any(not letters or set(letters) - set("AC") for letters in blocks):
            raise ValueError(f"blocks must hold one or more of the letters A and C for each stage, got {blocks}")
        if stem not in STEMS:
            raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        if gate not in (None, "se", "eca"):
            raise ValueError(f"gate must be 'se', 'eca' or None, got {gate!r}")
        self.in_chans, self.num_classes, self.drop_rate = in_chans, num_classes, drop_rate
        self.grad_checkpointing = False

        channels, kernel, pool = STEMS[stem]
        strides = [2] + [1] * (len(channels) - 1)
        if stem == "tiered_nopool":
            strides[-1] = 2
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        dim = in_chans
        for i, (chs, stride) in enumerate(zip(channels, strides)):
            layers[f"conv{i + 1}"] = ConvNormAct(dim, chs, kernel, stride, act_layer=act_layer, **dd)
            dim = chs
        if pool:
            layers["pool"] = nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(layers)
        # The first `tap` layers of the stem return its map of stride 2.
        self.tap = len(channels) - 1 if stem == "tiered_nopool" else len(channels)
        self.feature_info = [dict(num_chs=channels[self.tap - 1], reduction=2, module=f"stem.conv{self.tap}")]

        def mixer(kind: str, width: int, values: int, n_heads: int, stride: int, dilation: int) -> nn.Module:
            if kind == "C":
                if group_width and width % group_width:
                    raise ValueError(f"group_width must divide the {width} channels of a block, got {group_width}")
                groups = width // group_width if group_width else 1
                conv = ConvNormAct(width, width, 3, stride, dilation=dilation, groups=groups, act_layer=act_layer, **dd)
                if gate == "se":
                    return nn.Sequential(conv, SEModule(width, rd_ratio=gate_ratio, **dd))
                return nn.Sequential(conv, EcaModule(width, **dd)) if gate == "eca" else nn.Sequential(conv)
            head_dim = qk_dim or make_divisible(width * qk_ratio) // n_heads
            attn = HaloAttention(width, values, n_heads, head_dim, block, halo, stride, scale_pos, **dd)
            return nn.Sequential(attn, BatchNormAct2d(values, act_layer=act_layer, **dd))

        rates: Any = calculate_drop_path_rates(drop_path_rate, [len(letters) for letters in blocks], stagewise=True)
        reduction, dilation = 2 if stem == "3x3" else 4, 1
        stages = []
        for i, letters in enumerate(blocks):
            stride = 2 if i > 0 or stem == "3x3" else 1
            before = dilation
            if reduction * stride > output_stride:
                dilation, stride = dilation * stride, 1
            reduction *= stride
            stage = []
            for j, kind in enumerate(letters):
                width = expansion * dim if expansion else widths[i]
                values = int(width * value_ratio) if kind == "A" else width
                first = stride if j == 0 else 1
                mix = mixer(kind, width, values, heads[i], first, before if j == 0 else dilation)
                stage.append(
                    Bottleneck(dim, width, mix, values, dims[i], first, act_layer, expansion > 0, rates[i][j], **dd)
                )
                dim = dims[i]
            stages.append(nn.Sequential(*stage))
            self.feature_info.append(dict(num_chs=dim, reduction=reduction, module=f"stages.{i}"))
        self.stages: Any = nn.Sequential(*stages)
        self.final_conv: nn.Module = nn.Identity()
        if num_features:
            self.final_conv = ConvNormAct(dim, num_features, 1, act_layer=act_layer, **dd)
            self.feature_info[-1]["num_chs_norm"] = num_features
        self.num_features = self.head_hidden_size = num_features or dim
        self.head = ClassifierHead(self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize as timm does: convolutions by fan-out, the last norm of each block with a shortcut with zero."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1] // m.groups
                nn.init.normal_(m.weight, std=(2 / fan_out) ** 0.5)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
            elif isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.01)
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, HaloAttention):
                m.init_weights()
            elif isinstance(m, Bottleneck) and m.shortcut is not None:
                nn.init.zeros_(m.conv3.bn.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        blocks = [(r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None), (r"^final_conv", (99999,))]
        return dict(stem=r"^stem", blocks=blocks)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the stem's map of stride 2 and the stages' maps (timm's interface).

        Args:
            x: images (B, in_chans, H, W).
            indices: the last n maps if an int, these if a list, all if None.
            norm: apply the final convolution, its norm and activation to the last map, as `features_only` does.
            stop_early: skip the stages after the last one requested.
            output_fmt: must be "NCHW".
            intermediates_only: return only the list of maps, not (final features, list).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take, last_taken = feature_take_indices(len(self.stages) + 1, indices)
        last = len(self.stages)
        x = channels_last(x)
        intermediates = []
        for i, layer in enumerate(self.stem):
            x = layer(x)
            if i + 1 == self.tap and 0 in take:
                intermediates.append(x)
        final = x
        for i, stage in enumerate(self.stages if not stop_early else self.stages[:last_taken]):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
            final = self.final_conv(x) if i + 1 == last else x
            if i + 1 in take:
                intermediates.append(final if norm else x)
        if intermediates_only:
            return intermediates
        return final, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove layers that the maps `indices` do not need: later stages and, if `prune_head`, the head.

        `prune_norm` also removes the final convolution, unless the head is kept, which needs its channels.
        """
        take, last_taken = feature_take_indices(len(self.stages) + 1, indices)
        shortened = last_taken < len(self.stages)
        self.stages = self.stages[:last_taken]
        if last_taken == 0:
            self.stem = self.stem[: self.tap]  # type: ignore[assignment]
        if shortened or (prune_norm and prune_head):
            self.final_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last_taken]["num_chs"]
        if prune_head or shortened:
            self.num_classes = 0
            self.head = ClassifierHead(self.num_features, 0, pool_type="", **get_device_dtype(self))
        return take

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> the last map, (B, num_features, H/32, W/32)."""
        x = self.stem(channels_last(x))
        for stage in self.stages:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing and not torch.jit.is_scripting() else stage(x)
        return self.final_conv(x)


PUBLISHED_KEYS: Rules = [  # timm's name -> ours, applied in order
    (r"^stem\.(conv|bn)\.", r"stem.conv1.\1."),
    (r"\.conv1_1x1\.", ".conv1."),
    (r"\.conv3_1x1\.", ".conv3."),
    (r"\.(?:conv2_kxk|self_attn)\.", ".mix.0."),
    (r"\.(?:attn|post_attn)\.", ".mix.1."),
    (r"\.pos_embed\.", "."),
]


def rename(key: str) -> str:
    """Return our name for a key of timm's; our own keys stay unchanged."""
    return rename_key(key, PUBLISHED_KEYS)


def checkpoint_filter_fn(state_dict: dict, model: HaloNet) -> dict[str, Tensor]:
    """Convert weights under timm's names, alone or in a container ('state_dict' first, then 'model'), to ours."""
    out = {rename(key): value for key, value in unwrap(state_dict).items()}
    if not any(key.startswith("stages.0.0.conv1.") for key in out):
        raise ValueError(
            f"the weights are not a HaloNet's: they have no 'stages.0.0.conv1_1x1', but {next(iter(out), None)!r}"
        )
    for key, ours in model.state_dict().items():
        if key.endswith(("height_rel", "width_rel")) and key in out and out[key].shape != ours.shape:
            raise ValueError(
                f"the weights' {key} is {tuple(out[key].shape)}, the model's {tuple(ours.shape)}: "
                "its rows are 2 * (block + 2 * halo) - 1, its columns the channels of a head"
            )
    return out


def _paper(l3: int, b: int, h: int, r_v: float, r_b: float, d_f: int | None = None) -> dict:
    """Return the arguments of a row of the paper's table."""
    dims = tuple(int(r_b * width) for width in (64, 128, 256, 512))
    blocks = ("AAA", "AAA", "A" * l3, "AAA")
    return dict(blocks=blocks, dims=dims, block=b, halo=h, value_ratio=r_v, num_features=d_f)


# timm's hybrids.
RESNET = dict(stem="tiered", dims=(256, 512, 1024, 2048), heads=(8, 8, 8, 8), act_layer="silu")
REGNETZ = dict(stem="3x3", dims=(48, 96, 192, 288), heads=(8, 8, 8, 8), act_layer="silu", expansion=3)
VARIANTS: dict[str, dict[str, Any]] = dict(
    halo_h0=_paper(l3=7, b=8, h=3, r_v=1, r_b=0.5),
    halo_h1=_paper(l3=10, b=8, h=3, r_v=1, r_b=1),
    halo_h2=_paper(l3=11, b=8, h=3, r_v=1, r_b=1.25),
    halo_h3=_paper(l3=12, b=10, h=3, r_v=1, r_b=1.5, d_f=1024),
    halo_h4=_paper(l3=12, b=12, h=2, r_v=1, r_b=3, d_f=1280),
    halo_h5=_paper(l3=23, b=14, h=2, r_v=2.5, r_b=2, d_f=1536),
    halo_h6=_paper(l3=24, b=8, h=4, r_v=3, r_b=2.75, d_f=1536),
    halo_h7=_paper(l3=26, b=10, h=3, r_v=4, r_b=3.5, d_f=2048),
    halo_26t=dict(RESNET, blocks=("CC", "CC", "CA", "AA"), halo=2, act_layer="relu"),
    halo_50ts=dict(RESNET, blocks=("CCC", "CCCA", "CACACA", "CAC"), heads=(8, 4, 8, 8)),
    halo_se33ts=dict(
        RESNET,
        stem="tiered_nopool",
        blocks=("CC", "CCA", "CCA", "AA"),
        dims=(256, 512, 1024, 1536),
        gate="se",
        num_features=1280,
    ),
    halo_eca26ts=dict(RESNET, blocks=("CC", "CC", "CA", "AA"), halo=2, gate="eca", group_width=16, qk_dim=16),
    halo_regnetz_b=dict(
        REGNETZ,
        blocks=("CC", "CCCCCC", "CCCACCCACCCA", "AA"),
        qk_ratio=0.33,
        block=7,
        halo=2,
        gate="se",
        gate_ratio=0.25,
        group_width=16,
        num_features=1536,
    ),
)
SIZES = dict(halo_h3=320, halo_h4=384, halo_h5=448, halo_h6=512, halo_h7=600, halo_regnetz_b=224)  # the others: 256
TRAINED = {  # our name: timm's name, its tag, and the file's name in timm's release v0.1-attn-weights
    "halo_26t": ("halonet26t", "a1h_in1k", "halonet26t_a1h_256-3083328c"),
    "halo_50ts": ("halonet50ts", "a1h_in1k", "halonet50ts_a1h2_256-f3a3daee"),
    "halo_se33ts": ("sehalonet33ts", "ra2_in1k", "sehalonet33ts_256-87e053f9"),
    "halo_eca26ts": ("eca_halonext26ts", "c1_in1k", "eca_halonext26ts_c_256-06906299"),
    "halo_regnetz_b": ("haloregnetz_b", "ra3_in1k", "haloregnetz_c_raa_256-c8ad7616"),
}
PAPER, TIMM = "arXiv:2103.12731", "timm's results for its weights"
PUBLISHED = dict(  # ImageNet-1K top-1 and its source
    halo_h0=(77.9, PAPER),
    halo_h1=(79.9, PAPER),
    halo_h2=(80.4, PAPER),
    halo_h3=(81.9, PAPER),
    halo_h4=(83.3, PAPER),
    halo_h5=(84.0, PAPER),
    halo_h6=(84.4, PAPER),
    halo_h7=(84.9, PAPER),
    halo_26t=(79.134, TIMM),
    halo_50ts=(81.640, TIMM),
    halo_se33ts=(80.976, TIMM),
    halo_eca26ts=(79.518, TIMM),
    halo_regnetz_b=(81.058, TIMM),
)
RELEASE = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-attn-weights"


def _cfg(name: str) -> tuple[str, dict]:
    """Return the model's tag and its configuration."""
    cfg = make_cfg(
        SIZES.get(name, 256),
        crop_pct=0.95,
        first_conv="stem.conv1.conv",
        origin_url="https://github.com/huggingface/pytorch-image-models",
        paper_name="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
        paper_ids="arXiv:2103.12731",
    )
    if name not in TRAINED:
        return "untrained", cfg
    timm_name, tag, file = TRAINED[name]
    cfg |= dict(hf_hub_id=f"timm/{timm_name}.{tag}", url=f"{RELEASE}/{file}.pth", license="apache-2.0")
    cfg |= dict(crop_pct=0.95 if name == "halo_26t" else 0.94)
    if name == "halo_regnetz_b":
        cfg |= dict(mean=IMAGENET_INCEPTION_MEAN, std=IMAGENET_INCEPTION_STD)
    return tag, cfg


default_cfgs = generate_default_cfgs({f"{name}.{tag}": cfg for name in VARIANTS for tag, cfg in [_cfg(name)]})


def _create(name: str, pretrained: bool, **kwargs) -> HaloNet:
    kwargs = VARIANTS[name] | dict(feature_cfg=dict(norm=True)) | kwargs
    return create_model(HaloNet, name, pretrained, checkpoint_filter_fn, None, (0, 1, 2, 3, 4), **kwargs)


@register_model
def halo_h0(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_h0", pretrained, **kwargs)


@register_model
def halo_h1(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_h1", pretrained, **kwargs)


@register_model
def halo_h2(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_h2", pretrained, **kwargs)


@register_model
def halo_h3(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_h3", pretrained, **kwargs)


@register_model
def halo_h4(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_h4", pretrained, **kwargs)


@register_model
def halo_h5(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_h5", pretrained, **kwargs)


@register_model
def halo_h6(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_h6", pretrained, **kwargs)


@register_model
def halo_h7(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_h7", pretrained, **kwargs)


@register_model
def halo_26t(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_26t", pretrained, **kwargs)


@register_model
def halo_50ts(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_50ts", pretrained, **kwargs)


@register_model
def halo_se33ts(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_se33ts", pretrained, **kwargs)


@register_model
def halo_eca26ts(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_eca26ts", pretrained, **kwargs)


@register_model
def halo_regnetz_b(pretrained: bool = False, **kwargs) -> HaloNet:
    return _create("halo_regnetz_b", pretrained, **kwargs)
