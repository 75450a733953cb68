"""Attention over the whole map with iRPE's relative position bias (PATNet's PAT_sf; iRPE, arXiv 2107.14222)."""

import math

import torch
from torch import Tensor

from ..window_attention import window_attention

__all__ = ["relative_bias_attention"]


def relative_bias_attention(qkv: Tensor, heads: int, table: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale · q · k + table[bucket(distance)]) v over all tokens of a map (PATNet's PAT_sf; the Euclidean
    buckets of iRPE, arXiv 2107.14222).

    qkv    (B, H, W, 3, C), as in window_attention. This operator is window_attention with the whole map as the window.
    table  (heads, 81): the bias per head, indexed by `buckets`. Distances are unsigned, so entries 0 to 39 are unused.
    scale  factor of the logits; D ** -0.5 if None.

    Returns (B, H, W, C), contiguous, in the dtype of qkv, under autocast too. qkv and table get gradients, and these
    are deterministic. A NaN in a query affects only that query; one in a key or value affects all queries of its image.
    """
    if not torch.jit.is_scripting():
        if qkv.dim() != 5:
            raise ValueError(f"qkv must be of shape (B, H, W, 3, C), got {tuple(qkv.shape)}")
        if table.shape != (heads, 81) or not table.dtype.is_floating_point:
            raise ValueError(
                f"table must be floating point of shape {(heads, 81)}, got {table.dtype} of shape {tuple(table.shape)}"
            )
        if table.device != qkv.device:
            raise ValueError(f"table must be on {qkv.device} as qkv is, got {table.device}")
    H, W = qkv.shape[1], qkv.shape[2]
    if qkv.numel() == 0:  # an empty result that depends on every input, for autograd
        return qkv.sum(3) + table.sum().to(qkv.dtype)
    # A product with one-hot buckets, not a gather, whose gradient is nondeterministic on CUDA.
    chosen = buckets(H, W, table.device).flatten() == torch.arange(81, device=table.device).unsqueeze(1)
    zero = torch.zeros([], dtype=table.dtype, device=table.device)
    bias = torch.where(chosen, table.unsqueeze(2), zero).sum(1, dtype=table.dtype).view(heads, 2 * H - 1, 2 * W - 1)
    return window_attention(qkv, heads, (H, W), bias=bias, scale=scale)


def buckets(H: int, W: int, device: torch.device) -> Tensor:
    """Return the bucket, 40 or more, of each relative position of two tokens, (2H-1, 2W-1). Rounded distances up to 20
    have a bucket each; beyond, buckets grow logarithmically up to a distance of 160."""
    y = torch.arange(1 - H, H, device=device, dtype=torch.float32)
    x = torch.arange(1 - W, W, device=device, dtype=torch.float32)
    d = (y.square().unsqueeze(1) + x.square()).sqrt().round()
    far = (20 + 20 * (d.clamp(min=20) / 20).log() / math.log(8.0)).round().clamp(max=40)
    return (torch.where(d <= 20, d, far) + 40).long()
