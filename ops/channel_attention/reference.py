"""Reference implementation of channel attention (DaViT, arXiv 2204.03645).

S = scale · Kᵀ V          (D, D) in each head, summed over the N tokens
A = softmax of S over its last axis, which is V's
O = Q Aᵀ                  (N, D): the channels of every token, mixed by the same matrix

The sum over tokens (up to 67,000 of them at 800 x 1333) is in float32 or wider.
"""

import torch
from torch import Tensor


def channel_attention(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor:  # (B, ..., 3C) -> (B, ..., C)
    q, k, v = qkv.flatten(1, -2).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D) each
    if k.dtype != torch.float64:
        k, v = k.float(), v.float()
    s = k.transpose(-2, -1) @ v * (q.shape[3] ** -0.5 if scale is None else scale)
    out = q @ s.softmax(3).to(q.dtype).transpose(-2, -1)
    return out.transpose(1, 2).reshape(qkv.shape[:-1] + (qkv.shape[-1] // 3,))
