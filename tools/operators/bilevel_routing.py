"""Bi-level routing attention in BiFormer-S: stages 1 to 3, 7 x 7 regions of which 1, 4 and 16 are attended to."""

import torch
import torch.nn.functional as F
from saccade.ops import bilevel_routing_attention, region_routing

from . import Case


def windows(x, grid):
    B, H, W, C = x.shape
    return x.view(B, grid, H // grid, grid, W // grid, C).permute(0, 1, 3, 2, 4, 5).reshape(B, grid * grid, -1, C)


def published(qkv, idx, heads, regions):
    """Copy windows, and gather keys and values for every region."""
    (B, H, W, C3), P, grid = qkv.shape, idx.shape[1], regions[0]
    C = C3 // 3
    q, k, v = windows(qkv, grid).split(C, -1)  # (B, P, t, C) each
    where = idx[..., None, None].expand(-1, -1, -1, k.shape[2], C)
    k, v = (m.unsqueeze(1).expand(-1, P, -1, -1, -1).gather(2, where).flatten(2, 3) for m in (k, v))

    def split(m):
        return m.unflatten(-1, (heads, -1)).transpose(2, 3)  # (B, P, heads, tokens, D)

    a = (split(q) * C**-0.5 @ split(k).mT).softmax(-1)
    out = (a @ split(v)).transpose(2, 3).reshape(B, grid, grid, H // grid, W // grid, C)
    return out.permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, C)


def masked(qkv, idx, heads, regions):
    """Call scaled_dot_product_attention on all tokens with a mask of the routed pairs."""
    B, H, W, _ = qkv.shape
    _, P, _ = idx.shape
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    y, x = torch.arange(H, device=qkv.device), torch.arange(W, device=qkv.device)
    region = (y // (H // regions[0]))[:, None] * regions[1] + x // (W // regions[1])
    seen = torch.zeros(B, P, P, dtype=torch.bool, device=qkv.device).scatter_(2, idx, True)
    mask = seen[:, region.flatten()][:, :, region.flatten()].unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=(qkv.shape[-1] // 3) ** -0.5)
    return out.transpose(1, 2).reshape(B, H, W, -1)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for stage, topk in enumerate((1, 4, 16)):
        # Padded to a multiple of 7, as in the model.
        H, W = (-(-side // (4 << stage) // 7) * 7 for side in (height, width))
        C, heads = 64 << stage, 2 << stage

        def args(device, dtype, shape=(batch, H, W, 3 * C), heads=heads, topk=topk):
            qkv = torch.randn(shape, device=device, dtype=dtype)
            idx = region_routing(qkv, (shape[1] // 7, shape[2] // 7), topk)
            return qkv.requires_grad_(), idx, heads, (7, 7)

        size, flops = batch * H * W * C, 4 * batch * H * W * C * topk * (H * W // 49)
        library = {"SDPA, masked": masked} if H * W <= 3136 else {}  # for larger maps the mask takes gigabytes
        result.append(
            Case(
                where=f"BiFormer-S stage {stage + 1}",
                args=args,
                ours=bilevel_routing_attention,
                published=published,
                elements=(4 * size, 8 * size),
                flops=(flops, 5 * flops // 2),
                library=library,
            )
        )
    return result
