"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..registration import no_second_derivative
from . import kernel


@custom_op("saccade::channel_attention_fwd", mutates_args=())
def fwd(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return kernel.fwd(qkv, heads, scale)


@fwd.register_fake
def _(qkv, heads, scale):
    B, H, W, C3 = qkv.shape
    D = C3 // 3 // heads
    return qkv.new_empty(B, H, W, C3 // 3), qkv.new_empty(B, heads, D, D, dtype=torch.float32)


@custom_op("saccade::channel_attention_bwd", mutates_args=())
def bwd(dout: Tensor, qkv: Tensor, a: Tensor, heads: int, scale: float) -> Tensor:
    return kernel.bwd(dout, qkv, a, heads, scale)


@bwd.register_fake
def _(dout, qkv, a, heads, scale):
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


def _save(ctx, inputs, output):
    qkv, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, output[1])


def _backward(ctx, dout, _):
    return bwd(dout, *ctx.saved_tensors, *ctx.rest), None, None


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("channel_attention", bwd)


# Two products of N x D and D x D per head forward, four backward.
@register_flop_formula(torch.ops.saccade.channel_attention_fwd)
def fwd_flop(qkv_shape, heads, *args, **kwargs) -> int:
    B, H, W, C3 = qkv_shape
    return 2 * 2 * B * H * W * (C3 // 3) * (C3 // 3 // heads)


@register_flop_formula(torch.ops.saccade.channel_attention_bwd)
def bwd_flop(dout_shape, qkv_shape, a_shape, heads, *args, **kwargs) -> int:
    return 2 * fwd_flop(qkv_shape, heads)
