"""Neighborhood attention as its definition reads (NAT, arXiv 2204.07143; DiNAT, 2209.15001; strides: GNA, 2504.16922).

Both axes are treated alike and apart. Along an axis of length L, with kernel k, stride s and dilation d, where
1 ≤ s ≤ k and k · d ≤ L:

    x = g + d · i        position x is member i of residue class g, which has n = ceil((L - g) / d) members
    l = ⌊i / s⌋ · s + ⌊s / 2⌋                       the centre of the s queries that share a window
    a = min(max(l - ⌊k / 2⌋, 0), n - k)             the first member that they see: at a border the window is shifted
    keys of x: g + d · (a + m),  m = 0 … k - 1      always k of them

A query sees the kh · kw products of its rows and columns. With (dy, dx) the distance key - query in steps of d,

    S_xy = scale · <q_x, k_y> + bias[dy + kh - 1, dx + kw - 1]        O_x = Σ_y softmax_y(S_xy) v_y

head by head. A window contains its queries, so |dy| < kh and |dx| < kw whatever the stride. Here the kh · kw keys and
values of each query are tensors in memory; the other forms exist to avoid exactly these.
"""

import torch
from torch import Tensor


def neighborhood_attention(
    qkv: Tensor,
    heads: int,
    kernel: tuple[int, int],
    bias: Tensor | None = None,
    dilation: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    scale: float | None = None,
) -> Tensor:  # (B, H, W, 3, C), (heads, 2 kh - 1, 2 kw - 1) -> (B, H, W, C)
    _, H, W, _, C = qkv.shape
    rows, dy = neighbors(H, kernel[0], dilation[0], stride[0], qkv.device)
    columns, dx = neighbors(W, kernel[1], dilation[1], stride[1], qkv.device)
    q, k, v = qkv.unflatten(-1, (heads, C // heads)).unbind(3)  # (B, H, W, heads, D) each
    k, v = (z[:, rows][:, :, :, columns] for z in (k, v))  # (B, H, kh, W, kw, heads, D)
    logits = torch.einsum("byxhd,byixjhd->bhyxij", q, k) * ((C // heads) ** -0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + bias[:, dy[:, None, :, None], dx[None, :, None, :]]
    p = logits.flatten(-2).softmax(-1).view(logits.shape)
    return torch.einsum("bhyxij,byixjhd->byxhd", p, v).flatten(-2)


def neighbors(L: int, k: int, d: int, s: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(L, k) each: the positions that every position sees along an axis, and their indices in the table of biases."""
    x = torch.arange(L, device=device)
    g, i = x % d, x // d
    n = (L - g + d - 1) // d
    first = torch.minimum((i // s * s + s // 2 - k // 2).clamp(min=0), n - k)
    keys = first[:, None] + torch.arange(k, device=device)
    return g[:, None] + d * keys, keys - i[:, None] + k - 1
