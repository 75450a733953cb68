"""Strip gate (ELA, arXiv 2403.01123): gates the rows and columns of a map by their means."""

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
    """x · a_h · a_w with a = sigmoid(GroupNorm(conv(z))), for the means z_h of each row and z_w of each column.

    x            (B, C, H, W) in any memory format. The kernels read contiguous and channels-last maps, and views of
                 larger ones, without copying.
    weight       (C, M, K), K odd: the weight of a 1D convolution along the strips z, without bias, with C / M groups
                 and zero padding K // 2. Both strips share it and the normalisation.
    norm_weight, norm_bias
                 (C,): weight and bias of the GroupNorm, whose statistics are per strip and image.
    norm_groups  its number of groups, which divides C. A group with a single value (H or W is 1 and C = norm_groups)
                 becomes norm_bias, also in a batch of one.
    residual     whether to add x: x · (1 + a_h · a_w), at no extra cost.

    Returns (B, C, H, W) in the dtype of x, with its strides if x is dense. The strips are computed in float32 (float64
    for float64), under autocast too; parameters may have another dtype. x and the three parameters get gradients, and
    these are deterministic. A NaN affects only its image.
    """
    if torch.jit.is_scripting():
        return reference.strip_gate(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)
    else:
        _check(x, weight, norm_weight, norm_bias, norm_groups)
        if x.numel() == 0:  # an empty result that depends on every input, for autograd
            return x * (weight.sum() + norm_weight.sum() + norm_bias.sum()).to(x.dtype)
        if use_triton(x, weight, norm_weight, norm_bias):
            return _triton(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)
        if use_definition(x):
            return eager.definition(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)
        return eager.strip_gate(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)


def _triton(x: Tensor, *args) -> Tensor:
    from . import op  # imports Triton, so not at the top of the file

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
