"""Neighborhood attention of NAT-M and DiNAT-M."""

import torch
from published.nat import gathered
from saccade.ops import neighborhood_attention

from . import Case


def _heads(qkv, heads):
    q, k, v = qkv.unflatten(4, (heads, -1)).permute(3, 0, 4, 1, 2, 5)
    return q * q.shape[-1] ** -0.5, k, v


def published(qkv, heads, kernel, bias, dilation):
    return gathered(*_heads(qkv, heads), bias, dilation[0]).permute(0, 2, 3, 1, 4).flatten(3)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for stage in range(4):
        H, W = (max(7, side // (4 << stage)) for side in (height, width))  # models pad smaller maps
        C, heads = 64 << stage, 2 << stage
        for d in sorted({1, max(1, min(H, W) // 7)}):

            def args(device, dtype, shape=(batch, H, W, 3, C), heads=heads, d=d):
                qkv = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
                bias = torch.randn(heads, 13, 13, device=device, dtype=dtype).requires_grad_()
                return qkv, heads, (7, 7), bias, (d, d)

            size, flops = batch * H * W * C, 4 * batch * H * W * 49 * C
            result.append(
                Case(
                    where=f"NAT-M stage {stage + 1}" if d == 1 else f"DiNAT-M stage {stage + 1}, dilation {d}",
                    args=args,
                    ours=neighborhood_attention,
                    published=published,
                    elements=(4 * size, 8 * size),
                    flops=(flops, flops * 5 // 2),
                )
            )
    return result
