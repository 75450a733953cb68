"""Bi-level routing attention (BiFormer, arXiv 2303.08810): the tokens of a region attend to the tokens of K regions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import is_any_size, is_transformed, use_definition, use_triton
from ..precision import no_autocast
from . import eager, reference

__all__ = ["bilevel_routing_attention", "region_routing"]

MAX_HEAD_DIM = 128  # that the kernels support


def bilevel_routing_attention(
    qkv: Tensor, idx: Tensor, heads: int, regions: tuple[int, int], scale: float | None = None
) -> Tensor:
    """Let the tokens of each region attend to the tokens of the K regions that `idx` lists for it.

    qkv      (B, H, W, 3C): q | k | v on the last axis; head m has channels m·D to (m+1)·D of each. The kernels read a
             view of a larger map in place if its last axis has stride 1, else they copy it.
    idx      (B, P, K), int32 or int64: the key regions of each query region, row-major over the grid of P = R_h · R_w
             regions; distinct within a row. In PyTorch, an index outside 0 … P-1 raises an IndexError. The kernels
             cannot check this without synchronising with the GPU: they make the outputs of that region's queries NaN,
             and with them the gradients.
    regions  (R_h, R_w), which divide H and W.
    scale    factor of the logits; C ** -0.5 if None (as published, by all channels and not by the head dimension).

    Returns (B, H, W, C), contiguous. Only qkv gets a gradient, and it is deterministic. A NaN in a query affects only
    that query; one in a key or value affects the queries that attend to it and, in the kernels' dense variant (for
    small regions, see kernel.py), the others of its image too.
    """
    if torch.jit.is_scripting():
        return eager.bilevel_routing_attention(qkv, idx, heads, regions, scale)
    else:
        _check(qkv, idx, heads, regions)
        C = qkv.shape[3] // 3
        if qkv.numel() == 0:
            return qkv[..., :C].contiguous()
        scale = C**-0.5 if scale is None else scale
        _, P, K = idx.shape
        D, t = C // heads, qkv.shape[1] * qkv.shape[2] // P
        cannot = []
        if D > MAX_HEAD_DIM:
            cannot.append(f"a head dimension of {D}, over {MAX_HEAD_DIM}")
        if K * t * t >= 2**44:  # kernel.divide
            cannot.append(f"{K} regions of {t} tokens each")
        if use_triton(qkv, idx, cannot=cannot):
            return _triton(qkv, idx, heads, regions, scale)
        if is_transformed():  # PyTorch's attention lacks their rules
            with no_autocast(qkv):
                return reference.bilevel_routing_attention(qkv, idx, heads, regions, scale)
        _check_range(idx)
        return eager.bilevel_routing_attention(qkv, idx, heads, regions, scale)


def _triton(qkv: Tensor, idx: Tensor, heads: int, regions: tuple[int, int], scale: float) -> Tensor:
    from . import op  # imports Triton, so not at the top of the file

    return op.fwd(qkv, idx, heads, regions[0], regions[1], scale)[0]


def _check(qkv: Tensor, idx: Tensor, heads: int, regions: tuple[int, int]) -> None:
    if qkv.dim() != 4 or qkv.shape[3] % 3 or not qkv.dtype.is_floating_point:
        raise ValueError(
            f"qkv must be floating point of shape (B, H, W, 3C), got {qkv.dtype} of shape {tuple(qkv.shape)}"
        )
    B, H, W, C3 = qkv.shape
    C, (R, S) = C3 // 3, regions
    if heads < 1 or C % heads:
        raise ValueError(f"heads must divide the C = {C} channels of qkv, got {heads}")
    if qkv.numel() == 0:
        return
    if R < 1 or S < 1 or H % R or W % S:
        raise ValueError(f"regions must divide the {H} x {W} map of qkv, got {R} x {S}")
    if idx.dim() != 3 or idx.shape[0] != B or idx.shape[1] != R * S or not 1 <= idx.shape[2] <= R * S:
        raise ValueError(
            f"idx must be ({B}, {R * S}, K) with K from 1 to {R * S}, for {B} images of {R} x {S} regions, "
            f"got {tuple(idx.shape)}"
        )
    if idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"idx must be int32 or int64, got {idx.dtype}")
    if idx.device != qkv.device:
        raise ValueError(f"idx must be on {qkv.device} as qkv is, got {idx.device}")


def _check_range(idx: Tensor) -> None:
    if use_definition(idx):
        return  # the tensor may have no values
    low, high = idx.aminmax()
    if low < 0 or high >= idx.shape[1]:
        raise IndexError(f"idx must be from 0 to {idx.shape[1] - 1}, got {low.item()} to {high.item()}")


def region_routing(qkv: Tensor, region_size: tuple[int, int], topk: int) -> Tensor:
    """Choose the regions that each region attends to: the top-k by the dot product of its mean query and the mean keys.

    qkv          (B, H, W, 3C) as in bilevel_routing_attention.
    region_size  (h, w) in tokens. If they do not divide H or W, the regions of the last row or column are smaller, and
                 their means are over the tokens that they have.
    topk         K, from 1 to P = ceil(H/h) · ceil(W/w).

    Returns (B, P, K), int64, without gradient. Means, products and the choice are computed in float32 (float64 for
    float64), under autocast too, since rounding to half precision could change the choice.

    It is plain PyTorch on every device: q and k are read once, and all that follows has only P rows per image.
    """
    if torch.jit.is_scripting():
        return _routing(qkv, region_size, topk)
    else:
        if qkv.dim() != 4 or qkv.shape[3] % 3 or not qkv.dtype.is_floating_point:
            raise ValueError(
                f"qkv must be floating point of shape (B, H, W, 3C), got {qkv.dtype} of shape {tuple(qkv.shape)}"
            )
        (B, H, W, _), (h, w) = qkv.shape, region_size
        if h < 1 or w < 1:
            raise ValueError(f"region_size must be at least 1 x 1, got {h} x {w}")
        P = -(-H // h) * -(-W // w)
        if P == 0:
            return torch.empty(B, 0, topk, dtype=torch.int64, device=qkv.device)
        if not 1 <= topk <= P:
            raise ValueError(
                f"topk must be from 1 to {P}, the number of {h} x {w} regions in a {H} x {W} map, got {topk}"
            )
        with no_autocast(qkv):
            return _routing(qkv, region_size, topk)


def _routing(qkv: Tensor, region_size: tuple[int, int], topk: int) -> Tensor:
    B, H, W, C3 = qkv.shape
    h, w = region_size
    x = qkv.detach()[..., : C3 // 3 * 2]
    full = torch.float64 if x.dtype == torch.float64 else torch.float32
    if is_any_size(H, W):
        R, S = (H + h - 1) // h, (W + w - 1) // w
        x = F.pad(x, (0, 0, 0, S * w - W, 0, R * h - H)).reshape(B, R, h, S, w, C3 // 3 * 2).sum(4, dtype=full).sum(2)
        rows = (H - torch.arange(R, device=x.device) * h).clamp(max=h)
        columns = (W - torch.arange(S, device=x.device) * w).clamp(max=w)
        means = x / (rows.unsqueeze(1) * columns).unsqueeze(2)
    elif H % h == 0 and W % w == 0:
        # Summed in `full` without a copy; one axis at a time, which is ten times faster on a CPU. OpenVINO has no fast
        # sums over tensors of six axes.
        columns = x.reshape(B, H * (W // w), w, C3 // 3 * 2).sum(2, dtype=full)
        means = columns.reshape(B, H // h, h, W // w, C3 // 3 * 2).sum(2) / (h * w)
    else:
        x = x.to(full).permute(0, 3, 1, 2)  # channels-last, its memory format
        means = F.avg_pool2d(x, region_size, ceil_mode=True, count_include_pad=False).permute(0, 2, 3, 1)
    q, k = means.flatten(1, 2).chunk(2, -1)  # (B, P, C) each
    return (q @ k.transpose(1, 2)).topk(topk, -1)[1]
