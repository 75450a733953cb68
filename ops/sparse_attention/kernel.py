"""Triton kernels of sparse attention, forward and backward, and of its mask; and their launchers.

The attention is flash attention under a bit mask, with one word of 32 keys per query and tile of keys: 28 bytes for the
197 keys of a query, where float32 takes 788. In `fwd_kernel` and `dq_kernel` a program holds queries and loops over
keys, in `dkdv_kernel` it holds keys and loops over queries. Tiles of keys that none of the program's queries keeps are
skipped. Gathering the keys of each query would save arithmetic, but a tensor core needs 16 queries with the same keys.

The mask takes two kernels. `basis_kernel` folds the predictor of a head, (q W_qᵀ + b_q)(k W_kᵀ + b_k)ᵀ P, into q G + g,
in one pass over its keys. `mask_kernel` computes the softmax over K coefficients of a few queries from G. It takes the
largest coefficients one by one and adds each, times its row of U, to the scores. They stay in the registers of one warp
as whole rows, so that a sum over a row takes few instructions. Then it finds the budget-th largest score by bisection:
floats are ordered like their bits. It reads q and writes the bits; the scores are never in memory. This is in float32,
without tensor cores. A query with a NaN in its coefficients has NaN in all scores, and a NaN is above all numbers: it
keeps keys, whatever max does with it.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..tiles import FLOOR, LOG2E, once, precision, softmax_step
from ..tune import launch
from .eager import Predictor, Selection
from .reference import basis, with_cls

WORD = tl.constexpr(32)
LOWEST = tl.constexpr(-(2**31))
# Not specialised on: a size that is divisible by 16 would recompile the kernel.
SIZES = ["heads", "N", "C", "c", "K", "rounds", "budget"]


@triton.jit
def program(heads, tiles):
    """Return a program's image, head and tile. Heads are the fastest index: those of a token share its cache lines."""
    pid = tl.program_id(0)
    return (pid // heads // tiles).to(tl.int64), pid % heads, pid // heads % tiles


@triton.jit
def rows_of(tile, N, BLOCK: tl.constexpr):
    """Return the tokens of a tile, 64-bit because they are multiplied by strides, and a mask of those that exist."""
    n = tile * BLOCK + tl.arange(0, BLOCK)
    return tl.where(n < N, n, 0).to(tl.int64), n < N


@triton.jit
def unpack_bits(word, WIDTH: tl.constexpr):
    """Unpack words (M,) of WIDTH bits to (M, WIDTH)."""
    return ((word[:, None] >> tl.arange(0, WIDTH)[None, :].to(word.dtype)) & 1) != 0


@triton.jit(do_not_specialize=SIZES)
def fwd_kernel(
    qkv_ptr, mask_ptr, out_ptr, lse_ptr, stride_b, stride_n, heads, N, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    words = (N + WORD - 1) // WORD
    b, head, tile = program(heads, (N + BLOCK_M - 1) // BLOCK_M)
    n, row = rows_of(tile, N, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    C = heads * D
    mine = row[:, None] & (d < D)[None, :]
    q_ptr = qkv_ptr + b * stride_b + head * D
    q = tl.load(q_ptr + (n * stride_n)[:, None] + d[None, :], mine, 0.0)
    first = (b * heads + head) * N
    mask_ptr += (first + n) * words

    m = tl.full((BLOCK_M,), FLOOR, tl.float32)
    l = tl.full((BLOCK_M,), 0, tl.float32)
    acc = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for j in range(words):
        word = tl.load(mask_ptr + j, row, 0)
        if tl.max((word != 0).to(tl.int32), 0) != 0:
            i, ok = rows_of(j, N, WORD)
            inside = ok[:, None] & (d < D)[None, :]
            key = (i * stride_n)[:, None] + d[None, :]
            k = tl.load(q_ptr + C + key, inside, 0.0)
            v = tl.load(q_ptr + 2 * C + key, inside, 0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            s = tl.where(unpack_bits(word, WORD) & ok[None, :], s, float("-inf"))
            m, l, acc = softmax_step(s, v, m, l, acc, PRECISION)
    none = l == 0  # no key: the output is 0, and so is exp2(s - inf) in the backward pass
    tl.store(lse_ptr + first + n, tl.where(none, float("inf"), m + tl.log2(l)), row)
    out = acc / tl.where(none, 1.0, l)[:, None]
    out_ptr += (b * N + n)[:, None] * C + head * D + d[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mine)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    qkv_ptr, mask_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr, stride_b, stride_n, stride_db, stride_dn,
    heads, N, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    words = (N + WORD - 1) // WORD
    b, head, tile = program(heads, (N + BLOCK_M - 1) // BLOCK_M)
    n, row = rows_of(tile, N, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    C = heads * D
    mine = row[:, None] & (d < D)[None, :]
    q_ptr = qkv_ptr + b * stride_b + head * D
    q = tl.load(q_ptr + (n * stride_n)[:, None] + d[None, :], mine, 0.0)
    dout = tl.load(dout_ptr + b * stride_db + head * D + (n * stride_dn)[:, None] + d[None, :], mine, 0.0)
    out = tl.load(out_ptr + (b * N + n)[:, None] * C + head * D + d[None, :], mine, 0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    first = (b * heads + head) * N
    tl.store(delta_ptr + first + n, delta, row)
    lse = tl.load(lse_ptr + first + n, row, float("inf"))
    mask_ptr += (first + n) * words

    dq = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for j in range(words):
        word = tl.load(mask_ptr + j, row, 0)
        if tl.max((word != 0).to(tl.int32), 0) != 0:
            i, ok = rows_of(j, N, WORD)
            inside = ok[:, None] & (d < D)[None, :]
            key = (i * stride_n)[:, None] + d[None, :]
            k = tl.load(q_ptr + C + key, inside, 0.0)
            v = tl.load(q_ptr + 2 * C + key, inside, 0.0)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
            dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
            ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
            ds = tl.where(unpack_bits(word, WORD) & ok[None, :], ds, 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dqkv_ptr += (b * N + n)[:, None] * (3 * C) + head * D + d[None, :]
    tl.store(dqkv_ptr, (dq * scale).to(dqkv_ptr.dtype.element_ty), mine)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    qkv_ptr, mask_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr, stride_b, stride_n, stride_db, stride_dn,
    heads, N, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    words = (N + WORD - 1) // WORD
    b, head, tile = program(heads, (N + BLOCK_M - 1) // BLOCK_M)
    n, row = rows_of(tile, N, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    C = heads * D
    mine = row[:, None] & (d < D)[None, :]
    q_ptr = qkv_ptr + b * stride_b + head * D
    dout_ptr += b * stride_db + head * D
    key = (n * stride_n)[:, None] + d[None, :]
    k = tl.load(q_ptr + C + key, mine, 0.0)
    v = tl.load(q_ptr + 2 * C + key, mine, 0.0)
    first = (b * heads + head) * N
    place = tile * (BLOCK_M // WORD)  # index of this tile's first word in a row of the mask

    dk = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    dv = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for j in range(words):  # there are as many tiles of queries as words of keys
        i, ok = rows_of(j, N, WORD)
        word = tl.load(mask_ptr + (first + i) * words + place, ok, 0).to(tl.uint32).to(tl.uint64)
        if BLOCK_M > WORD:
            next = tl.load(mask_ptr + (first + i) * words + place + 1, ok & (place + 1 < words), 0)
            word |= next.to(tl.uint32).to(tl.uint64) << 32
        if tl.max((word != 0).to(tl.int32), 0) != 0:
            see = tl.trans(unpack_bits(word, BLOCK_M))
            lse = once(tl.load(lse_ptr + first + i, ok, float("inf")))  # exp2(s - inf) = 0 masks lanes without a query
            delta = once(tl.load(delta_ptr + first + i, ok, 0.0))
            # A NaN query reaches the keys that it keeps, through p and ds, but must not reach others as 0 · NaN.
            inside = (ok & (lse == lse))[:, None] & (d < D)[None, :]
            q = tl.load(q_ptr + (i * stride_n)[:, None] + d[None, :], inside, 0.0)
            dout = tl.load(dout_ptr + (i * stride_dn)[:, None] + d[None, :], inside, 0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.where(see, tl.exp2(s - lse[None, :]), 0.0)
            dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
            ds = tl.where(see, p * (dp - delta[None, :]), 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dqkv_ptr += (b * N + n)[:, None] * (3 * C) + head * D + d[None, :]
    tl.store(dqkv_ptr + C, (dk * scale).to(dqkv_ptr.dtype.element_ty), mine)
    tl.store(dqkv_ptr + 2 * C, dv.to(dqkv_ptr.dtype.element_ty), mine)


@triton.jit
def matrix(x_ptr, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Load a whole contiguous matrix, in float32 and padded with zeros."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (r < rows)[:, None] & (c < cols)[None, :]
    return tl.load(x_ptr + r[:, None] * cols + c[None, :], inside, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def basis_kernel(
    k_ptr, pq_ptr, pqb_ptr, pk_ptr, pkb_ptr, down_ptr, alive_ptr, fold_ptr, stride_b, stride_h, stride_n,
    heads, N, c, K, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, ALIVE: tl.constexpr,
):  # fmt: skip
    b, head, tile = program(heads, (K + BLOCK_K - 1) // BLOCK_K)
    d, kk, cc = tl.arange(0, BLOCK_D), tile * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_C)
    k_ptr += b * stride_b + head.to(tl.int64) * stride_h
    kP = tl.full((BLOCK_D, BLOCK_K), 0, tl.float32)
    sums = tl.full((BLOCK_K,), 0, tl.float32)  # column sums of P
    for j in range((N + WORD - 1) // WORD):
        i, ok = rows_of(j, N, WORD)
        if ALIVE:
            ok = ok & (tl.load(alive_ptr + b * N + i, ok, 0) != 0)
        k = tl.load(k_ptr + (i * stride_n)[:, None] + d[None, :], ok[:, None] & (d < D)[None, :], 0.0).to(tl.float32)
        P = tl.load(down_ptr + i[:, None] * K + kk[None, :], ok[:, None] & (kk < K)[None, :], 0.0).to(tl.float32)
        kP = tl.dot(tl.trans(k), P, kP, input_precision="ieee")
        sums += tl.sum(P, 0)
    W_k, b_k = matrix(pk_ptr, c, D, BLOCK_C, BLOCK_D), tl.load(pkb_ptr + cc, cc < c, 0.0).to(tl.float32)
    Kd = tl.dot(W_k, kP, input_precision="ieee") + b_k[:, None] * sums[None, :]
    W_q, b_q = matrix(pq_ptr, c, D, BLOCK_C, BLOCK_D), tl.load(pqb_ptr + cc, cc < c, 0.0).to(tl.float32)
    G = tl.dot(tl.trans(W_q), Kd, input_precision="ieee") * scale
    g = tl.sum(b_q[:, None] * Kd, 0) * scale
    line = (K + BLOCK_K - 1) // BLOCK_K * BLOCK_K  # lines are padded with zeros
    fold_ptr += (b * heads + head) * (D + 1) * line  # G (D, K), then g (K)
    tl.store(fold_ptr + d[:, None] * line + kk[None, :], G, (d < D)[:, None])
    tl.store(fold_ptr + D * line + kk, g)


@triton.jit
def ordered(S, SIGNED: tl.constexpr):
    """Return integers in the order of the floats S, of which none is negative unless SIGNED."""
    x = S.to(tl.int32, bitcast=True)
    if SIGNED:
        x ^= (x >> 31) & 0x7FFFFFFF
    return x


@triton.jit(do_not_specialize=SIZES)
def mask_kernel(
    q_ptr, fold_ptr, up_ptr, alive_ptr, mask_ptr, stride_b, stride_h, stride_n,
    heads, N, K, rounds, budget, COEF_THRESHOLD: tl.constexpr, THRESHOLD: tl.constexpr,
    ALIVE: tl.constexpr, SIGNED: tl.constexpr,
    D: tl.constexpr, LINE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    b, head, tile = program(heads, (N + BLOCK_M - 1) // BLOCK_M)
    n, row = rows_of(tile, N, BLOCK_M)
    kk, col = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    q_ptr += b * stride_b + head.to(tl.int64) * stride_h
    fold_ptr += (b * heads + head) * (D + 1) * LINE
    E = tl.full((BLOCK_M, BLOCK_K), 0, tl.float32)  # in base 2
    for start in tl.static_range(0, D, 16):  # in small steps, since fp32 operands take many registers
        d = start + tl.arange(0, 16)
        q = tl.load(q_ptr + (n * stride_n)[:, None] + d[None, :], row[:, None] & (d < D)[None, :], 0.0).to(tl.float32)
        G = tl.load(fold_ptr + d[:, None] * LINE + kk[None, :], (d < D)[:, None] & (kk < LINE)[None, :], 0.0)
        E = tl.dot(q, G, E, input_precision="ieee")
    E += tl.load(fold_ptr + D * LINE + kk, kk < LINE, 0.0)[None, :]
    visible = col < N
    if ALIVE:
        E = tl.where((tl.load(alive_ptr + b * N + n, row, 0) != 0)[:, None], E, 0.0)
        there = tl.load(alive_ptr + b * N + col, visible, 0) != 0
        budget = tl.minimum(budget, tl.sum(there.to(tl.int32), 0) - 1)  # CLS is not a patch
        visible = visible & there
    broken = tl.max(((E != E) & (kk < K)[None, :]).to(tl.int32), 1) != 0  # comparisons with NaN would pick no key
    E = tl.where((kk < K)[None, :], E, float("-inf"))
    A = tl.exp2(E - tl.max(E, 1)[:, None])
    A = tl.where((kk < K)[None, :], A / tl.sum(A, 1)[:, None], -1.0)

    S = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    A = A.to(tl.int32, bitcast=True)  # in the same order; one instruction finds the largest integer of a warp
    for _ in range(rounds):  # add the largest remaining coefficient times its row of U
        a = tl.max(A, 1)
        at = tl.min(tl.where(a[:, None] == A, kk[None, :], BLOCK_K), 1)
        U = tl.load(up_ptr + at[:, None] * BLOCK_N + col[None, :])
        coef = a.to(tl.float32, bitcast=True)
        S += tl.where(coef <= COEF_THRESHOLD, 0.0, coef)[:, None] * U
        A = tl.where(kk[None, :] == at[:, None], LOWEST, A)

    S = tl.where(broken[:, None] | (S != S), float("nan"), S)  # without a sign, above all numbers

    if THRESHOLD is None:
        x = tl.where(visible[None, :], ordered(S, SIGNED), LOWEST if SIGNED else -1)
        # `kept` scores, `budget` or more, are >= low, fewer are >= high. `width` is the distance of low and high, which
        # may take 32 bits, and 0 as soon as exactly `budget` are kept.
        low = tl.min(tl.where(visible[None, :], x, -(LOWEST + 1)), 1)
        high = tl.max(x, 1) + 1
        kept = low * 0 + N  # or fewer, if some are not alive: then `budget` is less, too
        width = tl.where(kept == budget, 0, (high - low).to(tl.uint32, bitcast=True))
        while tl.max(width, 0) > 1:
            middle = low + (width >> 1).to(tl.int32, bitcast=True)
            if SIGNED:
                count = tl.sum((x >= middle[:, None]).to(tl.int32), 1)
            else:  # the sign of a difference, which cannot overflow: two instructions instead of three
                below = (middle[:, None] - 1 - x).to(tl.uint32, bitcast=True)
                count = tl.sum((below >> 31).to(tl.int32), 1)
            enough = count >= budget
            kept = tl.where(enough, count, kept)
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
            width = tl.where(kept == budget, 0, (high - low).to(tl.uint32, bitcast=True))
        keep = x >= low[:, None]
        if tl.max(kept, 0) > budget:  # of those equal to low, keep the first
            above = x > low[:, None]
            quota = budget - tl.sum(above.to(tl.int32), 1)
            keep = above | (keep & (tl.cumsum((x == low[:, None]).to(tl.int32), 1) <= quota[:, None]))
    else:
        keep = (S > THRESHOLD) | (S != S)
    keep = (keep & visible[None, :]) | ((n == 0)[:, None] & (col < N)[None, :])  # CLS keeps all
    bits = tl.reshape(keep.to(tl.int32), (BLOCK_M, BLOCK_N // WORD, WORD)) << tl.arange(0, WORD)[None, None, :]
    words = (N + WORD - 1) // WORD
    w = tl.arange(0, BLOCK_N // WORD)
    mask_ptr += ((b * heads + head) * N + n)[:, None] * words + w[None, :]
    tl.store(mask_ptr, tl.sum(bits, 2), row[:, None] & (w < words)[None, :])


# By element size in bytes and head dim: rows of the program's tile, warps, stages. Chosen from the registers and shared
# memory of ahead-of-time compilation (saccade.ops.aot); not yet timed on a GPU. Loops advance by words of 32.
TILES = {
    (2, 32): (64, 4, 2),
    (2, 64): (64, 4, 2),
    (2, 128): (64, 8, 2),
    (4, 32): (32, 8, 2),  # fp32 products take many registers: every tile for (4, 128) spills
    (4, 64): (32, 8, 2),
}
STEP = 32  # columns of G per program of basis_kernel
SCORES = 1024  # per program of mask_kernel, which is one warp: 32 registers per thread


def attention_options(itemsize: int, D: int) -> dict:
    BLOCK_D = max(16, triton.next_power_of_2(D))
    rows, warps, stages = TILES[itemsize, max(32, BLOCK_D)]
    return dict(D=D, BLOCK_D=BLOCK_D, BLOCK_M=rows, num_warps=warps, num_stages=stages)


def basis_options(D: int, c: int) -> dict:
    BLOCK_D, BLOCK_C = (max(16, triton.next_power_of_2(n)) for n in (D, c))
    # All of W_q and W_k is in registers, in float32: 64 x 64 spill with four warps.
    return dict(D=D, BLOCK_D=BLOCK_D, BLOCK_C=BLOCK_C, BLOCK_K=STEP, num_warps=8 if BLOCK_C * BLOCK_D > 2048 else 4)


def mask_options(D: int, K: int, N: int) -> dict:
    BLOCK_K, BLOCK_N = (max(32, triton.next_power_of_2(n)) for n in (K, N))
    rows, line = max(1, min(4, SCORES // BLOCK_N)), triton.cdiv(K, STEP) * STEP
    return dict(D=D, LINE=line, BLOCK_K=BLOCK_K, BLOCK_M=rows, BLOCK_N=BLOCK_N, num_warps=1)


def fwd(qkv: Tensor, mask: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, C) and, for the backward pass, the base-2 log-sum-exp of the logits, (B, heads, N)."""
    B, N, C3 = qkv.shape
    out = qkv.new_empty(B, N, C3 // 3)
    lse = qkv.new_empty(B, heads, N, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if qkv.stride(2) != 1:
        qkv = qkv.contiguous()
    options = attention_options(qkv.element_size(), C3 // 3 // heads) | dict(PRECISION=precision(qkv))
    grid = (B * heads * triton.cdiv(N, options["BLOCK_M"]),)
    with torch.cuda.device_of(qkv):
        launch(fwd_kernel, grid)(qkv, mask.contiguous(), out, lse, *qkv.stride()[:2], heads, N, scale, **options)
    return out, lse


def bwd(dout: Tensor, qkv: Tensor, mask: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float) -> Tensor:
    """Return the gradient of qkv, (B, N, 3C) contiguous. Each element is written once, by one program."""
    B, N, C3 = qkv.shape
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return dqkv
    if qkv.stride(2) != 1:
        qkv = qkv.contiguous()
    if dout.stride(2) != 1:
        dout = dout.contiguous()
    mask, delta = mask.contiguous(), torch.empty_like(lse)
    options = attention_options(qkv.element_size(), C3 // 3 // heads) | dict(PRECISION=precision(qkv))
    grid = (B * heads * triton.cdiv(N, options["BLOCK_M"]),)
    strides = *qkv.stride()[:2], *dout.stride()[:2]
    with torch.cuda.device_of(qkv):
        launch(dq_kernel, grid)(qkv, mask, out, lse, dout, delta, dqkv, *strides, heads, N, scale, **options)
        launch(dkdv_kernel, grid)(qkv, mask, lse, dout, delta, dqkv, *strides, heads, N, scale, **options)
    return dqkv


def mask(
    q: Tensor, k: Tensor, predictor: Predictor, selection: Selection, budget: int | None, threshold: float | None
) -> Tensor:
    """Return the bit mask, (B, heads, N, ceil(N / 32)) int32."""
    topk, coef_threshold, basis_threshold, alive = selection
    (B, heads, N, D), K, c = q.shape, predictor.down.shape[1], predictor.proj_q.shape[0]
    bits = torch.empty(B, heads, N, triton.cdiv(N, 32), dtype=torch.int32, device=q.device)
    if bits.numel() == 0:
        return bits
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    fold_options, options = basis_options(D, c), mask_options(D, K, N)
    U = pad(basis(predictor.up.float(), basis_threshold), (0, options["BLOCK_N"] - N))
    fold = q.new_empty(B, heads, D + 1, options["LINE"], dtype=torch.float32)
    there = bits if alive is None else with_cls(alive).to(torch.uint8)  # not read if None
    weights = (t.contiguous() for t in predictor[:5])  # all but `up`
    scale = heads**-0.5 * LOG2E.value
    with torch.cuda.device_of(q):
        launch(basis_kernel, (B * heads * triton.cdiv(K, fold_options["BLOCK_K"]),))(
            k, *weights, there, fold, *k.stride()[:3], heads, N, c, K, scale,
            ALIVE=alive is not None, **fold_options,
        )  # fmt: skip
        launch(mask_kernel, (B * heads * triton.cdiv(N, options["BLOCK_M"]),))(
            q, fold, U, there, bits, *q.stride()[:3], heads, N, K, min(topk or K, K), budget or 0,
            COEF_THRESHOLD=coef_threshold, THRESHOLD=threshold, ALIVE=alive is not None,
            SIGNED=basis_threshold is None, **options,
        )  # fmt: skip
    return bits


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: every tile of TILES; the masks of DeiT-S at 224² and 384², and the largest."""
    itemsize = 4 if dtype == "fp32" else 2
    floats = dict(lse_ptr="*fp32", delta_ptr="*fp32", mask_ptr="*i32")
    for D in (D for size, D in TILES if size == itemsize):
        for kernel in (fwd_kernel, dq_kernel, dkdv_kernel):
            yield kernel, floats, attention_options(itemsize, D)
    pointers = dict(fold_ptr="*fp32", up_ptr="*fp32", alive_ptr="*u8", mask_ptr="*i32")
    for D, c, K, N in [(64, 32, 32, 197), (64, 32, 96, 577), (64, 64, 128, 1024)]:
        for alive in (False, True):
            yield basis_kernel, pointers, dict(ALIVE=alive) | basis_options(D, c)
            rule = dict(COEF_THRESHOLD=0.0, THRESHOLD=None, ALIVE=alive, SIGNED=alive)
            yield mask_kernel, pointers, rule | mask_options(D, K, N)
