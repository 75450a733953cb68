"""Triton kernels of window attention, forward and backward, and their launchers.

A program holds a tile of one window's tokens for one head and loops over the tokens of that window: `fwd_kernel` and
`dq_kernel` hold queries and loop over keys, `dkdv_kernel` holds keys and loops over queries. The position of a token on
the map is computed from its index in the window, including roll and padding (`tokens`): the map is read in place, and
no output is written that would be cropped. Padding tokens have the given value, which is loaded once.

A window that fits in one tile, such as the 49 tokens of most models in half precision, needs no loop, and its backward
pass no log-sum-exp: a single kernel, `bwd_kernel`, reads q, k, v and dO once and writes all three gradients. That is 7
maps in total, compared with 9 reads and 3 writes of the other two kernels.

The gradient of the bias is dS, summed over all windows and along its diagonals, without atomics. A program of
`bwd_kernel` processes several windows and keeps their N x N sum in registers; a program of `dbias_kernel` owns one
vertical distance and sums w x w over all pairs of rows at that distance and over some windows. So the buffers have
(2h - 1) w² elements per head, or N² if N is at most 64. PyTorch sums their diagonals.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import FLOOR, LOG2E, once, precision, softmax_step
from ..tune import launch
from .eager import diagonals, sum_diagonals

SIZES = ["B", "H", "W", "h", "w", "s_h", "s_w", "heads"]


@triton.jit
def divide(n, d):
    """Return n // d for 0 <= n < 2**20: an estimate in fp32, which may be one off, and its correction."""
    q = ((n.to(tl.float32) + 0.5) * (1.0 / d.to(tl.float32))).to(tl.int32)
    q -= (q * d > n).to(tl.int32)
    return q + (n - q * d >= d).to(tl.int32)


@triton.jit
def tokens(n, within, window, H, W, h, w, s_h, s_w, KW: tl.constexpr):
    """Return for tokens n of a window: row and column on the map, 64-bit because they are multiplied by strides;
    whether they are on the map, not its padding; on which side of the seams they are, -1 if not `within` the window;
    and the offset that their position adds to an index of the bias."""
    columns = (W + w - 1) // w
    n = tl.where(within, n, 0)
    row = n // KW if KW else divide(n, w)
    column = n - row * w
    y = window // columns * h + row + s_h
    x = window % columns * w + column + s_w
    height = (H + h - 1) // h * h
    wrapped_y = y >= height
    wrapped_x = x >= columns * w
    y = tl.where(wrapped_y, y - height, y)
    x = tl.where(wrapped_x, x - columns * w, x)
    side = tl.where(within, 2 * wrapped_y.to(tl.int32) + wrapped_x.to(tl.int32), -1)
    at = once(row * (2 * w - 1) + column)
    return y.to(tl.int64), x.to(tl.int64), within & (y < H) & (x < W), once(side), at


@triton.jit
def load(ptr, at, on, side, d, pad_ptr, D: tl.constexpr, PAD: tl.constexpr):
    """Load a tile of queries, keys or values from the map; with PAD, padding tokens have the values at pad_ptr."""
    x = tl.load(ptr + at[:, None] + d[None, :], on[:, None] & (d < D)[None, :], 0.0)
    if PAD:  # loaded for every tile, since values kept over the loop would take registers
        x = tl.where(((side >= 0) & (on == 0))[:, None], tl.load(pad_ptr + d, d < D, 0.0)[None, :], x)
    return x


