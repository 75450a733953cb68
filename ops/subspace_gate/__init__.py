"""Subspace gate (ULSAM, arXiv 2006.15102): gates each group of channels by an attention map over the positions."""

import torch
from torch import Tensor

from ..dispatch import use_definition, use_triton
from . import eager, reference

__all__ = ["subspace_gate"]


def subspace_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    point_weight: Tensor,
    point_bias: Tensor,
    point_norm_weight: Tensor,
    point_norm_bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    point_running_mean: Tensor | None = None,
    point_running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.9,
    eps: float = 1e-5,
) -> Tensor:
    """x_n · (1 + A_n) in each of g subspaces of channels, with A_n = softmax(relu(norm'(v_n · p_n + u_n))) over the
    positions and p = maxpool3(relu(norm(w · x + b))), a maximum over 3 x 3 positions.

    x             (B, C, H, W) in any memory format. The kernels read contiguous and channels-last maps, and views of
                  larger ones, without copying. Subspace n has channels n · C / g to (n + 1) · C / g.
    weight, bias, norm_weight, norm_bias, point_weight
                  (C,): w, b, weight and bias of norm, and v.
    point_bias, point_norm_weight, point_norm_bias
                  (g,): u, and weight and bias of norm'. Their length determines g.
    running_mean, running_var, point_running_mean, point_running_var
                  (C,), (C,), (g,), (g,): running statistics of the two BatchNorms. Required unless training; in
                  training they are updated if given: running = (1 - momentum) · running + momentum · batch statistics.
    training      whether the norms use batch statistics, which need more than one value per channel.
    momentum      as in PyTorch. With the published 0.9, only the last few batches count.

    Returns (B, C, H, W) in the dtype of x, with its strides if x is dense. All intermediate results are in float32
    (float64 if x is), under autocast too; parameters may have another dtype. x and the eight parameters get gradients,
    and these are deterministic. A NaN affects only its image, except through the batch statistics in training.
    """
    if torch.jit.is_scripting():
        return reference.subspace_gate(
            x, weight, bias, norm_weight, norm_bias, point_weight, point_bias, point_norm_weight, point_norm_bias,
            running_mean, running_var, point_running_mean, point_running_var, training, momentum, eps,
        )  # fmt: skip
    else:
        parameters = dict(
            weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias, point_weight=point_weight,
            point_bias=point_bias, point_norm_weight=point_norm_weight, point_norm_bias=point_norm_bias,
        )  # fmt: skip
        running = dict(
            running_mean=running_mean, running_var=running_var,
            point_running_mean=point_running_mean, point_running_var=point_running_var,
        )  # fmt: skip
        return _run(x, parameters, running, training, momentum, eps)


def _run(x: Tensor, parameters: dict, running: dict, training: bool, momentum: float, eps: float) -> Tensor:
    _check(x, parameters, running, training)
    if x.numel() == 0:  # an empty result that depends on every input, for autograd
        return x * sum(p.sum() for p in parameters.values()).to(x.dtype)
    given = [t for t in (*parameters.values(), *running.values()) if t is not None]
    cannot = []
    if sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:])) >= 2**31:  # kernel.REACH
        cannot.append("an image that spans 2**31 elements in memory")
    triton = use_triton(x, *given, cannot=cannot)
    # For gradients in eval mode the definition is as fast, and they are torch.func's bit for bit.
    differentiates = not training and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *given))
    if not triton and (differentiates or use_definition(x)):
        return eager.definition(x, *parameters.values(), *running.values(), training, momentum, eps)
    # In training they are not passed: an operator's inputs must not change before its backward pass.
    args = (*parameters.values(), *([None] * 4 if training else running.values()), training, eps)
    y, *batch = _triton(x, *args) if triton else eager.subspace_gate(x, *args)
    if training:
        _update(running.values(), batch, x.numel() // x.shape[1], momentum)
    return y


def _triton(x: Tensor, *args) -> list[Tensor]:
    from . import op  # imports Triton, so not at the top of the file

    y, _, _, _, batch = op.fwd(x, *args)
    return [y, *batch]


@torch.no_grad()
def _update(running, batch: list[Tensor], n: int, momentum: float) -> None:
    for i, (r, b) in enumerate(zip(running, batch)):
        if r is not None:  # mean, variance, mean, variance; the running variance is the unbiased one
            r.lerp_((b * (n / (n - 1)) if i % 2 else b).to(r.dtype), momentum)


def _check(x: Tensor, parameters: dict, running: dict, training: bool) -> None:
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point of shape (B, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    C, g = x.shape[1], parameters["point_bias"].numel()
    if g < 1 or C % g:
        raise ValueError(f"point_bias must have g elements, where g divides the C = {C} channels of x, got {g}")
    for name, t in (parameters | running).items():
        if t is None:
            if not training:
                raise ValueError(f"{name} must be given unless training, got None")
            continue
        n = g if name.startswith("point_") and name != "point_weight" else C
        if t.shape != (n,):
            raise ValueError(f"{name} must be ({n},), got {tuple(t.shape)}")
        if not t.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {t.device}")
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"training needs more than one value per channel, got x of shape {tuple(x.shape)}")
