"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..precision import no_autocast
from ..registration import no_second_derivative
from . import kernel


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
    """Return the gated map; for the backward pass, mean and deviation of each channel (B, C, 2) and their product with
    the weights (B, C); and, in training, mean and biased variance of each norm's input."""
    args = (weight, norm_weight, norm_bias, out_norm_weight, out_norm_bias)
    args += running_mean, running_var, out_running_mean, out_running_var, training, eps
    with no_autocast(x):
        u = kernel.moments(x)
        scale, shift, t, batch = kernel.gate(u, x.shape[2] * x.shape[3], *args)
        return kernel.affine(x, scale, shift), u, t, batch


@fwd.register_fake
def _(x, weight, norm_weight, norm_bias, out_norm_weight, *rest):
    B, C = x.shape[:2]
    norms = (1 if out_norm_weight is None else 2) if rest[-2] else 0
    batch = [x.new_empty(C, dtype=torch.float32) for _ in range(2 * norms)]
    return torch.empty_like(x), *(x.new_empty(*n, dtype=torch.float32) for n in ((B, C, 2), (B, C))), batch


@custom_op("saccade::gaussian_gate_bwd", mutates_args=())
def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_norm_weight: Tensor | None,
    out_norm_bias: Tensor | None,
    u: Tensor,
    t: Tensor,
    statistics: list[Tensor],
    training: bool,
    eps: float,
) -> list[Tensor]:
    """Return the gradients of x and of the three or five parameters. statistics: means and variances that the norms
    used."""
    args = (weight, norm_weight, norm_bias, out_norm_weight, out_norm_bias, training, eps)
    with no_autocast(x):
        sums = kernel.sums(dy, x)
        grads, scale, linear, constant = kernel.gate_gradient(*sums, t, u, x.shape[2] * x.shape[3], statistics, *args)
        return [kernel.affine(dy, scale, constant, x, linear), *grads]


@bwd.register_fake
def _(dy, x, *args):
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in args[:5] if p is not None)]


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are not differentiable
    *tensors, ctx.training, ctx.eps = inputs
    _, u, t, batch = output
    ctx.mark_non_differentiable(u, t, *batch)
    statistics = batch if ctx.training else [m for m in tensors[6:] if m is not None]
    ctx.save_for_backward(*tensors[:6], u, t, *statistics)


def _backward(ctx, dy, *_):
    *tensors, u, t = ctx.saved_tensors[:8]
    grads = bwd(dy, *tensors, u, t, list(ctx.saved_tensors[8:]), ctx.training, ctx.eps)
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
