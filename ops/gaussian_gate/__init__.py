"""Gaussian gate (PATNet, arXiv 2503.03148): gates each channel by the means and standard deviations of all channels."""

import torch
from torch import Tensor

from ..dispatch import use_definition, use_triton
from . import eager, reference

__all__ = ["gaussian_gate"]


def gaussian_gate(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    out_norm_weight: Tensor | None = None,
    out_norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    out_running_mean: Tensor | None = None,
    out_running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """out_norm(x · g) with g = hardsigmoid(norm(weight · [μ, σ])), for the mean μ and unbiased standard deviation σ of
    each channel of each image.

    x        (B, C, H, W) in any memory format. The kernels read contiguous and channels-last maps, and views of larger
             ones (such as the channels that a partial convolution leaves out), without copying.
    weight   (C, C, 2): a linear map from means, weight[..., 0], and deviations, weight[..., 1], to gates.
    norm_weight, norm_bias, out_norm_weight, out_norm_bias
             (C,): weights and biases of two BatchNorms, one over the B gates of a channel, one over the gated map.
             out_norm is omitted if its weight and bias are None.
    running_mean, running_var, out_running_mean, out_running_var
             (C,): their running statistics. Required unless training; in training they are updated if given:
             running = (1 - momentum) · running + momentum · batch statistics.
    training whether the norms use batch statistics, which need more than one image.

    Returns (B, C, H, W) in the dtype of x, with its strides if x is dense. All intermediate results are in float32
    (float64 if x is), under autocast too; parameters may have another dtype. x and the parameters get gradients, and
    these are deterministic; the gradient of σ is 0 where σ is 0. A map of one position has no unbiased deviation and
    gives NaN. A NaN affects only its image, except through the batch statistics in training.
    """
    if torch.jit.is_scripting():
        return reference.gaussian_gate(
            x, weight, norm_weight, norm_bias, out_norm_weight, out_norm_bias,
            running_mean, running_var, out_running_mean, out_running_var, training, momentum, eps,
        )  # fmt: skip
    else:
        parameters: dict[str, Tensor | None] = dict(weight=weight, norm_weight=norm_weight, norm_bias=norm_bias)
        running = dict(running_mean=running_mean, running_var=running_var)
        if out_norm_weight is not None or out_norm_bias is not None:
            parameters |= dict(out_norm_weight=out_norm_weight, out_norm_bias=out_norm_bias)
            running |= dict(out_running_mean=out_running_mean, out_running_var=out_running_var)
        return _run(x, parameters, running, training, momentum, eps)


def _run(x: Tensor, parameters: dict, running: dict, training: bool, momentum: float, eps: float) -> Tensor:
    _check(x, parameters, running, training)
    if x.numel() == 0:  # an empty result that depends on every input, for autograd
        return x * sum(p.sum() for p in parameters.values()).to(x.dtype)
    triton = use_triton(x, *(t for t in (*parameters.values(), *running.values()) if t is not None))
    bare = [None] * (5 - len(parameters))
    if not triton and use_definition(x):
        return eager.definition(x, *parameters.values(), *bare, *running.values(), *bare, training, momentum, eps)
    # In training they are not passed: an operator's inputs must not change before its backward pass.
    statistics = [None] * 4 if training else [*running.values(), *bare]
    args = (*parameters.values(), *bare, *statistics, training, eps)
    y, *batch = _triton(x, *args) if triton else eager.gaussian_gate(x, *args)
    if training:
        B, _, H, W = x.shape
        _update(running.values(), batch, (B, B * H * W), momentum)
    return y


def _triton(x: Tensor, *args) -> list[Tensor]:
    from . import op  # imports Triton, so not at the top of the file

    y, _, _, batch = op.fwd(x, *args)
    return [y, *batch]


@torch.no_grad()
def _update(running, batch: list[Tensor], counts: tuple[int, int], momentum: float) -> None:
    for i, (r, b) in enumerate(zip(running, batch)):
        if r is not None:  # mean, variance, mean, variance; the running variance is the unbiased one
            n = counts[i // 2]
            r.lerp_((b * (n / (n - 1)) if i % 2 else b).to(r.dtype), momentum)


def _check(x: Tensor, parameters: dict, running: dict, training: bool) -> None:
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point of shape (B, C, H, W), got {x.dtype} of shape {tuple(x.shape)}")
    C = x.shape[1]
    for name, t in (parameters | running).items():
        if t is None:
            if name in parameters:
                raise ValueError(f"{name} must be given, since out_norm needs both weight and bias, got None")
            if not training:
                raise ValueError(f"{name} must be given unless training, got None")
            continue
        shape = (C, C, 2) if name == "weight" else (C,)
        if t.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(t.shape)}")
        if not t.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} as x is, got {t.device}")
    if training and x.shape[0] == 1:
        raise ValueError(f"training needs more than one image, got x of shape {tuple(x.shape)}")
