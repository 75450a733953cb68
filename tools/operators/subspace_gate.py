"""ULSAM's gate in MobileNetV1 at the paper's positions (layers 8 and 12, 4 subspaces) and on its larger maps."""

import torch
import torch.nn.functional as F
from saccade.ops import subspace_gate

from . import Case

MOMENTUM, EPS = 0.9, 1e-5


def published(x, w, b, nw, nb, pw, pb, pnw, pnb, rm, rv, prm, prv, training, momentum):
    """Loop over the subspaces, each with its own convolutions, norms and pooling."""
    parts, g = [], pb.shape[0]
    G = x.shape[1] // g
    for n, part in enumerate(x.chunk(g, 1)):
        own, one = slice(n * G, n * G + G), slice(n, n + 1)
        a = F.conv2d(part, w[own].view(G, 1, 1, 1), b[own], groups=G)
        a = F.batch_norm(a, rm[own], rv[own], nw[own], nb[own], training, momentum, EPS)
        a = F.max_pool2d(F.relu(a), 3, 1, 1)
        a = F.conv2d(a, pw[own].view(1, G, 1, 1), pb[one])
        a = F.batch_norm(a, prm[one], prv[one], pnw[one], pnb[one], training, momentum, EPS)
        a = F.relu(a).flatten(2).softmax(2).view(a.shape).expand(-1, G, -1, -1)
        parts.append(a * part + part)
    return torch.cat(parts, 1)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for layer, C, reduction in ((2, 128, 4), (8, 512, 16), (12, 512, 32)):
        B, H, W, g = batch, -(-height // reduction), -(-width // reduction), 4

        def args(device, dtype, shape=(B, C, H, W), g=g):
            def vector(n, scale=1.0):
                return (torch.randn(n, device=device) * scale).to(dtype)

            C, x = shape[1], torch.randn(shape, device=device, dtype=dtype)
            norm = vector(C).fill_(1), vector(C, 0.1), vector(C, (g / C) ** 0.5)
            leaves = x, vector(C), vector(C), *norm, vector(g), vector(g).fill_(1), vector(g, 0.1)
            running = [vector(n).fill_(fill) for n in (C, g) for fill in (0, 1)]
            return *(t.requires_grad_() for t in leaves), *running, True, MOMENTUM

        size = B * C * H * W
        result.append(
            Case(
                where=f"MobileNetV1 layer {layer}, training",
                args=args,
                ours=subspace_gate,
                published=published,
                elements=(4 * size, 6 * size),
                flops=(4 * size, 8 * size),
            )
        )
    return result
