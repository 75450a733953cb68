"""Registration of the Triton kernels with PyTorch: fake kernels, autograd, autocast and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..registration import autocast_as_attention, no_second_derivative
from . import kernel
from .eager import Predictor, Selection


@custom_op("saccade::sparse_attention_fwd", mutates_args=())
def fwd(qkv: Tensor, mask: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return kernel.fwd(qkv, mask, heads, scale)


@fwd.register_fake
def _(qkv, mask, heads, scale):
    B, N, C3 = qkv.shape
    return qkv.new_empty(B, N, C3 // 3), qkv.new_empty(B, heads, N, dtype=torch.float32)


@custom_op("saccade::sparse_attention_bwd", mutates_args=())
def bwd(dout: Tensor, qkv: Tensor, mask: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float) -> Tensor:
    return kernel.bwd(dout, qkv, mask, out, lse, heads, scale)


@bwd.register_fake
def _(dout, qkv, mask, out, lse, heads, scale):
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx, inputs, output):
    qkv, mask, *ctx.geometry = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, mask, *output)


def _backward(ctx, dout, _):
    return bwd(dout, *ctx.saved_tensors, *ctx.geometry), None, None, None


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("sparse_attention", bwd)
autocast_as_attention("saccade::sparse_attention_fwd", fwd)


@custom_op("saccade::sparse_attention_mask", mutates_args=())
def mask(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_q_bias: Tensor,
    proj_k: Tensor,
    proj_k_bias: Tensor,
    down: Tensor,
    up: Tensor,
    budget: int | None,
    threshold: float | None,
    topk: int | None,
    coef_threshold: float,
    basis_threshold: float | None,
    alive: Tensor | None,
) -> Tensor:
    predictor = Predictor(proj_q, proj_q_bias, proj_k, proj_k_bias, down, up)
    return kernel.mask(q, k, predictor, Selection(topk, coef_threshold, basis_threshold, alive), budget, threshold)


@mask.register_fake
def _(q, *args):
    B, heads, N, _ = q.shape
    return q.new_empty(B, heads, N, (N + 31) // 32, dtype=torch.int32)


# Counted as PyTorch counts its own attention: two matrix products forward, five backward, over all keys, since the
# kernels compute whole tiles.
@register_flop_formula(torch.ops.saccade.sparse_attention_fwd)
def fwd_flop(qkv_shape, mask_shape, *args, **kwargs) -> int:
    B, N, C3 = qkv_shape
    return 2 * 2 * B * N * N * (C3 // 3)


@register_flop_formula(torch.ops.saccade.sparse_attention_bwd)
def bwd_flop(dout_shape, qkv_shape, *args, **kwargs) -> int:
    return fwd_flop(qkv_shape, None) * 5 // 2


# Counted: kᵀ P, its two projections, q G, and one row of U per kept coefficient.
@register_flop_formula(torch.ops.saccade.sparse_attention_mask)
def mask_flop(
    q_shape, k_shape, proj_q_shape, a, b, c, down_shape, d, budget=None, threshold=None, topk=None, *args, **kwargs
) -> int:
    (B, heads, N, D), K = q_shape, down_shape[1]
    return 2 * B * heads * (2 * N * D * K + 2 * proj_q_shape[0] * D * K + N * N * (topk or K))
