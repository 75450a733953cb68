"""Fast PyTorch implementation, used where the Triton kernels cannot run (mainly on CPUs).

Both variants read the packed map in place and call scaled_dot_product_attention, so no logits are kept.
"""

import torch
from torch import Tensor

from ..attention import attend
from ..dispatch import is_any_size, use_definition

# Gathered keys and values per chunk, in bytes. Above about 32 MB glibc maps fresh pages for every buffer, and page
# faults then take longer than the attention (measured: 0.9 ms, and 52 ms for twice the bytes).
CHUNK_BYTES = 16 << 20


def bilevel_routing_attention(
    qkv: Tensor, idx: Tensor, heads: int, regions: tuple[int, int], scale: float | None = None
) -> Tensor:
    """See saccade.ops.bilevel_routing_attention, which checks the arguments."""
    _, H, W, C3 = qkv.shape
    P, K = idx.shape[1], idx.shape[2]
    s = (C3 // 3) ** -0.5 if scale is None else scale
    t = H * W // max(P, 1)
    # Dense attention under a mask copies nothing but computes P / K times as many logits. It is faster for small
    # regions, whose gather copies many short rows (stage 3 at 224, 4 tokens, P / K = 3: 2.7 ms; gathered 7.1 ms + 11 ms
    # for the gather).
    if not is_any_size(P, t) and (K == P or (P <= 4 * K and t <= 16)):
        return _dense(qkv, idx, heads, regions, s)
    return _gather(qkv, idx, heads, regions, s)


def _dense(qkv: Tensor, idx: Tensor, heads: int, regions: tuple[int, int], scale: float) -> Tensor:
    B, H, W, C3 = qkv.shape
    (R, S), C = regions, C3 // 3
    P, K = R * S, idx.shape[2]
    q, k, v = qkv.reshape(B, H * W, 3, heads, C // heads).permute(2, 0, 3, 1, 4).unbind(0)
    mask: Tensor | None = None
    if K < P:
        row = torch.arange(H, device=qkv.device) // (H // R)
        col = torch.arange(W, device=qkv.device) // (W // S)
        region = (row[:, None] * S + col).reshape(-1)  # per token
        chosen = torch.zeros(B, P, P, dtype=torch.bool, device=qkv.device)
        chosen = chosen.scatter(2, idx.long(), torch.ones_like(idx, dtype=torch.bool))  # ONNX takes no scalar bool here
        mask = chosen[:, region][:, :, region].unsqueeze(1)  # (B, 1, N, N)
    return attend(q, k, v, mask, scale).transpose(1, 2).reshape(B, H, W, C)


def _gather(
    qkv: Tensor, idx: Tensor, heads: int, regions: tuple[int, int], scale: float, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    B, H, W, C3 = qkv.shape
    (R, S), C = regions, C3 // 3
    P, t = R * S, H * W // (R * S)
    # tokens (P, t): the tokens of each region, numbered over the map
    tokens = torch.arange(H * W, device=qkv.device).view(R, H // R, S, W // S).transpose(1, 2).reshape(P, t)
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
        if use_definition(qkv):  # a loop would fix the batch size in the graph
            return _gather_chunk(qkv, idx, tokens, heads, regions, scale)
    step = max(1, chunk_bytes // max(1, P * idx.shape[2] * t * 2 * C * qkv.element_size()))
    outs = [
        _gather_chunk(qkv[b : b + step], idx[b : b + step], tokens, heads, regions, scale)
        for b in range(0, max(B, 1), step)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _gather_chunk(
    qkv: Tensor, idx: Tensor, tokens: Tensor, heads: int, regions: tuple[int, int], scale: float
) -> Tensor:
    B, H, W, C3 = qkv.shape
    (R, S), C, D = regions, C3 // 3, C3 // 3 // heads
    (P, t), K = tokens.shape, idx.shape[2]
    first = torch.arange(B, device=qkv.device) * (H * W)
    rows = (first[:, None, None, None] + tokens[idx.long()]).view(-1)
    kv = qkv.reshape(B * H * W, C3)[:, C:].index_select(0, rows).view(B * P, K * t, 2, heads, D)
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    q = qkv[..., :C].reshape(B, R, H // R, S, W // S, C).transpose(2, 3).reshape(B * P, t, heads, D).transpose(1, 2)
    out = attend(q, k, v, None, scale)  # (B*P, heads, t, D)
    return out.transpose(1, 2).reshape(B, R, S, H // R, W // S, C).transpose(2, 3).reshape(B, H, W, C)
