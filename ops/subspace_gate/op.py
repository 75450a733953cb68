"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..precision import no_autocast
from ..registration import no_second_derivative
from . import kernel
from .eager import Middle


@custom_op("saccade::subspace_gate_fwd", mutates_args=())
def fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    point_weight: Tensor,
    point_bias: Tensor,
    point_norm_weight: Tensor,
    point_norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    point_running_mean: Tensor | None,
    point_running_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the gated map; for the backward pass, the scores and, in training, mean and variance of each channel of x;
    and, in training, mean and biased variance of each norm's input."""
    args = (weight, bias, norm_weight, norm_bias, point_weight, point_bias, point_norm_weight, point_norm_bias)
    args += running_mean, running_var, point_running_mean, point_running_var, training, eps
    with no_autocast(x):
        g = point_bias.shape[0]
        moments = kernel.moments(x, g) if training else (running_mean, running_var)
        middle = Middle(moments, *args)
        s = kernel.scores(x, middle.scale, middle.shift, middle.point_weight, g)
        y = kernel.gate(x, middle.attention(s))
        kept = moments if training else (s.new_empty(0), s.new_empty(0))
        return y, s, *kept, [m.clone() for m in middle.batch()]


@fwd.register_fake
def _(x, weight, bias, norm_weight, norm_bias, point_weight, point_bias, *rest):
    (B, C, H, W), g, training = x.shape, point_bias.shape[0], rest[-2]
    kept = [x.new_empty(C if training else 0, dtype=torch.float32) for _ in range(2)]
    batch = [x.new_empty(n, dtype=torch.float32) for n in (C, C, g, g)] if training else []
    return torch.empty_like(x), x.new_empty(B, g, H, W, dtype=torch.float32), *kept, batch


@custom_op("saccade::subspace_gate_bwd", mutates_args=())
def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    point_weight: Tensor,
    point_bias: Tensor,
    point_norm_weight: Tensor,
    point_norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    point_running_mean: Tensor | None,
    point_running_var: Tensor | None,
    s: Tensor,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> list[Tensor]:
    """Return the gradients of x and of the eight parameters."""
    args = (weight, bias, norm_weight, norm_bias, point_weight, point_bias, point_norm_weight, point_norm_bias)
    args += running_mean, running_var, point_running_mean, point_running_var, training, eps
    with no_autocast(x):
        middle = Middle((mean, var) if training else (running_mean, running_var), *args)
        attention = middle.attention(s)
        ds, *point = middle.attention_backward(kernel.gate_gradient(dy, x, attention), attention)
        return [*kernel.map_gradient(dy, x, ds, attention, middle), *point]


@bwd.register_fake
def _(dy, x, *args):
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in args[:8])]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are not differentiable
    *tensors, ctx.training, ctx.eps = inputs
    _, *kept, batch = output
    ctx.mark_non_differentiable(*kept, *batch)
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx, dy, *_):
    return *bwd(dy, *ctx.saved_tensors, ctx.training, ctx.eps), *[None] * 6


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("subspace_gate", bwd)


# Counted as PyTorch does: only the two convolutions; backward twice that.
@register_flop_formula(torch.ops.saccade.subspace_gate_fwd)
def fwd_flop(x_shape, *args, **kwargs) -> int:
    B, C, H, W = x_shape
    return 2 * 2 * B * C * H * W


@register_flop_formula(torch.ops.saccade.subspace_gate_bwd)
def bwd_flop(dy_shape, *args, **kwargs) -> int:
    return 2 * fwd_flop(dy_shape)
