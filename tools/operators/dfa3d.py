"""Deformable attention: DFA3D's lifter, per camera, and in 2D on a detector's pyramid and on a bird's-eye view.

The maps of the lifter and the detector have the papers' sizes for any image size, since road scenes are not square.
"""

from functools import partial

import torch
import torch.nn.functional as F
from saccade.ops import dfa3d, ms_deform_attn

from . import Case

LIFT = [(116, 200), (58, 100), (29, 50), (15, 25)]  # strides 8 to 64 of 928 x 1600
DETECT = [(100, 167), (50, 84), (25, 42), (13, 21)]  # of 800 x 1333


def published_2d(value, shapes, locations, weights):
    """Call grid_sample per level; materialise all samples (B · heads, C, Q, L · P), then weight and sum them."""
    B, heads = value.shape[0], value.shape[2]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1)  # (B · heads, C, S)
    grids = (2 * locations - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, B · heads, Q, P, 2)
    levels = [part.unflatten(2, size) for part, size in zip(maps.split([H * W for H, W in shapes], 2), shapes)]
    samples = torch.cat([F.grid_sample(x, g, align_corners=False) for x, g in zip(levels, grids)], 3)
    weighted = samples * weights.transpose(1, 2).flatten(0, 1).flatten(2).unsqueeze(1)
    return weighted.sum(3).unflatten(0, (B, heads)).flatten(1, 2).mT.contiguous()


def published_3d(value, depth, shapes, locations, weights):
    """Compute the depth scores (B, Q, heads, L, P, 4) with depth repeated over the heads, then gather each corner's
    rows, weight them by the scores and sum."""
    B, _, heads, _, _, _ = locations.shape
    D = depth.shape[3]
    depth = depth.expand(-1, -1, heads, -1).contiguous()
    size = torch.tensor([(W, H, D) for H, W in shapes], device=value.device)[:, None]
    start = torch.tensor([0] + [H * W for H, W in shapes], device=value.device).cumsum(0)[:-1, None]
    u = locations * size - 0.5
    low = u.detach().floor()
    f = u - low
    alive = ((u > -1) & (u < size)).all(-1)
    b = torch.arange(B, device=value.device).view(B, 1, 1, 1, 1)
    m = torch.arange(heads, device=value.device).view(heads, 1, 1)
    corners, scores = [], []
    for dy, dx in ((0, 0), (0, 1), (1, 1), (1, 0)):
        at = low + low.new_tensor([dx, dy, 0])
        inside = alive & ((at >= 0) & (at < size))[..., :2].all(-1)
        cell = torch.where(inside, start + at[..., 1] * size[..., 0] + at[..., 0], 0).long()
        score = 0
        for dz in range(2):
            bin = low[..., 2] + dz
            there = inside & (bin >= 0) & (bin < D)
            g = depth[b, cell, m, torch.where(there, bin, 0).long()]
            score = score + (f[..., 2] if dz else 1 - f[..., 2]) * there * g
        scores.append(score)
        hat = (f[..., 1] if dy else 1 - f[..., 1]) * (f[..., 0] if dx else 1 - f[..., 0])
        corners.append((cell, hat * inside))
    out = 0
    for (cell, hat), score in zip(corners, torch.stack(scores, -1).unbind(-1)):
        out = out + ((weights * hat * score)[..., None] * value[b, cell, m]).sum((3, 4))
    return out.flatten(2)


def outer_product(value, depth, shapes, locations, weights):
    """Sample value ⊗ depth (B · heads, C, D, H, W) by one 5-D grid_sample per level."""
    B, Q, heads, _, P, _ = locations.shape
    C, out = value.shape[3], 0
    sizes = [H * W for H, W in shapes]
    for level, (maps, bins, (H, W)) in enumerate(zip(value.split(sizes, 1), depth.split(sizes, 1), shapes)):
        product = torch.einsum("bsmc,bsmd->bmcds", maps, bins.expand(-1, -1, heads, -1)).reshape(B * heads, C, -1, H, W)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(B * heads, Q, P, 1, 3)
        sampled = F.grid_sample(product, grid, padding_mode="zeros", align_corners=False)[..., 0]
        out = out + (sampled * weights[:, :, :, level].transpose(1, 2).reshape(B * heads, 1, Q, P)).sum(-1)
    return out.view(B, heads * C, Q).mT.contiguous()


def _args(device, dtype, B, Q, heads, C, shapes, P, D):
    S, L, dims = sum(H * W for H, W in shapes), len(shapes), 3 if D else 2
    value = torch.randn(B, S, heads, C, device=device, dtype=dtype)
    depth = [torch.randn(B, S, 1, D, device=device).softmax(-1).to(dtype).requires_grad_()] if D else []
    # Around one reference point per query, a few cells apart, as in trained layers; neighbouring queries are close.
    centre = torch.linspace(0, 1, Q, device=device)[:, None, None, None, None]
    centre = torch.cat([centre * 7 % 1, centre] + [centre * 49 % 1] * (dims - 2), -1)
    step = torch.tensor([(4 / W, 4 / H, 4 / max(D, 1))[:dims] for H, W in shapes], device=device)[:, None]
    locations = centre + step * torch.randn(B, Q, heads, L, P, dims, device=device)
    weights = torch.randn(B, Q, heads, L * P, device=device).softmax(-1).unflatten(-1, (L, P)).to(dtype)
    return value.requires_grad_(), *depth, shapes, locations.requires_grad_(), weights.requires_grad_()


def cases(batch: int, height: int, width: int) -> list[Case]:
    def case(where, Q, shapes, P, D, peers):
        heads, C = 8, 32
        S, N = sum(H * W for H, W in shapes), batch * Q * heads * len(shapes) * P
        maps, outputs = batch * S * (heads * C + D), batch * Q * heads * C
        samples = N * (4 if D else 3)
        return Case(
            where=where,
            args=partial(_args, B=batch, Q=Q, heads=heads, C=C, shapes=shapes, P=P, D=D),
            ours=dfa3d if D else ms_deform_attn,
            published=published_3d if D else published_2d,
            elements=(maps + samples + outputs, 2 * maps + 2 * samples + outputs),
            flops=(8 * N * C, 16 * N * C + (8 * N * C if D else 0)),
            library=peers,
        )

    # The models' own cameras and maps for any image size, scaled down for small ones, to try things out.
    share = min(1.0, (height * width) ** 0.5 / 224)

    def scaled(shapes):
        return [(max(1, round(share * H)), max(1, round(share * W))) for H, W in shapes]

    product = {"grid_sample of the product": outer_product}  # naive trilinear sampling: 3.3 GiB for base
    lift, detect, plane = scaled(LIFT), scaled(DETECT), scaled([(200, 200)])
    return [
        case("DFA3D base, a camera", round(9502 * share**2), lift, 8, 112, product),
        case("DFA3D small, a camera", round(5345 * share**2), scaled([(23, 40)]), 8, 112, product),
        case("Deformable DETR encoder", sum(H * W for H, W in detect), detect, 4, 0, {}),
        case("BEVFormer temporal", plane[0][0] * plane[0][1], plane, 4, 0, {}),
    ]
