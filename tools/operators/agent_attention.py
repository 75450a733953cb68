"""Agent attention and its pooling in Agent-DeiT, Agent-PVT-S and Agent-Swin-T, with bias tables for 224 x 224."""

import functools

import torch
import torch.nn.functional as F
from saccade.ops import agent_attention, pool_agents, resize_agent_bias

from . import Case


def ours(qkv, an, ah, aw, na, ha, wa, token, weight, bias, heads, size, grid):
    T, key_token, query_token = (0, None, None) if token is None else (1, *token.unbind())
    q, k, v = qkv.chunk(3, -1)
    key_bias, query_bias = (an, ah, aw), (na, ha, wa)
    if (*grid, *size) != (*_square(an.shape[1]), ah.shape[2], aw.shape[2]):
        key_bias, query_bias = (resize_agent_bias(factors, size, grid) for factors in (key_bias, query_bias))
    agents = pool_agents(q[:, T:].unflatten(1, size), grid)
    tokens = None if token is None else (key_token, query_token)
    return agent_attention(q, k, v, agents, key_bias, query_bias, heads, tokens, weight, bias)


def _square(a):
    return (round(a**0.5),) * 2


def _split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _bias(block, rows, columns, size, grid):
    """Return the bias (heads, a, h·w), resized over the map and then over the agents."""
    block = F.interpolate(block, size=size, mode="bilinear")
    table = rows.unsqueeze(3) + columns.unsqueeze(2)
    if table.shape[2:] != size:
        table = F.interpolate(table, size=size, mode="bilinear")
    p = _square(block.shape[1])
    if p == grid:
        return block.flatten(2), table.flatten(2)
    return (
        F.interpolate(x.flatten(2).mT.unflatten(2, p), size=grid, mode="bilinear").flatten(2).mT for x in (block, table)
    )


def published(qkv, an, ah, aw, na, ha, wa, token, weight, bias, heads, size, grid):
    """Materialise biases repeated over the batch, logits, biased logits and probabilities; copy maps for the pooling
    and the convolution."""
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    T, scale = int(token is not None), (C // heads) ** -0.5
    q, k, v = qkv.chunk(3, -1)
    agents = F.adaptive_avg_pool2d(q[:, T:].mT.reshape(B, C, *size), grid).flatten(2).mT
    biases = []
    for i, factors in enumerate(((an, ah, aw), (na, ha, wa))):
        block, table = (x.repeat(B, 1, 1, 1) for x in _bias(*factors, size, grid))
        b = block + table
        biases.append(b if token is None else torch.cat((token[i, ..., None].repeat(B, 1, 1, 1), b), 3))
    qs, ks, vs, a = (_split(x, heads).contiguous() for x in (q, k, v, agents))
    p1 = (a * scale @ ks.mT + biases[0]).softmax(-1)
    p2 = (qs * scale @ a.mT + biases[1].mT).softmax(-1)
    out = (p2 @ (p1 @ vs)).transpose(1, 2).reshape(B, N, C)
    maps = v[:, T:].mT.reshape(B, C, *size)
    conv = F.conv2d(maps, weight, bias, padding=1, groups=C).permute(0, 2, 3, 1).reshape(B, N - T, C)
    return out + conv if token is None else torch.cat((out[:, :1], out[:, 1:] + conv), 1)


def library(qkv, an, ah, aw, na, ha, wa, token, weight, bias, heads, size, grid):
    """Call scaled_dot_product_attention twice with materialised biases, and conv2d."""
    T = int(token is not None)
    q, k, v = qkv.chunk(3, -1)
    maps = (x[:, T:].transpose(1, 2).unflatten(2, size) for x in (q, v))
    agents = F.adaptive_avg_pool2d(next(maps), grid).flatten(2).mT
    b1, b2 = (sum(_bias(*factors, size, grid)) for factors in ((an, ah, aw), (na, ha, wa)))
    if token is not None:
        b1, b2 = (torch.cat((t[..., None], b), 2) for t, b in zip(token, (b1, b2)))
    qs, ks, vs, a = (_split(x, heads) for x in (q, k, v, agents))
    va = F.scaled_dot_product_attention(a, ks, vs, b1[None])
    out = F.scaled_dot_product_attention(qs, a, va, b2.mT[None]).transpose(1, 2).flatten(2)
    conv = F.conv2d(next(maps), weight, bias, padding=1, groups=weight.shape[0]).flatten(2).mT
    return out + F.pad(conv, (0, 0, T, 0))


def _args(device, dtype, B, size, C, heads, p, grid, side, token):
    def rand(*shape):
        return torch.randn(shape, device=device, dtype=dtype).requires_grad_()

    a = p * p
    tables = [rand(heads, a, *s) for _ in range(2) for s in ((7, 7), (side[0],), (side[1],))]
    qkv = rand(B, token + size[0] * size[1], 3 * C)
    return qkv, *tables, rand(2, heads, a) if token else None, rand(C, 1, 3, 3), rand(C), heads, size, grid


def cases(batch: int, height: int, width: int) -> list[Case]:
    # dense: the numbers of agents in detectors and segmenters, where the tables are resized to the map
    dense = (height, width) != (224, 224)
    stages = [(f"Agent-DeiT-{s}", 16, C, C // 64, 7, 7, 14, 1) for s, C in (("T", 192), ("S", 384))]
    for name, dims, heads, grids in (
        ("Agent-PVT-S", (64, 128, 320, 512), (1, 2, 5, 8), (12, 16, 28, 28)),
        ("Agent-Swin-T", (96, 192, 384), (3, 6, 12), (9, 12, 14)),
    ):
        for i, (C, g, p, big) in enumerate(zip(dims, heads, (3, 4, 7, 7), grids)):
            stages.append((f"{name} stage {i + 1}", 4 << i, C, g, p, big if dense else p, 56 >> i, 0))
    result = []
    for where, stride, C, heads, p, grid, side, token in stages:
        size = height // stride, width // stride
        side = size if token else (side, side)  # DeiT has a fixed image size
        B, N, a = batch, token + size[0] * size[1], grid * grid
        flops = 8 * B * a * N * C + 18 * B * N * C
        elements = B * N * C, B * a * C
        result.append(
            Case(
                where=where,
                args=functools.partial(
                    _args, B=B, size=size, C=C, heads=heads, p=p, grid=(grid, grid), side=side, token=token
                ),
                ours=ours,
                published=published,
                elements=(4 * elements[0] + 2 * elements[1], 7 * elements[0] + 2 * elements[1]),
                flops=(flops, 5 * flops // 2),
                library={"two SDPA calls": library},
            )
        )
    return result
