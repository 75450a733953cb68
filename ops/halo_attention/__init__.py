"""Halo attention (HaloNet, arXiv 2103.12731): each block's queries attend to the block and a halo around it."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from . import eager, reference

__all__ = ["halo_attention"]


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
) -> Tensor:
    """softmax(scale · q kᵀ + q · (R_h + R_w)) v, in windows of a = block + 2 · halo pixels a side (reference.py).

    q            (B, heads·D, ceil(H / stride), ceil(W / stride)): the queries, those of a strided convolution if stride
                 is not 1; it must divide block. For other strides, take queries at full resolution and pool after.
    kv           (B, heads·(D + Dv), H, W): channels k of head 0 | v of head 0 | k of head 1 | …
                 Both maps in any memory format: the kernels read them, and views of bigger ones, where they lie.
    height_rel, width_rel
                 (2a - 1, D) each, what relative rows and columns add to a key; shared by all heads. They may have
                 another type; they are used in that of q.
    scale        of the products of queries and keys; D ** -0.5 if None. With scale_pos, of the position logits too.

    Returns (B, heads·Dv, ceil(H / stride), ceil(W / stride)), contiguous or channels-last as q is.

    Cells outside the image are zeros, not masked: they take part in the softmax by their position logits. Where block
    does not divide H or W, the map is thought continued with such cells to the right and downwards.

    Gradients go to q, kv and both tables, and are the same in every run. Under autocast all is in autocast's type, the
    softmax of the kernels in float32. A NaN among the queries stays in its row of the output; one among keys and values
    reaches the queries whose windows see it.
    """
    if torch.jit.is_scripting():
        return reference.halo_attention(q, kv, height_rel, width_rel, heads, block, halo, stride, scale, scale_pos)
    else:
        _check(q, kv, height_rel, width_rel, heads, block, halo, stride)
        device = q.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            if q.dtype != torch.float64:  # as PyTorch's own matrix products
                q, kv = (z.to(torch.get_autocast_dtype(device)) for z in (q, kv))
            with torch.autocast(device, enabled=False):
                return _attend(q, kv, height_rel, width_rel, heads, block, halo, stride, scale, scale_pos)
        return _attend(q, kv, height_rel, width_rel, heads, block, halo, stride, scale, scale_pos)


def _attend(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    heads: int,
    block: int,
    halo: int,
    stride: int,
    scale: float | None,
    scale_pos: bool,
) -> Tensor:
    D = height_rel.shape[1]
    if kv.numel() == 0:  # with a graph to all
        v = kv.unflatten(1, (heads, kv.shape[1] // heads))[:, :, D:].flatten(1, 2)
        return v[:, :, ::stride, ::stride] + (q.sum() + height_rel.sum() + width_rel.sum()).to(kv.dtype)
    scale = D**-0.5 if scale is None else scale
    cannot = []
    if max(D, kv.shape[1] // heads - D) > 256:
        cannot.append("a head dimension over 256")
    if block + 2 * halo > 32:
        cannot.append(f"a window of {block + 2 * halo} pixels a side, over 32")
    args = q, kv, height_rel, width_rel, heads, block, halo, stride, scale, scale_pos
    if use_triton(q, kv, height_rel, width_rel, cannot=cannot):
        return _triton(*args)
    return eager.halo_attention(*args)


def _triton(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    heads: int,
    block: int,
    halo: int,
    stride: int,
    scale: float,
    scale_pos: bool,
) -> Tensor:
    from . import op  # and with it Triton: only now

    rows, columns = reference.position_logits(q, height_rel, width_rel, heads, block, halo, stride)
    if scale_pos:
        rows, columns = rows * scale, columns * scale
    return op.fwd(q, kv, rows, columns, heads, block, halo, stride, scale)[0]


def _check(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    heads: int,
    block: int,
    halo: int,
    stride: int,
) -> None:
    for name, x, shape in (("q", q, "heads·D, H, W"), ("kv", kv, "heads·(D + Dv), H, W")):
        if x.dim() != 4 or not x.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be floating point of shape (B, {shape}), got {x.dtype} of shape {tuple(x.shape)}"
            )
    if block < 1 or halo < 0:
        raise ValueError(f"block must be at least 1 and halo at least 0, got {block} and {halo}")
    if stride < 1 or block % stride:
        raise ValueError(
            f"stride must divide block = {block}, got {stride}: take queries at full resolution and pool afterwards"
        )
    a, C = block + 2 * halo, q.shape[1]
    if heads < 1 or heads > C or C % heads:
        raise ValueError(f"heads must divide the {C} channels of q, got {heads}")
    if kv.shape[1] % heads or kv.shape[1] <= C:
        raise ValueError(f"kv must have {heads}·({C // heads} + Dv) channels, got {kv.shape[1]}")
    for name, x in (("height_rel", height_rel), ("width_rel", width_rel)):
        if tuple(x.shape) != (2 * a - 1, C // heads) or not x.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be floating point of shape ({2 * a - 1}, {C // heads}) for windows of {a} pixels, "
                f"got {x.dtype} of shape {tuple(x.shape)}"
            )
    B, _, H, W = kv.shape
    size = B, -(-H // stride), -(-W // stride)
    if tuple(q.shape) != (B, C, *size[1:]):
        raise ValueError(
            f"q must be ({B}, {C}, {size[1]}, {size[2]}) for the {H} x {W} map of kv and stride {stride}, "
            f"got {tuple(q.shape)}"
        )
    if kv.dtype != q.dtype:
        raise ValueError(f"kv must be {q.dtype} as q is, got {kv.dtype}")
    for name, x in (("kv", kv), ("height_rel", height_rel), ("width_rel", width_rel)):
        if x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {x.device}")
