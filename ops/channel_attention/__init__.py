"""Channel attention (DaViT, arXiv 2204.03645): the channels of a head attend to each other over all tokens."""

import torch
from torch import Tensor

from ..dispatch import is_compiled, use_definition, use_triton
from ..precision import no_autocast
from . import eager, reference

__all__ = ["channel_attention"]

MAX_HEAD_DIM = 128  # that the kernels support


def channel_attention(qkv: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Q Aᵀ with A = softmax(scale · Kᵀ V) over its last axis, a D x D matrix of the channels of each head.

    Compared with attention over tokens, channels take the place of tokens, K that of the queries, V that of the keys,
    and Q that of the values.

    qkv    tokens (B, N, 3C) or a map (B, H, W, 3C): q | k | v on the last axis; head m has channels m·D to (m+1)·D of
           each. The kernels read a view of a larger map in place if its last axis has stride 1, else they copy it.
    scale  factor of the logits; D ** -0.5 if None, as published (it does not depend on the number of tokens).

    Returns (B, N, C) or (B, H, W, C), contiguous. Logits and softmax are computed in float32 (float64 for float64),
    under autocast too; everything else has the dtype of qkv. The gradient is deterministic. A NaN in a query affects
    only its token and head; one in a key or value affects all tokens of its head and image.
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
        if use_definition(qkv) and not (is_compiled() and qkv.device.type == "cpu"):
            with no_autocast(qkv):
                return reference.channel_attention(qkv, heads, scale)
        return eager.channel_attention(qkv, heads, scale)


def _triton(qkv: Tensor, heads: int, scale: float) -> Tensor:
    from . import op  # imports Triton, so not at the top of the file

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
