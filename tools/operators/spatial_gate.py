"""PATNet-T2's spatial gate, in training, on the half of the channels that is gated: views of a channels-last map."""

import torch
import torch.nn.functional as F
from saccade.ops import spatial_gate

from . import Case

DIM = 64


def published(x, weight, norm_weight, norm_bias, running_mean, running_var, training):
    g = F.hardsigmoid(F.conv2d(x, weight[None, :, None, None]))
    return F.batch_norm(x * g, running_mean, running_var, norm_weight, norm_bias, training)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for stage in range(4):
        dim, H, W = DIM << stage, height // (4 << stage), width // (4 << stage)

        def args(device, dtype, shape=(batch, dim, H, W), C=dim // 2):
            options = dict(device=device, dtype=dtype)
            x = torch.randn(shape, **options).contiguous(memory_format=torch.channels_last)[:, :C]
            parameters = torch.randn(C, **options) / C**0.5, *(torch.rand(C, **options) for _ in range(2))
            statistics = (torch.ones(C, device=device) for _ in range(2))
            return *(t.detach().requires_grad_() for t in (x, *parameters)), *statistics, True

        size = batch * dim // 2 * H * W
        result.append(
            Case(
                where=f"PATNet-T2 stage {stage + 1}",
                args=args,
                ours=spatial_gate,
                published=published,
                elements=(3 * size, 5 * size),
                flops=(8 * size, 16 * size),
            )
        )
    return result
