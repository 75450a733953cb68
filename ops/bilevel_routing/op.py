"""Registration of the Triton kernels with PyTorch: fake kernels, autograd, autocast and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..registration import autocast_as_attention, no_second_derivative
from . import kernel


@custom_op("saccade::bilevel_routing_fwd", mutates_args=())
def fwd(
    qkv: Tensor, idx: Tensor, heads: int, region_rows: int, region_cols: int, scale: float
) -> tuple[Tensor, Tensor]:
    return kernel.fwd(qkv, idx, heads, (region_rows, region_cols), scale)


@fwd.register_fake
def _(qkv, idx, heads, region_rows, region_cols, scale):
    B, H, W, C3 = qkv.shape
    return qkv.new_empty(B, H, W, C3 // 3), qkv.new_empty(B, heads, H * W, dtype=torch.float32)


@custom_op("saccade::bilevel_routing_bwd", mutates_args=())
def bwd(
    dout: Tensor,
    qkv: Tensor,
    idx: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    region_rows: int,
    region_cols: int,
    scale: float,
) -> Tensor:
    return kernel.bwd(dout, qkv, idx, out, lse, heads, (region_rows, region_cols), scale)


@bwd.register_fake
def _(dout, qkv, idx, out, lse, heads, region_rows, region_cols, scale):
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx, inputs, output):
    qkv, idx, *ctx.geometry = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, idx, *output)


def _backward(ctx, dout, _):
    return bwd(dout, *ctx.saved_tensors, *ctx.geometry), None, None, None, None, None


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("bilevel_routing_attention", bwd)
autocast_as_attention("saccade::bilevel_routing_fwd", fwd)


# Counted as PyTorch counts its own attention: two matrix products forward, five backward; over the routed keys only.
@register_flop_formula(torch.ops.saccade.bilevel_routing_fwd)
def fwd_flop(qkv_shape, idx_shape, *args, **kwargs) -> int:
    B, H, W, C3 = qkv_shape
    _, P, K = idx_shape
    return 2 * 2 * B * (H * W) * (H * W // P * K) * (C3 // 3)


@register_flop_formula(torch.ops.saccade.bilevel_routing_bwd)
def bwd_flop(dout_shape, qkv_shape, idx_shape, *args, **kwargs) -> int:
    return fwd_flop(qkv_shape, idx_shape) * 5 // 2
