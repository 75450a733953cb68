"""Registration of the Triton kernels with PyTorch: fake implementations, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..registration import no_second_derivative
from . import kernel as kernels


@custom_op("saccade::neighborhood_attention_fwd", mutates_args=())
def fwd(
    qkv: Tensor,
    bias: Tensor | None,
    heads: int,
    kernel: list[int],
    dilation: list[int],
    stride: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return kernels.fwd(qkv, bias, heads, kernel, dilation, stride, scale)


@fwd.register_fake
def _(qkv, bias, heads, kernel, dilation, stride, scale):
    B, H, W, _, C = qkv.shape
    return qkv.new_empty(B, H, W, C), qkv.new_empty(B, heads, H * W, dtype=torch.float32)


@custom_op("saccade::neighborhood_attention_bwd", mutates_args=())
def bwd(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    kernel: list[int],
    dilation: list[int],
    stride: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    return kernels.bwd(dout, qkv, bias, out, lse, heads, kernel, dilation, stride, scale)


@bwd.register_fake
def _(dout, qkv, bias, out, lse, heads, kernel, dilation, stride, scale):
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    return dqkv, lse.new_empty((0,) if bias is None else bias.shape)


def _save(ctx, inputs, output):
    qkv, bias, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, bias, *output)


def _backward(ctx, dout, _):
    dqkv, dbias = bwd(dout, *ctx.saved_tensors, *ctx.rest)
    return dqkv, None if ctx.saved_tensors[1] is None else dbias, None, None, None, None, None


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("neighborhood_attention", bwd)


# As PyTorch counts its own attention: two matrix products forward, five backward, of all queries and the keys they see.
@register_flop_formula(torch.ops.saccade.neighborhood_attention_fwd)
def fwd_flop(qkv_shape, bias_shape, heads, kernel, *args, **kwargs) -> int:
    B, H, W, _, C = qkv_shape
    return 2 * 2 * B * (H * W) * (kernel[0] * kernel[1]) * C


@register_flop_formula(torch.ops.saccade.neighborhood_attention_bwd)
def bwd_flop(dout_shape, qkv_shape, bias_shape, y_shape, lse_shape, heads, kernel, *args, **kwargs) -> int:
    return fwd_flop(qkv_shape, bias_shape, heads, kernel) * 5 // 2