@triton.jit
def logits(q, k, q_side, k_side, q_at, k_at, bias_ptr, middle, scale, BIAS: tl.constexpr, PRECISION: tl.constexpr):
    """Return the logits of pairs (M, N) in base 2; -inf for pairs on two sides of a seam."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
    if BIAS:
        s += tl.load(bias_ptr + (q_at[:, None] - k_at[None, :] + middle)) * LOG2E
    return tl.where(q_side[:, None] == k_side[None, :], s, float("-inf"))


@triton.jit
def program(pid, H, W, h, w, heads, BLOCK: tl.constexpr):
    """Return a program's head, the first token of its tile, its window and its image."""
    head = pid % heads
    pid = pid // heads
    tiles = (h * w + BLOCK - 1) // BLOCK
    first = pid % tiles * BLOCK
    pid = pid // tiles
    windows = ((H + h - 1) // h) * ((W + w - 1) // w)
    return head, first, pid % windows, (pid // windows).to(tl.int64)


@triton.jit(do_not_specialize=SIZES)
def fwd_kernel(
    qkv_ptr, pad_ptr, bias_ptr, out_ptr, lse_ptr,
    stride_b, stride_h, stride_w, stride_t,
    H, W, h, w, s_h, s_w, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    if KH:
        h, w = KH, KW
    head, first, window, b = program(tl.program_id(0), H, W, h, w, heads, BLOCK_M)
    N = h * w
    C = heads * D
    n = first + tl.arange(0, BLOCK_M)
    y, x, on, side, at = tokens(n, n < N, window, H, W, h, w, s_h, s_w, KW)
    d = tl.arange(0, BLOCK_D)
    qkv_ptr += b * stride_b + head * D
    stride_t = tl.cast(stride_t, tl.int64)
    bias_ptr += head * (2 * h - 1) * (2 * w - 1)
    middle = (h - 1) * (2 * w - 1) + w - 1
    pad_ptr += head * D + C
    q = load(qkv_ptr, y * stride_h + x * stride_w, on, side, d, pad_ptr, D, False)

    m = tl.full((BLOCK_M,), FLOOR, tl.float32)
    l = tl.full((BLOCK_M,), 0, tl.float32)
    acc = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for start in range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        ky, kx, k_on, k_side, k_at = tokens(i, i < N, window, H, W, h, w, s_h, s_w, KW)
        key = ky * stride_h + kx * stride_w
        k = load(qkv_ptr + stride_t, key, k_on, k_side, d, pad_ptr, D, PAD)
        v = load(qkv_ptr + 2 * stride_t, key, k_on, k_side, d, pad_ptr + C, D, PAD)
        s = logits(q, k, side, k_side, at, k_at, bias_ptr, middle, scale, BIAS, PRECISION)
        m, l, acc = softmax_step(s, v, m, l, acc, PRECISION)
    pixel = (b * H + y) * W + x
    tl.store(lse_ptr + (b * heads + head) * H * W + y * W + x, m + tl.log2(l), on)  # base 2, like the logits
    out = (acc / l[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (pixel * C + head * D)[:, None] + d[None, :], out, on[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    qkv_ptr, pad_ptr, bias_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr,
    stride_b, stride_h, stride_w, stride_t, stride_db, stride_dh, stride_dw,
    H, W, h, w, s_h, s_w, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    if KH:
        h, w = KH, KW
    head, first, window, b = program(tl.program_id(0), H, W, h, w, heads, BLOCK_M)
    N = h * w
    C = heads * D
    n = first + tl.arange(0, BLOCK_M)
    y, x, on, side, at = tokens(n, n < N, window, H, W, h, w, s_h, s_w, KW)
    d = tl.arange(0, BLOCK_D)
    mine = on[:, None] & (d < D)[None, :]
    qkv_ptr += b * stride_b + head * D
    stride_t = tl.cast(stride_t, tl.int64)
    bias_ptr += head * (2 * h - 1) * (2 * w - 1)
    middle = (h - 1) * (2 * w - 1) + w - 1
    pad_ptr += head * D + C
    q = load(qkv_ptr, y * stride_h + x * stride_w, on, side, d, pad_ptr, D, False)
    dout = load(dout_ptr + b * stride_db + head * D, y * stride_dh + x * stride_dw, on, side, d, pad_ptr, D, False)
    pixel = (b * H + y) * W + x
    out = tl.load(out_ptr + (pixel * C + head * D)[:, None] + d[None, :], mine, 0.0)
    row = (b * heads + head) * H * W + y * W + x
    lse = tl.load(lse_ptr + row, on, 0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # stored for the other kernels, so this one runs first
    tl.store(delta_ptr + row, delta, on)

    dq = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for start in range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        ky, kx, k_on, k_side, k_at = tokens(i, i < N, window, H, W, h, w, s_h, s_w, KW)
        key = ky * stride_h + kx * stride_w
        k = load(qkv_ptr + stride_t, key, k_on, k_side, d, pad_ptr, D, PAD)
        v = load(qkv_ptr + 2 * stride_t, key, k_on, k_side, d, pad_ptr + C, D, PAD)
        s = logits(q, k, side, k_side, at, k_at, bias_ptr, middle, scale, BIAS, PRECISION)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dqkv_ptr += (pixel * 3 * C + head * D)[:, None] + d[None, :]
    tl.store(dqkv_ptr, (dq * scale).to(dqkv_ptr.dtype.element_ty), mine)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    qkv_ptr, pad_ptr, bias_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr, dpad_ptr,
    stride_b, stride_h, stride_w, stride_t, stride_db, stride_dh, stride_dw,
    H, W, h, w, s_h, s_w, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    if KH:
        h, w = KH, KW
    pid = tl.program_id(0)
    head, first, window, b = program(pid, H, W, h, w, heads, BLOCK_M)
    N = h * w
    C = heads * D
    n = first + tl.arange(0, BLOCK_M)
    y, x, on, side, at = tokens(n, n < N, window, H, W, h, w, s_h, s_w, KW)
    d = tl.arange(0, BLOCK_D)
    qkv_ptr += b * stride_b + head * D
    stride_t = tl.cast(stride_t, tl.int64)
    dout_ptr += b * stride_db + head * D
    bias_ptr += head * (2 * h - 1) * (2 * w - 1)
    middle = (h - 1) * (2 * w - 1) + w - 1
    lse_ptr += (b * heads + head) * H * W
    delta_ptr += (b * heads + head) * H * W
    pad_ptr += head * D + C
    key = y * stride_h + x * stride_w
    k = load(qkv_ptr + stride_t, key, on, side, d, pad_ptr, D, PAD)
    v = load(qkv_ptr + 2 * stride_t, key, on, side, d, pad_ptr + C, D, PAD)

    dk = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    dv = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for start in range(0, N, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        qy, qx, q_on, q_side, q_at = tokens(i, i < N, window, H, W, h, w, s_h, s_w, KW)
        lse = once(tl.load(lse_ptr + qy * W + qx, q_on, float("inf")))  # exp2(s - inf) = 0 masks padding tokens
        delta = once(tl.load(delta_ptr + qy * W + qx, q_on, 0.0))
        q = load(qkv_ptr, qy * stride_h + qx * stride_w, q_on, q_side, d, pad_ptr, D, False)
        dout = load(dout_ptr, qy * stride_dh + qx * stride_dw, q_on, q_side, d, pad_ptr, D, False)
        s = logits(
            k, q, side, q_side, -at, -q_at, bias_ptr, middle, scale, BIAS, PRECISION
        )  # distances are query - key
        p = tl.exp2(s - lse[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk *= scale
    has = (d < D)[None, :]
    dqkv_ptr += (((b * H + y) * W + x) * 3 * C + head * D)[:, None] + d[None, :]
    tl.store(dqkv_ptr + C, dk.to(dqkv_ptr.dtype.element_ty), on[:, None] & has)
    tl.store(dqkv_ptr + 2 * C, dv.to(dqkv_ptr.dtype.element_ty), on[:, None] & has)
    if PAD:
        out = (side >= 0) & (on == 0)
        dpad_ptr += (pid // heads).to(tl.int64) * 2 * C + head * D + d
        tl.store(dpad_ptr, tl.sum(tl.where(out[:, None], dk, 0.0), 0), d < D)
        tl.store(dpad_ptr + C, tl.sum(tl.where(out[:, None], dv, 0.0), 0), d < D)


@triton.jit(do_not_specialize=["per", *SIZES])
def dbias_kernel(
    qkv_ptr, pad_ptr, bias_ptr, lse_ptr, dout_ptr, delta_ptr, ds_ptr,
    stride_b, stride_h, stride_w, stride_t, stride_db, stride_dh, stride_dw,
    B, per, H, W, h, w, s_h, s_w, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    """Sum dS over the pairs of rows at each distance, query - key: ds (chunks of `per` windows, heads, 2h-1, w, w)."""
    if KH:
        h, w = KH, KW
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    tiles_n = (w + BLOCK_N - 1) // BLOCK_N
    j = pid % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    pid = pid // tiles_n
    tiles_m = (w + BLOCK_M - 1) // BLOCK_M
    i = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    pid = pid // tiles_m
    dy = pid % (2 * h - 1) - (h - 1)
    chunk = pid // (2 * h - 1)
    windows = ((H + h - 1) // h) * ((W + w - 1) // w)
    first = chunk * per
    d = tl.arange(0, BLOCK_D)
    C = heads * D
    stride_t = tl.cast(stride_t, tl.int64)
    middle = (h - 1) * (2 * w - 1) + w - 1
    pad_ptr += head * D + C

    total = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    pairs = h - tl.abs(dy)
    for step in range((min(first + per, windows * B) - first) * pairs):
        window = first + step // pairs
        b = (window // windows).to(tl.int64)
        row = step % pairs + tl.maximum(dy, 0)  # row of the queries
        y, x, on, side, at = tokens(row * w + i, i < w, window % windows, H, W, h, w, s_h, s_w, KW)
        ky, kx, k_on, k_side, k_at = tokens((row - dy) * w + j, j < w, window % windows, H, W, h, w, s_h, s_w, KW)
        base = qkv_ptr + b * stride_b + head * D
        key = ky * stride_h + kx * stride_w
        q = load(base, y * stride_h + x * stride_w, on, side, d, pad_ptr, D, False)
        k = load(base + stride_t, key, k_on, k_side, d, pad_ptr, D, PAD)
        v = load(base + 2 * stride_t, key, k_on, k_side, d, pad_ptr + C, D, PAD)
        dout = load(dout_ptr + b * stride_db + head * D, y * stride_dh + x * stride_dw, on, side, d, pad_ptr, D, False)
        at_lse = (b * heads + head) * H * W + y * W + x
        lse = once(tl.load(lse_ptr + at_lse, on, float("inf")))
        delta = once(tl.load(delta_ptr + at_lse, on, 0.0))
        s = logits(
            q, k, side, k_side, at, k_at, bias_ptr + head * (2 * h - 1) * (2 * w - 1), middle, scale, True, PRECISION
        )
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        total += tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    ds_ptr += ((chunk * heads + head) * (2 * h - 1) + dy + h - 1).to(tl.int64) * w * w
    tl.store(ds_ptr + (i * w)[:, None] + j[None, :], total, (i < w)[:, None] & (j < w)[None, :])


@triton.jit(do_not_specialize=["per", *SIZES])
def bwd_kernel(
    qkv_ptr, pad_ptr, bias_ptr, dout_ptr, dqkv_ptr, dpad_ptr, ds_ptr,
    stride_b, stride_h, stride_w, stride_t, stride_db, stride_dh, stride_dw,
    B, per, H, W, h, w, s_h, s_w, heads, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, PAD: tl.constexpr, BIAS: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    """Compute all gradients for `per` windows that fit in one tile each; ds (chunks, heads, N, N) is summed over
    them."""
    if KH:
        h, w = KH, KW
    pid = tl.program_id(0)
    head = pid % heads
    chunk = pid // heads
    windows = ((H + h - 1) // h) * ((W + w - 1) // w)
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    has = (d < D)[None, :]
    N = h * w
    C = heads * D
    stride_t = tl.cast(stride_t, tl.int64)
    bias_ptr += head * (2 * h - 1) * (2 * w - 1)
    middle = (h - 1) * (2 * w - 1) + w - 1
    pad_ptr += head * D + C
    total = tl.full((BLOCK, BLOCK), 0, tl.float32)
    if BIAS:  # the same for all windows: its values take half the registers of their addresses
        _, _, _, _, at = tokens(n, n < N, 0, H, W, h, w, s_h, s_w, KW)
        bias = tl.load(bias_ptr + (at[:, None] - at[None, :] + middle)) * LOG2E
    for i in range(chunk * per, min((chunk + 1) * per, windows * B)):
        b = (i // windows).to(tl.int64)
        y, x, on, side, _ = tokens(n, n < N, i % windows, H, W, h, w, s_h, s_w, KW)
        token = y * stride_h + x * stride_w
        base = qkv_ptr + b * stride_b + head * D
        q = load(base, token, on, side, d, pad_ptr, D, False)
        k = load(base + stride_t, token, on, side, d, pad_ptr, D, PAD)
        v = load(base + 2 * stride_t, token, on, side, d, pad_ptr + C, D, PAD)
        dout = load(dout_ptr + b * stride_db + head * D, y * stride_dh + x * stride_dw, on, side, d, pad_ptr, D, False)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if BIAS:
            s += bias
        s = tl.where(side[:, None] == side[None, :], s, float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        p = p / tl.sum(p, 1)[:, None]
        to = dqkv_ptr + b * H * W * 3 * C + head * D
        to += ((y.to(tl.int32) * W + x.to(tl.int32)).to(tl.int64) * 3 * C)[:, None] + d[None, :]
        mine = on[:, None] & has
        dv = tl.dot(
            tl.trans(p.to(dout.dtype)), dout, input_precision=PRECISION
        )  # first, so that it needs no registers later
        tl.store(to + 2 * C, dv.to(dqkv_ptr.dtype.element_ty), mine)
        if PAD:  # of each window: sums over windows would take registers
            out = ((side >= 0) & (on == 0))[:, None]
            part = dpad_ptr + tl.cast(i, tl.int64) * 2 * C + head * D + d
            tl.store(part + C, tl.sum(tl.where(out, dv, 0.0), 0), d < D)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if BIAS:
            total += ds
        dq = tl.dot(ds.to(k.dtype), k, input_precision=PRECISION) * scale
        tl.store(to, dq.to(dqkv_ptr.dtype.element_ty), mine)
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, input_precision=PRECISION) * scale
        tl.store(to + C, dk.to(dqkv_ptr.dtype.element_ty), mine)
        if PAD:
            tl.store(part, tl.sum(tl.where(out, dk, 0.0), 0), d < D)
    if BIAS:
        ds_ptr += pid.to(tl.int64) * N * N + (n * N)[:, None] + n[None, :]
        tl.store(ds_ptr, total, (n < N)[:, None] & (n < N)[None, :])


# By element size in bytes and head dim: most rows of the program's tile, rows per step, warps, stages. Chosen from the
# registers and shared memory of ahead-of-time compilation (saccade.ops.aot); not yet timed on a GPU.
TILES = {
    (2, 32): (64, 32, 4, 3),
    (2, 64): (64, 32, 8, 2),
    (2, 128): (64, 32, 8, 1),
    (2, 256): (16, 16, 8, 1),  # padding and a bias take the rest of the registers
    (4, 32): (32, 32, 8, 1),
    (4, 64): (32, 16, 8, 2),
    (4, 128): (16, 16, 8, 1),
}
TILE = {2: 64, 4: 32}  # by element size in bytes: tokens of the largest window that bwd_kernel supports
PROGRAMS = 1024  # least number of programs if each sums over windows: about eight per SM


def _block(D: int) -> int:
    return max(16, triton.next_power_of_2(D))


def fits_tile(itemsize: int, D: int, N: int) -> bool:
    """Return whether bwd_kernel supports a window: the tiles of larger ones do not fit in registers."""
    return TILE[itemsize] >= N and D <= 32


def window_options(h: int, w: int) -> dict:
    """Return a square window's size as constexprs, so that divisions by it are multiplications; (0, 0) for others, as
    stripes grow with the image and would be compiled for every size."""
    return dict(KH=h, KW=w) if h == w <= 32 else dict(KH=0, KW=0)


def launch_options(itemsize: int, D: int, N: int, hip: bool) -> dict:
    """Return constexprs and launch options for N tokens to divide into tiles."""
    rows, walked, warps, stages = TILES[itemsize, max(32, _block(D))]
    if itemsize == 2 and D <= 32 and rows >= N:  # a window in one step: nothing to load ahead
        walked, stages = rows, 1
    return _limit(itemsize * D > 256, hip) | dict(
        D=D,
        BLOCK_D=_block(D),
        BLOCK_M=max(16, min(rows, triton.next_power_of_2(N))),
        BLOCK_N=max(16, min(walked, triton.next_power_of_2(N))),
        num_warps=warps,
        num_stages=min(stages, 2) if hip else stages,
    )


def forward_options(itemsize: int, D: int, N: int, hip: bool) -> dict:
    """Return those of fwd_kernel."""
    return launch_options(itemsize, D, N, hip) | _limit(itemsize * D >= 256, hip)


def _limit(needed: bool, hip: bool) -> dict:
    # Without a limit, ptxas aims at 64, 80 or 128 registers for some of these kernels, and spills 8 to 24 bytes.
    return dict(maxnreg=255) if needed and not hip else {}


def tile_options(itemsize: int, D: int, N: int, hip: bool) -> dict:
    """Return those of bwd_kernel for windows of N tokens."""
    block = max(16, triton.next_power_of_2(N))
    return dict(D=D, BLOCK_D=_block(D), BLOCK=block, num_warps=4, num_stages=1)


def owner_options(itemsize: int, D: int, w: int, hip: bool) -> dict:
    """Return those of dbias_kernel for windows of w columns."""
    options = launch_options(itemsize, D, w, hip)
    if itemsize == 4 or D > 128:
        options |= dict(BLOCK_M=16, BLOCK_N=16, num_warps=4, num_stages=1)
    return options


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _has_padding(H: int, W: int, window: list[int], pad: Tensor | None) -> bool:
    return pad is not None and bool(H % window[0] or W % window[1])


def _count(H: int, W: int, window: list[int]) -> int:
    return triton.cdiv(H, window[0]) * triton.cdiv(W, window[1])


def fwd(
    qkv: Tensor, bias: Tensor | None, pad: Tensor | None, heads: int, window: list[int], shift: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, W, C) and, for the backward pass, the base-2 log-sum-exp of the logits (B, heads,
    H·W)."""
    B, H, W, _, C = qkv.shape
    out = qkv.new_empty(B, H, W, C)
    lse = qkv.new_empty(B, heads, H * W, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    qkv, N = _readable(qkv), window[0] * window[1]
    options = forward_options(qkv.element_size(), C // heads, N, torch.version.hip is not None)
    grid = (B * _count(H, W, window) * triton.cdiv(N, options["BLOCK_M"]) * heads,)
    with torch.cuda.device_of(qkv):
        launch(fwd_kernel, grid)(
            qkv, lse if pad is None else pad.contiguous(), lse if bias is None else bias.contiguous(), out, lse,
            *qkv.stride()[:4], H, W, *window, *shift, heads, scale,
            **window_options(*window), PAD=_has_padding(H, W, window, pad), BIAS=bias is not None,
            PRECISION=precision(qkv), **options,
        )  # fmt: skip
    return out, lse


def bwd(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    out: Tensor,
    lse: Tensor,
    heads: int,
    window: list[int],
    shift: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, (B, H, W, 3, C) contiguous, of bias and of pad; the last two are empty for None."""
    B, H, W, _, C = qkv.shape
    h, w = window
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    dbias = lse.new_empty((0,) if bias is None else bias.shape)
    dpad = qkv.new_empty((0,) if pad is None else pad.shape)
    if dqkv.numel() == 0:
        return dqkv, dbias.zero_(), dpad.zero_()
    qkv, dout, N, D = _readable(qkv), _readable(dout), h * w, C // heads
    windows, hip = B * _count(H, W, window), torch.version.hip is not None
    tensors = qkv, lse if pad is None else pad.contiguous(), lse if bias is None else bias.contiguous()
    strides, sizes = (*qkv.stride()[:4], *dout.stride()[:3]), (H, W, h, w, *shift, heads, scale)
    padding = _has_padding(H, W, window, pad)
    given = dict(PAD=padding, BIAS=bias is not None, PRECISION=precision(qkv), **window_options(h, w))
    with torch.cuda.device_of(qkv):
        if fits_tile(qkv.element_size(), D, N):
            per = 1 if bias is None else max(4, triton.cdiv(windows * heads, PROGRAMS))
            chunks = triton.cdiv(windows, per)
            parts = lse.new_empty((windows if padding else 0, 2, C))
            ds = lse.new_empty((0 if bias is None else chunks, heads, N, N))
            launch(bwd_kernel, (chunks * heads,))(
                *tensors, dout, dqkv, parts, ds, *strides, B, per, *sizes, **given,
                **tile_options(qkv.element_size(), D, N, hip),
            )  # fmt: skip
            if bias is not None:
                dbias = diagonals(ds.sum(0), (h, w)).contiguous()
        else:
            options, delta = launch_options(qkv.element_size(), D, N, hip), torch.empty_like(lse)
            programs = windows * triton.cdiv(N, options["BLOCK_M"])
            parts = lse.new_empty((programs if padding else 0, 2, C))
            grid = (programs * heads,)
            launch(dq_kernel, grid)(*tensors, out, lse, dout, delta, dqkv, *strides, *sizes, **given, **options)
            launch(dkdv_kernel, grid)(*tensors, lse, dout, delta, dqkv, parts, *strides, *sizes, **given, **options)
            if bias is not None:
                options = owner_options(qkv.element_size(), D, w, hip)
                owners = heads * (2 * h - 1) * triton.cdiv(w, options["BLOCK_M"]) * triton.cdiv(w, options["BLOCK_N"])
                per = triton.cdiv(windows, max(1, PROGRAMS // owners))
                chunks = triton.cdiv(windows, per)
                ds = lse.new_empty(chunks, heads, 2 * h - 1, w, w)
                launch(dbias_kernel, (chunks * owners,))(
                    *tensors, lse, dout, delta, ds, *strides, B, per, *sizes,
                    **window_options(h, w), PAD=padding, PRECISION=precision(qkv), **options,
                )  # fmt: skip
                dbias = sum_diagonals(ds.sum(0))
        if padding:
            dpad[0] = 0
            dpad[1:] = parts.sum(0)
        else:
            dpad.zero_()
    return dqkv, dbias, dpad


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: every tile of TILES, and windows of one tile."""
    itemsize = 4 if dtype == "fp32" else 2
    floats = dict.fromkeys(("bias_ptr", "lse_ptr", "delta_ptr", "dpad_ptr", "ds_ptr"), "*fp32")
    for D in (D for size, D in TILES if size == itemsize):
        for pad, bias in itertools.product((False, True), repeat=2):
            for h, w in ((7, 7), (8, 8), (56, 7), (4, 4), (5, 3)):
                given = dict(PAD=pad, BIAS=bias, **window_options(h, w))
                if fits_tile(itemsize, D, h * w):
                    yield bwd_kernel, floats, given | tile_options(itemsize, D, h * w, hip)
                elif h * w < 32:
                    continue
                else:
                    for kernel in (dq_kernel, dkdv_kernel):
                        yield kernel, floats, given | launch_options(itemsize, D, h * w, hip)
                    if bias:
                        options = owner_options(itemsize, D, w, hip) | window_options(h, w)
                        yield dbias_kernel, floats, dict(PAD=pad) | options
                yield fwd_kernel, floats, given | forward_options(itemsize, D, h * w, hip)
