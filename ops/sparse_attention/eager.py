"""Fast PyTorch implementation, used where the Triton kernels cannot run (mainly on CPUs).

The projections are folded: (q W_qᵀ + b_q)(k W_kᵀ + b_k)ᵀ P is q G + g, where G (D, K) and g (K) of a head take one pass
over its keys. Unless the scores themselves are requested, they are computed for a few images at a time. Attention is
scaled_dot_product_attention with an additive mask, which is decoded from the bits one byte at a time by a table.
"""

from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

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

CHUNK_BYTES = 4 << 20  # bytes of scores at a time, which stay in cache during the repeated comparisons
# Comparisons of every row with a guess. After seven, 95 % of rows are done; the others need a top-k, as slow as ten.
ROUNDS = 7


class Predictor(NamedTuple):
    """The weights of the predictor; see saccade.ops.connectivity."""

    proj_q: Tensor
    proj_q_bias: Tensor
    proj_k: Tensor
    proj_k_bias: Tensor
    down: Tensor
    up: Tensor


class Selection(NamedTuple):
    """Which coefficients and basis values count; see saccade.ops.connectivity."""

    topk: int | None
    coef_threshold: float
    basis_threshold: float | None
    alive: Tensor | None


def connectivity(q: Tensor, k: Tensor, predictor: Predictor, selection: Selection) -> Tensor:
    """See saccade.ops.connectivity, which checks the arguments."""
    A = coefficients(q, k, predictor, selection)
    return A @ reference.basis(predictor.up.to(A.dtype), selection.basis_threshold)


def coefficients(q: Tensor, k: Tensor, predictor: Predictor, selection: Selection) -> Tensor:
    """Return the coefficients A of each patch query, (B, heads, N-1, K)."""
    _, heads, _, D = q.shape
    (topk, coef_threshold, _, alive), (*weights, down, _) = selection, predictor
    q, k, W_q, b_q, W_k, b_k, P = (t.to(full(q)) for t in (q[:, :, 1:], k, *weights, down[None]))
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
    q: Tensor, k: Tensor, predictor: Predictor, selection: Selection, budget: int | None, threshold: float | None
) -> Tensor:
    """See saccade.ops.predict_mask, which checks the arguments."""
    A = coefficients(q, k, predictor, selection)
    N = predictor.up.shape[0]
    U = F.pad(reference.basis(predictor.up.to(A.dtype), selection.basis_threshold), (0, -N % 32))

    def words(A: Tensor, alive: Tensor | None) -> Tensor:
        S = A @ U
        S[..., N:] = -float("inf")
        return _words(S, N, budget, threshold, alive)

    return _by_images(words, A, selection.alive, A.shape[1] * A.shape[2] * U.shape[1] * A.element_size())


def sparse_mask(scores: Tensor, budget: int | None, threshold: float | None, alive: Tensor | None) -> Tensor:
    N = scores.shape[-1]

    def words(scores: Tensor, alive: Tensor | None) -> Tensor:
        return _words(F.pad(scores.to(full(scores)), (0, -N % 32), value=-float("inf")), N, budget, threshold, alive)

    return _by_images(words, scores, alive, scores.shape[1] * scores.shape[2] * scores.shape[3] * 4)


