"""Channel attention (DaViT, arXiv 2204.03645): the channels of a head attend to each other, over all tokens."""

import torch
from torch import Tensor

from ..dispatch import use_definition, use_triton
from ..precision import no_autocast
from . import eager, reference

__all__ = ["channel_attention"]

MAX_HEAD_DIM = 128  # of the kernels


def channel_attention(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Q Aᵀ with A = softmax(scale · Kᵀ V) over its last axis, of D x D channels in each head.

    qkv    (B, N, 3C) tokens or (B, H, W, 3C), a map: q | k | v on the last axis; head m owns channels m·D to (m+1)·D of
           each. If the last axis has stride 1, a view of a bigger map is read where it lies; if not, the kernels take
           a copy.
    scale  of the logits, D ** -0.5 if None: whatever the number of tokens, as published.

    So K plays the query and V the key of usual attention, with channels for tokens, and Q the value. Returns
    (B, N, C) or (B, H, W, C), contiguous. Logits and softmax are in float32 (float64 for float64), under autocast too;
    the rest has the type of qkv. The gradient is the same in every run. A NaN in a query stays in its token and head;
    one in a key or a value reaches all tokens of its head and image.
    """
    if torch.jit.is_scripting():
        return reference.channel_attention(qkv, heads, scale)
    else:
        _check(qkv, heads)
        C = qkv.shape[-1] // 3
        if qkv.numel() == 0:
            return qkv[..., :C].contiguous()
        D = C // heads
        scale = D**-0.5 if scale is None else scale
        cannot = [f"a head dimension of {D}, over {MAX_HEAD_DIM}"] if D > MAX_HEAD_DIM else []
        if use_triton(qkv, cannot=cannot):
            return _triton(qkv, heads, scale)
        if use_definition(qkv):
            with no_autocast(qkv):
                return reference.channel_attention(qkv, heads, scale)
        return eager.channel_attention(qkv, heads, scale)


def _triton(qkv: Tensor, heads: int, scale: float) -> Tensor:
    from . import op  # and with it Triton: only now

    if qkv.dim() == 4:
        return op.fwd(qkv, heads, scale)[0]
    return op.fwd(qkv.unsqueeze(1), heads, scale)[0].squeeze(1)


def _check(qkv: Tensor, heads: int) -> None:
    if qkv.dim() not in (3, 4) or qkv.shape[-1] % 3 or not qkv.dtype.is_floating_point:
        raise ValueError(
            "qkv must be floating point of shape (B, N, 3C) or (B, H, W, 3C), "
            f"got {qkv.dtype} of shape {tuple(qkv.shape)}"
        )
    if heads < 1 or qkv.shape[-1] // 3 % heads:
        raise ValueError(f"heads must divide the C = {qkv.shape[-1] // 3} channels of qkv, got {heads}")
