"""Triton kernels of neighborhood attention, forward and backward, and their launchers.

A program has a tile of TH x TW queries of one residue class and one head, and walks the rectangle of keys that is the
union of their windows once, in chunks: `fwd_kernel` and `dq_kernel`. Of `dkdv_kernel` the tile is one of keys, and the
rectangle holds the queries whose windows have any of them. So each gradient is written once, by one program. Whether a
query sees a key is computed from their coordinates; where a class has as many members as the kernel (DENSE), every one
does. The maps are read where they are, with strides: an image's classes are d pixels apart, and each pixel of a head is
D contiguous elements, moved as vectors where ALIGNED.

The bias is read from its table, (2kh-1)(2kw-1) numbers per head that stay in the L1 cache. Its gradient sums dS over
all pairs at each distance. In `dbias_kernel` a program has a chunk of a rectangle with one position relative to every
tile, so that the distances in it are the same for all tiles: it computes dS for many tiles of many images and sums them
in registers. PyTorch sums the partial results and their diagonals. There are no atomics: results are deterministic. The
gradient of the bias costs another computation of the logits and of dP, which dq_kernel and dkdv_kernel compute too: 9
matrix products in all, and q, k, v and dO read once more.

A masked pair has the probability 0, but 0 · NaN is NaN. So a program that finds a NaN in its result repeats its walk
with the NaNs removed from the operands (CLEAN), leaving them in the queries that see them.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import FLOOR, LOG2E, once, precision, softmax_step
from ..tune import launch
from .eager import diagonals

NOWHERE = tl.constexpr(0x7FFF7FFF)  # row and column of no member, 16 bits each
SIZES = ["H", "W", "dh", "dw", "heads", "total", "per"]


@triton.jit
def first_key(i, n, K: tl.constexpr, S: tl.constexpr):
    """The first member in the window of member i, in a class of n."""
    return tl.minimum(tl.maximum(i // S * S + S // 2 - K // 2, 0), n - K)


@triton.jit
def first_query(j, K: tl.constexpr, S: tl.constexpr):
    """The first member that sees member j."""
    return tl.where(j < K, 0, (j - K + 1 + K // 2 - S // 2 + S - 1) // S * S)


@triton.jit
def last_query(j, n, K: tl.constexpr, S: tl.constexpr):
    """The last member that sees member j, in a class of n."""
    last = (j + K // 2 - S // 2) // S * S + S - 1
    return tl.where(j >= n - K, n - 1, tl.minimum(last, n - 1))


@triton.jit
def locate(pid, H, W, dh, dw, TH: tl.constexpr, TW: tl.constexpr):
    """Decode the number of a tile: image, first row and column of the class, its lengths, first members of the tile."""
    tiles_x = ((W + dw - 1) // dw + TW - 1) // TW
    tiles_y = ((H + dh - 1) // dh + TH - 1) // TH
    x0 = pid % tiles_x * TW
    pid = pid // tiles_x
    y0 = pid % tiles_y * TH
    pid = pid // tiles_y
    gx = pid % dw
    pid = pid // dw
    gy = pid % dh
    return (pid // dh).to(tl.int64), gy, gx, (H - gy + dh - 1) // dh, (W - gx + dw - 1) // dw, y0, x0


@triton.jit
def offsets(y, x, gy, gx, dh, dw, stride_h, stride_w, ALIGNED: tl.constexpr):
    """Offsets of members (y, x) of a class, 64-bit."""
    at = (gy + y * dh).to(tl.int64) * stride_h + (gx + x * dw).to(tl.int64) * stride_w
    return tl.multiple_of(at, ALIGNED)


@triton.jit
def load(ptr, at, on, d, D: tl.constexpr):
    return tl.load(ptr + at[:, None] + d[None, :], on[:, None] & (d < D)[None, :], 0.0)


@triton.jit
def bad_rows(x):
    """Whether a row (M, D) has a NaN or infinity."""
    x = x.to(tl.float32)
    return tl.sum(tl.where(x - x == 0.0, 0, 1), 1) > 0


@triton.jit
def within(key, first, K: tl.constexpr):
    """first <= key < first + K, for keys along one axis of a tile and the first keys of queries along the other."""
    return (key - first).to(tl.uint32) < K


@triton.jit
def keys(
    q, k_ptr, stride_t, bias_ptr, start, qy, qx, ay, ax, top, left, rows, nx, gy, gx, dh, dw, stride_h, stride_w, scale,
    KH: tl.constexpr, KW: tl.constexpr, SPAN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr, BIAS: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load a chunk of the rectangle of keys. Return keys, values, the base-2 logits, and which pairs are in a window.
    With a bias, logits of the other pairs are -inf already, or NaN where a key has one: the mask is not kept."""
    d = tl.arange(0, BLOCK_D)
    n = start + tl.arange(0, BLOCK_N)
    ky = top + n // SPAN
    kx = left + n % SPAN
    on = (n < rows * SPAN) & (kx < nx)
    at = offsets(ky, kx, gy, gx, dh, dw, stride_h, stride_w, ALIGNED)
    k = load(k_ptr, at, on, d, D)
    v = load(k_ptr + stride_t, at, on, d, D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    cell = once(tl.where(on, ky << 16 | kx, -1))
    ky = cell >> 16
    kx = cell & 0xFFFF
    if DENSE:
        seen = (cell >= 0)[None, :]
    else:
        seen = within(ky[None, :], ay[:, None], KH) & within(kx[None, :], ax[:, None], KW)
    if BIAS:
        of_q = (KH - 1 - qy) * (2 * KW - 1) + KW - 1 - qx
        of_k = ky * (2 * KW - 1) + kx
        s += tl.load(bias_ptr + (of_q[:, None] + of_k[None, :]), seen, float("-inf")) * LOG2E
    return k, v, s, seen


@triton.jit
def fwd_walk(
    q, k_ptr, stride_t, bias_ptr, qy, qx, ay, ax, top, left, rows, nx, gy, gx, dh, dw, stride_h, stride_w, scale,
    KH: tl.constexpr, KW: tl.constexpr, SPAN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr,
    CLEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.full((BLOCK_M,), FLOOR, tl.float32)
    l = tl.full((BLOCK_M,), 0, tl.float32)
    acc = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for start in range(0, rows * SPAN, BLOCK_N):
        _, v, s, seen = keys(
            q, k_ptr, stride_t, bias_ptr, start, qy, qx, ay, ax, top, left, rows, nx, gy, gx, dh, dw,
            stride_h, stride_w, scale, KH, KW, SPAN, D, BLOCK_D, BLOCK_N, BIAS, DENSE, ALIGNED, PRECISION,
        )  # fmt: skip
        if CLEAN:
            bad = bad_rows(v)
            s = tl.where(bad[None, :], float("nan"), s)
            v = tl.where(bad[:, None], 0.0, v)
        if CLEAN or not BIAS:
            s = tl.where(seen, s, float("-inf"))
        m, l, acc = softmax_step(s, v, m, l, acc, PRECISION)
    return m, l, acc


@triton.jit(do_not_specialize=SIZES)
def fwd_kernel(
    qkv_ptr, bias_ptr, out_ptr, lse_ptr,
    stride_b, stride_h, stride_w, stride_t, H, W, dh, dw, heads, scale,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, SPAN: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads  # fastest: the heads of a pixel share its cache lines
    b, gy, gx, ny, nx, y0, x0 = locate(pid // heads, H, W, dh, dw, TH, TW)
    m = tl.arange(0, TH * TW)
    d = tl.arange(0, BLOCK_D)
    qy = y0 + m // TW
    qx = x0 + m % TW
    on = (qy < ny) & (qx < nx)
    qy = tl.minimum(qy, ny - 1)  # a row beyond the map computes what the last one does: the bias table ends there
    qx = tl.minimum(qx, nx - 1)
    ay = first_key(qy, ny, KH, SH)
    ax = first_key(qx, nx, KW, SW)
    top = first_key(y0, ny, KH, SH)
    rows = first_key(tl.minimum(y0 + TH - 1, ny - 1), ny, KH, SH) + KH - top
    qkv_ptr += b * stride_b + head * D
    stride_t = tl.cast(stride_t, tl.int64)
    q = load(qkv_ptr, offsets(qy, qx, gy, gx, dh, dw, stride_h, stride_w, ALIGNED), on, d, D)
    bias_ptr += head * (2 * KH - 1) * (2 * KW - 1)
    left = first_key(x0, nx, KW, SW)
    most, total, acc = fwd_walk(
        q, qkv_ptr + stride_t, stride_t, bias_ptr, qy, qx, ay, ax, top, left, rows, nx, gy, gx, dh, dw,
        stride_h, stride_w, scale, KH, KW, SPAN, D, BLOCK_D, TH * TW, BLOCK_N, BIAS, DENSE, ALIGNED, False,
        PRECISION,
    )  # fmt: skip
    if not DENSE:
        check = tl.sum(acc)  # reducing one axis after the other ends Triton 3.6 with an assertion for sm_100
        if check != check:
            most, total, acc = fwd_walk(
                q, qkv_ptr + stride_t, stride_t, bias_ptr, qy, qx, ay, ax, top, left, rows, nx, gy, gx, dh, dw,
                stride_h, stride_w, scale, KH, KW, SPAN, D, BLOCK_D, TH * TW, BLOCK_N, BIAS, DENSE, ALIGNED, True,
                PRECISION,
            )  # fmt: skip
    y = gy + qy * dh
    x = gx + qx * dw
    tl.store(lse_ptr + (b * heads + head) * H * W + y * W + x, most + tl.log2(total), on)  # base 2, as the logits
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    C = heads * D
    at = tl.multiple_of(((b * H + y) * W + x) * C, ALIGNED)
    tl.store(out_ptr + head * D + at[:, None] + d[None, :], out, on[:, None] & (d < D)[None, :])


@triton.jit
def dq_walk(
    q, dout, lse, delta, k_ptr, stride_t, bias_ptr, qy, qx, ay, ax, top, left, rows, nx, gy, gx, dh, dw,
    stride_h, stride_w, scale,
    KH: tl.constexpr, KW: tl.constexpr, SPAN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BIAS: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr,
    CLEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dq = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for start in range(0, rows * SPAN, BLOCK_N):
        k, v, s, seen = keys(
            q, k_ptr, stride_t, bias_ptr, start, qy, qx, ay, ax, top, left, rows, nx, gy, gx, dh, dw,
            stride_h, stride_w, scale, KH, KW, SPAN, D, BLOCK_D, BLOCK_N, BIAS, DENSE, ALIGNED, PRECISION,
        )  # fmt: skip
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
        if CLEAN or not BIAS:
            ds = tl.where(seen, ds, 0.0)
        if CLEAN:
            k = tl.where(bad_rows(k)[:, None], 0.0, k)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    qkv_ptr, bias_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr,
    stride_b, stride_h, stride_w, stride_t, stride_db, stride_dh, stride_dw, H, W, dh, dw, heads, scale,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, SPAN: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    b, gy, gx, ny, nx, y0, x0 = locate(pid // heads, H, W, dh, dw, TH, TW)
    m = tl.arange(0, TH * TW)
    d = tl.arange(0, BLOCK_D)
    qy = y0 + m // TW
    qx = x0 + m % TW
    on = (qy < ny) & (qx < nx)
    qy = tl.minimum(qy, ny - 1)  # a row beyond the map computes what the last one does: the bias table ends there
    qx = tl.minimum(qx, nx - 1)
    ay = first_key(qy, ny, KH, SH)
    ax = first_key(qx, nx, KW, SW)
    top = first_key(y0, ny, KH, SH)
    rows = first_key(tl.minimum(y0 + TH - 1, ny - 1), ny, KH, SH) + KH - top
    qkv_ptr += b * stride_b + head * D
    stride_t = tl.cast(stride_t, tl.int64)
    q = load(qkv_ptr, offsets(qy, qx, gy, gx, dh, dw, stride_h, stride_w, ALIGNED), on, d, D)
    at = offsets(qy, qx, gy, gx, dh, dw, stride_dh, stride_dw, ALIGNED)
    dout = load(dout_ptr + b * stride_db + head * D, at, on, d, D)
    y = gy + qy * dh
    x = gx + qx * dw
    C = heads * D
    pixel = (b * H + y) * W + x
    out = load(out_ptr + head * D, tl.multiple_of(pixel * C, ALIGNED), on, d, D)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # dkdv_kernel and dbias_kernel read it
    at = (b * heads + head) * H * W + y * W + x
    tl.store(delta_ptr + at, delta, on)
    lse = tl.load(lse_ptr + at, on, 0.0)
    bias_ptr += head * (2 * KH - 1) * (2 * KW - 1)
    left = first_key(x0, nx, KW, SW)
    dq = dq_walk(
        q, dout, lse, delta, qkv_ptr + stride_t, stride_t, bias_ptr, qy, qx, ay, ax, top, left, rows, nx, gy, gx, dh,
        dw, stride_h, stride_w, scale, KH, KW, SPAN, D, BLOCK_D, TH * TW, BLOCK_N, BIAS, DENSE, ALIGNED, False,
        PRECISION,
    )  # fmt: skip
    if not DENSE:
        check = tl.sum(dq)
        if check != check:
            dq = dq_walk(
                q, dout, lse, delta, qkv_ptr + stride_t, stride_t, bias_ptr, qy, qx, ay, ax, top, left, rows, nx, gy,
                gx, dh, dw, stride_h, stride_w, scale, KH, KW, SPAN, D, BLOCK_D, TH * TW, BLOCK_N, BIAS, DENSE, ALIGNED,
                True, PRECISION,
            )  # fmt: skip
    dq = (dq * scale).to(dqkv_ptr.dtype.element_ty)
    at = tl.multiple_of(pixel * 3 * C, ALIGNED)
    tl.store(dqkv_ptr + head * D + at[:, None] + d[None, :], dq, on[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    qkv_ptr, bias_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr,
    stride_b, stride_h, stride_w, stride_t, stride_db, stride_dh, stride_dw, H, W, dh, dw, heads, scale,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, SPAN: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BIAS: tl.constexpr, DENSE: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    b, gy, gx, ny, nx, y0, x0 = locate(pid // heads, H, W, dh, dw, TH, TW)
    m = tl.arange(0, TH * TW)
    d = tl.arange(0, BLOCK_D)
    ky = y0 + m // TW
    kx = x0 + m % TW
    mine = (ky < ny) & (kx < nx)
    qkv_ptr += b * stride_b + head * D
    stride_t = tl.cast(stride_t, tl.int64)
    at = offsets(ky, kx, gy, gx, dh, dw, stride_h, stride_w, ALIGNED)
    k = load(qkv_ptr + stride_t, at, mine, d, D)
    v = load(qkv_ptr + 2 * stride_t, at, mine, d, D)
    dout_ptr += b * stride_db + head * D
    lse_ptr += (b * heads + head) * H * W
    delta_ptr += (b * heads + head) * H * W
    bias_ptr += head * (2 * KH - 1) * (2 * KW - 1)
    of_k = (ky + KH - 1) * (2 * KW - 1) + kx + KW - 1

    top = first_query(y0, KH, SH)
    left = first_query(x0, KW, SW)
    rows = last_query(tl.minimum(y0 + TH - 1, ny - 1), ny, KH, SH) + 1 - top
    dk = tl.full((TH * TW, BLOCK_D), 0, tl.float32)
    dv = tl.full((TH * TW, BLOCK_D), 0, tl.float32)
    for start in range(0, rows * SPAN, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        qy = top + n // SPAN
        qx = left + n % SPAN
        on = (n < rows * SPAN) & (qx < nx)
        pixel = (gy + qy * dh) * W + gx + qx * dw
        lse = once(tl.load(lse_ptr + pixel, on, float("inf")))  # exp2(s - inf) = 0 masks what is no query
        delta = once(tl.load(delta_ptr + pixel, on, 0.0))
        # A NaN reaches the keys that its query sees through p; 0 · NaN would reach all keys of the tile.
        good = (lse == lse) & (delta == delta)
        lse = tl.where(good, lse, float("nan"))
        of_q = offsets(qy, qx, gy, gx, dh, dw, stride_h, stride_w, ALIGNED)
        q = load(qkv_ptr, of_q, on & good, d, D)
        of_dout = offsets(qy, qx, gy, gx, dh, dw, stride_dh, stride_dw, ALIGNED)
        dout = load(dout_ptr, of_dout, on & good, d, D)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        if DENSE:
            seen = mine[:, None] & on[None, :]
        else:
            first = once(tl.where(on, first_key(qy, ny, KH, SH) << 16 | first_key(qx, nx, KW, SW), NOWHERE))
            seen = mine[:, None] & within(ky[:, None], (first >> 16)[None, :], KH)
            seen = seen & within(kx[:, None], (first & 0xFFFF)[None, :], KW)
        if BIAS:
            entry = once(qy * (2 * KW - 1) + qx)
            s += tl.load(bias_ptr + (of_k[:, None] - entry[None, :]), seen, 0.0) * LOG2E
        p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = tl.where(seen, p * (dp - delta[None, :]), 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    C = heads * D
    at = tl.multiple_of(((b * H + gy + ky * dh) * W + gx + kx * dw) * 3 * C, ALIGNED)
    dqkv_ptr += head * D + at[:, None] + d[None, :]
    has = mine[:, None] & (d < D)[None, :]
    tl.store(dqkv_ptr + C, (dk * scale).to(dqkv_ptr.dtype.element_ty), has)
    tl.store(dqkv_ptr + 2 * C, dv.to(dqkv_ptr.dtype.element_ty), has)


@triton.jit(do_not_specialize=SIZES)
def dbias_kernel(
    qkv_ptr, bias_ptr, lse_ptr, dout_ptr, delta_ptr, ds_ptr,
    stride_b, stride_h, stride_w, stride_t, stride_db, stride_dh, stride_dw, H, W, dh, dw, heads, total, per, scale,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    LOW_Y: tl.constexpr, LOW_X: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    """ds (parts, heads, TH · TW, ROWS · SPAN): dS summed over `per` of all the `total` tiles."""
    CHUNKS: tl.constexpr = (ROWS * SPAN + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    head = pid // CHUNKS % heads
    part = pid // CHUNKS // heads
    m = tl.arange(0, TH * TW)
    n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    qkv_ptr += head * D
    dout_ptr += head * D
    bias_ptr += head * (2 * KH - 1) * (2 * KW - 1)
    stride_t = tl.cast(stride_t, tl.int64)
    # Distances, key - query: the same in every tile.
    dy = (LOW_Y + n // SPAN)[None, :] - (m // TW)[:, None]
    dx = (LOW_X + n % SPAN)[None, :] - (m % TW)[:, None]
    exists = (n < ROWS * SPAN)[None, :] & within(dy, 1 - KH, 2 * KH - 1) & within(dx, 1 - KW, 2 * KW - 1)
    bias = tl.load(bias_ptr + (dy + KH - 1) * (2 * KW - 1) + dx + KW - 1, exists, 0.0) * LOG2E
    sums = tl.full((TH * TW, BLOCK_N), 0, tl.float32)
    for tile in range(part * per, tl.minimum((part + 1) * per, total)):
        b, gy, gx, ny, nx, own_y, own_x = locate(tile, H, W, dh, dw, TH, TW)
        y0 = tl.minimum(own_y, tl.maximum(ny - TH, 0))  # the last tiles end with the class, and skip others' queries
        x0 = tl.minimum(own_x, tl.maximum(nx - TW, 0))
        qy = y0 + m // TW
        qx = x0 + m % TW
        ky = y0 + LOW_Y + n // SPAN
        kx = x0 + LOW_X + n % SPAN
        q_on = (qy >= own_y) & (qy < ny) & (qx >= own_x) & (qx < nx)
        k_on = (n < ROWS * SPAN) & (ky >= 0) & (ky < ny) & (kx >= 0) & (kx < nx)
        at = b * stride_b + offsets(qy, qx, gy, gx, dh, dw, stride_h, stride_w, ALIGNED)
        q = load(qkv_ptr, at, q_on, d, D)
        at = b * stride_db + offsets(qy, qx, gy, gx, dh, dw, stride_dh, stride_dw, ALIGNED)
        dout = load(dout_ptr, at, q_on, d, D)
        at = b * stride_b + offsets(ky, kx, gy, gx, dh, dw, stride_h, stride_w, ALIGNED)
        k = load(qkv_ptr + stride_t, at, k_on, d, D)
        v = load(qkv_ptr + 2 * stride_t, at, k_on, d, D)
        at = (b * heads + head) * H * W + (gy + qy * dh) * W + gx + qx * dw
        lse = once(tl.load(lse_ptr + at, q_on, 0.0))
        delta = once(tl.load(delta_ptr + at, q_on, 0.0))
        ay = once(first_key(qy, ny, KH, SH))
        ax = once(first_key(qx, nx, KW, SW))
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E) + bias
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        seen = q_on[:, None] & k_on[None, :]
        seen = seen & within(ky[None, :], ay[:, None], KH) & within(kx[None, :], ax[:, None], KW)
        sums += tl.where(seen, tl.exp2(s - lse[:, None]) * (dp - delta[:, None]), 0.0)
    ds_ptr += ((part * heads + head).to(tl.int64) * (TH * TW) + m)[:, None] * (ROWS * SPAN) + n[None, :]
    tl.store(ds_ptr, sums, (n < ROWS * SPAN)[None, :])


# By bytes per element and padded head dimension: tile (rows, columns), keys or queries walked at a time, warps, stages.
# With more stages Triton would also prefetch the bias, element by element, and use twice the registers. Chosen by
# ahead-of-time compilation (saccade.ops.aot), so that nothing spills on sm_90; not timed on a GPU yet.
TILES = {
    (2, 16): (8, 8, 32, 4, 1),
    (2, 32): (8, 8, 32, 4, 1),
    (2, 64): (8, 8, 32, 4, 1),
    (2, 128): (8, 8, 32, 8, 1),
    (4, 16): (4, 8, 16, 4, 1),
    (4, 32): (4, 8, 32, 4, 1),
    (4, 64): (4, 4, 32, 4, 1),
    (4, 128): (4, 4, 16, 8, 1),
}
PROGRAMS = 1024  # at least, for sums over tiles: about 8 per multiprocessor


def _start(i: int, n: int, k: int, s: int) -> int:
    return min(max(i // s * s + s // 2 - k // 2, 0), n - k)


@functools.lru_cache(maxsize=256)
def spans(L: int, k: int, d: int, s: int, t: int) -> tuple[int, int, int, int]:
    """Return for tiles of t along an axis: the most keys in the union of the windows of a tile's queries, the most
    queries that see any of a tile's keys, and the first and the number of the members, relative to a tile that ends
    within its class (dbias_kernel), that any tile's queries see."""
    keys = queries = low = high = 0
    for n in {-(-L // d), L // d}:
        first = [_start(i, n, k, s) for i in range(n)]
        for own in range(0, n, t):
            last, origin = min(own + t, n) - 1, min(own, max(n - t, 0))
            keys = max(keys, first[last] + k - first[own])
            seeing = [i for i in range(n) if first[i] <= last and first[i] + k > own]
            queries = max(queries, seeing[-1] - seeing[0] + 1)
            low, high = min(low, first[own] - origin), max(high, first[last] + k - origin)
    if queries > t + k - 1:  # those beside an edge, whose number depends on L: one kernel for all of them
        queries = max(queries, t + k - 1 + k // 2)
    return keys, queries, low, high - low


def launch_options(itemsize: int, D: int, kernel: list[int], stride: list[int], aligned: bool, hip: bool) -> dict:
    """Return constexprs and launch options; SPAN, BIAS and DENSE are added by the caller."""
    block = max(16, triton.next_power_of_2(D))
    th, tw, walked, warps, stages = TILES[itemsize, block]
    return dict(
        KH=kernel[0],
        KW=kernel[1],
        SH=stride[0],
        SW=stride[1],
        TH=th,
        TW=tw,
        D=D,
        BLOCK_D=block,
        BLOCK_N=walked,
        ALIGNED=16 // itemsize if aligned else 1,
        num_warps=warps,
        num_stages=min(stages, 2) if hip else stages,
    )


def sum_options(options: dict, itemsize: int) -> dict:
    """Return those of dbias_kernel, whose sums need registers."""
    walked = 64 if itemsize * options["BLOCK_D"] <= 128 else 32 if itemsize * options["BLOCK_D"] <= 256 else 16
    return options | dict(BLOCK_N=walked, num_warps=8, num_stages=1)


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _is_aligned(*tensors: Tensor) -> bool:
    """Return whether all rows of channels start at multiples of 16 bytes (allocations do, views may not)."""
    return all((n * x.element_size()) % 16 == 0 for x in tensors for n in (x.storage_offset(), *x.stride()[:-1]))


def _launch(qkv: Tensor, heads: int, kernel: list[int], dilation: list[int], stride: list[int], *others: Tensor):
    """Return the options, the spans along both axes, and the number of tiles."""
    B, H, W, _, C = qkv.shape
    D, itemsize = C // heads, qkv.element_size()
    aligned = D * itemsize % 16 == 0 and _is_aligned(qkv, *others)
    options = launch_options(itemsize, D, kernel, stride, aligned, torch.version.hip is not None)
    options["PRECISION"] = precision(qkv)
    options["DENSE"] = all(k * d == L for L, k, d in zip((H, W), kernel, dilation))
    tiles, lines = B * dilation[0] * dilation[1], []
    for L, k, d, s, t in zip((H, W), kernel, dilation, stride, (options["TH"], options["TW"])):
        lines.append(spans(L, k, d, s, t))
        tiles *= triton.cdiv(triton.cdiv(L, d), t)
    return options, lines, tiles


def fwd(
    qkv: Tensor,
    bias: Tensor | None,
    heads: int,
    kernel: list[int],
    dilation: list[int],
    stride: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, W, C) and, for the backward pass, the logits' base-2 log-sum-exp (B, heads, H·W)."""
    B, H, W, _, C = qkv.shape
    out, lse = qkv.new_empty(B, H, W, C), qkv.new_empty(B, heads, H * W, dtype=torch.float32)
    qkv = _readable(qkv)
    options, (_, line), tiles = _launch(qkv, heads, kernel, dilation, stride)
    with torch.cuda.device_of(qkv):
        launch(fwd_kernel, (tiles * heads,))(
            qkv, lse if bias is None else bias.contiguous(), out, lse, *qkv.stride()[:4], H, W, *dilation, heads, scale,
            SPAN=line[0], BIAS=bias is not None, **options,
        )  # fmt: skip
    return out, lse


def bwd(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    kernel: list[int],
    dilation: list[int],
    stride: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of qkv, contiguous, and of the bias; the latter is empty if there is none."""
    H, W = qkv.shape[1:3]
    dqkv, delta = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), torch.empty_like(lse)
    dbias = lse.new_empty((0,) if bias is None else bias.shape)
    qkv, dout = _readable(qkv), _readable(dout)
    table = lse if bias is None else bias.contiguous()
    options, (column, line), tiles = _launch(qkv, heads, kernel, dilation, stride, dout)
    strides, sizes = (*qkv.stride()[:4], *dout.stride()[:3]), (H, W, *dilation, heads)
    given = options | dict(BIAS=bias is not None)
    with torch.cuda.device_of(qkv):
        grid = (tiles * heads,)
        launch(dq_kernel, grid)(qkv, table, out, lse, dout, delta, dqkv, *strides, *sizes, scale, SPAN=line[0], **given)
        launch(dkdv_kernel, grid)(qkv, table, lse, dout, delta, dqkv, *strides, *sizes, scale, SPAN=line[1], **given)
        if bias is not None:
            options = sum_options(options, qkv.element_size())
            del options["DENSE"]
            (low_y, rows), (low_x, span), tile = column[2:], line[2:], (options["TH"], options["TW"])
            chunks = triton.cdiv(rows * span, options["BLOCK_N"])
            per = triton.cdiv(tiles, max(1, PROGRAMS // (heads * chunks)))
            parts = triton.cdiv(tiles, per)
            ds = lse.new_empty(parts, heads, *tile, rows, span)
            launch(dbias_kernel, (parts * heads * chunks,))(
                qkv, table, lse, dout, delta, ds, *strides, *sizes, tiles, per, scale,
                LOW_Y=low_y, LOW_X=low_x, ROWS=rows, SPAN=span, **options,
            )  # fmt: skip
            ds = diagonals(ds.sum(0).permute(0, 2, 4, 1, 3), low_y, kernel[0])  # (heads, TW, SPAN, 2 kh - 1)
            dbias = diagonals(ds.movedim(3, 1), low_x, kernel[1]).contiguous()
    return dqkv, dbias


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """For saccade.ops.aot: every tile of TILES, for the windows and the classes of NAT and DiNAT."""
    itemsize = 4 if dtype == "fp32" else 2
    floats = dict.fromkeys(("bias_ptr", "lse_ptr", "delta_ptr", "ds_ptr"), "*fp32")
    for D in (D for size, D in TILES if size == itemsize):
        options = launch_options(itemsize, D, [7, 7], [1, 1], True, hip)
        for dense, length in ((False, 56), (True, 7)):
            (_, _, low, _), (keys, queries, _, members) = (spans(length, 7, 1, 1, options[t]) for t in ("TH", "TW"))
            given = options | dict(DENSE=dense, BIAS=True)
            for kernel, span in ((fwd_kernel, keys), (dq_kernel, keys), (dkdv_kernel, queries)):
                yield kernel, floats, given | dict(SPAN=span)
        low, rows = spans(56, 7, 1, 1, options["TH"])[2:]
        given = dict(LOW_Y=low, LOW_X=low, ROWS=rows, SPAN=members)
        yield dbias_kernel, floats, sum_options(options, itemsize) | given
