"""PATNet-T2's Gaussian gate and norm, on the three quarters of the channels that its partial convolution leaves out:
views of a channels-last map. In training mode if there is more than one image."""

import torch
import torch.nn.functional as F
from saccade.ops import gaussian_gate

from . import Case

DIM = 64


def published(x, weight, norm_weight, norm_bias, out_norm_weight, out_norm_bias, *rest):
    *statistics, training = rest
    mean, std = x.mean((2, 3), keepdim=True), x.flatten(2).std(2)[..., None, None]
    t = F.conv2d(torch.cat((mean, std), 3), weight.unsqueeze(2))
    g = F.hardsigmoid(F.batch_norm(t, *statistics[:2], norm_weight, norm_bias, training))
    return F.batch_norm(x * g, *statistics[2:4], out_norm_weight, out_norm_bias, training)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for stage in range(3):  # the fourth stage has self-attention
        dim, H, W = DIM << stage, height // (4 << stage), width // (4 << stage)
        C = dim - dim // 4

        def args(device, dtype, shape=(batch, dim, H, W), C=C):
            options = dict(device=device, dtype=dtype)
            x = torch.randn(shape, **options).contiguous(memory_format=torch.channels_last)[:, -C:]
            parameters = torch.randn(C, C, 2, **options) / (2 * C) ** 0.5, *(torch.rand(C, **options) for _ in range(4))
            statistics = (torch.ones(C, device=device) for _ in range(4))
            return (
                *(t.detach().requires_grad_() for t in (x, *parameters)),
                *statistics,
                batch > 1,
            )  # the mean of a channel is one number per image

        size, product = batch * C * H * W, 4 * batch * C * C
        result.append(
            Case(
                where=f"PATNet-T2 stage {stage + 1}",
                args=args,
                ours=gaussian_gate,
                published=published,
                elements=(3 * size, 5 * size),
                flops=(product + 6 * size, 2 * product + 8 * size),
            )
        )
    return result
