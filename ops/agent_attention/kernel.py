"""Triton kernels of agent attention, forward and backward, and their launchers.

    gather_kernel   P1 V: a tile of agents loops over a range of the keys; merge_kernel combines the ranges
    read_kernel     P2 (P1 V) and the convolution: a tile of queries loops over the agents, usually one tile of them

In the backward pass, either softmax is a matrix P of tokens (the queries of P2, the keys of P1) by agents. The gradient
of its logits, dS = P · (dP − delta), is summed in three ways, each by programs that own their part of the result:

    tokens_kernel   over the agents: dq; or dk and dv, including the convolution's part of dv and its parameters
    agents_kernel   over the tokens: the gradients of the agents and of P1 V
    bias_kernel     over the batch: the gradient of the bias; tokens_kernel does it if one tile holds all agents

A bias is a sum of small tables, computed in registers. Its factors are interpolated along y beforehand (`along_rows` in
tables.py), which leaves three lookups per logit, most of them shared within a tile. A materialised bias has heads·a
values per token and would be read from L2 for every image: 196 bytes per token and head for 49 agents, where the key
and value take 128 bytes in half precision at D = 32. The gradient of a bias is (heads, tokens, a), summed over the
batch in a few chunks (`_chunk`); PyTorch reduces it to the tables.

Offsets to tokens are 64-bit. There are no atomics.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..tiles import FLOOR, LOG2E, precision, softmax_step
from ..tune import launch
from .tables import resizing

# Not specialised on, since they change with the image size: a divisible size would recompile the kernel.
SIZES = ["B", "heads", "N", "a", "h", "w", "S", "share", "images", "splits", "total"]


@triton.jit
def along(x, TOKENS_FIRST: tl.constexpr):
    """Return values of the tokens as a column or a row of the tile. They are computed once, not by each thread."""
    return tl.sum(x[:, None], 1)[:, None] if TOKENS_FIRST else tl.sum(x[:, None], 1)[None, :]


@triton.jit
def bias(rows_ptr, columns_ptr, token_ptr, head, n, m, N, h, w, S, T: tl.constexpr, AP: tl.constexpr,
         TOKENS_FIRST: tl.constexpr):  # fmt: skip
    """Return the bias of tokens n by agents m, or of agents by tokens unless TOKENS_FIRST, times log2(e). The tables
    have AP agents, a multiple of 16 and of the tile, so that nothing is masked: tokens from N on have any bias."""
    i = tl.maximum(tl.minimum(n, N - 1) - T, 0)
    y = i // w
    x = i - y * w
    s = tl.minimum(tl.maximum(((2 * x + 1) * S - w).to(tl.float32) / (2 * w), 0.0), (S - 1).to(tl.float32))
    j = s.to(tl.int32)
    f = along(s - j, TOKENS_FIRST)
    row = along(((y * S + j) * AP) | (j + 1 < S).to(tl.int32), TOKENS_FIRST)  # AP is even: one bit is free
    step = tl.where(row & 1 != 0, AP, 0)
    m = m[None, :] if TOKENS_FIRST else m[:, None]
    rows_ptr += head * h * S * AP
    left_ptr = rows_ptr + tl.multiple_of(row & -2, (16, 16)) + m
    left = tl.load(left_ptr)
    right = tl.load(left_ptr + tl.multiple_of(step, (16, 16)))
    columns_ptr += head * w * AP
    b = left + f * (right - left) + tl.load(columns_ptr + tl.multiple_of(along(x * AP, TOKENS_FIRST), (16, 16)) + m)
    if T:
        n = n[:, None] if TOKENS_FIRST else n[None, :]
        b = tl.where(n == 0, tl.load(token_ptr + head * AP + m), b)
    return b * LOG2E


@triton.jit
def load(x_ptr, n, stride_n, ok, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load rows n of D values each."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(x_ptr + n.to(tl.int64)[:, None] * stride_n + d[None, :], ok[:, None] & (d < D)[None, :], 0.0)


@triton.jit
def store(x_ptr, n, stride_n, ok, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    x_ptr += n.to(tl.int64)[:, None] * stride_n + d[None, :]
    tl.store(x_ptr, x.to(x_ptr.dtype.element_ty), ok[:, None] & (d < D)[None, :])


@triton.jit
def neighbours(x_ptr, y, x, stride_n, dy, dx, h, w, T: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load the tokens dy rows and dx columns from those at (y, x); zero outside the map."""
    y, x = y + dy, x + dx
    ok = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    return load(x_ptr, T + y * w + x, stride_n, ok, D, BLOCK_D).to(tl.float32)


