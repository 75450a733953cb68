"""Attention over the whole map with iRPE's bias by distance (PATNet's PAT_sf; iRPE, arXiv 2107.14222)."""

import math

import torch
from torch import Tensor

from ..window_attention import window_attention

__all__ = ["relative_bias_attention"]


def relative_bias_attention(qkv: Tensor, heads: int, table: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale · q · k + table[bucket of the distance]) v over all tokens of a map (PATNet's PAT_sf; the Euclidean
    buckets of iRPE, arXiv 2107.14222).

    qkv    (B, H, W, 3, C): as of window_attention, which this is with the whole map as its window.
    table  (heads, 81): of each head, by `buckets`. Distances have no sign: entries 0 to 39 are never read.
    scale  of the logits; D ** -0.5 if None.

    Returns (B, H, W, C), contiguous, in the type of qkv, under autocast too. Gradients go to qkv and the table, and are
    the same in every run. A NaN in a query stays there; among the keys and values it reaches all queries of its image.
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
    if qkv.numel() == 0:  # with a graph to the table
        return qkv.sum(3) + table.sum().to(qkv.dtype)
    # Summed over the buckets, not gathered: on CUDA the gradient of a gather sums in another order in every run.
    chosen = buckets(H, W, table.device).flatten() == torch.arange(81, device=table.device).unsqueeze(1)
    zero = torch.zeros([], dtype=table.dtype, device=table.device)
    bias = torch.where(chosen, table.unsqueeze(2), zero).sum(1, dtype=table.dtype).view(heads, 2 * H - 1, 2 * W - 1)
    return window_attention(qkv, heads, (H, W), bias=bias, scale=scale)


def buckets(H: int, W: int, device: torch.device) -> Tensor:
    """(2H-1, 2W-1): the bucket of each distance between two tokens. Up to 20 each rounded distance has its own, beyond
    they grow with the logarithm, as far as 160: 40 and more."""
    y = torch.arange(1 - H, H, device=device, dtype=torch.float32)
    x = torch.arange(1 - W, W, device=device, dtype=torch.float32)
    d = (y.square().unsqueeze(1) + x.square()).sqrt().round()
    far = (20 + 20 * (d.clamp(min=20) / 20).log() / math.log(8.0)).round().clamp(max=40)
    return (torch.where(d <= 20, d, far) + 40).long()
