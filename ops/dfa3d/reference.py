"""Reference implementation of depth-weighted deformable attention (DFA3D, arXiv 2307.12972).

A sample at (x, y, z), in cells and bins of its level, has four corners k around (x, y). With linear weights `hat`,

    g_k = Σ over the two bins around z of hat · depth[corner k, bin]                 1 without depth
    out = Σ over levels and points of weight · Σ_k hat_k · g_k · value[corner k]

This is trilinear sampling of value ⊗ depth without materialising the product. Corners and bins outside count as zero.
"""

import torch
from torch import Tensor


def dfa3d(
    value: Tensor, depth: Tensor | None, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:  # (B, S, M, C), (B, S, M or 1, D), L pairs, (B, Q, M, L, P, 2 or 3), (B, Q, M, L, P) -> (B, Q, M·C)
    B, Q, M, _, _ = weights.shape
    full = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
    b = torch.arange(B, device=value.device)[:, None, None, None]
    m = torch.arange(M, device=value.device)[:, None]
    out = torch.zeros(B, Q, M, value.shape[3], dtype=full, device=value.device)
    start = 0
    for level, (H, W) in enumerate(shapes):
        loc, a = locations[:, :, :, level].to(full), weights[:, :, :, level].to(full)  # (B, Q, M, P, 2 or 3), (…, P)
        x, y = loc[..., 0] * W - 0.5, loc[..., 1] * H - 0.5
        alive = (x > -1) & (x < W) & (y > -1) & (y < H)
        z = torch.zeros_like(x)
        if depth is not None:
            z = loc[..., 2] * depth.shape[3] - 0.5
            alive = alive & (z > -1) & (z < depth.shape[3])
        x, y, z = torch.where(alive, x, 0.0), torch.where(alive, y, 0.0), torch.where(alive, z, 0.0)
        for dy in range(2):
            for dx in range(2):
                cx, cy = x.detach().floor() + dx, y.detach().floor() + dy
                inside = alive & (cx >= 0) & (cx < W) & (cy >= 0) & (cy < H)
                cell = torch.where(inside, start + cy * W + cx, 0).long()
                w = a * _hat(x, dx) * _hat(y, dy)
                if depth is not None:
                    w = w * _score(depth.to(full), b, cell, m, z)
                row = value[b, cell, m].to(full)  # (B, Q, M, P, C)
                out = out + torch.where(inside[..., None], w[..., None] * row, 0.0).sum(3)
        start += H * W
    return out.flatten(2).to(value.dtype)


def depth_score(depth: Tensor, shapes: list[tuple[int, int]], locations: Tensor) -> Tensor:
    """Return g at the four corners, (B, Q, M, L, P, 4), clockwise: (y0, x0), (y0, x1), (y1, x1), (y1, x0)."""
    B, _, M, _, _, _ = locations.shape
    D = depth.shape[3]
    full = torch.promote_types(torch.promote_types(depth.dtype, locations.dtype), torch.float32)
    b = torch.arange(B, device=depth.device)[:, None, None, None]
    m = torch.arange(M, device=depth.device)[:, None]
    scores: list[Tensor] = []
    start = 0
    for level, (H, W) in enumerate(shapes):
        loc = locations[:, :, :, level].to(full)
        x, y, z = loc[..., 0].detach() * W - 0.5, loc[..., 1].detach() * H - 0.5, loc[..., 2] * D - 0.5
        alive = (x > -1) & (x < W) & (y > -1) & (y < H) & (z > -1) & (z < D)
        x, y, z = torch.where(alive, x, 0.0), torch.where(alive, y, 0.0), torch.where(alive, z, 0.0)
        corners: list[Tensor] = []
        for dy, dx in [(0, 0), (0, 1), (1, 1), (1, 0)]:
            cx, cy = x.floor() + dx, y.floor() + dy
            inside = alive & (cx >= 0) & (cx < W) & (cy >= 0) & (cy < H)
            cell = torch.where(inside, start + cy * W + cx, 0).long()
            corners.append(torch.where(inside, _score(depth, b, cell, m, z), 0.0))
        scores.append(torch.stack(corners, -1))
        start += H * W
    return torch.stack(scores, 3).to(depth.dtype)


def _hat(x: Tensor, d: int) -> Tensor:
    f = x - x.detach().floor()
    return f if d else 1 - f


def _score(depth: Tensor, b: Tensor, cell: Tensor, m: Tensor, z: Tensor) -> Tensor:
    D, m = depth.shape[3], m % depth.shape[2]  # one depth for all heads, or one per head
    bin = z.detach().floor()
    score = torch.zeros_like(z)
    for d in range(2):
        there = (bin + d >= 0) & (bin + d < D)
        g = depth[b, cell, m, torch.where(there, bin + d, 0).long()]
        score = score + torch.where(there, _hat(z, d) * g, 0.0)
    return score
