"""The plain-PyTorch form for speed: what runs where Triton does not, above all on a CPU.

The projections are folded: (q W_qᵀ + b_q)(k W_kᵀ + b_k)ᵀ P is q G + g, where G (D, K) and g (K) of a head take one pass
over its keys. Scores live a few images at a time, unless they are asked for. The softmax over the kept keys is that of
scaled_dot_product_attention, whose additive mask is looked up from the bits, a byte at a time.
"""

from functools import partial
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import attend
from ..dispatch import (
    definition_gradients,
    is_saved_graph,
    is_transformed,
    use_definition,
    wants_definition_gradients,
)
from ..precision import full, no_autocast
from . import reference
from .reference import with_cls

CHUNK_BYTES = 4 << 20  # of scores at a time: they stay in the cache while they are compared again and again
# Of comparing every row with a guess. After seven, 95 % of rows are split; the others cost a top-k, ten times a round.
ROUNDS = 7


def connectivity(
    q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up, topk, coef_threshold, basis_threshold, alive
):
    A = coefficients(q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, topk, coef_threshold, alive)
    return A @ reference.basis(up.to(A.dtype), basis_threshold)


def coefficients(q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, topk, coef_threshold, alive) -> Tensor:
    _, heads, _, D = q.shape
    q, k, W_q, b_q, W_k, b_k, P = (
        t.to(full(q)) for t in (q[:, :, 1:], k, proj_q, proj_q_bias, proj_k, proj_k_bias, down[None])
    )
    if alive is not None:
        P = P * with_cls(alive)[..., None]
    kP = (
        (P.transpose(-2, -1) @ k.transpose(1, 2).flatten(2)).unflatten(2, (heads, D)).permute(0, 2, 3, 1)
    )  # (B, heads, D, K)
    Kd = W_k @ kP + b_k[:, None] * P.sum(1)[:, None, None]
    G, g = W_q.transpose(-2, -1) @ Kd, b_q @ Kd
    E = (q @ G + g[:, :, None]) * heads**-0.5
    if alive is not None:
        E = E * alive[:, None, :, None]
    A = E.softmax(-1)
    if topk is not None:
        A = A * largest(A.detach(), A.shape[-1], topk)
    return A.masked_fill(coef_threshold >= A, 0.0) if coef_threshold > 0 else A


def predict_mask(
    q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up, budget, threshold, topk, coef_threshold, basis_threshold,
    alive,
) -> Tensor:  # fmt: skip
    A = coefficients(q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, topk, coef_threshold, alive)
    N = up.shape[0]
    U = F.pad(reference.basis(up.to(A.dtype), basis_threshold), (0, -N % 32))

    def words(A: Tensor, alive: Tensor | None) -> Tensor:
        S = A @ U
        S[..., N:] = -float("inf")
        return _words(S, N, budget, threshold, alive)

    return _by_images(words, A, alive, A.shape[1] * A.shape[2] * U.shape[1] * A.element_size())


def sparse_mask(scores: Tensor, budget: int | None, threshold: float | None, alive: Tensor | None) -> Tensor:
    N = scores.shape[-1]

    def words(scores: Tensor, alive: Tensor | None) -> Tensor:
        return _words(F.pad(scores.to(full(scores)), (0, -N % 32), value=-float("inf")), N, budget, threshold, alive)

    return _by_images(words, scores, alive, scores.shape[1] * scores.shape[2] * scores.shape[3] * 4)


