"""ELA-S's strip gate in ResNet-50, at the stages' output sizes."""

import torch
import torch.nn.functional as F
from saccade.ops import strip_gate

from . import Case

K, M, GROUPS = 5, 8, 16  # ELA-S


def published(x, weight, norm_weight, norm_bias, groups):
    B, C, H, W = x.shape
    h, w = x.mean(3), x.mean(2)

    def gate(z):
        u = F.conv1d(z, weight, padding=K // 2, groups=C // M)
        return torch.sigmoid(F.group_norm(u, groups, norm_weight, norm_bias))

    return x * gate(h).view(B, C, H, 1) * gate(w).view(B, C, 1, W)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for stage in range(4):
        B, C, H, W = batch, 256 << stage, height // (4 << stage), width // (4 << stage)

        def args(device, dtype, shape=(B, C, H, W)):
            x = torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            weight = torch.randn(shape[1], M, K, device=device, dtype=dtype) / (M * K) ** 0.5
            norm = torch.ones(shape[1], device=device, dtype=dtype), torch.zeros(shape[1], device=device, dtype=dtype)
            return *(t.requires_grad_() for t in (x, weight, *norm)), GROUPS

        size, convolutions = B * C * H * W, 2 * B * C * M * K * (H + W)
        result.append(
            Case(
                where=f"ResNet-50 stage {stage + 1}",
                args=args,
                ours=strip_gate,
                published=published,
                elements=(3 * size, 4 * size),
                flops=(convolutions + 4 * size, 2 * convolutions + 8 * size),
            )
        )
    return result
