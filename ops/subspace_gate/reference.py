"""Reference implementation of the subspace gate (ULSAM, arXiv 2006.15102).

The C channels are g subspaces of G = C / g. For the channels x_n of subspace n:

    p   = maxpool3(relu(norm(w · x_n + b)))                     (B, G, H, W)
    A_n = softmax over H·W of relu(norm'(Σ_c v_c · p_c + u))    (B, 1, H, W)
    y_n = x_n + A_n · x_n

Both norms are BatchNorms. This implementation materialises a map for every line; the other implementations avoid that.
"""

import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:  # (B, C, H, W), (C,) ..., (g,) ... -> (B, C, H, W)
    g = point_bias.shape[0]
    a = F.batch_norm(
        x * weight[:, None, None] + bias[:, None, None],
        running_mean, running_var, norm_weight, norm_bias, training, momentum, eps,
    )  # fmt: skip
    p = F.max_pool2d(a.relu(), 3, 1, 1)
    s = (p * point_weight[:, None, None]).unflatten(1, (g, -1)).sum(2) + point_bias[:, None, None]
    t = F.batch_norm(
        s, point_running_mean, point_running_var, point_norm_weight, point_norm_bias, training, momentum, eps
    )
    gate = t.relu().flatten(2).softmax(2).unflatten(2, x.shape[2:]).to(x.dtype)
    return (x.unflatten(1, (g, -1)) * (1 + gate.unsqueeze(2))).flatten(1, 2)
