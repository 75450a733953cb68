"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..precision import no_autocast
from ..registration import no_second_derivative
from . import kernel


@custom_op("saccade::agent_attention_fwd", mutates_args=())
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_rows: Tensor,
    key_columns: Tensor,
    key_token: Tensor | None,
    query_rows: Tensor,
    query_columns: Tensor,
    query_token: Tensor | None,
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    key_tables, query_tables = (key_rows, key_columns, key_token), (query_rows, query_columns, query_token)
    return kernel.fwd(q, k, v, agents, key_tables, query_tables, dwc_weight, dwc_bias, heads, scale)


@fwd.register_fake
def _(q, k, v, agents, *args):
    (B, N, C), a, heads = q.shape, agents.shape[1], args[-2]
    lse1, lse2 = (q.new_empty(B, heads, n, dtype=torch.float32) for n in (a, N))
    return q.new_empty(B, N, C), q.new_empty(B, heads, a, C // heads), lse1, lse2


@custom_op("saccade::agent_attention_bwd", mutates_args=())
def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_rows: Tensor,
    key_columns: Tensor,
    key_token: Tensor | None,
    query_rows: Tensor,
    query_columns: Tensor,
    query_token: Tensor | None,
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    va: Tensor,
    lse1: Tensor,
    lse2: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q … query_token, and of the taps and bias (10, C). For None they are empty tensors."""
    key_tables, query_tables = (key_rows, key_columns, key_token), (query_rows, query_columns, query_token)
    with no_autocast(q):
        return kernel.bwd(
            dout, q, k, v, agents, key_tables, query_tables, dwc_weight, dwc_bias, va, lse1, lse2, heads, scale
        )


@bwd.register_fake
def _(dout, q, k, v, agents, *args):
    *tables, dwc_weight, _, _, _, _, _, _ = args
    tables = [agents.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in tables]
    dweight = agents.new_empty((0,) if dwc_weight is None else (10, q.shape[2]), dtype=torch.float32)
    return *(x.new_empty(x.shape) for x in (q, k, v, agents)), *tables, dweight


def _save(ctx, inputs, output):
    *tensors, heads, scale = inputs
    ctx.rest = heads, scale
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, dout, *_):
    *grads, dweight = bwd(dout, *ctx.saved_tensors, *ctx.rest)
    tensors = ctx.saved_tensors
    dwc_weight, dwc_bias = tensors[10:12]
    grads = [None if x is None else grad for x, grad in zip(tensors, grads)]
    dwc = (
        None if dwc_weight is None else dweight[:9].T.reshape(dwc_weight.shape).to(dwc_weight.dtype),
        None if dwc_bias is None else dweight[9].to(dwc_bias.dtype),
    )
    return *grads, *dwc, None, None


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("agent_attention", bwd)


# Counted as PyTorch counts its own attention: two matrix products forward and five backward, per softmax.
@register_flop_formula(torch.ops.saccade.agent_attention_fwd)
def fwd_flop(q_shape, k_shape, v_shape, agents_shape, *args, **kwargs) -> int:
    B, N, C = q_shape
    return 4 * B * agents_shape[1] * (N + k_shape[1]) * C


@register_flop_formula(torch.ops.saccade.agent_attention_bwd)
def bwd_flop(dout_shape, q_shape, k_shape, v_shape, agents_shape, *args, **kwargs) -> int:
    return fwd_flop(q_shape, k_shape, v_shape, agents_shape) * 5 // 2
