"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..precision import no_autocast
from ..registration import no_second_derivative
from . import kernel
from .eager import Gates


@custom_op("saccade::strip_gate_fwd", mutates_args=())
def fwd(
    x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_groups: int, eps: float, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gated map and, for the backward pass, the strips' means."""
    with no_autocast(x):  # the map in its own dtype and the strips in float32, under autocast too
        z = kernel.strip_means(x)
        return kernel.gate(x, *Gates(*z, weight, norm_weight, norm_bias, norm_groups, eps).a, residual), *z


@fwd.register_fake
def _(x, weight, norm_weight, norm_bias, norm_groups, eps, residual):
    B, C, H, W = x.shape
    z_h, z_w = (x.new_empty(B, C, L, dtype=torch.float32) for L in (H, W))
    return torch.empty_like(x), z_h, z_w


@custom_op("saccade::strip_gate_bwd", mutates_args=())
def bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    z_h: Tensor,
    z_w: Tensor,
    norm_groups: int,
    eps: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight, norm_weight and norm_bias."""
    with no_autocast(x):
        gates = Gates(
            z_h, z_w, weight, norm_weight, norm_bias, norm_groups, eps
        )  # small: cheaper to recompute than to keep
        dz_h, dz_w, *grads = gates.backward(*kernel.strip_sums(dy, x, *gates.a))
        dweight, dnorm_weight, dnorm_bias = (g.contiguous() for g in grads)
        return kernel.gate(dy, *gates.a, residual, dz_h, dz_w, like=x), dweight, dnorm_weight, dnorm_bias


@bwd.register_fake
def _(dy, x, weight, norm_weight, norm_bias, z_h, z_w, norm_groups, eps, residual):
    return torch.empty_like(x), *(p.new_empty(p.shape) for p in (weight, norm_weight, norm_bias))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # zeros for the outputs that are not differentiable
    *tensors, norm_groups, eps, residual = inputs
    ctx.rest = norm_groups, eps, residual
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx, dy, *_):
    return *bwd(dy, *ctx.saved_tensors, *ctx.rest), None, None, None


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("strip_gate", bwd)


# Counted as PyTorch does: only the convolutions.
@register_flop_formula(torch.ops.saccade.strip_gate_fwd)
def fwd_flop(x_shape, weight_shape, *args, **kwargs) -> int:
    B, _, H, W = x_shape
    C, M, K = weight_shape
    return 2 * B * C * M * K * (H + W)


@register_flop_formula(torch.ops.saccade.strip_gate_bwd)
def bwd_flop(dy_shape, x_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * fwd_flop(x_shape, weight_shape)
