"""Reference implementation of halo attention (HaloNet, arXiv 2103.12731).

The map is divided into blocks of b x b pixels. The window of a block is the block and h pixels around it, a = b + 2h
per side. A block has a tile of queries, b / stride per side. The query at (y, x) of the tile and the cell (i, j) of the
window have the logit

    scale · <q, k_ij> + <q, R_h[i - y + a - 1] + R_w[j - x + a - 1]>

and the output is Σ softmax(logits) v over all a · a cells. Cells outside the image have k = v = 0 and take part.
With a stride, (y, x) count queries, not pixels.

This implementation materialises the windows and the logits; the other implementations avoid that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def halo_attention(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    heads: int,
    block: int,
    halo: int,
    stride: int = 1,
    scale: float | None = None,
    scale_pos: bool = False,
) -> Tensor:  # (B, heads·D, H', W'), (B, heads·(D + Dv), H, W), (2a - 1, D) twice -> (B, heads·Dv, H', W')
    B, _, H, W = kv.shape
    D, a, t = height_rel.shape[1], block + 2 * halo, block // stride
    M, N = (H + block - 1) // block, (W + block - 1) // block  # blocks
    s = D**-0.5 if scale is None else scale

    x = F.pad(q, (0, N * t - q.shape[3], 0, M * t - q.shape[2]))
    kv = F.pad(kv, (halo, halo + N * block - W, halo, halo + M * block - H))
    windows = kv.unflatten(1, (heads, -1)).unfold(3, a, block).unfold(4, a, block)  # (B, heads, D + Dv, M, N, a, a)
    k, v = windows[:, :, :D], windows[:, :, D:]

    rows, columns = position_logits(x, height_rel, width_rel, heads, block, halo, stride)
    position = rows.unsqueeze(-1) + columns.unsqueeze(-2)
    position = position.reshape(B, heads, M, t, N, t, a, a).transpose(3, 4)  # (B, heads, M, N, t, t, a, a)
    x = x.reshape(B, heads, D, M, t, N, t)
    logits = torch.einsum("bhdmynx,bhdmnij->bhmnyxij", x, k) * s + position * (s if scale_pos else 1.0)
    p = logits.flatten(-2).softmax(-1).view_as(logits)
    out = torch.einsum("bhmnyxij,bhdmnij->bhdmynx", p, v)
    return out.reshape(B, v.shape[1] * v.shape[2], M * t, N * t)[:, :, : q.shape[2], : q.shape[3]]


def position_logits(
    q: Tensor, height_rel: Tensor, width_rel: Tensor, heads: int, block: int, halo: int, stride: int, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Return <q, R_h> for the rows of each query's window and <q, R_w> for its columns, (B, heads, H', W', a) each,
    with zeros up to a `multiple`."""
    a, t = block + 2 * halo, block // stride
    x = q.unflatten(1, (heads, -1))
    of_rows, of_columns = (
        F.pad(_of_lines(table.to(q.dtype), lines, a, t), (0, -a % multiple))
        for table, lines in ((height_rel, q.shape[2]), (width_rel, q.shape[3]))
    )
    rows = torch.einsum("bhdyx,ydi->bhyxi", x, of_rows)
    return rows, torch.einsum("bhdyx,xdj->bhyxj", x, of_columns)


def _of_lines(table: Tensor, lines: int, a: int, t: int) -> Tensor:
    """Return (lines, D, a): for queries in line y of their tile, the a rows of the table that start at a - 1 - y."""
    return table.unfold(0, a, 1)[a - t :].flip(0).repeat((lines + t - 1) // t, 1, 1)[:lines]
