"""Reference implementation of the spatial gate (PATNet, arXiv 2503.03148).

g = hardsigmoid(Σ_c w_c x_c)      (B, 1, H, W)
y = norm(x · g)                   (B, C, H, W), a BatchNorm
"""

import torch.nn.functional as F
from torch import Tensor

from ..gaussian_gate.reference import hardsigmoid


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
) -> Tensor:  # (B, C, H, W), (C,) ... -> (B, C, H, W)
    s = F.conv2d(x, weight[None, :, None, None])
    return F.batch_norm(x * hardsigmoid(s), running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
