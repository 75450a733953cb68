"""HaloNet's attention in the stages of H0 and H1 (which have the same), H4, and timm's hybrids."""

import torch
import torch.nn.functional as F
from saccade.ops import halo_attention
from torch import nn

from . import Case

#   model, stage, channels, heads, block, halo, stride
ROWS = [
    ("HaloNet-H0/H1", 1, 64, 4, 8, 3, 1),
    ("HaloNet-H0/H1", 2, 128, 8, 8, 3, 2),
    ("HaloNet-H0/H1", 2, 128, 8, 8, 3, 1),
    ("HaloNet-H0/H1", 3, 256, 8, 8, 3, 1),
    ("HaloNet-H0/H1", 4, 512, 8, 8, 3, 1),
    ("HaloNet-H4", 1, 64, 4, 12, 2, 1),
    ("HaloNet-H4", 2, 128, 8, 12, 2, 1),
    ("HaloNet-H4", 3, 256, 8, 12, 2, 1),
    ("HaloNet-H4", 4, 512, 8, 12, 2, 1),
    ("halonet26t", 3, 256, 8, 8, 2, 1),
    ("halonet26t", 4, 512, 8, 8, 2, 2),
    ("halonet26t", 4, 512, 8, 8, 2, 1),
    ("halonet50ts", 2, 128, 4, 8, 3, 1),
    ("halonet50ts", 3, 256, 8, 8, 3, 1),
    ("halonet50ts", 4, 512, 8, 8, 3, 1),
]


def published(q, kv, height_rel, width_rel, heads, block, halo, stride):
    """Unfold windows; materialise content, row and column logits and their sum, each (…, t · t, a · a)."""
    (B, C, HQ, WQ), (_, _, H, W) = q.shape, kv.shape
    D, a, t, M, N = C // heads, block + 2 * halo, block // stride, -(-H // block), -(-W // block)
    q = F.pad(q, (0, N * t - WQ, 0, M * t - HQ))
    kv = F.pad(kv, (halo, halo + N * block - W, halo, halo + M * block - H))
    windows = kv.unfold(2, a, block).unfold(3, a, block).reshape(B * heads, -1, M * N, a * a).permute(0, 2, 3, 1)
    k, v = windows.split((D, windows.shape[3] - D), -1)
    x = q.reshape(B * heads, D, M, t, N, t).permute(0, 2, 4, 3, 5, 1).reshape(B * heads * M * N, t, t, D)

    def relative(x, table):  # queries along the last axis but one: (…, t, 2a - 1) to the a offsets of each
        every = x @ table.mT
        offset = torch.arange(a, device=x.device) - torch.arange(t, device=x.device)[:, None] + a - 1
        return every.gather(-1, offset.expand(*every.shape[:-1], a))

    rows = relative(x.transpose(1, 2), height_rel).transpose(1, 2)[..., None].expand(-1, t, t, a, a)
    columns = relative(x, width_rel)[..., None, :].expand(-1, t, t, a, a)
    position = (rows + columns).reshape(B * heads, M * N, t * t, a * a)
    logits = x.reshape(B * heads, M * N, t * t, D) @ k.mT * D**-0.5 + position
    out = (logits.softmax(-1) @ v).view(B * heads, M, N, t, t, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(B, -1, M * t, N * t)[:, :, :HQ, :WQ]


class Given(nn.Module):
    def __init__(self, x):
        super().__init__()
        self.x = x

    def forward(self, _):
        return self.x


def timm_module(q, kv, height_rel, width_rel, heads, block, halo, stride):
    """Without its projections."""
    from timm.layers.halo_attn import HaloAttn

    with torch.device("meta"):
        module = HaloAttn(q.shape[1], stride=stride, num_heads=heads, block_size=block, halo_size=halo)
    module.q, module.kv = Given(q), Given(kv)
    for name, table in (("height_rel", height_rel), ("width_rel", width_rel)):
        delattr(module.pos_embed, name)
        setattr(module.pos_embed, name, table)
    return module(kv)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for model, stage, C, heads, block, halo, stride in ROWS:
        B, H, W = batch, *(-(-size // ((2 << stage) // stride)) for size in (height, width))
        HQ, WQ, a = -(-H // stride), -(-W // stride), block + 2 * halo

        def args(
            device,
            dtype,
            q=(B, C, HQ, WQ),
            kv=(B, 2 * C, H, W),
            table=(2 * a - 1, C // heads),
            rest=(heads, block, halo, stride),
        ):
            maps = (
                torch.randn(s, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
                for s in (q, kv)
            )
            tables = (torch.randn(table, device=device, dtype=dtype) / table[1] ** 0.5 for _ in range(2))
            return *(z.requires_grad_() for z in (*maps, *tables)), *rest

        queries, keys, products = B * C * HQ * WQ, B * C * H * W, 2 * 2 * B * HQ * WQ * C * a * a
        result.append(
            Case(
                where=f"{model} stage {stage}" + (", strided" if stride > 1 else ""),
                args=args,
                ours=halo_attention,
                published=published,
                elements=(2 * queries + 2 * keys, 4 * queries + 4 * keys),
                flops=(products, products * 5 // 2),
                library={} if H % block or W % block else {"timm.layers.HaloAttn": timm_module},
            )
        )
    return result
