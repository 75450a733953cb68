"""PATNet: a four-stage pyramid that convolves a quarter of the channels and applies attention to the others.

Paper: "Partial Convolution Meets Visual Attention", arXiv 2503.03148.
Published code: haiduo/PartialNet@679cfc0 (MIT), that of the follow-up, arXiv 2502.01303, with this network in it.
Parameters map one to one (`checkpoint_filter_fn`), outputs are equal. `fuse()` merges what can be merged for inference.

Everything is channels-last: blocks process (B, H, W, C), their convolutions and norms get an NCHW view of the same
memory, and a stage returns such a view.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    ClassifierHead,
    DropPath,
    calculate_drop_path_rates,
    create_act_layer,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model
from timm.models._features_fx import register_notrace_module
from timm.models._input import update_model_args
from torch import Tensor, nn

from ..ops import gaussian_gate, relative_bias_attention, spatial_gate
from ..ops.dispatch import use_definition
from ..ops.relative_bias import buckets
from .attention_maps import AttentionMap, GateMap, describe, window_map
from .base import Pyramid, Stage, create_model, make_cfg
from .layers import can_fuse, channels_last, project
from .published import Rules, complete, rename_key, unwrap

PARTS = 4  # parts of the channels, one of which is convolved


def nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _count(*norms: nn.BatchNorm2d) -> None:
    """Count a training batch, as a BatchNorm does when it is called."""
    for norm in norms:
        if norm.training:
            norm.num_batches_tracked.add_(1)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and shift per channel of a BatchNorm at inference."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - scale * norm.running_mean


# Control flow depends on shapes, so torch.fx treats this layer, and others like it, as a leaf.
@register_notrace_module
class GatedMixer(nn.Module):
    """PAT_ch: (B, H, W, C) -> same. A quarter of the channels is convolved; the others are gated by the means and
    deviations of all of them, and normalised.

    On a map with a single position the deviation is 0; the published code gives NaN.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.part = dim // PARTS
        rest = dim - self.part
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1, bias=False, **dd)
        self.gate = nn.Parameter(trunc_normal_(torch.empty(rest, rest, 2, **dd), std=0.02))
        self.gate_norm = nn.BatchNorm2d(rest, **dd)  # over the batch
        self.norm = nn.BatchNorm2d(rest, **dd)  # None once it is merged into what follows

    def forward(self, x: Tensor) -> Tensor:
        x = nchw(x)
        y, z = self.conv(x[:, : self.part]), self.gated(x[:, self.part :])
        return torch.cat((nhwc(y), nhwc(z)), 3)

    def gated(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.defined(x)
        else:
            gate_norm, norm = self.gate_norm, self.norm
            norms = [gate_norm] if norm is None else [gate_norm, norm]
            if x.shape[2] * x.shape[3] == 1 or not can_fuse(*norms):
                return self.defined(x)
            affine, running = (None, None), (None, None)
            if norm is not None:
                affine, running = (norm.weight, norm.bias), (norm.running_mean, norm.running_var)  # type: ignore[assignment]
            _count(*norms)
            n = gate_norm
            return gaussian_gate(
                x, self.gate, n.weight, n.bias, *affine, n.running_mean, n.running_var, *running,
                n.training, n.momentum, n.eps,  # type: ignore[arg-type]
            )  # fmt: skip

    def defined(self, x: Tensor) -> Tensor:
        y = x * self.gates(x)
        return y if self.norm is None else self.norm(y)

    def gates(self, x: Tensor) -> Tensor:
        """Return the gate of each channel of x (B, C, H, W), (B, C, 1, 1)."""
        mean = x.mean((2, 3), keepdim=True)
        std = torch.zeros_like(mean)
        if x.shape[2] * x.shape[3] > 1:
            std = x.std((2, 3), keepdim=True)
        return F.hardsigmoid(self.gate_norm(F.conv2d(torch.cat((mean, std), 3), self.gate.unsqueeze(2))))


@describe.register(GatedMixer)
def _(mixer: GatedMixer, x: Tensor) -> Iterator[AttentionMap]:
    rest = nchw(x)[:, mixer.part :]
    grid = (x.shape[1], x.shape[2])
    yield GateMap(
        kind="channel gate",
        grid=grid,
        heads=rest.shape[1],
        images=len(x),
        gate=mixer.gates(rest),
        magnitude=rest.abs(),
    )


@register_notrace_module
class RelativeAttention(nn.Module):
    """Attention of all tokens, with a bias by their distance (iRPE): (B, H, W, C) -> same.

    In training `drop` of the probabilities and of the output is dropped.
    """

    def __init__(self, dim: int, heads: int, drop: float, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.heads, self.drop = heads, drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.table = nn.Parameter(torch.zeros(heads, 81, **dd))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, drop={self.drop}"

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        qkv = (self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)).view(B, H, W, 3, C)
        if self.training and self.drop > 0.0:
            y = self.attend_with_dropout(qkv)
        else:
            y = relative_bias_attention(qkv, self.heads, self.table)
        y = self.proj(y) if torch.jit.is_scripting() else project(self.proj, y)
        return F.dropout(y, self.drop, self.training)

    def attend_with_dropout(self, qkv: Tensor) -> Tensor:
        """Compute attention with dropout of the probabilities, which the operator does not support."""
        B, H, W, _, C = qkv.shape
        q, k, v = qkv.view(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        rows, columns = torch.arange(H, device=qkv.device), torch.arange(W, device=qkv.device)
        dy = rows.unsqueeze(1) - rows + H - 1
        dx = columns.unsqueeze(1) - columns + W - 1
        ids = buckets(H, W, qkv.device)[dy[:, None, :, None], dx[None, :, None, :]]  # (H, W, H, W)
        bias = self.table[:, ids.flatten(0, 1).flatten(1)].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, bias, self.drop)
        return y.transpose(1, 2).reshape(B, H, W, C)


@describe.register(RelativeAttention)
def _(mixer: RelativeAttention, x: Tensor) -> Iterator[AttentionMap]:
    grid = (x.shape[1], x.shape[2])
    bias = mixer.table[:, buckets(*grid, x.device)]
    yield window_map(mixer.qkv(x), mixer.heads, grid, grid, bias=bias, kind="tokens")


class AttentionMixer(nn.Module):
    """A convolution of the first quarter of the channels, attention among the others (PAT_sf): (B, H, W, C) -> same."""

    def __init__(self, dim: int, heads: int, drop: float, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.part = dim // PARTS
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(dim - self.part, eps=1e-6, **dd)
        self.attn = RelativeAttention(dim - self.part, heads, drop, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(nchw(x)[:, : self.part])
        return torch.cat((nhwc(y), self.attn(self.norm(x[..., self.part :]))), 3)


@register_notrace_module
class SpatialAttention(nn.Module):
    """PAT_sp: (B, H, W, C) -> same. Every position of the first half of the channels is gated by one number, and
    normalised; the other half is normalised, and goes through a 1 x 1 convolution."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.part = dim - dim // 2
        self.gate = nn.Linear(self.part, 1, bias=False, **dd)
        self.norm = nn.BatchNorm2d(self.part, **dd)
        self.norm2 = nn.BatchNorm2d(dim // 2, **dd)
        self.conv = nn.Linear(dim // 2, dim // 2, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        y, z = self.gated(x[..., : self.part]), self.norm2(nchw(x[..., self.part :].contiguous()))
        return torch.cat((y, self.conv(nhwc(z)) if torch.jit.is_scripting() else project(self.conv, nhwc(z))), 3)

    def gated(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.defined(x)
        else:
            n = self.norm
            if not can_fuse(self.gate, n) or self.gate.bias is not None:
                return self.defined(x)
            _count(n)
            norm = n.weight, n.bias, n.running_mean, n.running_var, n.training, n.momentum, n.eps
            return nhwc(spatial_gate(nchw(x), self.gate.weight[0], *norm))

    def defined(self, x: Tensor) -> Tensor:
        return nhwc(self.norm(nchw(x * F.hardsigmoid(self.gate(x)))))


@describe.register(SpatialAttention)
def _(mixer: SpatialAttention, x: Tensor) -> Iterator[AttentionMap]:
    yield _spatial_gate(mixer.gate(x[..., : mixer.part]))


def _spatial_gate(logits: Tensor) -> GateMap:  # (B, H, W, 1)
    gate = nchw(F.hardsigmoid(logits))
    return GateMap(kind="spatial gate", grid=(gate.shape[2], gate.shape[3]), heads=1, images=len(gate), gate=gate)


class Mlp(nn.Module):
    """Linear, BatchNorm, activation, linear: (B, H, W, C) -> same."""

    def __init__(self, dim: int, act: str, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.fc1 = nn.Linear(dim, 2 * dim, bias=False, **dd)
        self.norm = nn.BatchNorm2d(2 * dim, **dd)
        self.act = create_act_layer(act)
        self.fc2 = nn.Linear(2 * dim, dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x) if torch.jit.is_scripting() else project(self.fc1, x)
        hidden = self.act(nhwc(self.norm(nchw(hidden))))
        return self.fc2(hidden) if torch.jit.is_scripting() else project(self.fc2, hidden)


class Block(nn.Module):
    """Mixer and MLP (paper, figure 2): (B, H, W, C) -> same. An attention mixer has its own residual connection."""

    def __init__(self, mixer: nn.Module, mlp: Mlp, spatial: nn.Module, residual: bool, drop_path: float):
        super().__init__()
        self.mixer, self.mlp, self.spatial, self.residual = mixer, mlp, spatial, residual
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x)
        if self.residual:
            x = y = x + y
        return x + self.drop_path(self.spatial(self.mlp(y)))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.contiguous()), nn.Parameter(bias)
    return layer


def _tokens_at_once(x: Tensor, hidden: int) -> int:
    """Return how many of the tokens x (..., C) an MLP processes at once, 0 for all.

    A CPU is faster if they stay in its cache, but not if they are so few that it mainly reads weights.
    """
    if torch.is_grad_enabled() or use_definition(x) or x.device.type != "cpu":
        return 0
    at_once = 2**20 // (hidden * x.element_size())
    return at_once if at_once >= 1024 and x.numel() >= 2 * at_once * x.shape[-1] else 0


@register_notrace_module
class FusedBlock(nn.Module):
    """A `Block` for inference, its BatchNorms merged into the linear layers.

    Of PAT_sp, behind z = W h of the second linear layer, W1 the rows of the gated half and W2 those of the other:

        BN(z1 · hardsigmoid(a z1)) = (s W1) h · hardsigmoid((a W1) h) + t       s, t: of the BatchNorm
        C BN(z2)                   = (C s2 W2) h + C t2

    So one linear layer gives both halves, the logit of the gate being its last output.
    """

    def __init__(self, block: Block):
        super().__init__()
        self.mixer, self.residual, self.act = block.mixer, block.residual, block.mlp.act
        scale, bias = _affine(block.mlp.norm)
        w = scale[:, None] * block.mlp.fc1.weight
        if isinstance(self.mixer, GatedMixer):
            scale, shift = _affine(self.mixer.norm)
            self.mixer.norm = None  # type: ignore[assignment]
            part = self.mixer.part
            bias = bias + w[:, part:] @ shift
            w = torch.cat((w[:, :part], w[:, part:] * scale), 1)
        self.fc1, self.hidden = _linear(w, bias), len(bias)
        w, spatial = block.mlp.fc2.weight, block.spatial
        self.dim, self.gated = len(w), 0
        if isinstance(spatial, SpatialAttention):
            self.gated = spatial.part
            scale, shift = _affine(spatial.norm)
            other_scale, other_shift = _affine(spatial.norm2)
            gated, other, conv = w[: self.gated], w[self.gated :], spatial.conv.weight
            rows = scale[:, None] * gated, conv @ (other_scale[:, None] * other), spatial.gate.weight @ gated
            bias = torch.cat((torch.zeros_like(shift), conv @ other_shift, shift.new_zeros(1)))
            self.fc2 = _linear(torch.cat(rows), bias)
            self.shift = nn.Parameter(shift)
        else:
            self.fc2 = block.mlp.fc2

    def forward(self, x: Tensor) -> Tensor:
        y = self.mixer(x)
        if self.residual:
            x = y = x + y
        at_once = _tokens_at_once(y, self.hidden) if can_fuse(self.fc1, self.act, self.fc2) else 0
        if at_once == 0:
            return x + self.mlp(y)
        chunks = zip(x.flatten(0, 2).split(at_once), y.flatten(0, 2).split(at_once))
        return torch.cat([x + self.mlp(y) for x, y in chunks]).view(x.shape)

    def mlp(self, x: Tensor) -> Tensor:  # (..., C) -> same
        if torch.jit.is_scripting():
            x = self.fc2(self.act(self.fc1(x)))
        else:
            x = project(self.fc2, self.act(project(self.fc1, x)))
        if self.gated:
            y, z, gate = x.split([self.gated, self.dim - self.gated, 1], -1)
            x = torch.cat((torch.addcmul(self.shift, y, F.hardsigmoid(gate)), z), -1)
        return x


@describe.register(FusedBlock)
def _(block: FusedBlock, x: Tensor) -> Iterator[AttentionMap]:
    """The gate of PAT_sp, whose logit the last linear layer gives; mixers are modules of their own."""
    if block.gated:
        y = block.mixer(x)
        y = x + y if block.residual else y
        yield _spatial_gate(block.fc2(block.act(block.fc1(y)))[..., -1:])


@register_notrace_module
class Patches(nn.Module):
    """A convolution over non-overlapping patches, then BatchNorm: NCHW -> NCHW, channels-last in memory.

    Pixels beyond the last whole patch are dropped; a map smaller than one patch is padded with zeros to one.
    """

    def __init__(self, in_chans: int, dim: int, stride: int, device=None, dtype=None):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.stride = stride
        self.conv = nn.Conv2d(in_chans, dim, stride, stride, bias=False, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        down, right = max(0, self.stride - x.shape[2]), max(0, self.stride - x.shape[3])
        if down > 0 or right > 0:
            x = F.pad(x, (0, right, 0, down))
        return self.norm(self.conv(channels_last(x)))

    @torch.no_grad()
    def fuse(self) -> "Patches":
        if isinstance(self.norm, nn.BatchNorm2d):
            scale, shift = _affine(self.norm)
            self.conv.weight = nn.Parameter(scale[:, None, None, None] * self.conv.weight)
            self.conv.bias = nn.Parameter(shift)
            self.norm = nn.Identity()  # type: ignore[assignment]
        return self


class Head(ClassifierHead):
    """Pooling, a linear layer to `hidden` features, activation, classifier: (B, dim, H, W) -> (B, num_classes)."""

    def __init__(self, dim: int, hidden: int, num_classes: int, pool_type: str, drop_rate: float, act: str, **dd):
        super().__init__(hidden, num_classes, pool_type, drop_rate, **dd)
        if self.global_pool.feat_mult() != 1:
            raise ValueError(f"global_pool must leave the width as it is, got {pool_type!r}")
        self.hidden = nn.Linear(dim, hidden, bias=False, **dd)
        self.act = create_act_layer(act)

    def forward(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        x = nchw(self.hidden(nhwc(x))) if self.global_pool.is_identity() else self.hidden(x)
        x = self.drop(self.act(x))
        return x if pre_logits else self.fc(x)


class PATNet(Pyramid):
    """Images (B, in_chans, H, W) of any size to logits (B, num_classes) or to four maps of strides 4, 8, 16 and 32.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for pooled features.
        global_pool: name of the pooling over the last map, as in timm; '' for none.
        depths: blocks per stage. Those of the last attend to all tokens, the others gate their channels.
        dims: number of channels per stage.
        act_layer: timm's name of the activation.
        spatial_attn: whether the MLPs end in spatial attention (PAT_sp).
        attn_heads: heads of the attention in the last stage; they divide three quarters of its width.
        head_hidden_size: width of the layer before the classifier.
        out_norms: a BatchNorm for each stage's map in `forward_intermediates` and `features_only`, as the published
            detection backbones have. The next stage gets the map without it.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
        attn_drop_rate: dropout of the attention's probabilities and of its output in the last stage.
        fused: build the form that `fuse()` makes, for weights that were stored after it.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (1, 2, 8, 2),
        dims: tuple[int, ...] = (32, 64, 128, 256),
        act_layer: str = "gelu",
        spatial_attn: bool = False,
        attn_heads: int = 4,
        head_hidden_size: int = 1280,
        out_norms: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        fused: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if len(depths) != len(dims):
            raise ValueError(f"depths and dims must be equally long, got {depths} and {dims}")
        if min(dims) < PARTS:
            raise ValueError(f"dims must be at least {PARTS}, got {dims}")
        attended = dims[-1] - dims[-1] // PARTS
        if attn_heads < 1 or attended % attn_heads:
            raise ValueError(f"attn_heads must divide the {attended} channels that attend, got {attn_heads}")
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features, self.head_hidden_size = dims[-1], head_hidden_size
        self.drop_rate = drop_rate

        self.stem = Patches(in_chans, dims[0], 4, **dd)
        rates: Any = iter(calculate_drop_path_rates(drop_path_rate, sum(depths)))
        stages = []
        self.feature_info = []
        for i, (depth, dim) in enumerate(zip(depths, dims)):
            downsample = Patches(dims[i - 1], dim, 2, **dd) if i else nn.Identity()
            last = i == len(dims) - 1
            blocks = []
            for _ in range(depth):
                mixer = AttentionMixer(dim, attn_heads, attn_drop_rate, **dd) if last else GatedMixer(dim, **dd)
                spatial = SpatialAttention(dim, **dd) if spatial_attn else nn.Identity()
                blocks.append(Block(mixer, Mlp(dim, act_layer, **dd), spatial, last, next(rates)))
            stages.append(Stage(downsample, blocks))
            self.feature_info.append(dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}"))
        self.stages = nn.Sequential(*stages)
        self.out_norms = nn.ModuleList(nn.BatchNorm2d(dim, **dd) for dim in dims) if out_norms else None
        self.norm = nn.Identity()
        self.head = Head(dims[-1], head_hidden_size, num_classes, global_pool, drop_rate, act_layer, **dd)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Conv2d):
                trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)
        self.fused = False
        if fused:
            self._fuse()

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Prune as every `Pyramid`; the layers before the classifier are part of the head."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.head_hidden_size = self.num_features
            self.head = ClassifierHead(self.num_features, 0, pool_type="", **get_device_dtype(self))
        return take

    @torch.no_grad()
    def fuse(self) -> "PATNet":
        """Merge BatchNorms, and the second linear layer of each MLP with PAT_sp, into equal layers for inference.

        In place; returns the model. The norms of the gates and the `out_norms` remain. Stored with timm's
        `save_for_hf`, the model loads again; weights alone load into a model made with `fused=True`.
        """
        if self.training:
            raise RuntimeError("fuse() merges BatchNorms as they are at inference: call eval() first")
        self._fuse()
        update_model_args(self, fused=True)
        return self.eval()

    @torch.no_grad()
    def _fuse(self) -> None:
        self.fused = True
        for patches in [m for m in self.modules() if isinstance(m, Patches)]:
            patches.fuse()
        for stage in self.stages:
            stage.blocks = nn.Sequential(*[FusedBlock(b) if isinstance(b, Block) else b for b in stage.blocks])


PUBLISHED_KEYS: Rules = [  # published name -> ours, in order; published stages and mergings alternate in one list
    (r"^patch_embed\.proj\.", "stem.conv."),
    (r"^patch_embed\.norm\.", "stem.norm."),
    (r"^stages\.([135])\.reduction\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.conv."),
    (r"^stages\.([135])\.norm\.", lambda m: f"stages.{int(m[1]) // 2 + 1}.downsample.norm."),
    (r"^stages\.(\d)\.blocks\.(\d+)\.(?=spatial_mixing|mlp\.\d)", lambda m: f"stages.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"\.spatial_mixing\.partial_conv3\.", ".mixer.conv."),
    (r"\.spatial_mixing\.attn\.cfc1\.weight$", ".mixer.gate"),
    (r"\.spatial_mixing\.attn\.bn\.", ".mixer.gate_norm."),
    (r"\.spatial_mixing\.attn\.rpe_k\.lookup_table_bias$", ".mixer.attn.table"),
    (r"\.spatial_mixing\.", ".mixer."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.1\.", ".mlp.norm."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
    (r"\.mlp\.4\.conv_attn\.", ".spatial.gate."),
    (r"\.mlp\.4\.", ".spatial."),
    (r"^norm([0246])\.", lambda m: f"out_norms.{int(m[1]) // 2}."),
    (r"^avgpool_pre_head\.1\.", "head.hidden."),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
]


def rename(key: str) -> str:
    """Return our name for a key of a published state dict; our own keys stay unchanged."""
    return rename_key(key, PUBLISHED_KEYS)


def checkpoint_filter_fn(state_dict: dict, model: PATNet) -> dict[str, Tensor]:
    """Convert weights under the published names (training, classification or detection files) to ours."""
    own, out = model.state_dict(), {}
    for key, value in unwrap(state_dict).items():
        key = rename(key.removeprefix("model."))  # of the trainer's module
        if key in own and value.ndim == 4 and own[key].ndim < 4:  # a linear layer written as a convolution
            value = value.flatten(own[key].ndim - 1)
        out[key] = value
    if (fused := "stages.0.blocks.0.fc1.weight" in out) != model.fused:
        raise ValueError(
            "the weights are of a fused PATNet: load them with fused=True"
            if fused
            else "the weights are not of a fused PATNet: load them with fused=False, then call fuse()"
        )
    return complete(out, model)


def _dims(dim: int) -> tuple[int, ...]:
    return dim, 2 * dim, 4 * dim, 8 * dim


# PAT_sp and four heads as the published configurations have it. The papers draw PAT_sp in every variant, and the code
# also supports six heads: the papers do not say which of these gave the published accuracies.
VARIANTS: dict[str, dict[str, Any]] = dict(
    patnet_t0=dict(depths=(1, 2, 8, 2), dims=_dims(32)),
    patnet_t1=dict(depths=(1, 2, 8, 2), dims=_dims(48), spatial_attn=True),
    patnet_t2=dict(depths=(2, 2, 6, 4), dims=_dims(64), act_layer="relu"),
    patnet_s=dict(depths=(2, 2, 9, 4), dims=_dims(96), act_layer="relu"),
    patnet_m=dict(depths=(2, 3, 16, 4), dims=_dims(128), act_layer="relu"),
    patnet_l=dict(depths=(2, 3, 20, 4), dims=_dims(160), act_layer="relu"),
)
FIGURE = "read off a figure of the published code's README"
PUBLISHED = dict(  # ImageNet-1K top-1 and its source
    patnet_t0=(73.9, FIGURE),
    patnet_t1=(78.1, FIGURE),
    patnet_t2=(80.2, FIGURE),
    patnet_s=(82.1, FIGURE),
    patnet_m=(83.1, FIGURE),
    patnet_l=(83.9, FIGURE),
)
WEIGHTS = dict.fromkeys(
    ("patnet_t0", "patnet_t1"), "share links in issues 3 and 4, which expire: https://github.com/haiduo/PartialNet"
)
CFG = make_cfg(
    crop_pct=0.9,
    first_conv="stem.conv",
    license="mit",
    origin_url="https://github.com/haiduo/PartialNet",
    paper_name="Partial Convolution Meets Visual Attention",
    paper_ids="arXiv:2503.03148",
)
default_cfgs = generate_default_cfgs({f"{name}.untrained": CFG for name in VARIANTS})


def _create(name: str, pretrained: bool, **kwargs) -> PATNet:
    kwargs = VARIANTS[name] | kwargs
    return create_model(PATNet, name, pretrained, checkpoint_filter_fn, WEIGHTS.get(name), **kwargs)


@register_model
def patnet_t0(pretrained: bool = False, **kwargs) -> PATNet:
    return _create("patnet_t0", pretrained, **kwargs)


@register_model
def patnet_t1(pretrained: bool = False, **kwargs) -> PATNet:
    return _create("patnet_t1", pretrained, **kwargs)


@register_model
def patnet_t2(pretrained: bool = False, **kwargs) -> PATNet:
    return _create("patnet_t2", pretrained, **kwargs)


@register_model
def patnet_s(pretrained: bool = False, **kwargs) -> PATNet:
    return _create("patnet_s", pretrained, **kwargs)


@register_model
def patnet_m(pretrained: bool = False, **kwargs) -> PATNet:
    return _create("patnet_m", pretrained, **kwargs)


@register_model
def patnet_l(pretrained: bool = False, **kwargs) -> PATNet:
    return _create("patnet_l", pretrained, **kwargs)
