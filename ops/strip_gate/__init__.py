"""Strip gate (ELA, arXiv 2403.01123): rows and columns of a map, gated by their own means."""

import torch
from torch import Tensor

from ..dispatch import use_definition, use_triton
from . import eager, reference

__all__ = ["strip_gate"]


def strip_gate(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_groups: int,
    eps: float = 1e-5,
    residual: bool = False,
) -> Tensor:
    """x · a_h · a_w, with a = sigmoid(GroupNorm(conv(z))) for the means z_h over each row and z_w over each column.

    x            (B, C, H, W), in any memory format: the kernels read contiguous and channels-last maps, and views of
                 bigger ones, where they lie.
    weight       (C, M, K): a convolution along the strips without bias, of C / M groups, zero padding K // 2 at both
                 ends of each strip, K odd. Both strips share it, and the normalisation that follows.
    norm_weight, norm_bias
                 (C,): the affine of that GroupNorm, whose statistics are those of one strip of one image.
    norm_groups  its groups, which divide C. A group with a single value (H or W is 1 and C = norm_groups) comes out as
                 norm_bias, in a batch of one too.
    residual     adds x: x · (1 + a_h · a_w), at no cost.

    Returns (B, C, H, W), lying in memory as x does where x is dense. The strips are computed in float32 (float64 for
    float64), under autocast too; x keeps its type, and the parameters may have another. Gradients go to x and to the
    three parameters, and are the same in every run. A NaN stays in its image.
    """
    if torch.jit.is_scripting():
        return reference.strip_gate(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)
    else:
        _check(x, weight, norm_weight, norm_bias, norm_groups)
        if x.numel() == 0:  # with a graph to the parameters
            return x * (weight.sum() + norm_weight.sum() + norm_bias.sum()).to(x.dtype)
        if use_triton(x, weight, norm_weight, norm_bias):
            return _triton(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)
        if use_definition(x):
            return eager.definition(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)
        return eager.strip_gate(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)


def _triton(x: Tensor, *args) -> Tensor:
    from . import op  # and with it Triton: only now

    return op.fwd(x, *args)[0]


def _check(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_groups: int) -> None:
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point of shape (B, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    C = x.shape[1]
    if weight.dim() != 3 or weight.shape[0] != C or weight.shape[1] < 1 or C % weight.shape[1]:
        raise ValueError(f"weight must be ({C}, M, K) with M dividing C = {C}, got {tuple(weight.shape)}")
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"weight must have an odd kernel size, got {weight.shape[2]}")
    for name, p in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if p.shape != (C,):
            raise ValueError(f"{name} must be ({C},), got {tuple(p.shape)}")
    if norm_groups < 1 or C % norm_groups:
        raise ValueError(f"norm_groups must divide the C = {C} channels of x, got {norm_groups}")
    for name, p in (("weight", weight), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if not p.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {p.dtype}")
        if p.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {p.device}")
