"""Spatial gate (PATNet, arXiv 2503.03148): gates each position by a 1 x 1 convolution of its channels."""

import torch
from torch import Tensor

from ..dispatch import use_definition, use_triton
from . import eager, reference

__all__ = ["spatial_gate"]


def spatial_gate(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """norm(x · g) with g = hardsigmoid(Σ_c weight_c · x_c), one gate per position.

    x        (B, C, H, W) in any memory format. The kernels read contiguous and channels-last maps, and views of larger
             ones (such as the half of the channels that is gated), without copying.
    weight   (C,): the weight of the convolution, which has no bias.
    norm_weight, norm_bias
             (C,): weight and bias of the BatchNorm.
    running_mean, running_var
             (C,): its running statistics. Required unless training; in training they are updated if given:
             running = (1 - momentum) · running + momentum · batch statistics.
    training whether the norm uses batch statistics, which need more than one value per channel.

    Returns (B, C, H, W) in the dtype of x, with its strides if x is dense. All intermediate results are in float32
    (float64 if x is), under autocast too; parameters may have another dtype. x and the three parameters get gradients,
    and these are deterministic. A NaN affects only its position, except through the batch statistics in training.
    """
    if torch.jit.is_scripting():
        return reference.spatial_gate(
            x, weight, norm_weight, norm_bias, running_mean, running_var, training, momentum, eps
        )
    else:
        parameters = dict(weight=weight, norm_weight=norm_weight, norm_bias=norm_bias)
        running = dict(running_mean=running_mean, running_var=running_var)
        return _run(x, parameters, running, training, momentum, eps)


def _run(x: Tensor, parameters: dict, running: dict, training: bool, momentum: float, eps: float) -> Tensor:
    _check(x, parameters, running, training)
    if x.numel() == 0:  # an empty result that depends on every input, for autograd
        return x * sum(p.sum() for p in parameters.values()).to(x.dtype)
    triton = use_triton(x, *(t for t in (*parameters.values(), *running.values()) if t is not None))
    if not triton and use_definition(x):
        return eager.definition(x, *parameters.values(), *running.values(), training, momentum, eps)
    # In training they are not passed: an operator's inputs must not change before its backward pass.
    args = (*parameters.values(), *([None] * 2 if training else running.values()), training, eps)
    y, *batch = _triton(x, *args) if triton else eager.spatial_gate(x, *args)
    if training:
        _update(running.values(), batch, x.numel() // x.shape[1], momentum)
    return y


def _triton(x: Tensor, *args) -> list[Tensor]:
    from . import op  # imports Triton, so not at the top of the file

    y, _, batch = op.fwd(x, *args)
    return [y, *batch]


@torch.no_grad()
def _update(running, batch: list[Tensor], n: int, momentum: float) -> None:
    for r, b, unbiased in zip(running, batch, (1, n / (n - 1))):
        if r is not None:
            r.lerp_((b * unbiased).to(r.dtype), momentum)


def _check(x: Tensor, parameters: dict, running: dict, training: bool) -> None:
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point of shape (B, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    C = x.shape[1]
    for name, t in (parameters | running).items():
        if t is None:
            if not training:
                raise ValueError(f"{name} must be given unless training, got None")
            continue
        if t.shape != (C,):
            raise ValueError(f"{name} must be ({C},), got {tuple(t.shape)}")
        if not t.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {t.device}")
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"training needs more than one value per channel, got x of shape {tuple(x.shape)}")
