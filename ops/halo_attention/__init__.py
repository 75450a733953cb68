"""Halo attention (HaloNet, arXiv 2103.12731): the queries of a block attend to the block and a halo around it."""

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
    """softmax(scale · q kᵀ + q · (R_h + R_w)) v in windows of a = block + 2 · halo pixels per side (see reference.py).

    q            (B, heads·D, ceil(H / stride), ceil(W / stride)): the queries, for example of a strided convolution.
                 stride must divide block; for other strides, use queries at full resolution and pool the output.
    kv           (B, heads·(D + Dv), H, W): channels k of head 0 | v of head 0 | k of head 1 | …
                 q and kv may have any memory format: the kernels read them, and views of larger maps, without copying.
    height_rel, width_rel
                 (2a - 1, D) each: embeddings of relative rows and columns, shared by all heads. They may have another
                 dtype and are cast to that of q.
    scale        factor of the products of queries and keys; D ** -0.5 if None.
    scale_pos    whether scale applies to the position logits too.

    Returns (B, heads·Dv, ceil(H / stride), ceil(W / stride)), in the memory format of q (contiguous or channels-last).

    Pixels outside the image are zeros and not masked: they take part in the softmax with their position logits. If
    block does not divide H or W, the map is extended with such pixels at the right and bottom.

    q, kv and both tables get gradients, and these are deterministic. Under autocast everything is in autocast's dtype,
    except the softmax of the kernels, which is in float32. A NaN in a query affects only its own output; one in a key
    or value affects the queries whose windows contain it.
    """
    if torch.jit.is_scripting():
        return reference.halo_attention(q, kv, height_rel, width_rel, heads, block, halo, stride, scale, scale_pos)
    else:
        _check(q, kv, height_rel, width_rel, heads, block, halo, stride)
        scale = height_rel.shape[1] ** -0.5 if scale is None else scale
        settings = eager.Settings(heads, block, halo, stride, scale, scale_pos)
        device = q.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            if q.dtype != torch.float64:  # as in PyTorch's own matrix products
                q, kv = (z.to(torch.get_autocast_dtype(device)) for z in (q, kv))
            with torch.autocast(device, enabled=False):
                return _attend(q, kv, height_rel, width_rel, settings)
        return _attend(q, kv, height_rel, width_rel, settings)


def _attend(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, settings: eager.Settings) -> Tensor:
    D, (heads, block, halo, stride, *_) = height_rel.shape[1], settings
    if kv.numel() == 0:  # an empty result that depends on every input, for autograd
        v = kv.unflatten(1, (heads, kv.shape[1] // heads))[:, :, D:].flatten(1, 2)
        return v[:, :, ::stride, ::stride] + (q.sum() + height_rel.sum() + width_rel.sum()).to(kv.dtype)
    cannot = []
    if max(D, kv.shape[1] // heads - D) > 256:
        cannot.append("a head dimension over 256")
    if block + 2 * halo > 32:
        cannot.append(f"a window of {block + 2 * halo} pixels per side, over 32")
    if use_triton(q, kv, height_rel, width_rel, cannot=cannot):
        return _triton(q, kv, height_rel, width_rel, settings)
    return eager.halo_attention(q, kv, height_rel, width_rel, settings)


def _triton(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, settings: eager.Settings) -> Tensor:
    from . import op  # imports Triton, so not at the top of the file

    heads, block, halo, stride, scale, scale_pos = settings
    rows, columns = reference.position_logits(q, height_rel, width_rel, heads, block, halo, stride, multiple=8)
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
            f"stride must divide block = {block}, got {stride}: use queries at full resolution and pool the output"
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
