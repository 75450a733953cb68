"""Registration of the Triton kernels with PyTorch: fake kernels, autograd and FLOP formulas. Without a depth, the 2D
operator."""

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula

from ..registration import no_second_derivative
from . import kernel


@custom_op("saccade::dfa3d_fwd", mutates_args=())
def fwd(value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    return kernel.fwd(value, depth, locations, weights, shapes)


@fwd.register_fake
def _(value, depth, locations, weights, shapes):
    B, Q, M, _, _ = weights.shape
    return value.new_empty(B, Q, M * value.shape[3])


@custom_op("saccade::dfa3d_bwd_samples", mutates_args=())
def bwd_samples(
    dout: Tensor, value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of locations and weights."""
    return kernel.bwd_samples(dout, value, depth, locations, weights, shapes)


@bwd_samples.register_fake
def _(dout, value, depth, locations, weights, shapes):
    return locations.new_empty(locations.shape), weights.new_empty(weights.shape)


@custom_op("saccade::dfa3d_bwd_maps", mutates_args=())
def bwd_maps(
    dout: Tensor, value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of value and depth; the latter is empty without depth."""
    return kernel.bwd_maps(dout, value, depth, locations, weights, shapes)


@bwd_maps.register_fake
def _(dout, value, depth, locations, weights, shapes):
    return value.new_empty(value.shape), value.new_empty(0) if depth is None else depth.new_empty(depth.shape)


def _save(ctx, inputs, output):
    *tensors, ctx.shapes = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dout):
    args = (dout, *ctx.saved_tensors, ctx.shapes)
    to_value, to_depth, *to_samples, _ = ctx.needs_input_grad
    dvalue, ddepth = bwd_maps(*args) if to_value or to_depth else (None, None)
    dlocations, dweights = bwd_samples(*args) if any(to_samples) else (None, None)
    return dvalue, ddepth if to_depth else None, dlocations, dweights, None


fwd.register_autograd(_backward, setup_context=_save)
no_second_derivative("dfa3d", bwd_samples, bwd_maps)


# Counted: the products with the rows of value at the four corners of every sample. Those with depth are of two numbers.
@register_flop_formula(torch.ops.saccade.dfa3d_fwd)
def fwd_flop(value_shape, depth_shape, locations_shape, weights_shape, *args, **kwargs) -> int:
    B, Q, M, L, P = weights_shape
    return 8 * B * Q * M * L * P * value_shape[3]


@register_flop_formula(torch.ops.saccade.dfa3d_bwd_samples)
def samples_flop(dout_shape, *shapes, **kwargs) -> int:
    return fwd_flop(*shapes)


@register_flop_formula(torch.ops.saccade.dfa3d_bwd_maps)
def maps_flop(dout_shape, value_shape, depth_shape, *shapes, **kwargs) -> int:
    return fwd_flop(value_shape, depth_shape, *shapes) * (1 if depth_shape is None else 2)
