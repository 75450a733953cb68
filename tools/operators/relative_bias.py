"""PATNet's PAT_sf in the last stage of T0, S and L: three quarters of the channels, four heads."""

import torch
from saccade.ops import relative_bias_attention
from saccade.ops.relative_bias import buckets

from . import Case


def published(qkv, heads, table):
    B, H, W, _, C = qkv.shape
    q, k, v = qkv.reshape(B, H * W, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    y, x = torch.arange(H, device=qkv.device), torch.arange(W, device=qkv.device)
    dy, dx = y[:, None] - y + H - 1, x[:, None] - x + W - 1
    ids = buckets(H, W, qkv.device)[dy[:, None, :, None], dx[None, :, None, :]].view(H * W, H * W)
    s = (q * (C // heads) ** -0.5) @ k.mT + table[:, ids]
    return (s.softmax(-1) @ v).transpose(1, 2).reshape(B, H, W, C)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for name, dim in (("T0", 256), ("S", 768), ("L", 1280)):
        B, H, W, C = batch, height // 32, width // 32, dim * 3 // 4

        def args(device, dtype, shape=(B, H, W, 3, C)):
            table = torch.randn(4, 81, device=device, dtype=dtype)
            return torch.randn(shape, device=device, dtype=dtype).requires_grad_(), 4, table.requires_grad_()

        size, flops = B * H * W * C, 4 * B * (H * W) ** 2 * C
        result.append(
            Case(
                where=f"PATNet-{name} stage 4",
                args=args,
                ours=relative_bias_attention,
                published=published,
                elements=(4 * size, 7 * size),
                flops=(flops, flops * 5 // 2),
            )
        )
    return result
