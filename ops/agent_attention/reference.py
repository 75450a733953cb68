"""Reference implementation of agent attention (arXiv 2312.08874, equations 3 to 6).

With agents A (a, D), queries Q (N, D), keys K and values V (M, D) of one head:

    P1 = softmax(scale · A Kᵀ + B1)          (a, M): each agent attends to all keys
    P2 = softmax(scale · Q Aᵀ + B2)          (N, a): each query attends to all agents
    O  = P2 (P1 V) + depthwise 3 x 3 convolution of V

Both biases are sums of small factors. For B1, with agent m and the key at row y and column x of its map,

    B1[m, (y, x)] = I(block[m])[y, x] + rows[m, y] + columns[m, x]

where I resizes a small square table bilinearly to the map. This implementation materialises biases, logits and
probabilities, the last two for every image; the other implementations avoid that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_bias: tuple[Tensor, Tensor, Tensor],
    query_bias: tuple[Tensor, Tensor, Tensor],
    heads: int,
    token_bias: tuple[Tensor, Tensor] | None = None,
    dwc_weight: Tensor | None = None,
    dwc_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # (B, N, C), (B, M, C), (B, M, C), (B, a, C) -> (B, N, C)
    C = q.shape[2]
    b1, b2 = bias(key_bias), bias(query_bias)  # (heads, a, M), (heads, a, N)
    if token_bias is not None:
        b1 = torch.cat((token_bias[0].unsqueeze(2).to(b1.dtype), b1), 2)
        b2 = torch.cat((token_bias[1].unsqueeze(2).to(b2.dtype), b2), 2)
    out = attend(q, k, v, agents, b1, b2, heads, (C // heads) ** -0.5 if scale is None else scale)
    if dwc_weight is None:
        return out
    T = 0 if token_bias is None else 1  # a class token is not part of the map
    x = v[:, T:].transpose(1, 2).unflatten(2, (key_bias[1].shape[2], key_bias[2].shape[2]))
    size = (query_bias[1].shape[2], query_bias[2].shape[2])
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear")
    return out + F.pad(convolve(x, dwc_weight, dwc_bias).flatten(2).transpose(1, 2), (0, 0, T, 0))


def bias(factors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """block (heads, a, S, S), rows (heads, a, h), columns (heads, a, w) -> (heads, a, h·w)"""
    block, rows, columns = factors
    block = F.interpolate(block, size=(rows.shape[2], columns.shape[2]), mode="bilinear")
    return (block + rows.unsqueeze(3) + columns.unsqueeze(2)).flatten(2)


def attend(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, b1: Tensor, b2: Tensor, heads: int, scale: float) -> Tensor:
    D = q.shape[2] // heads
    q, k, v, agents = [x.unflatten(2, (heads, D)).transpose(1, 2) for x in (q, k, v, agents)]  # (B, heads, ·, D)
    p1 = (scale * agents @ k.transpose(-2, -1) + b1.to(q.dtype)).softmax(-1)  # (B, heads, a, M)
    p2 = (scale * q @ agents.transpose(-2, -1) + b2.transpose(-2, -1).to(q.dtype)).softmax(-1)  # (B, heads, N, a)
    return (p2 @ (p1 @ v)).transpose(1, 2).flatten(2)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (B, C, h, w), (C, 1, 3, 3), (C,)
    return F.conv2d(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), padding=1, groups=x.shape[1])
