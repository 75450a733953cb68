"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..registration import no_second_derivative
from . import kernel


@custom_op("saccade::window_attention_fwd", mutates_args=())
def fwd(
    qkv: Tensor, bias: Tensor | None, pad: Tensor | None, heads: int, window: list[int], shift: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    return kernel.fwd(qkv, bias, pad, heads, window, shift, scale)


@fwd.register_fake
def _(qkv, bias, pad, heads, window, shift, scale):
    B, H, W, _, C = qkv.shape
    return qkv.new_empty(B, H, W, C), qkv.new_empty(B, heads, H * W, dtype=torch.float32)


@custom_op("saccade::window_attention_bwd", mutates_args=())
def bwd(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernel.bwd(dout, qkv, bias, pad, out, lse, heads, window, shift, scale)


@bwd.register_fake
def _(dout, qkv, bias, pad, out, lse, heads, window, shift, scale):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dbias = lse.new_empty((0,) if bias is None else bias.shape)
    return dqkv, dbias, qkv.new_empty((0,) if pad is None else pad.shape)


def _save(ctx, inputs, output):
    qkv, bias, pad, *ctx.geometry = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, bias, pad, *output)


def _backward(ctx, dout, _):
    _, bias, pad, *_ = ctx.saved_tensors
    dqkv, dbias, dpad = bwd(dout, *ctx.saved_tensors, *ctx.geometry)
    return dqkv, None if bias is None else dbias, None if pad is None else dpad, None, None, None, None


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("window_attention", bwd)


# Counted as PyTorch counts its own attention: two matrix products forward, five backward, for the queries of the map
# and all keys.
@register_flop_formula(torch.ops.saccade.window_attention_fwd)
def fwd_flop(qkv_shape, bias_shape, pad_shape, heads, window, *args, **kwargs) -> int:
    B, H, W, _, C = qkv_shape
    return 2 * 2 * B * (H * W) * (window[0] * window[1]) * C


@register_flop_formula(torch.ops.saccade.window_attention_bwd)
def bwd_flop(dout_shape, qkv_shape, bias_shape, pad_shape, y_shape, lse_shape, heads, window, *args, **kwargs) -> int:
    return fwd_flop(qkv_shape, bias_shape, pad_shape, heads, window) * 5 // 2
