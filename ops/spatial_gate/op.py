"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..precision import no_autocast
from ..registration import no_second_derivative
from . import kernel
from .eager import Norm


@custom_op("saccade::spatial_gate_fwd", mutates_args=())
def fwd(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return the output; for the backward pass, the gates; in training, mean and biased variance of the norm's
    input."""
    args = (weight, norm_weight, norm_bias, running_mean, running_var, training, eps)
    n, wide = x.numel() // x.shape[1], weight.float()
    with no_autocast(x):
        if training:
            g, *moments = kernel.gate(x, wide)
            norm = Norm(*moments, n, *args)
            return kernel.norm(x, g, norm.gain, norm.shift), g, moments
        norm = Norm(running_mean, running_var, n, *args)
        g, y = kernel.gate(x, wide, norm.gain, norm.shift)
        return y, g, []


@fwd.register_fake
def _(x, weight, norm_weight, norm_bias, running_mean, running_var, training, eps):
    B, C, H, W = x.shape
    batch = [x.new_empty(C, dtype=torch.float32) for _ in range(2 if training else 0)]
    return torch.empty_like(x), x.new_empty(B, 1, H, W, dtype=torch.float32), batch


@custom_op("saccade::spatial_gate_bwd", mutates_args=())
def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    mean: Tensor,
    var: Tensor,
    g: Tensor,
    training: bool,
    eps: float,
) -> list[Tensor]:
    """Return the gradients of x, weight, norm_weight and norm_bias; mean and var are the statistics that were used."""
    with no_autocast(x):
        n = x.numel() // x.shape[1]
        norm = Norm(mean, var, n, weight, norm_weight, norm_bias, None, None, training, eps)
        grads, linear, constant = norm.backward(*kernel.sums(dy, x, g))
        dx, dweight = kernel.grad(dy, x, g, weight.float(), norm.gain, linear, constant)
        return [dx, dweight.to(weight.dtype), *grads]


@bwd.register_fake
def _(dy, x, weight, norm_weight, norm_bias, *rest):
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in (weight, norm_weight, norm_bias))]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are not differentiable
    *tensors, running_mean, running_var, ctx.training, ctx.eps = inputs
    _, g, batch = output
    ctx.mark_non_differentiable(g, *batch)
    ctx.save_for_backward(*tensors, *(batch if ctx.training else (running_mean, running_var)), g)


def _backward(ctx, dy, *_):
    return *bwd(dy, *ctx.saved_tensors, ctx.training, ctx.eps), *[None] * 4


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("spatial_gate", bwd)


# Counted as PyTorch does: only the convolution; backward twice that.
@register_flop_formula(torch.ops.saccade.spatial_gate_fwd)
def fwd_flop(x_shape, *args, **kwargs) -> int:
    B, C, H, W = x_shape
    return 2 * B * C * H * W


@register_flop_formula(torch.ops.saccade.spatial_gate_bwd)
def bwd_flop(dy_shape, *args, **kwargs) -> int:
    return 2 * fwd_flop(dy_shape)
