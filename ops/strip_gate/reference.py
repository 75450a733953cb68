"""Reference implementation of the strip gate (ELA, arXiv 2403.01123).

z_h = mean of x over W   (B, C, H)        z_w = mean of x over H   (B, C, W)
a   = sigmoid(GroupNorm(conv(z)))         of each, with the same convolution, weight and bias
y   = x · a_h · a_w                       or x + x · a_h · a_w with `residual`
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def strip_gate(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_groups: int,
    eps: float = 1e-5,
    residual: bool = False,
) -> Tensor:  # (B, C, H, W), (C, M, K), (C,), (C,) -> (B, C, H, W)
    a_h = _gate(x.mean(3), weight, norm_weight, norm_bias, norm_groups, eps).to(x.dtype)
    a_w = _gate(x.mean(2), weight, norm_weight, norm_bias, norm_groups, eps).to(x.dtype)
    y = x * a_h.unsqueeze(3) * a_w.unsqueeze(2)
    return x + y if residual else y


def _gate(z: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, norm_groups: int, eps: float) -> Tensor:
    C, M, K = weight.shape
    u = F.conv1d(z.to(weight.dtype), weight, padding=K // 2, groups=C // M)
    return torch.group_norm(u, norm_groups, norm_weight, norm_bias, eps).sigmoid()