def _by_images(f, x: Tensor, alive: Tensor | None, image_bytes: int) -> Tensor:
    if not _has_cheap_values(x):  # a loop would fix the batch size in the graph
        return f(x, alive)
    step = max(1, CHUNK_BYTES // max(1, image_bytes))
    parts = [
        f(x[b : b + step], None if alive is None else alive[b : b + step]) for b in range(0, max(1, x.shape[0]), step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _has_cheap_values(x: Tensor) -> bool:
    """Return whether the code may branch on values: they exist, and reading them does not synchronise with a GPU."""
    return x.device.type == "cpu" and not use_definition(x)


def _words(S: Tensor, N: int, budget: int | None, threshold: float | None, alive: Tensor | None) -> Tensor:
    """Select keys by the scores S (B, heads, N-1, 32 · words), -inf beyond N, and pack them into bits. CLS keeps
    all."""
    if alive is not None:
        S = S.masked_fill(~F.pad(with_cls(alive), (0, S.shape[-1] - N))[:, None, None], -float("inf"))
    if budget is None:
        keep = ~(threshold >= S)  # unlike S > threshold, it keeps NaN, so that the output is NaN
    elif alive is None:
        keep = largest(S, N, budget)
    else:
        keep = _split(S, budget, alive.sum(1).clamp(max=budget)[:, None, None, None])
    words = pack(keep)
    B, heads = S.shape[:2]
    cls = pack(torch.arange(S.shape[-1], device=S.device) < N).expand(B, heads, 1, -1)
    return torch.cat((cls, words), 2)


def pack(keep: Tensor) -> Tensor:
    """Pack bool (..., 32 · words) into int32 (..., words). Eight bytes of 0 or 1 become one byte: the product with the
    sum of 2 ** (56 - 7i) moves byte i to bit 56 + i, and no two terms overlap."""
    if use_definition(keep):
        return reference.pack(keep)
    return ((keep.view(torch.int64) * 0x0102040810204080) >> 56).to(torch.uint8).view(torch.int32)


def largest(x: Tensor, n: int, count: int) -> Tensor:
    """Return a mask of the `count` largest of the first n values of each row; the others must be -inf. Of equal values,
    the first are chosen.

    On a CPU, top-k takes 4 µs per row. Instead, this searches for a threshold t with exactly `count` values at or above
    it. The first guess is exact for normally distributed values; the second goes slightly beyond, to bracket t. Later
    guesses interpolate between the bounds of the bracket, and every third one bisects it. Rows that are not done after
    ROUNDS guesses, and rows with ties at t, use top-k.
    """
    if not _has_cheap_values(x) or x.numel() == 0:
        return _split(x, count)
    rows = x.flatten(0, -2)
    some = rows[:, :n]
    low, high = some.amin(-1, keepdim=True), rows.amax(-1, keepdim=True)
    below, above = torch.full_like(low, n), torch.zeros_like(low)  # the numbers of values >= low, and of values > high
    at_least = torch.empty_like(rows)  # not bool: comparisons into the dtype of their input are six times faster
    z = NormalDist().inv_cdf(1 - (count - 0.5) / n)
    mean = some.mean(-1, keepdim=True)
    deviation = (torch.linalg.vector_norm(some, dim=-1, keepdim=True).square() / n - mean * mean).clamp(min=0).sqrt()
    spacing = deviation / (n * NormalDist().pdf(z))  # between the values around t
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
    """Do the same as `largest` without branching on values. own: the count per row, at most `count`."""
    values = x.topk(count, sorted=own is not None)[0]
    if own is None:
        t, quota = values.amin(-1, keepdim=True), count
    else:
        t, quota = values.gather(-1, (own - 1).clamp(min=0).expand(*values.shape[:-1], 1)), own
    above = x > t
    level = ~(above | (x < t))  # equal to t, or NaN
    return above | (level & (level.long().cumsum(-1) <= quota - above.sum(-1, keepdim=True)))


def sparse_attention(qkv: Tensor, mask: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """See saccade.ops.sparse_attention, which checks the arguments."""
    B, N, C3 = qkv.shape
    if is_saved_graph() or is_transformed():
        with no_autocast(qkv):
            return reference.sparse_attention(qkv, mask, heads, scale)
    if not _has_cheap_values(qkv):
        out = attend(*_heads(qkv, heads), _bias(mask, N, qkv.dtype), scale)
        return out.transpose(1, 2).reshape(B, N, C3 // 3)
    if torch.is_autocast_enabled("cpu") and qkv.dtype != torch.float64:
        qkv = qkv.to(torch.get_autocast_dtype("cpu"))
    return SparseAttention.apply(qkv, mask, heads, scale)


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    return qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _bias(mask: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """Return the additive mask (B, heads, N, N), 0 where a bit is set and -inf elsewhere; rows are padded to words."""
    bit, byte = torch.arange(8, device=mask.device), torch.arange(256, device=mask.device)[:, None]
    table = torch.where((byte >> bit) & 1 == 1, 0.0, -float("inf")).to(dtype)  # for the eight keys of each byte
    return F.embedding(mask.contiguous().view(torch.uint8).int(), table).flatten(-2)[..., :N]


class SparseAttention(torch.autograd.Function):
    """PyTorch's flash attention for CPUs, which saves the bits for the backward pass instead of the additive mask."""

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