def _by_images(f, x: Tensor, alive: Tensor | None, image_bytes: int) -> Tensor:
    if not _may_look(x):  # a loop would fix the batch size in the graph
        return f(x, alive)
    step = max(1, CHUNK_BYTES // max(1, image_bytes))
    parts = [
        f(x[b : b + step], None if alive is None else alive[b : b + step]) for b in range(0, max(1, x.shape[0]), step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _may_look(x: Tensor) -> bool:
    """Return whether there are values to branch on, at no cost."""
    return x.device.type == "cpu" and not use_definition(x)


def _words(S: Tensor, N: int, budget: int | None, threshold: float | None, alive: Tensor | None) -> Tensor:
    """Bits of the keys that S (B, heads, N-1, 32 · words), -inf beyond N, gives each query; CLS has them all."""
    if alive is not None:
        S = S.masked_fill(~F.pad(with_cls(alive), (0, S.shape[-1] - N))[:, None, None], -float("inf"))
    if budget is None:
        keep = ~(threshold >= S)  # not S > threshold: a query that is NaN shall see it
    elif alive is None:
        keep = largest(S, N, budget)
    else:
        keep = _split(S, budget, alive.sum(1).clamp(max=budget)[:, None, None, None])
    words = pack(keep)
    B, heads = S.shape[:2]
    cls = pack(torch.arange(S.shape[-1], device=S.device) < N).expand(B, heads, 1, -1)
    return torch.cat((cls, words), 2)


def pack(keep: Tensor) -> Tensor:
    """(..., 32 · words) bool -> (..., words) int32. Eight bytes of 0 or 1 become one of eight bits: byte i is moved to
    bit 56 + i by the product with 2 ** (56 - 7i), and no two terms of the product meet."""
    if use_definition(keep):
        return reference.pack(keep)
    return ((keep.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8).view(torch.int32)


def largest(x: Tensor, n: int, count: int) -> Tensor:
    """Whether each is among the `count` largest of the first n of its row, the rest of which is -inf; of equal ones the
    first are.

    On a CPU no top-k, which takes 4 us a row, but guesses t at a value with exactly `count` not below it. The first is
    right for normally distributed values; the second steps a little too far from it, so that what is sought lies
    between them. Later ones are interpolated between two values whose numbers of larger ones are known, and each third
    halves their distance. Rows that are not split in ROUNDS, and those that tie there, take the top-k.
    """
    if not _may_look(x) or x.numel() == 0:
        return _split(x, count)
    rows = x.flatten(0, -2)
    some = rows[:, :n]
    low, high = some.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    below, above = torch.full_like(low, n), torch.zeros_like(low)  # so many are at least low; at least high, but for it
    at_least = torch.empty_like(rows)  # not bool: comparisons into their own type are six times faster
    z = NormalDist().inv_cdf(1 - (count - 0.5) / n)
    mean = some.mean(-1, keepdim=True)
    deviation = (torch.linalg.vector_norm(some, dim=-1, keepdim=True).square() / n - mean * mean).clamp(min=0).sqrt()
    spacing = deviation / (n * NormalDist().pdf(z))  # of the values around t
    t = mean + z * deviation
    for i in range(ROUNDS):
        t = t.clamp(low, high)
        size = torch.ge(rows, t, out=at_least).sum(-1, keepdim=True)
        up = size >= count
        low, below = torch.where(up, t, low), torch.where(up, size, below)
        high, above = torch.where(up, high, t), torch.where(up, above, size)
        if i == 0:
            t = t + (size - count + torch.where(up, 2.0, -2.0)) * spacing
        elif i % 3 == 1:
            t = (low + high) / 2
        else:
            t = low + (high - low) * ((below - count) / (below - above)).clamp(0.02, 0.98)
    keep = torch.ge(rows, low, out=at_least).bool()
    rest = ((below != count) | low.isnan()).flatten().nonzero().flatten()
    if rest.numel():
        keep[rest] = _split(rows[rest], count)
    return keep.view(x.shape)


def _split(x: Tensor, count: int, own: Tensor | None = None) -> Tensor:
    """`largest` without a look at the values. own: how many of these count for each row."""
    values = x.topk(count, sorted=own is not None)[0]
    if own is None:
        t, quota = values.amin(-1, keepdim=True), count
    else:
        t, quota = values.gather(-1, (own - 1).clamp(min=0).expand(*values.shape[:-1], 1)), own
    above = x > t
    level = ~(above | (x < t))  # and NaN
    return above | (level & (level.long().cumsum(-1) <= quota - above.sum(-1, keepdim=True)))


def sparse_attention(qkv: Tensor, mask: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """See saccade.ops.sparse_attention, which checks the arguments."""
    B, N, C3 = qkv.shape
    if is_saved_graph() or is_transformed():
        with no_autocast(qkv):
            return reference.sparse_attention(qkv, mask, heads, scale)
    if not _may_look(qkv):
        out = attend(*_heads(qkv, heads), _bias(mask, N, qkv.dtype), scale)
        return out.transpose(1, 2).reshape(B, N, C3 // 3)
    if torch.is_autocast_enabled("cpu") and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype("cpu"))
    return SparseAttention.apply(qkv, mask, heads, scale)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _bias(mask: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """0 where the mask has a bit, -inf elsewhere: (B, heads, N, N), each row padded to whole words."""
    bit, byte = torch.arange(8, device=mask.device), torch.arange(256, device=mask.device)[:, None]
    table = torch.where((byte >> bit) & 1 == 1, 0.0, -float("inf")).to(dtype)  # of the eight keys of each byte
    return F.embedding(mask.contiguous().view(torch.uint8).int(), table).flatten(-2)[..., :N]


class SparseAttention(torch.autograd.Function):
    """PyTorch's own flash attention for CPUs, but what it keeps for the backward is the bits, not the floats."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, mask: Tensor, heads: int, scale: float | None) -> Tensor:
        qkv = qkv if qkv.stride(2) == 1 else qkv.contiguous()
        bias = _bias(mask, qkv.shape[1], qkv.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads(qkv, heads), attn_mask=bias, scale=scale
        )
        ctx.save_for_backward(qkv, mask, out, lse)
        ctx.rest = heads, scale
        return out.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        (qkv, mask, out, lse), (heads, scale) = ctx.saved_tensors, ctx.rest
        if wants_definition_gradients(dout):
            f = partial(reference.sparse_attention, mask=mask, heads=heads, scale=scale)
            return *definition_gradients(f, (qkv,), (True,), dout), None, None, None
        dout = dout.contiguous().unflatten(2, (heads, -1)).transpose(1, 2)
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, *_heads(qkv, heads), out, lse, 0.0, False,
            attn_mask=_bias(mask, qkv.shape[1], qkv.dtype), scale=scale,
        )  # fmt: skip
        return torch.stack([g.transpose(1, 2) for g in grads], 2).flatten(2), None, None, None
