"""Sparsifiner: DeiT or LV-ViT whose attention layers predict, for each image, the keys that each query attends to.

Paper: "Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers", CVPR 2023,
arXiv 2303.13755. Published code: lim142857/Sparsifiner@9a11e26 (MIT). Parameters map one to one
(`checkpoint_filter_fn`), outputs are equal. Weights of a dense DeiT or LV-ViT load too, since the method starts from
them.

Differences from the published code: pruned tokens are removed, not masked (the logits are the same); an image's result
does not depend on other images, whereas the published budget of keys depends on the first image of the batch and on
earlier batches; and a query without keys above the score threshold gets 0 in LV-ViT too, not NaN.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import ConvNormAct, DropPath, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..ops import connectivity, predict_mask, sparse_attention, sparse_mask, unpack_mask
from ..ops.dispatch import indices_of_largest
from ..ops.precision import full, no_autocast, no_gradients
from .attention_maps import AttentionMap, QueryMap, describe
from .base import Isotropic, TokenHead, checked_size, create_model, init_linear, make_cfg
from .layers import (
    CachedMlp,
    can_fuse,
    channels_last,
    is_traced,
    mark_unused,
    position_table,
    project,
    resize_positions,
)
from .published import Rules, complete, rename_key, unwrap

STRIDE = 16  # pixels per token


@dataclass
class Record:
    """The intermediate results of an attention layer with n tokens, which it records for `Sparsifiner.distill`."""

    recon: bool
    connectivity: Tensor | None = None  # (B, heads, n-1, n), the predicted scores
    attention: Tensor | None = None  # (B, heads, n, n), the dense softmax
    mask: Tensor | None = None  # (B, heads, n, n) bool, the keys that were kept


class MaskPredictor(nn.Module):
    """Predict the keys that each query keeps, from a low-rank estimate of the attention (paper, section 3.2).

    Args:
        tokens: number of tokens, including the class token: the tables `down` and `up` have one row per token.
        head_dim: channels per head; all heads share the predictor.
        basis: number of basis vectors over the tokens; a query's scores are linear combinations of them.
        width: channels that queries and keys are projected to.
        budget: number of keys with the largest scores that a query keeps, None to use score_threshold.
        score_threshold: keep the keys with a score above it, None to use budget.
        basis_threshold: entries of the basis with a magnitude not above it become 0.
        coef_topk: how many of a query's coefficients to keep, the largest; None for all.
        coef_threshold: kept coefficients that are not above it become 0.
        share_proj: use one table for both projections.
    """

    def __init__(
        self,
        tokens: int,
        head_dim: int,
        basis: int,
        width: int,
        budget: int | None,
        score_threshold: float | None,
        basis_threshold: float,
        coef_topk: int | None,
        coef_threshold: float,
        share_proj: bool,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.budget, self.score_threshold, self.basis_threshold = budget, score_threshold, basis_threshold
        self.coef_topk, self.coef_threshold = coef_topk, coef_threshold
        self.proj_q = nn.Linear(head_dim, width, **dd)
        self.proj_k = nn.Linear(head_dim, width, **dd)
        self.down = nn.Parameter(trunc_normal_(torch.empty(tokens, basis, **dd), std=0.02))
        self.up = None if share_proj else nn.Parameter(trunc_normal_(torch.empty(tokens, basis, **dd), std=0.02))
        self.record: Record | None = None  # while `Sparsifiner.distill` runs

    def extra_repr(self) -> str:
        return f"budget={self.budget}, score_threshold={self.score_threshold}, coef_topk={self.coef_topk}"

    def forward(self, q: Tensor, k: Tensor, kept: Tensor | None) -> Tensor:
        """Map queries and keys (B, heads, n, D) to bits (B, heads, n, ceil(n / 32)), of the n tokens `kept` (B, n), or
        of all tokens."""
        if torch.jit.is_scripting():
            with torch.no_grad():
                return self.bits(q, k, kept)
        else:
            if self.record is not None:
                self.record.connectivity = self.scores(q, k, kept, self.record.recon)
                return self.select(self.record.connectivity)
            with no_gradients():
                return self.bits(q, k, kept)

    def bits(self, q: Tensor, k: Tensor, kept: Tensor | None) -> Tensor:
        """As `forward`, without a record."""
        if kept is not None:
            return self.select(self.scores(q, k, kept))
        up = self.down if self.up is None else self.up
        q, k, W_q, b_q, W_k, b_k = self.project(q, k)
        return predict_mask(
            q, k, W_q, b_q, W_k, b_k, self.down, up,
            self.budget, self.score_threshold, self.coef_topk, self.coef_threshold, self.basis_threshold,
        )  # fmt: skip

    def select(self, scores: Tensor) -> Tensor:
        """Map scores (B, heads, n-1, n) to bits. If tokens were removed, at most all remaining patches are kept."""
        budget = self.budget
        if budget is not None and scores.shape[3] < self.down.shape[0]:
            budget = min(budget, scores.shape[2])
        return sparse_mask(scores, budget, self.score_threshold)

    def scores(self, q: Tensor, k: Tensor, kept: Tensor | None, recon: bool = False) -> Tensor:
        """(B, heads, n, D) twice -> (B, heads, n-1, n), in float32 at least; see `Sparsifiner.distill` for `recon`."""
        q, k, W_q, b_q, W_k, b_k = self.project(q, k)
        if kept is not None:
            if torch.jit.is_scripting():
                return self.scores_of_kept(q, k, W_q, b_q, W_k, b_k, kept)
            else:
                with no_autocast(q):
                    return self.scores_of_kept(q, k, W_q, b_q, W_k, b_k, kept)
        up = self.down if self.up is None else self.up
        return connectivity(
            q, k, W_q, b_q, W_k, b_k, self.down, up,
            None if recon else self.coef_topk,
            0.0 if recon else self.coef_threshold,
            None if recon else self.basis_threshold,
        )  # fmt: skip

    def project(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return q, k and the weights and biases of their projections; identities after layers that must be called."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if can_fuse(self.proj_q, self.proj_k) and self.proj_q.bias is not None and self.proj_k.bias is not None:
                return q, k, self.proj_q.weight, self.proj_q.bias, self.proj_k.weight, self.proj_k.bias
        q, k = self.proj_q(q), self.proj_k(k)
        width = q.shape[3]
        eye, zero = torch.eye(width, dtype=q.dtype, device=q.device), q.new_zeros(width)
        return q, k, eye, zero, eye, zero

    def scores_of_kept(
        self, q: Tensor, k: Tensor, W_q: Tensor, b_q: Tensor, W_k: Tensor, b_k: Tensor, kept: Tensor
    ) -> Tensor:
        """Compute `connectivity` with different rows of the tables for each image."""
        full = torch.promote_types(q.dtype, torch.float32)
        down = self.down.to(full)[kept]  # (B, n, K)
        up = down if self.up is None else self.up.to(full)[kept]
        q, k = q[:, :, 1:].to(full), k.to(full)
        W_q, b_q, W_k, b_k = W_q.to(full), b_q.to(full), W_k.to(full), b_k.to(full)
        # (k W_kᵀ + b_k)ᵀ P, by way of kᵀ P: one product for all heads, and of K columns
        heads, D = q.shape[1], q.shape[3]
        k_down = (down.transpose(-2, -1) @ k.transpose(1, 2).flatten(2)).unflatten(2, (heads, D)).permute(0, 2, 3, 1)
        k_down = W_k @ k_down + b_k[:, None] * down.sum(1)[:, None, None]  # (B, heads, c, K)
        coef = ((q @ (W_q.transpose(-2, -1) @ k_down) + (b_q @ k_down)[:, :, None]) * heads**-0.5).softmax(-1)
        if self.coef_topk is not None:
            index = coef.detach().topk(self.coef_topk, sorted=False)[1]
            coef = coef * torch.zeros_like(coef).scatter(-1, index, 1.0)
        if self.coef_threshold > 0.0:
            coef = coef.masked_fill(coef <= self.coef_threshold, 0.0)
        basis = up.transpose(-2, -1).abs()
        return coef @ basis.masked_fill(basis <= self.basis_threshold, 0.0)[:, None]


# The operators check shapes, so torch.fx treats this layer as a leaf.
@register_notrace_module
class SparseAttention(nn.Module):
    """Attention of each query to the keys that the predictor chooses; optionally it removes patches.

    Args:
        dim: number of channels.
        heads: number of heads.
        tokens: number of tokens, including the class token, before any are removed.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        keep: number of patches to keep after this layer, those that the class token attends to most; None for all.
        predictor: arguments of the MaskPredictor.
        size: (h, w) of the map of patches, for attention maps; None: one row.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        tokens: int,
        qkv_bias: bool,
        keep: int | None,
        predictor: dict,
        size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        self.heads, self.scale, self.tokens, self.keep = heads, (dim // heads) ** -0.5, tokens, keep
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.predictor = MaskPredictor(tokens, dim // heads, **predictor, **dd)
        self.size = size or (1, tokens - 1)
        self.record: Record | None = None  # while `Sparsifiner.distill` runs

    def extra_repr(self) -> str:
        return f"heads={self.heads}, keep={self.keep}"

    def forward(self, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Map tokens (B, n, C) and their indices among all tokens (B, n), None if none were removed, to the output of
        the kept tokens (B, m, C) and their indices among the n, (B, m), None if all are kept."""
        qkv = self.qkv(x) if torch.jit.is_scripting() else project(self.qkv, x)
        q, k, v = self.split(qkv)
        mask = self.predictor(q, k, kept)
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if self.record is not None:
                full = torch.promote_types(q.dtype, torch.float32)
                attention = ((q @ k.mT).to(full) * self.scale).softmax(-1)
                self.record.attention, self.record.mask = attention, unpack_mask(mask, q.shape[2])
                if self.record.recon:  # attention itself is dense, and no token is removed
                    return self.proj((attention.to(v.dtype) @ v).transpose(1, 2).flatten(2)), None
        out, left = self.finish(sparse_attention(qkv, mask, self.heads), q, k)
        return self.proj(out) if torch.jit.is_scripting() else project(self.proj, out), left

    def split(self, qkv: Tensor) -> list[Tensor]:
        B, N, C3 = qkv.shape  # no unflatten, after which ONNX has one batch size
        return qkv.reshape(B, N, 3, self.heads, C3 // 3 // self.heads).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[return-value]

    def finish(self, out: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        removed = self.tokens - q.shape[2]
        if removed == 0 and self.keep is None:
            return out, None
        full = torch.promote_types(q.dtype, torch.float32)
        logits = (q[:, :, :1].to(full) * k.to(full)).sum(-1) * self.scale  # (B, heads, n), of the class token
        share = torch.ones_like(logits[:, :, :1])
        if removed > 0:
            share = _share_of_the_rest(logits, removed)
            cls = out[:, :1].reshape(out.shape[0], 1, self.heads, out.shape[2] // self.heads)
            cls = cls * share[:, None].to(out.dtype)
            out = torch.cat((cls.flatten(2), out[:, 1:]), 1)
        if self.keep is None:
            return out, None
        weights = (logits.detach().softmax(-1) * share.detach())[:, :, 1:].mean(1)
        order = indices_of_largest(weights, self.keep)
        order = order.gather(1, indices_of_largest(-order, self.keep))  # as they were before
        left = torch.cat((torch.zeros_like(order[:, :1]), order + 1), 1)
        return _take(out, left), left


def _share_of_the_rest(logits: Tensor, removed: int) -> Tensor:
    """Return the share of the class token's attention that tokens still there get, from its logits for them.

    In the published code removed tokens are zeros, and the class token still attends to them, with logits of 0.
    """
    return (logits.logsumexp(-1, keepdim=True) - math.log(removed)).sigmoid()


@describe.register(SparseAttention)
def _(mixer: SparseAttention, x: Tensor, kept: Tensor | None) -> Iterator[AttentionMap]:
    """kept: 1 for the keys that a query keeps; tokens: their weights. Removed tokens have no weights at all."""
    q, k, v = mixer.split(mixer.qkv(x))
    mask = unpack_mask(mixer.predictor(q, k, kept), x.shape[1])
    logits = q.to(full(q)) @ k.to(full(k)).mT * mixer.scale
    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)
    if kept is not None:
        share = _share_of_the_rest(logits[:, :, 0], mixer.tokens - x.shape[1])
        weights = torch.cat((weights[:, :, :1] * share[..., None], weights[:, :, 1:]), 2)
        mask, weights = (_put(_put(t, kept, mixer.tokens, 2), kept, mixer.tokens, 3) for t in (mask, weights))
        v = _put(v, kept, mixer.tokens, 2)
    common = dict(grid=mixer.size, query_grid=mixer.size, heads=mixer.heads, images=len(x), tokens=1, query_tokens=1)
    common = common | dict(normalized=False)
    whole = kept is None and bool(mask.any(-1).all())
    yield QueryMap(kind="kept", weights=lambda i: mask[:, :, i.to(x.device)].float(), **common)  # type: ignore[arg-type]
    common = common | dict(normalized=whole, values=v)
    yield QueryMap(kind="tokens", weights=lambda i: weights[:, :, i.to(x.device)], **common)  # type: ignore[arg-type]


def _take(x: Tensor, index: Tensor) -> Tensor:  # (B, n, C), (B, m) -> (B, m, C)
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


@register_notrace_function
def _put(x: Tensor, index: Tensor, size: int, dim: int) -> Tensor:
    """Scatter x to the positions `index` (B, n) along `dim` of a tensor of zeros of that `size`."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape[0], index.shape[1]
    shape_out = list(x.shape)
    shape_out[dim] = size
    return x.new_zeros(shape_out).scatter(dim, index.view(shape).expand(x.shape), x)


class Block(nn.Module):
    """Attention and MLP with residual connections, which LV-ViT halves. Maps tokens (B, n, C) and their indices (B, n),
    None if all, to the kept tokens and their indices."""

    def __init__(self, dim: int, attn: SparseAttention, mlp_ratio: float, eps: float, skip: float, rate: float, **dd):
        super().__init__()
        self.skip = skip
        self.norm1 = nn.LayerNorm(dim, eps=eps, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=eps, **dd)
        self.mlp = CachedMlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path = DropPath(rate) if rate > 0.0 else nn.Identity()
        self.grad_checkpointing = False

    def forward(self, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if self.grad_checkpointing and self.attn.record is None:
                return checkpoint(self.residuals, x, kept)
        return self.residuals(x, kept)

    def residuals(self, x: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y, left = self.attn(self.norm1(x), kept)
        if self.attn.keep is not None and left is not None:
            x, kept = _take(x, left), left if kept is None else kept.gather(1, left)
        x = torch.add(x, self.drop_path(y), alpha=self.skip)
        return torch.add(x, self.drop_path(self.mlp(self.norm2(x))), alpha=self.skip), kept


@register_notrace_module
class Stem(nn.Module):
    """Patch embedding for one image size: (B, in_chans, H, W) -> (B, H / 16 · W / 16, dim).

    DeiT's is one convolution; LV-ViT's first halves the resolution by three convolutions.
    """

    def __init__(self, in_chans: int, dim: int, img_size: tuple[int, int], convs: bool, **dd):
        super().__init__()
        self.img_size = img_size
        width, stride = (64, STRIDE // 2) if convs else (in_chans, STRIDE)
        layers = [(in_chans, 7, 2), (width, 3, 1), (width, 3, 1)] if convs else []
        self.convs = nn.Sequential(*[ConvNormAct(n, width, kernel, stride=s, **dd) for n, kernel, s in layers])
        self.proj = nn.Conv2d(width, dim, stride, stride, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] != self.img_size[0] or x.shape[3] != self.img_size[1]:
            raise ValueError(
                f"images must be {self.img_size[0]} x {self.img_size[1]}, the img_size that the mask predictors are "
                f"made for, got {x.shape[2]} x {x.shape[3]}"
            )
        if is_traced():
            x = self._check_in_graph(x)
        x = self.proj(self.convs(channels_last(x)))
        return x.flatten(2).transpose(1, 2)

    @torch.jit.unused
    def _check_in_graph(self, x: Tensor) -> Tensor:
        """Record the check of the size in a traced graph; ONNX has no errors."""
        return x if torch.onnx.is_in_onnx_export() else torch.jit.script(_checked_image)(x, *self.img_size)


def _checked_image(x: Tensor, height: int, width: int) -> Tensor:
    if x.shape[2] != height or x.shape[3] != width:
        raise ValueError(f"images must be {height} x {width}, as traced, got {x.shape[2]} x {x.shape[3]}")
    return x


class Distillation(NamedTuple):
    """The inputs of the published losses. N includes the class token. For layers after a patch was removed, its
    connectivity, attention and mask are 0."""

    logits: Tensor  # (B, num_classes), of the class token alone
    features: Tensor  # (B, N-1, C), the patches after the last norm; of LV-ViT their scores (B, N-1, num_classes)
    alive: Tensor  # (B, N-1) bool, the patches that no layer removed
    connectivity: list[Tensor]  # per layer (B, heads, N-1, N), the predicted scores
    attention: list[Tensor]  # per layer (B, heads, N, N), the dense softmax
    mask: list[Tensor]  # per layer (B, heads, N, N) bool, the keys that a query keeps


class Sparsifiner(Isotropic):
    """Sparsifiner: images (B, in_chans, *img_size) to logits (B, num_classes), or to maps of stride 16.

    The mask predictors are only trained through `distill`: a loss on the logits gives them no gradient. The model works
    in DistributedDataParallel; compiled with torch.compile, it needs `static_graph=True`.

    Args:
        host: "deit" or "lvvit". LV-ViT has a stem of four convolutions, no bias of queries, keys and values, halved
            residuals, and in evaluation half of the patches' largest scores is added to the logits.
        img_size: image size, multiples of 16; it is fixed, since the predictors' tables depend on it.
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for pooled features.
        global_pool: "token" (the class token's features), "avg" (the mean over the patches) or "" (all tokens).
        dim: number of channels.
        depth: number of blocks.
        heads: number of heads.
        mlp_ratio: hidden channels of the MLPs over their input channels.
        keep_rate: fraction of all tokens that a query keeps as keys, one number or one per block, rounded up.
        score_threshold: keep the keys with a score above it instead; keep_rate is then ignored.
        reduce_n: number of tokens over the number of basis vectors of the predictors.
        reduce_c: channels per head over the channels of the predictors' projections.
        basis_threshold: entries of the basis with a magnitude not above it become 0.
        coef_topk: how many of a query's coefficients in that basis to keep, the largest.
        coef_threshold: keep the coefficients above it instead; coef_topk is then ignored.
        share_proj: use one table both to project the keys to the basis and as the basis.
        token_keep_rate: a fraction r of the patches is kept from block depth / 4 on, r² from depth / 2, r³ from
            3 · depth / 4: those that the class token attends to most. 1 keeps all. DeiT only.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0 in the first.
    """

    def __init__(
        self,
        host: str = "deit",
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        dim: int = 192,
        depth: int = 12,
        heads: int = 3,
        mlp_ratio: float = 4.0,
        keep_rate: float | Sequence[float] = 0.25,
        score_threshold: float | None = None,
        reduce_n: int = 6,
        reduce_c: int = 2,
        basis_threshold: float = 0.02,
        coef_topk: int = 8,
        coef_threshold: float | None = None,
        share_proj: bool = False,
        token_keep_rate: float = 1.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = dict(device=device, dtype=dtype)
        if host not in ("deit", "lvvit"):
            raise ValueError(f"host must be 'deit' or 'lvvit', got {host!r}")
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} heads for {dim} channels")
        h, w = checked_size(img_size, STRIDE)
        self.size = size = h // STRIDE, w // STRIDE
        patches = size[0] * size[1]
        basis, width = (patches + 1) // reduce_n, dim // heads // reduce_c
        topk = coef_topk if coef_threshold is None else None
        if not basis or not width or (topk is not None and not 1 <= topk <= basis):
            raise ValueError(
                f"reduce_n={reduce_n} leaves {basis} coefficients of {patches + 1} tokens, and reduce_c={reduce_c} "
                f"{width} channels of {dim // heads}: both must be at least 1, and coef_topk from 1 to {basis}, "
                f"got {coef_topk}"
            )
        predictor = dict(basis=basis, width=width, score_threshold=score_threshold, basis_threshold=basis_threshold)
        predictor |= dict(coef_topk=topk, coef_threshold=coef_threshold or 0.0, share_proj=share_proj)
        budgets = [None] * depth if score_threshold is not None else _budgets(keep_rate, depth, patches + 1)
        keeps = _keeps(token_keep_rate, host, depth, patches)

        self.host, self.in_chans, self.num_classes = host, in_chans, num_classes
        self.num_features = self.head_hidden_size = dim
        lvvit = host == "lvvit"
        eps, skip = (1e-5, 0.5) if lvvit else (1e-6, 1.0)
        self.stem = Stem(in_chans, dim, (h, w), lvvit, **dd)
        self.cls_token = position_table(1, dim, **dd)
        self.pos_embed = position_table(1 + patches, dim, **dd)
        blocks = []
        for i, rate in enumerate(calculate_drop_path_rates(drop_path_rate, depth)):
            chosen = predictor | dict(budget=budgets[i])
            attn = SparseAttention(dim, heads, patches + 1, not lvvit, keeps.get(i), chosen, size, **dd)
            blocks.append(Block(dim, attn, mlp_ratio, eps, skip, rate, **dd))  # type: ignore[arg-type]
        self.blocks = nn.ModuleList(blocks)
        self.feature_info = [dict(num_chs=dim, reduction=STRIDE, module=f"blocks.{i}") for i in range(depth)]
        self.norm = nn.LayerNorm(dim, eps=eps, **dd)
        self.head = TokenHead(dim, num_classes, global_pool, drop_rate, **dd)
        self.aux: nn.Module | None = self._aux(**dd)  # of the patches
        init_linear(self)

    def _aux(self, **dd) -> nn.Module | None:
        if self.host != "lvvit":
            return None
        return nn.Linear(self.num_features, self.num_classes, **dd) if self.num_classes else nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.aux = self._aux(**get_device_dtype(self))
        if self.aux is not None:
            self.aux.train(self.training)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.stem(x)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.pos_embed
        if not torch.jit.is_scripting():
            x = self._mark_unused(x)
        return x, self.size

    @torch.jit.unused
    def _mark_unused(self, x: Tensor) -> Tensor:
        """Mark parameters that only `distill` trains: the predictors, whose masks are discrete, and LV-ViT's second
        head."""
        return mark_unused(x, (p for n, p in self.named_parameters() if ".predictor." in n or n.startswith("aux.")))

    def restore_removed(self, x: Tensor, kept: Tensor | None) -> Tensor:
        """Scatter tokens (B, n, C) to (B, N, C), with zeros for removed tokens."""
        return x if kept is None else _put(x, kept, self.pos_embed.shape[1], 1)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> tokens after the final norm, the class token first, (B, N, dim). Of a removed token
        the norm sees zeros, as published."""
        x, _ = self.embed(x)
        kept: Tensor | None = None
        for block in self.blocks:
            x, kept = block(x, kept)
        return self.norm(self.restore_removed(x, kept))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        out = self.head(x, pre_logits=pre_logits)
        if self.aux is None or self.training or pre_logits or self.num_classes == 0 or self.head.pool_type == "":
            return out
        return out + 0.5 * self.aux(x[:, 1:]).amax(1)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list | tuple[Tensor, list]:
        """Return the blocks' outputs as `Isotropic` does; removed tokens are zeros in them, before any norm."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        take, last_taken = feature_take_indices(len(self.blocks), indices)
        x, size = self.embed(x)
        kept, intermediates = None, []
        for i, block in enumerate(self.blocks if not stop_early else self.blocks[: last_taken + 1]):
            x, kept = block(x, kept)
            if i in take:
                y = self.restore_removed(x, kept)
                y = self.norm(y) if norm else y
                out = y[:, 1:].unflatten(1, size).permute(0, 3, 1, 2) if output_fmt == "NCHW" else y[:, 1:]
                intermediates.append((out, y[:, :1]) if return_prefix_tokens else out)
        return intermediates if intermediates_only else (self.norm(self.restore_removed(x, kept)), intermediates)

    @torch.jit.ignore
    def distill(self, x: Tensor, recon: bool = False) -> Distillation:
        """Return the logits and the other inputs of the published losses, with gradients.

        `recon` is the first phase of the published training: the predictors' basis keeps its sign and all entries, all
        coefficients are used, attention is dense and no token is removed, so that only the predictors are trained. A
        model with the weights of its dense parent then computes the same as the parent, the teacher.
        """
        x, _ = self.embed(x)
        kept: Any = None
        layers, N = [], x.shape[1]
        for block in self.blocks:
            before = kept
            record = block.attn.record = block.attn.predictor.record = Record(recon)
            try:
                x, kept = block(x, kept)
            finally:
                block.attn.record = block.attn.predictor.record = None
            S, A, M = record.connectivity, record.attention, record.mask
            if before is not None:
                S = _put(_put(S, before[:, 1:] - 1, N - 1, 2), before, N, 3)
                A, M = (_put(_put(t, before, N, 2), before, N, 3) for t in (A, M))
            layers.append((S, A, M))
        alive = x.new_ones(x.shape[:2], dtype=torch.bool)
        if kept is not None:
            alive = _put(alive, kept, N, 1)
        x = self.norm(self.restore_removed(x, kept))
        features = x[:, 1:] if self.aux is None else self.aux(x[:, 1:])
        return Distillation(self.head(x), features, alive[:, 1:], *map(list, zip(*layers)))

    @torch.jit.ignore
    @torch.no_grad()
    def kept_keys(self, x: Tensor) -> list[Tensor]:
        """Return, for each layer, the keys that each query keeps, (B, heads, N, N) bool; false for removed tokens."""
        return self.distill(x).mask

    @torch.jit.ignore
    @torch.no_grad()
    def attention_macs(self, x: Tensor) -> dict[str, float]:
        """Count the multiply-accumulates of all layers' attention as the paper does, averaged over images x.

        `sparse`: logits and values of the kept keys. `predictor`: the estimate that chooses them, not counting zeros of
        the basis. `dense`: logits and values of all keys, as in the parent. None of them includes the projections to
        queries, keys, values and output, which are the same in both.
        """
        macs = dict(dense=0.0, predictor=0.0, sparse=0.0)
        for block, mask in zip(self.blocks, self.kept_keys(x)):
            _, heads, N, _ = mask.shape
            predictor = block.attn.predictor
            (width, D), (_, basis) = predictor.proj_q.weight.shape, predictor.down.shape
            up = predictor.down if predictor.up is None else predictor.up
            filled = (up.abs() > predictor.basis_threshold).float().mean().item()
            n = mask[:, 0, 0].sum(-1).double()  # tokens that are still there: the class token keeps all of them
            projections, up_projection = 2 * n * width * (D + basis), (predictor.coef_topk or basis) * n * n * filled
            macs["dense"] += 2 * heads * N * N * D
            macs["predictor"] += heads * (projections + up_projection).mean().item()
            macs["sparse"] += 2 * D * mask.sum().item() / len(x)
        return macs


def _budgets(keep_rate: float | Sequence[float], depth: int, tokens: int) -> list[int]:
    """Return the number of keys that a query keeps in each block."""
    rates = [keep_rate] * depth if isinstance(keep_rate, int | float) else list(keep_rate)
    if len(rates) != depth or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"keep_rate must be above 0 and at most 1, one number or {depth}, got {keep_rate}")
    return [math.ceil(rate * tokens) for rate in rates]


def _keeps(token_keep_rate: float, host: str, depth: int, patches: int) -> dict[int, int]:
    """Return the number of patches that are kept after the attention of each pruning block."""
    if token_keep_rate == 1:
        return {}
    if host != "deit":
        raise ValueError(f"token_keep_rate must be 1 for LV-ViT, which keeps all tokens, got {token_keep_rate}")
    if not 0 < token_keep_rate < 1 or depth < 4:
        raise ValueError(
            f"token_keep_rate must be above 0 and at most 1, below that only with at least 4 blocks, got "
            f"{token_keep_rate} with {depth}"
        )
    return {depth * i // 4: math.ceil(token_keep_rate**i * patches) for i in (1, 2, 3)}


def _conv(m) -> str:
    return f"stem.convs.{int(m[2]) - 1}.{m[1]}."


PUBLISHED_KEYS: Rules = [  # published name -> ours, applied in order
    (r"^patch_embed\.proj\.", "stem.proj."),
    (r"^patch_embed\.(conv|bn)(\d)\.", _conv),
    (r"\.mask_predictor\.proj_c_([qk])\.", r".predictor.proj_\1."),
    (r"\.mask_predictor\.proj_n$", ".predictor.down"),
    (r"\.mask_predictor\.proj_back_n$", ".predictor.up"),
    (r"^head\.(weight|bias)$", r"head.fc.\1"),
    (r"^aux_head\.", "aux."),
]


def rename(key: str) -> str:
    """Return our name for a key of a published state dict; our own keys stay unchanged."""
    return rename_key(key, PUBLISHED_KEYS)


def checkpoint_filter_fn(state_dict: dict, model: Sparsifiner) -> dict[str, Tensor]:
    """Convert weights of a published Sparsifiner or of its dense parent (timm's deit_*_patch16_224, LV-ViT) to ours.

    A parent has no mask predictors: the model's own keep their values, as the method begins. Position embeddings of
    another resolution are resized as the published loader does, bicubically, from a square; predictors cannot be.
    """
    out = {rename(key): value for key, value in unwrap(state_dict).items()}
    own = model.state_dict()
    if not any(".predictor." in key for key in out):
        out |= {key: value for key, value in own.items() if ".predictor." in key}
    for key in [key for key in out if key.endswith(".predictor.down") and key in own]:
        if len(out[key]) != len(own[key]):
            raise ValueError(
                f"the mask predictors of these weights are for {len(out[key])} tokens and cannot be resized to this "
                f"model's {len(own[key])}: set img_size to theirs, or start from the dense parent"
            )
        up = key.removesuffix("down") + "up"
        if up in out and up not in own and not torch.equal(out.pop(up), out[key]):
            raise ValueError(f"share_proj=True needs weights with two equal tables, but {key} and its up differ")
    positions = out.get("pos_embed")
    if positions is not None and positions.shape[1:] != own["pos_embed"].shape[1:]:
        side = math.isqrt(positions.shape[1] - 1)
        if positions.shape[1] == 1 + side * side and positions.shape[2] == own["pos_embed"].shape[2]:
            out["pos_embed"] = resize_positions(positions, (side, side), model.size, "bicubic")
    return complete(out, model, "blocks.")


VARIANTS: dict[str, dict[str, Any]] = dict(
    sparsifiner_deit_t=dict(dim=192, heads=3),
    sparsifiner_deit_s=dict(dim=384, heads=6),
    sparsifiner_deit_b=dict(dim=768, heads=12),
    sparsifiner_lvvit_s=dict(host="lvvit", dim=384, depth=16, heads=6, mlp_ratio=3.0),
    sparsifiner_lvvit_m=dict(host="lvvit", dim=512, depth=20, heads=8, mlp_ratio=3.0),
)
# The authors published no top-1 of a variant and a keep rate that could be verified.
WEIGHTS = dict.fromkeys(VARIANTS, "none are published, but those of its dense parent, DeiT or LV-ViT, load")


def _cfg(name: str) -> dict:
    lvvit = "lvvit" in name
    return make_cfg(
        stride=STRIDE,
        fixed_input_size=True,
        first_conv="stem.convs.0.conv" if lvvit else "stem.proj",
        classifier=("head.fc", "aux") if lvvit else "head.fc",
        license="mit",
        origin_url="https://github.com/lim142857/Sparsifiner",
        paper_name="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
        paper_ids="arXiv:2303.13755",
    )


default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg(name) for name in VARIANTS})


def _create(name: str, pretrained: bool, **kwargs) -> Sparsifiner:
    kwargs = VARIANTS[name] | kwargs
    return create_model(Sparsifiner, name, pretrained, checkpoint_filter_fn, WEIGHTS[name], 3, **kwargs)


@register_model
def sparsifiner_deit_t(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return _create("sparsifiner_deit_t", pretrained, **kwargs)


@register_model
def sparsifiner_deit_s(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return _create("sparsifiner_deit_s", pretrained, **kwargs)


@register_model
def sparsifiner_deit_b(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return _create("sparsifiner_deit_b", pretrained, **kwargs)


@register_model
def sparsifiner_lvvit_s(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return _create("sparsifiner_lvvit_s", pretrained, **kwargs)


@register_model
def sparsifiner_lvvit_m(pretrained: bool = False, **kwargs) -> Sparsifiner:
    return _create("sparsifiner_lvvit_m", pretrained, **kwargs)
