"""DaViT-T's channel attention, on the output of its projection."""

import torch
import torch.nn.functional as F
from saccade.ops import channel_attention

from . import Case

DIMS, HEADS = (96, 192, 384, 768), (3, 6, 12, 24)


def published(qkv, heads):
    """Compute A = softmax((K / √D)ᵀ V), out = (A Qᵀ)ᵀ per head, with a scaled copy of K and a copy of the output."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, 2))  # (B, heads, N, D)
    scaled = k * k.shape[3] ** -0.5
    weights = torch.softmax(scaled.mT @ v, 3)  # (B, heads, D, D)
    return (weights @ q.mT).permute(0, 3, 1, 2).flatten(2)


def sdpa(qkv, heads):
    """Call scaled_dot_product_attention with the D channels as tokens."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 4, 1).unbind(0)  # (B, heads, D, N) each
    out = F.scaled_dot_product_attention(k, v, q, scale=q.shape[2] ** -0.5)
    return out.permute(0, 3, 1, 2).flatten(2)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for stage, (C, heads) in enumerate(zip(DIMS, HEADS)):
        N = -(-height // (4 << stage)) * -(-width // (4 << stage))

        def args(device, dtype, shape=(batch, N, 3 * C), heads=heads):
            return torch.randn(shape, device=device, dtype=dtype).requires_grad_(), heads

        size, products = batch * N * C, 2 * 2 * batch * N * C * (C // heads)
        result.append(
            Case(
                where=f"DaViT-T stage {stage + 1}",
                args=args,
                ours=channel_attention,
                published=published,
                elements=(4 * size, 8 * size),
                flops=(products, 2 * products),
                library={"scaled_dot_product_attention": sdpa},
            )
        )
    return result
