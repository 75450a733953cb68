"""Reference implementation of the Gaussian gate (PATNet, arXiv 2503.03148).

μ, σ = mean and unbiased standard deviation over H·W      (B, C) each
g    = hardsigmoid(norm(Σ_c w_c0 μ_c + w_c1 σ_c))         (B, C)
y    = out_norm(x · g)                                    (B, C, H, W)

Both norms are BatchNorms; that of the gates has B values per channel.
"""

import torch.nn.functional as F
from torch import Tensor

SIXTH = 0.1666666716337204  # 1 / 6 in float32: the slope of PyTorch's hardsigmoid, in float64 too


def hardsigmoid(t: Tensor, slope: float = SIXTH) -> Tensor:
    """Hardsigmoid, bit-identical to PyTorch's including the gradient, but with a second derivative."""
    r = F.relu6(t + 3)
    return r / 6 + (r - r.detach()) * (slope - 1 / 6)


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
) -> Tensor:  # (B, C, H, W), (C, C, 2), (C,) ... -> (B, C, H, W)
    t = x.mean((2, 3)) @ weight[:, :, 0].transpose(-2, -1) + x.std((2, 3)) @ weight[:, :, 1].transpose(-2, -1)
    t = F.batch_norm(t, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
    y = x * hardsigmoid(t)[:, :, None, None]
    if out_norm_weight is None:
        return y
    return F.batch_norm(y, out_running_mean, out_running_var, out_norm_weight, out_norm_bias, training, momentum, eps)
