"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..precision import no_autocast
from ..registration import no_second_derivative
from . import kernel
from .eager import Gate


@custom_op("saccade::gaussian_gate_fwd", mutates_args=())
def fwd(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_norm_weight: Tensor | None,
    out_norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out_running_mean: Tensor | None,
    out_running_var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return the gated map; for the backward pass, mean and deviation of each channel; and, in training, mean and
    biased variance of each norm's input."""
    args = (weight, norm_weight, norm_bias, out_norm_weight, out_norm_bias)
    args += running_mean, running_var, out_running_mean, out_running_var, training, eps
    with no_autocast(x):
        moments = kernel.moments(x)
        gate = Gate(*moments, x.shape[2] * x.shape[3], *args)
        return kernel.affine(x, gate.scale, gate.shift), *moments, [m.clone() for m in gate.batch()]


@fwd.register_fake
def _(x, weight, norm_weight, norm_bias, out_norm_weight, *rest):
    B, C = x.shape[:2]
    norms = (1 if out_norm_weight is None else 2) if rest[-2] else 0
    batch = [x.new_empty(C, dtype=torch.float32) for _ in range(2 * norms)]
    return torch.empty_like(x), *(x.new_empty(B, C, dtype=torch.float32) for _ in range(2)), batch


@custom_op("saccade::gaussian_gate_bwd", mutates_args=())
def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_norm_weight: Tensor | None,
    out_norm_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    out_running_mean: Tensor | None,
    out_running_var: Tensor | None,
    mean: Tensor,
    std: Tensor,
    training: bool,
    eps: float,
) -> list[Tensor]:
    """Return the gradients of x and of the three or five parameters."""
    args = (weight, norm_weight, norm_bias, out_norm_weight, out_norm_bias)
    args += running_mean, running_var, out_running_mean, out_running_var, training, eps
    with no_autocast(x):
        gate = Gate(mean, std, x.shape[2] * x.shape[3], *args)  # small: cheaper to recompute than to keep
        grads, linear, constant = gate.backward(*kernel.sums(dy, x))
        dx = kernel.affine(dy, gate.scale, constant, x, linear)
        return [dx, *(g for g in grads if g is not None)]


@bwd.register_fake
def _(dy, x, *args):
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in args[:5] if p is not None)]


def _save(ctx, inputs, output):
    *tensors, ctx.training, ctx.eps = inputs
    _, mean, std, batch = output
    ctx.mark_non_differentiable(mean, std, *batch)
    ctx.save_for_backward(*tensors, mean, std)


def _backward(ctx, dy, *_):
    grads = bwd(dy, *ctx.saved_tensors, ctx.training, ctx.eps)
    return *grads, *[None] * (12 - len(grads))


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("gaussian_gate", bwd)


# Counted as PyTorch does: only the convolution, a product of the moments (B, 2C) with the weights. Backward, twice
# that.
@register_flop_formula(torch.ops.saccade.gaussian_gate_fwd)
def fwd_flop(x_shape, *args, **kwargs) -> int:
    B, C = x_shape[:2]
    return 2 * B * C * 2 * C


@register_flop_formula(torch.ops.saccade.gaussian_gate_bwd)
def bwd_flop(dy_shape, *args, **kwargs) -> int:
    return 2 * fwd_flop(dy_shape)