@triton.jit
def place(n, N, w, T: tl.constexpr):
    """Return row and column of tokens n; for those that are not on the map, a row far from it."""
    y = (n - T) // w
    return tl.where((n >= T) & (n < N), y, -4), n - T - y * w


@triton.jit
def take_tile(pid, count, BLOCK: tl.constexpr):
    """Split a program's index into its tile of `count` agents or tokens and the remaining index."""
    tiles = (count + BLOCK - 1) // BLOCK
    return pid % tiles * BLOCK + tl.arange(0, BLOCK), pid // tiles


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    k_ptr, v_ptr, agents_ptr, rows_ptr, columns_ptr, token_ptr, part_ptr, lse_ptr,
    stride_kb, stride_kn, stride_vb, stride_vn,
    B, heads, N, a, h, w, S, share, scale,
    T: tl.constexpr, AP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    m, pid = take_tile(pid // heads, a, BLOCK_A)
    b = (pid % B).to(tl.int64)
    split = pid // B
    mine = m < a
    k_ptr += b * stride_kb + head * D
    v_ptr += b * stride_vb + head * D
    agents = load(agents_ptr + b * a * heads * D + head * D, m, heads * D, mine, D, BLOCK_D)

    top = tl.full((BLOCK_A,), FLOOR, tl.float32)
    l = tl.full((BLOCK_A,), 0, tl.float32)
    acc = tl.full((BLOCK_A, BLOCK_D), 0, tl.float32)
    for start in range(split * share, tl.minimum(N, (split + 1) * share), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = n < N
        k = load(k_ptr, n, stride_kn, ok, D, BLOCK_D)
        v = load(v_ptr, n, stride_vn, ok, D, BLOCK_D)
        s = tl.dot(agents, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s += bias(rows_ptr, columns_ptr, token_ptr, head, n, m, N, h, w, S, T, AP, False)
        top, l, acc = softmax_step(tl.where(ok[None, :], s, float("-inf")), v, top, l, acc, PRECISION)
    first = ((split * B + b) * heads + head) * a
    store(part_ptr + first * D, m, D, mine, acc / l[:, None], D, BLOCK_D)
    tl.store(lse_ptr + first + m, top + tl.log2(l), mine)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    part_ptr, parts_ptr, va_ptr, lse_ptr, total, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """Combine a tile of the total = B·heads·a agents: partial outputs and log-sum-exps per split, into va and lse."""
    m = (tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)).to(tl.int64)
    ok = m < total
    top = tl.load(parts_ptr + m, ok, 0.0)
    l = tl.full((BLOCK_A,), 1, tl.float32)
    acc = load(part_ptr, m, D, ok, D, BLOCK_D)
    for split in range(1, splits):
        one = tl.load(parts_ptr + split * total + m, ok, 0.0)
        new = tl.maximum(top, one)
        shrink, weight = tl.exp2(top - new), tl.exp2(one - new)
        l = l * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * load(part_ptr, split * total + m, D, ok, D, BLOCK_D)
        top = new
    store(va_ptr, m, D, ok, acc / l[:, None], D, BLOCK_D)
    tl.store(lse_ptr + m, top + tl.log2(l), ok)


@triton.jit(do_not_specialize=SIZES)
def read_kernel(
    q_ptr, v_ptr, agents_ptr, va_ptr, rows_ptr, columns_ptr, token_ptr, weight_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qn, stride_vb, stride_vn,
    heads, N, a, h, w, S, scale,
    T: tl.constexpr, AP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
    CONV: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    n, pid = take_tile(pid // heads, N, BLOCK_N)
    b = pid.to(tl.int64)
    mine = n < N
    q = load(q_ptr + b * stride_qb + head * D, n, stride_qn, mine, D, BLOCK_D)
    agents_ptr += b * a * heads * D + head * D
    va_ptr += (b * heads + head) * a * D

    top = tl.full((BLOCK_N,), FLOOR, tl.float32)
    l = tl.full((BLOCK_N,), 0, tl.float32)
    acc = tl.full((BLOCK_N, BLOCK_D), 0, tl.float32)
    for start in range(0, a, BLOCK_A):
        m = start + tl.arange(0, BLOCK_A)
        ok = m < a
        agents = load(agents_ptr, m, heads * D, ok, D, BLOCK_D)
        va = load(va_ptr, m, D, ok, D, BLOCK_D)
        s = tl.dot(q, tl.trans(agents), input_precision=PRECISION) * (scale * LOG2E)
        s += bias(rows_ptr, columns_ptr, token_ptr, head, n, m, N, h, w, S, T, AP, True)
        top, l, acc = softmax_step(tl.where(ok[None, :], s, float("-inf")), va, top, l, acc, PRECISION)
    tl.store(lse_ptr + (b * heads + head) * N + n, top + tl.log2(l), mine)
    out = acc / l[:, None]
    if CONV:  # weight is (10, C): nine taps and the bias
        c = head * D + tl.arange(0, BLOCK_D)
        has = tl.arange(0, BLOCK_D) < D
        v_ptr += b * stride_vb + head * D
        y, x = place(n, N, w, T)
        # A sum of its own: in the layout of the products' results, pixels would be loaded in pairs of channels.
        conv = tl.where((n >= T)[:, None], tl.load(weight_ptr + 9 * heads * D + c, has, 0.0)[None, :], 0.0)
        for tap in tl.range(9, num_stages=1):
            value = neighbours(v_ptr, y, x, stride_vn, tap // 3 - 1, tap % 3 - 1, h, w, T, D, BLOCK_D)
            conv += value * tl.load(weight_ptr + tap * heads * D + c, has, 0.0)[None, :]
        out += conv
    store(out_ptr + b * N * heads * D + head * D, n, heads * D, mine, out, D, BLOCK_D)


@triton.jit
def pairs(x, y, agents, z, b, lse, ok, scale, PRECISION: tl.constexpr):
    """Return P and dP of a tile: softmax of the logits of x and agents, and its gradient from y and z."""
    p = tl.exp2(tl.dot(x, tl.trans(agents), input_precision=PRECISION) * (scale * LOG2E) + b - lse)
    return tl.where(ok, p, 0.0), tl.dot(y, tl.trans(z), input_precision=PRECISION)


@triton.jit(do_not_specialize=SIZES)
def tokens_kernel(
    x_ptr, y_ptr, agents_ptr, z_ptr, rows_ptr, columns_ptr, token_ptr, lse_ptr, delta_ptr, dout_ptr, weight_ptr,
    dx_ptr, dy_ptr, dbias_ptr, dweight_ptr,
    stride_xb, stride_xn, stride_yb, stride_yn, stride_db, stride_dn,
    B, heads, N, a, h, w, S, images, scale,
    T: tl.constexpr, AP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
    KEYS: tl.constexpr, CONV: tl.constexpr, SINGLE: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    """Without KEYS x, y, z are q, dout and P1 V, the softmax over agents; with KEYS k, v and d(P1 V), over tokens."""
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    n, chunk = take_tile(pid, N, BLOCK_N)
    mine = n < N
    c = head * D
    C = heads * D
    m = tl.arange(0, BLOCK_A)
    if SINGLE:
        ok = mine[:, None] & (m < a)[None, :]
        bias_one = bias(rows_ptr, columns_ptr, token_ptr, head, n, m, N, h, w, S, T, AP, True)
        dbias = tl.full((BLOCK_N, BLOCK_A), 0, tl.float32)
    if CONV:
        tap_of = tl.arange(0, 16)[:, None]
        d = tl.arange(0, BLOCK_D)
        dweight = tl.full((16, BLOCK_D), 0, tl.float32)
    for i in range(chunk * images, tl.minimum(B, (chunk + 1) * images)):
        b = tl.full((), i, tl.int64)
        x = load(x_ptr + b * stride_xb + c, n, stride_xn, mine, D, BLOCK_D)
        y = load(y_ptr + b * stride_yb + c, n, stride_yn, mine, D, BLOCK_D)
        first = (b * heads + head) * a  # agent
        if not KEYS:
            token = (b * heads + head) * N + n
            lse = tl.load(lse_ptr + token, mine, 0.0)[:, None]
            if not SINGLE:
                total = tl.full((BLOCK_N,), 0, tl.float32)
                for start in range(0, a, BLOCK_A):
                    m = start + tl.arange(0, BLOCK_A)
                    ok = mine[:, None] & (m < a)[None, :]
                    agents = load(agents_ptr + b * a * C + c, m, C, m < a, D, BLOCK_D)
                    z = load(z_ptr + first * D, m, D, m < a, D, BLOCK_D)
                    one = bias(rows_ptr, columns_ptr, token_ptr, head, n, m, N, h, w, S, T, AP, True)
                    p, dp = pairs(x, y, agents, z, one, lse, ok, scale, PRECISION)
                    total += tl.sum(p * dp, 1)
                tl.store(delta_ptr + token, total, mine)
                delta = total[:, None]
        dx = tl.full((BLOCK_N, BLOCK_D), 0, tl.float32)
        dy = tl.full((BLOCK_N, BLOCK_D), 0, tl.float32)
        for start in range(0, a, BLOCK_A):
            m = start + tl.arange(0, BLOCK_A)
            ok = mine[:, None] & (m < a)[None, :]
            agents = load(agents_ptr + b * a * C + c, m, C, m < a, D, BLOCK_D)
            z = load(z_ptr + first * D, m, D, m < a, D, BLOCK_D)
            if KEYS:
                lse = tl.load(lse_ptr + first + m, m < a, 0.0)[None, :]
                delta = tl.load(delta_ptr + first + m, m < a, 0.0)[None, :]
            one = bias_one if SINGLE else bias(rows_ptr, columns_ptr, token_ptr, head, n, m, N, h, w, S, T, AP, True)
            p, dp = pairs(x, y, agents, z, one, lse, ok, scale, PRECISION)
            if SINGLE and not KEYS:
                total = tl.sum(p * dp, 1)
                tl.store(delta_ptr + token, total, mine)
                delta = total[:, None]
            ds = p * (dp - delta)
            dx = tl.dot(ds.to(agents.dtype), agents, dx, input_precision=PRECISION)
            if KEYS:
                dy = tl.dot(p.to(z.dtype), z, dy, input_precision=PRECISION)
            if SINGLE:
                dbias += ds
        store(dx_ptr + b * N * C + c, n, C, mine, dx * scale, D, BLOCK_D)
        if CONV:
            value = y.to(tl.float32)
            row, column = place(n, N, w, T)
            conv = tl.full((BLOCK_N, BLOCK_D), 0, tl.float32)
            for tap in tl.range(9, num_stages=1):
                g = neighbours(
                    dout_ptr + b * stride_db + c, row, column, stride_dn, 1 - tap // 3, 1 - tap % 3, h, w, T, D, BLOCK_D
                )
                conv += g * tl.load(weight_ptr + tap * C + c + d, d < D, 0.0)[None, :]
                dweight += tl.where(tap_of == tap, tl.sum(g * value, 0)[None, :], 0.0)
            g = neighbours(dout_ptr + b * stride_db + c, row, column, stride_dn, 0, 0, h, w, T, D, BLOCK_D)
            dweight += tl.where(tap_of == 9, tl.sum(g, 0)[None, :], 0.0)
            dy += conv
        if KEYS:
            store(dy_ptr + b * N * C + c, n, C, mine, dy, D, BLOCK_D)
    if SINGLE:
        dbias_ptr += (chunk * heads + head).to(tl.int64) * N * a + n.to(tl.int64)[:, None] * a + m[None, :]
        tl.store(dbias_ptr, dbias, mine[:, None] & (m < a)[None, :])
    if CONV:
        dweight_ptr += pid.to(tl.int64) * 10 * C + tap_of * C + c + d[None, :]
        tl.store(dweight_ptr, dweight, (tap_of < 10) & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def agents_kernel(
    x_ptr, y_ptr, agents_ptr, z_ptr, rows_ptr, columns_ptr, token_ptr, lse_ptr, delta_ptr, dagents_ptr, dz_ptr,
    stride_xb, stride_xn, stride_yb, stride_yn,
    B, heads, N, a, h, w, S, share, scale,
    T: tl.constexpr, AP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    m, pid = take_tile(pid // heads, a, BLOCK_A)
    b = (pid % B).to(tl.int64)
    split = pid // B
    mine = m < a
    first = (b * heads + head) * a
    x_ptr += b * stride_xb + head * D
    y_ptr += b * stride_yb + head * D
    agents = load(agents_ptr + b * a * heads * D + head * D, m, heads * D, mine, D, BLOCK_D)
    z = load(z_ptr + first * D, m, D, mine, D, BLOCK_D)
    if KEYS:
        lse = tl.load(lse_ptr + first + m, mine, 0.0)[:, None]
        delta = tl.load(delta_ptr + first + m, mine, 0.0)[:, None]

    dagents = tl.full((BLOCK_A, BLOCK_D), 0, tl.float32)
    dz = tl.full((BLOCK_A, BLOCK_D), 0, tl.float32)
    for start in range(split * share, tl.minimum(N, (split + 1) * share), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = mine[:, None] & (n < N)[None, :]
        x = load(x_ptr, n, stride_xn, n < N, D, BLOCK_D)
        y = load(y_ptr, n, stride_yn, n < N, D, BLOCK_D)
        if not KEYS:
            token = (b * heads + head) * N + n
            lse = tl.load(lse_ptr + token, n < N, 0.0)[None, :]
            delta = tl.load(delta_ptr + token, n < N, 0.0)[None, :]
        one = bias(rows_ptr, columns_ptr, token_ptr, head, n, m, N, h, w, S, T, AP, False)
        p, dp = pairs(agents, z, x, y, one, lse, ok, scale, PRECISION)
        dagents = tl.dot((p * (dp - delta)).to(x.dtype), x, dagents, input_precision=PRECISION)
        if not KEYS:
            dz = tl.dot(p.to(y.dtype), y, dz, input_precision=PRECISION)
    first += split.to(tl.int64) * B * heads * a
    store(dagents_ptr + first * D, m, D, mine, dagents * scale, D, BLOCK_D)
    if not KEYS:
        store(dz_ptr + first * D, m, D, mine, dz, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def bias_kernel(
    x_ptr, y_ptr, agents_ptr, z_ptr, rows_ptr, columns_ptr, token_ptr, lse_ptr, delta_ptr, dbias_ptr,
    stride_xb, stride_xn, stride_yb, stride_yn,
    B, heads, N, a, h, w, S, images, scale,
    T: tl.constexpr, AP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_A: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    m, pid = take_tile(pid // heads, a, BLOCK_A)
    n, chunk = take_tile(pid, N, BLOCK_N)
    ok = (n < N)[:, None] & (m < a)[None, :]
    one = bias(rows_ptr, columns_ptr, token_ptr, head, n, m, N, h, w, S, T, AP, True)
    dbias = tl.full((BLOCK_N, BLOCK_A), 0, tl.float32)
    for i in range(chunk * images, tl.minimum(B, (chunk + 1) * images)):
        b = tl.full((), i, tl.int64)
        first = (b * heads + head) * a
        x = load(x_ptr + b * stride_xb + head * D, n, stride_xn, n < N, D, BLOCK_D)
        y = load(y_ptr + b * stride_yb + head * D, n, stride_yn, n < N, D, BLOCK_D)
        agents = load(agents_ptr + b * a * heads * D + head * D, m, heads * D, m < a, D, BLOCK_D)
        z = load(z_ptr + first * D, m, D, m < a, D, BLOCK_D)
        if KEYS:
            lse = tl.load(lse_ptr + first + m, m < a, 0.0)[None, :]
            delta = tl.load(delta_ptr + first + m, m < a, 0.0)[None, :]
        else:
            token = (b * heads + head) * N + n
            lse = tl.load(lse_ptr + token, n < N, 0.0)[:, None]
            delta = tl.load(delta_ptr + token, n < N, 0.0)[:, None]
        p, dp = pairs(x, y, agents, z, one, lse, ok, scale, PRECISION)
        dbias += p * (dp - delta)
    dbias_ptr += (chunk * heads + head).to(tl.int64) * N * a + n.to(tl.int64)[:, None] * a + m[None, :]
    tl.store(dbias_ptr, dbias, ok)


# By element size in bytes and head dim: most tokens and agents per tile, warps, stages. Chosen for no spills on sm_90,
# from the registers and shared memory of ahead-of-time compilation (saccade.ops.aot); not yet timed on a GPU.
TILES = {
    (2, 32): (64, 64, 4, 2),
    (2, 64): (32, 64, 4, 2),
    (4, 32): (32, 16, 4, 1),
    (4, 64): (16, 32, 4, 2),
}
OF_TOKENS = dict(num_stages=1)  # what tokens_kernel changes of these: it spills with two
# Enough to fill the largest GPU several times: with fewer tiles, the tokens or images are split among programs.
PROGRAMS = 512


def tile(itemsize: int, D: int, a: int, hip: bool) -> dict:
    BLOCK_D = max(16, triton.next_power_of_2(D))
    tokens, agents, warps, stages = TILES[itemsize, max(32, BLOCK_D)]
    if a > agents == tokens:  # two softmaxes' logits at once: tokens_kernel spills
        tokens //= 2
    agents = max(16, min(agents, triton.next_power_of_2(a)))
    warps = warps // 2 if hip else warps  # as many threads: AMD's have 64 lanes
    stages = 1 if hip else stages  # with two, Triton 3.6 fails to compile tokens_kernel for gfx942
    return dict(D=D, BLOCK_D=BLOCK_D, BLOCK_N=tokens, BLOCK_A=agents, num_warps=warps, num_stages=stages)


def _share(N: int, programs: int, block: int) -> int:
    """Return the tokens per split: at least four tiles, so that partial results stay small compared with the map."""
    most = triton.cdiv(N, 4 * block)
    return triton.cdiv(N, block * min(most, triton.cdiv(PROGRAMS, programs))) * block


def _chunk(B: int, programs: int) -> int:
    """Return the images per program: at least four, so that partial bias gradients are fewer than images."""
    return triton.cdiv(B, min(max(1, B // 4), triton.cdiv(PROGRAMS, programs)))


def _readable(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def _tables(rows: Tensor, columns: Tensor, token: Tensor | None, options: dict) -> tuple[tuple, tuple, dict]:
    """Return pointers to the tables, padded to whole tiles of agents; the sizes a, h, w, S; and constexprs."""
    (_, h, S, a), block = rows.shape, options["BLOCK_A"]
    more = -a % block
    padded = [x if x is None or not more else pad(x, (0, more)) for x in (rows, columns, token)]
    token = padded[0] if token is None else padded[2]
    sizes = a, h, columns.shape[1], S
    return (*padded[:2], token), sizes, dict(T=int(padded[2] is not None), AP=a + more)


def _taps(weight: Tensor | None, bias: Tensor | None, C: int) -> Tensor | None:
    """Return (10, C): nine taps and the bias, in float32."""
    if weight is None:
        return None
    bias = weight.new_zeros(C) if bias is None else bias
    return torch.cat((weight.float().view(C, 9).T, bias.float().view(1, C)))


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_tables: tuple[Tensor, Tensor, Tensor | None],
    query_tables: tuple[Tensor, Tensor, Tensor | None],
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the output (B, N, C) and, for the backward pass, P1 V (B, heads, a, D) and the base-2 log-sum-exps of both
    softmaxes, (B, heads, a) and (B, heads, N)."""
    (B, N, C), M, a = q.shape, k.shape[1], agents.shape[1]
    q, k, v, agents = _readable(q), _readable(k), _readable(v), agents.contiguous()
    options = tile(q.element_size(), C // heads, a, torch.version.hip is not None)
    options |= dict(PRECISION=precision(agents))
    out = q.new_empty(B, N, C)
    va = q.new_empty(B, heads, a, C // heads)
    lse1, lse2 = (q.new_empty(B, heads, n, dtype=torch.float32) for n in (a, N))
    programs = B * heads * triton.cdiv(a, options["BLOCK_A"])
    share = _share(M, programs, options["BLOCK_N"])
    splits = triton.cdiv(M, share)
    part, parts = va, lse1
    if splits > 1:
        part, parts = (x.new_empty(splits, *x.shape, dtype=torch.float32) for x in (va, lse1))
    with torch.cuda.device_of(q):
        pointers, sizes, given = _tables(*key_tables, options)
        launch(gather_kernel, (programs * splits,))(
            k, v, agents, *pointers, part, parts, *k.stride()[:2], *v.stride()[:2],
            B, heads, M, *sizes, share, scale, **given, **options,
        )  # fmt: skip
        if splits > 1:
            total = B * heads * a
            blocks = {name: options[name] for name in ("D", "BLOCK_D", "BLOCK_A")}
            launch(merge_kernel, (triton.cdiv(total, blocks["BLOCK_A"]),))(
                part, parts, va, lse1, total, splits, **blocks
            )
        pointers, sizes, given = _tables(*query_tables, options)
        weight = _taps(dwc_weight, dwc_bias, C)
        launch(read_kernel, (B * heads * triton.cdiv(N, options["BLOCK_N"]),))(
            q, v, agents, va, *pointers, lse2 if weight is None else weight, out, lse2,
            *q.stride()[:2], *v.stride()[:2], heads, N, *sizes, scale, **given, CONV=weight is not None, **options,
        )  # fmt: skip
    return out, va, lse1, lse2


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_tables: tuple[Tensor, Tensor, Tensor | None],
    query_tables: tuple[Tensor, Tensor, Tensor | None],
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    va: Tensor,
    lse1: Tensor,
    lse2: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k, v and agents; of rows, columns and class token of either bias; and of the taps and
    bias (10, C). The gradient of an argument that is None is an empty tensor."""
    C = q.shape[2]
    q, k, v, dout = map(_readable, (q, k, v, dout))
    agents = agents.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    weight = _taps(dwc_weight, dwc_bias, C)
    with torch.cuda.device_of(q):
        common = dout, weight, heads, scale
        delta = torch.empty_like(lse2)
        of_queries = q, dout, agents, va, query_tables, lse2, delta
        dquery, _ = _tokens(*of_queries, *common, dq, dq, keys=False)
        dagents, dva = _agents(*of_queries, heads, scale, keys=False)
        delta = (dva * va).sum(-1)
        of_keys = k, v, agents, dva.to(va.dtype), key_tables, lse1, delta
        dkey, dweight = _tokens(*of_keys, *common, dk, dv, keys=True)
        dagents += _agents(*of_keys, heads, scale, keys=True)[0]
    dagents = dagents.transpose(1, 2).reshape(agents.shape).to(agents.dtype)
    return dq, dk, dv, dagents, *_factors(dkey, key_tables), *_factors(dquery, query_tables), dweight


def _tokens(x, y, agents, z, tables, lse, delta, dout, weight, heads, scale, dx, dy, keys):
    """Run tokens_kernel and, with many agents, bias_kernel. Return the gradients of the bias (heads, N, a) and taps."""
    (B, N, C), a = x.shape, agents.shape[1]
    options = tile(x.element_size(), C // heads, a, torch.version.hip is not None)
    options |= dict(PRECISION=precision(agents))
    pointers, sizes, given = _tables(*tables, options)
    tiles, agent_tiles = triton.cdiv(N, options["BLOCK_N"]), triton.cdiv(a, options["BLOCK_A"])
    single, conv = agent_tiles == 1, keys and weight is not None
    images = _chunk(B, heads * tiles)
    programs = triton.cdiv(B, images) * tiles
    dbias = lse.new_empty(triton.cdiv(B, images), heads, N, a) if single else lse
    dweight = lse.new_empty(programs, 10, C) if conv else lse.new_empty(1, 0)
    strides = *x.stride()[:2], *y.stride()[:2]
    options |= OF_TOKENS
    launch(tokens_kernel, (programs * heads,))(
        x, y, agents, z, *pointers, lse, delta, dout, weight if conv else lse, dx, dy, dbias, dweight,
        *strides, *dout.stride()[:2], B, heads, N, *sizes, images, scale,
        **given, KEYS=keys, CONV=conv, SINGLE=single, **options,
    )  # fmt: skip
    if not single:
        images = _chunk(B, heads * tiles * agent_tiles)
        dbias = lse.new_empty(triton.cdiv(B, images), heads, N, a)
        launch(bias_kernel, (len(dbias) * tiles * agent_tiles * heads,))(
            x, y, agents, z, *pointers, lse, delta, dbias, *strides, B, heads, N, *sizes, images, scale,
            **given, KEYS=keys, **options,
        )  # fmt: skip
    return (part[0] if len(part) == 1 else part.sum(0) for part in (dbias, dweight))


def _agents(x, y, agents, z, tables, lse, delta, heads, scale, keys):
    """Return the gradients of the agents and of z, (B, heads, a, D) in float32."""
    (B, N, C), a = x.shape, agents.shape[1]
    options = tile(x.element_size(), C // heads, a, torch.version.hip is not None)
    options |= dict(PRECISION=precision(agents))
    pointers, sizes, given = _tables(*tables, options)
    programs = B * heads * triton.cdiv(a, options["BLOCK_A"])
    share = _share(N, programs, options["BLOCK_N"])
    dagents = lse.new_empty(triton.cdiv(N, share), B, heads, a, C // heads)
    dz = dagents if keys else torch.empty_like(dagents)
    launch(agents_kernel, (programs * len(dagents),))(
        x, y, agents, z, *pointers, lse, delta, dagents, dz, *x.stride()[:2], *y.stride()[:2],
        B, heads, N, *sizes, share, scale, **given, KEYS=keys, **options,
    )  # fmt: skip
    return tuple(part[0] if len(part) == 1 else part.sum(0) for part in (dagents, dz))


def _factors(dbias: Tensor, tables: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a bias' tables from its own (heads, N, a)."""
    rows, columns, token = tables
    dtoken = dbias.new_empty(0)
    if token is not None:
        dtoken, dbias = dbias[:, 0].contiguous(), dbias[:, 1:]
    dbias = dbias.unflatten(1, (rows.shape[1], columns.shape[1]))  # (heads, h, w, a)
    return resizing(columns.shape[1], rows.shape[2], dbias).mT @ dbias, dbias.sum(1), dtoken


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield every tile of TILES for saccade.ops.aot, with few and with many agents."""
    itemsize = 4 if dtype == "fp32" else 2
    names = "rows", "columns", "token", "weight", "lse", "parts", "delta", "dbias", "dweight", "dagents", "dz"
    floats = {f"{name}_ptr": "*fp32" for name in names}
    for D in (D for size, D in TILES if size == itemsize):
        most = TILES[itemsize, D][1]
        for a in (9, most, most + 1):
            options = tile(itemsize, D, a, hip)
            given = dict(T=1, AP=triton.cdiv(a, options["BLOCK_A"]) * options["BLOCK_A"])
            conv = dict(given, CONV=True)
            single = options["BLOCK_A"] >= a
            yield gather_kernel, floats | dict(part_ptr="*fp32"), given | options
            yield merge_kernel, floats | dict(part_ptr="*fp32"), {k: options[k] for k in ("D", "BLOCK_D", "BLOCK_A")}
            yield read_kernel, floats, conv | options
            for keys in (False, True):
                flags = dict(CONV=keys, KEYS=keys, SINGLE=single)
                yield tokens_kernel, floats, given | flags | options | OF_TOKENS
                yield agents_kernel, floats, dict(given, KEYS=keys) | options
                if not single:
                    yield bias_kernel, floats, dict(given, KEYS=keys) | options
