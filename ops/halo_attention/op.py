"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..registration import no_second_derivative
from . import kernel
from .eager import Settings, empty


@custom_op("saccade::halo_attention_fwd", mutates_args=())
def fwd(
    q: Tensor, kv: Tensor, rows: Tensor, columns: Tensor, heads: int, block: int, halo: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output and, for the backward pass, the log-sum-exp, from queries, keys, values and position logits."""
    return kernel.fwd(q, kv, rows, columns, Settings(heads, block, halo, stride, scale))


@fwd.register_fake
def _(q, kv, rows, columns, heads, *rest):
    B, C, H, W = q.shape
    return empty(q, kv.shape[1] - C), q.new_empty(B, heads, H, W, dtype=torch.float32)


@custom_op("saccade::halo_attention_bwd", mutates_args=())
def bwd(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    block: int,
    halo: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, kv, rows and columns."""
    return kernel.bwd(dout, q, kv, rows, columns, out, lse, Settings(heads, block, halo, stride, scale))


@bwd.register_fake
def _(dout, q, kv, rows, columns, *rest):
    drows, dcolumns = (
        torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=z.device) for z in (rows, columns)
    )
    return empty(q, q.shape[1]), empty(kv, kv.shape[1]), drows, dcolumns


def _save(ctx, inputs, output):
    tensors, ctx.rest = inputs[:4], inputs[4:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, dout, _):
    return *bwd(dout, *ctx.saved_tensors, *ctx.rest), *[None] * 5


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("halo_attention", bwd)


# Counted as PyTorch counts its own attention: two matrix products forward, five backward, over all cells of the
# windows.
@register_flop_formula(torch.ops.saccade.halo_attention_fwd)
def fwd_flop(q_shape, kv_shape, rows_shape, columns_shape, heads, block, halo, *args, **kwargs) -> int:
    B, _, H, W = q_shape
    return 2 * B * H * W * (block + 2 * halo) ** 2 * kv_shape[1]


@register_flop_formula(torch.ops.saccade.halo_attention_bwd)
def bwd_flop(dout_shape, q_shape, kv_shape, rows, columns, out, lse, heads, block, halo, *args, **kwargs) -> int:
    B, C, H, W = q_shape
    return 2 * B * H * W * (block + 2 * halo) ** 2 * (2 * kv_shape[1] + C)
