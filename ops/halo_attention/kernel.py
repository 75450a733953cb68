"""Triton kernels of halo attention, forward and backward, and their launchers.

`fwd_kernel` and `dq_kernel` hold a tile of one block's queries and loop over the a · a cells of its window, by whole
rows where these fill a step. `dkdv_kernel` holds a tile of one block's keys, as square as possible so that few blocks
see any of it, and loops over the queries of all blocks whose windows contain any of them: its own and its neighbours.
So every gradient is written once, by one program, and is deterministic.

Position logits are passed as 2a numbers per query: <q, R_h[…]> for each row of the window and <q, R_w[…]> for each
column (op.py). Cell (i, j) needs the sum of two of them. Gathering them would take one uncoalesced load per logit.
Instead they are multiplied by one-hot matrices of the cells' rows and columns, made in registers, which is exact and
adds 2a channels to the D of the product. Their gradients are dS times the same matrices. The tables may have more than
a numbers per query, of which the last are multiplied by zeros: a multiple of 8 is read as vectors.

All maps are read without copying, by four strides. Offsets are 64-bit.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import maps
from ..maps import known_strides, layout
from ..tiles import FLOOR, LOG2E, gradient, once, precision, softmax_step
from ..tune import launch
from .eager import Settings, empty

SIZES = ["H", "W", "HQ", "WQ", "M", "N"]
STRIDES = [f"stride_{tensor}{axis}" for tensor in "qkogdrc" for axis in "bchyx"]


@triton.jit
def program(heads, M, N, TILES: tl.constexpr):
    """Return a program's image, head, block row and column, and the index of its tile in the block."""
    pid = tl.program_id(0)
    head = pid % heads  # fastest index: the heads of a pixel share its cache lines
    pid = pid // heads
    tile = pid % TILES
    pid = pid // TILES
    J = pid % N
    pid = pid // N
    return (pid // M).to(tl.int64), head.to(tl.int64), pid % M, J, tile


@triton.jit
def offsets(channel, y, x, stride_c, stride_y, stride_x):
    """Return the offsets of pixels (y, x) by channels."""
    return (y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x)[:, None] + (channel.to(tl.int64) * stride_c)[None, :]


@triton.jit
def queries(m, I, J, HQ, WQ, SIDE: tl.constexpr):
    """Return row and column on their map of queries m of block (I, J), and a mask of those that exist."""
    y = I * SIDE + m // SIDE
    x = J * SIDE + m % SIDE
    return y, x, (m < SIDE * SIDE) & (y < HQ) & (x < WQ)


@triton.jit
def cells(step, A: tl.constexpr, WALKED: tl.constexpr):
    """Return row and column in the window of the cells of a step, and a mask of those that exist. A step has as many
    whole rows as fit in it, so that only the rows depend on the step; or cells of the flat list, where whole rows would
    leave a third of it unused, which takes divisions in each step."""
    lane = tl.arange(0, WALKED)
    ROWS: tl.constexpr = WALKED // A
    if 3 * ROWS * A >= 2 * WALKED:
        i = step * ROWS + lane // A
        j = lane % A
        ok = (lane < ROWS * A) & (i < A)
    else:
        n = step * WALKED + lane
        i = n // A
        j = n % A
        ok = n < A * A
    return i, j, ok


@triton.jit
def steps(A: tl.constexpr, WALKED: tl.constexpr):
    """Return the number of steps that `cells` takes for a window."""
    ROWS: tl.constexpr = WALKED // A
    return (A + ROWS - 1) // ROWS if 3 * ROWS * A >= 2 * WALKED else (A * A + WALKED - 1) // WALKED


@triton.jit
def one_hot(i, POSITIONS: tl.constexpr, DTYPE: tl.constexpr):
    """Return the matrix of cells by the position logits of a query in one table: 1 at i."""
    # A conversion of truth values takes three instructions, a choice between constants one.
    hot = tl.arange(0, POSITIONS)[None, :] == i[:, None]
    return tl.where(hot, 1.0, 0.0).to(DTYPE)


@triton.jit
def known_table(stride_b, stride_h, stride_y, stride_x, TABLE: tl.constexpr):
    """Return a table's strides as the compiler can use them: multiples of TABLE."""
    return (
        stride_b // TABLE * TABLE, stride_h // TABLE * TABLE, stride_y // TABLE * TABLE, stride_x // TABLE * TABLE
    )  # fmt: skip


@triton.jit
def places(y, x, ok, stride_y, stride_x, AP: tl.constexpr, POSITIONS: tl.constexpr):
    """Return the offsets of the position logits of the queries at (y, x) in a table, and a mask of those that exist."""
    c = tl.arange(0, POSITIONS)
    return offsets(c, y, x, 1, stride_y, stride_x), ok[:, None] & (c < AP)[None, :]


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def fwd_kernel(
    q_ptr, kv_ptr, rows_ptr, columns_ptr, out_ptr, lse_ptr,
    stride_qb, stride_qc, stride_qy, stride_qx, stride_kb, stride_kc, stride_ky, stride_kx,
    stride_rb, stride_rh, stride_ry, stride_rx, stride_cb, stride_ch, stride_cy, stride_cx,
    stride_ob, stride_oc, stride_oy, stride_ox,
    heads, H, W, HQ, WQ, M, N, scale,
    Q: tl.constexpr, KV: tl.constexpr, OUT: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, AP: tl.constexpr, POSITIONS: tl.constexpr, TABLE: tl.constexpr,
    OWN: tl.constexpr, WALKED: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    stride_qb, stride_qc, stride_qy, stride_qx = known_strides(stride_qb, stride_qc, stride_qy, stride_qx, Q)
    stride_kb, stride_kc, stride_ky, stride_kx = known_strides(stride_kb, stride_kc, stride_ky, stride_kx, KV)
    stride_ob, stride_oc, stride_oy, stride_ox = known_strides(stride_ob, stride_oc, stride_oy, stride_ox, OUT)
    stride_rb, stride_rh, stride_ry, stride_rx = known_table(stride_rb, stride_rh, stride_ry, stride_rx, TABLE)
    stride_cb, stride_ch, stride_cy, stride_cx = known_table(stride_cb, stride_ch, stride_cy, stride_cx, TABLE)
    A: tl.constexpr = BLOCK + 2 * HALO
    b, head, I, J, tile = program(heads, M, N, TILES)
    y, x, ok = queries(tile * OWN + tl.arange(0, OWN), I, J, HQ, WQ, SIDE)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    q_ptr += b * stride_qb + head * D * stride_qc
    q = tl.load(q_ptr + offsets(d, y, x, stride_qc, stride_qy, stride_qx), ok[:, None] & (d < D)[None, :], 0.0)
    rows_ptr += b * stride_rb + head * stride_rh
    columns_ptr += b * stride_cb + head * stride_ch
    of_row, of_some = places(y, x, ok, stride_ry, stride_rx, AP, POSITIONS)
    rows = tl.load(rows_ptr + of_row, of_some, 0.0)
    of_column, _ = places(y, x, ok, stride_cy, stride_cx, AP, POSITIONS)
    columns = tl.load(columns_ptr + of_column, of_some, 0.0)
    k_ptr = kv_ptr + b * stride_kb + head * (D + DV) * stride_kc
    v_ptr = k_ptr + tl.full((), D, tl.int64) * stride_kc

    most = tl.full((OWN,), FLOOR, tl.float32)
    total = tl.full((OWN,), 0, tl.float32)
    acc = tl.full((OWN, BLOCK_V), 0, tl.float32)
    for step in range(steps(A, WALKED)):
        i, j, ok_k = cells(step, A, WALKED)
        ky = I * BLOCK - HALO + i
        kx = J * BLOCK - HALO + j
        inside = ok_k & (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
        of_keys, of_values = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < DV)[None, :]
        k = tl.load(k_ptr + offsets(d, ky, kx, stride_kc, stride_ky, stride_kx), of_keys, 0.0)
        v = tl.load(v_ptr + offsets(e, ky, kx, stride_kc, stride_ky, stride_kx), of_values, 0.0)
        hot_i = one_hot(i, POSITIONS, q.dtype)
        hot_j = one_hot(j, POSITIONS, q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.dot(rows, tl.trans(hot_i), s, input_precision=PRECISION)
        s = tl.dot(columns, tl.trans(hot_j), s, input_precision=PRECISION) * LOG2E
        s = tl.where(ok_k[None, :], s, float("-inf"))
        most, total, acc = softmax_step(s, v, most, total, acc, PRECISION)
    lse_ptr += (b * heads + head) * HQ * WQ + y.to(tl.int64) * WQ + x
    tl.store(lse_ptr, most + tl.log2(total), ok)
    out_ptr += b * stride_ob + head * DV * stride_oc
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets(e, y, x, stride_oc, stride_oy, stride_ox), out, ok[:, None] & (e < DV)[None, :])


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def dq_kernel(
    q_ptr, kv_ptr, rows_ptr, columns_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, drows_ptr, dcolumns_ptr,
    stride_qb, stride_qc, stride_qy, stride_qx, stride_kb, stride_kc, stride_ky, stride_kx,
    stride_rb, stride_rh, stride_ry, stride_rx, stride_cb, stride_ch, stride_cy, stride_cx,
    stride_ob, stride_oc, stride_oy, stride_ox, stride_gb, stride_gc, stride_gy, stride_gx,
    stride_db, stride_dc, stride_dy, stride_dx,
    heads, H, W, HQ, WQ, M, N, scale,
    Q: tl.constexpr, KV: tl.constexpr, OUT: tl.constexpr, DOUT: tl.constexpr, TO: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, AP: tl.constexpr, POSITIONS: tl.constexpr, TABLE: tl.constexpr,
    OWN: tl.constexpr, WALKED: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    stride_qb, stride_qc, stride_qy, stride_qx = known_strides(stride_qb, stride_qc, stride_qy, stride_qx, Q)
    stride_kb, stride_kc, stride_ky, stride_kx = known_strides(stride_kb, stride_kc, stride_ky, stride_kx, KV)
    stride_ob, stride_oc, stride_oy, stride_ox = known_strides(stride_ob, stride_oc, stride_oy, stride_ox, OUT)
    stride_gb, stride_gc, stride_gy, stride_gx = known_strides(stride_gb, stride_gc, stride_gy, stride_gx, DOUT)
    stride_db, stride_dc, stride_dy, stride_dx = known_strides(stride_db, stride_dc, stride_dy, stride_dx, TO)
    stride_rb, stride_rh, stride_ry, stride_rx = known_table(stride_rb, stride_rh, stride_ry, stride_rx, TABLE)
    stride_cb, stride_ch, stride_cy, stride_cx = known_table(stride_cb, stride_ch, stride_cy, stride_cx, TABLE)
    A: tl.constexpr = BLOCK + 2 * HALO
    b, head, I, J, tile = program(heads, M, N, TILES)
    y, x, ok = queries(tile * OWN + tl.arange(0, OWN), I, J, HQ, WQ, SIDE)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    of_q = ok[:, None] & (d < D)[None, :]
    of_v = ok[:, None] & (e < DV)[None, :]
    q_ptr += b * stride_qb + head * D * stride_qc
    q = tl.load(q_ptr + offsets(d, y, x, stride_qc, stride_qy, stride_qx), of_q, 0.0)
    out_ptr += b * stride_ob + head * DV * stride_oc
    out = tl.load(out_ptr + offsets(e, y, x, stride_oc, stride_oy, stride_ox), of_v, 0.0)
    dout_ptr += b * stride_gb + head * DV * stride_gc
    dout = tl.load(dout_ptr + offsets(e, y, x, stride_gc, stride_gy, stride_gx), of_v, 0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # stored for dkdv_kernel, so this one runs first
    query = (b * heads + head) * HQ * WQ + y.to(tl.int64) * WQ + x
    tl.store(delta_ptr + query, delta, ok)
    lse = tl.load(lse_ptr + query, ok, 0.0)
    of_rows = b * stride_rb + head * stride_rh
    of_columns = b * stride_cb + head * stride_ch
    of_row, of_some = places(y, x, ok, stride_ry, stride_rx, AP, POSITIONS)
    rows = tl.load(rows_ptr + of_rows + of_row, of_some, 0.0)
    of_column, _ = places(y, x, ok, stride_cy, stride_cx, AP, POSITIONS)
    columns = tl.load(columns_ptr + of_columns + of_column, of_some, 0.0)
    k_ptr = kv_ptr + b * stride_kb + head * (D + DV) * stride_kc
    v_ptr = k_ptr + tl.full((), D, tl.int64) * stride_kc

    dq = tl.full((OWN, BLOCK_D), 0, tl.float32)
    drows = tl.full((OWN, POSITIONS), 0, tl.float32)
    dcolumns = tl.full((OWN, POSITIONS), 0, tl.float32)
    for step in range(steps(A, WALKED)):
        i, j, ok_k = cells(step, A, WALKED)
        ky = I * BLOCK - HALO + i
        kx = J * BLOCK - HALO + j
        inside = ok_k & (ky >= 0) & (ky < H) & (kx >= 0) & (kx < W)
        of_keys, of_values = inside[:, None] & (d < D)[None, :], inside[:, None] & (e < DV)[None, :]
        k = tl.load(k_ptr + offsets(d, ky, kx, stride_kc, stride_ky, stride_kx), of_keys, 0.0)
        v = tl.load(v_ptr + offsets(e, ky, kx, stride_kc, stride_ky, stride_kx), of_values, 0.0)
        hot_i = one_hot(i, POSITIONS, q.dtype)
        hot_j = one_hot(j, POSITIONS, q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = tl.dot(rows, tl.trans(hot_i), s, input_precision=PRECISION)
        s = tl.dot(columns, tl.trans(hot_j), s, input_precision=PRECISION) * LOG2E
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = gradient(s - lse[:, None], dp - delta[:, None], ok_k[None, :])[1].to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        drows = tl.dot(ds, hot_i, drows, input_precision=PRECISION)
        dcolumns = tl.dot(ds, hot_j, dcolumns, input_precision=PRECISION)
    dq_ptr += b * stride_db + head * D * stride_dc
    dq = (dq * scale).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + offsets(d, y, x, stride_dc, stride_dy, stride_dx), dq, of_q)
    tl.store(drows_ptr + of_rows + of_row, drows.to(dq.dtype), of_some)
    tl.store(dcolumns_ptr + of_columns + of_column, dcolumns.to(dq.dtype), of_some)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def dkdv_kernel(
    q_ptr, kv_ptr, rows_ptr, columns_ptr, dout_ptr, lse_ptr, delta_ptr, dkv_ptr,
    stride_qb, stride_qc, stride_qy, stride_qx, stride_kb, stride_kc, stride_ky, stride_kx,
    stride_rb, stride_rh, stride_ry, stride_rx, stride_cb, stride_ch, stride_cy, stride_cx,
    stride_gb, stride_gc, stride_gy, stride_gx, stride_db, stride_dc, stride_dy, stride_dx,
    heads, H, W, HQ, WQ, M, N, scale,
    Q: tl.constexpr, KV: tl.constexpr, DOUT: tl.constexpr, TO: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, AP: tl.constexpr, POSITIONS: tl.constexpr, TABLE: tl.constexpr,
    OWN: tl.constexpr, WIDTH: tl.constexpr, WALKED: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    stride_qb, stride_qc, stride_qy, stride_qx = known_strides(stride_qb, stride_qc, stride_qy, stride_qx, Q)
    stride_kb, stride_kc, stride_ky, stride_kx = known_strides(stride_kb, stride_kc, stride_ky, stride_kx, KV)
    stride_gb, stride_gc, stride_gy, stride_gx = known_strides(stride_gb, stride_gc, stride_gy, stride_gx, DOUT)
    stride_db, stride_dc, stride_dy, stride_dx = known_strides(stride_db, stride_dc, stride_dy, stride_dx, TO)
    stride_rb, stride_rh, stride_ry, stride_rx = known_table(stride_rb, stride_rh, stride_ry, stride_rx, TABLE)
    stride_cb, stride_ch, stride_cy, stride_cx = known_table(stride_cb, stride_ch, stride_cy, stride_cx, TABLE)
    A: tl.constexpr = BLOCK + 2 * HALO
    STEPS: tl.constexpr = (SIDE * SIDE + WALKED - 1) // WALKED  # to loop over one block's queries
    b, head, I, J, tile = program(heads, M, N, TILES)
    HEIGHT: tl.constexpr = OWN // WIDTH
    first_y = tile // ((BLOCK + WIDTH - 1) // WIDTH) * HEIGHT
    first_x = tile % ((BLOCK + WIDTH - 1) // WIDTH) * WIDTH
    m = tl.arange(0, OWN)
    ky = first_y + m // WIDTH
    kx = first_x + m % WIDTH
    mine = (ky < BLOCK) & (kx < BLOCK)
    ky += I * BLOCK
    kx += J * BLOCK
    mine = mine & (ky < H) & (kx < W)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    of_k = mine[:, None] & (d < D)[None, :]
    of_v = mine[:, None] & (e < DV)[None, :]
    k_ptr = kv_ptr + b * stride_kb + head * (D + DV) * stride_kc
    v_ptr = k_ptr + tl.full((), D, tl.int64) * stride_kc
    k = tl.load(k_ptr + offsets(d, ky, kx, stride_kc, stride_ky, stride_kx), of_k, 0.0)
    v = tl.load(v_ptr + offsets(e, ky, kx, stride_kc, stride_ky, stride_kx), of_v, 0.0)

    # Rows and columns of blocks whose windows contain keys of the tile.
    I0 = tl.maximum(I * BLOCK + first_y - HALO, 0) // BLOCK
    J0 = tl.maximum(J * BLOCK + first_x - HALO, 0) // BLOCK
    I1 = tl.minimum((I * BLOCK + tl.minimum(first_y + HEIGHT, BLOCK) - 1 + HALO) // BLOCK, M - 1)
    J1 = tl.minimum((J * BLOCK + tl.minimum(first_x + WIDTH, BLOCK) - 1 + HALO) // BLOCK, N - 1)
    across = J1 - J0 + 1

    q_ptr += b * stride_qb + head * D * stride_qc
    dout_ptr += b * stride_gb + head * DV * stride_gc
    rows_ptr += b * stride_rb + head * stride_rh
    columns_ptr += b * stride_cb + head * stride_ch
    lse_ptr += (b * heads + head) * HQ * WQ
    delta_ptr += (b * heads + head) * HQ * WQ
    dk = tl.full((OWN, BLOCK_D), 0, tl.float32)
    dv = tl.full((OWN, BLOCK_V), 0, tl.float32)
    for step in range((I1 - I0 + 1) * across * STEPS):
        visited = step // STEPS
        block_y = I0 + visited // across
        block_x = J0 + visited % across
        y, x, ok = queries(step % STEPS * WALKED + tl.arange(0, WALKED), block_y, block_x, HQ, WQ, SIDE)
        query = y.to(tl.int64) * WQ + x
        lse = once(tl.load(lse_ptr + query, ok, float("inf")))  # exp2(s - inf) = 0 masks lanes without a query
        delta = once(tl.load(delta_ptr + query, ok, 0.0))
        ok = ok & (lse == lse)  # a NaN query must reach its own keys only, not as 0 · NaN others of the tile
        q = tl.load(q_ptr + offsets(d, y, x, stride_qc, stride_qy, stride_qx), ok[:, None] & (d < D)[None, :], 0.0)
        dout = tl.load(
            dout_ptr + offsets(e, y, x, stride_gc, stride_gy, stride_gx), ok[:, None] & (e < DV)[None, :], 0.0
        )
        of_row, of_some = places(y, x, ok, stride_ry, stride_rx, AP, POSITIONS)
        rows = tl.load(rows_ptr + of_row, of_some, 0.0)
        of_column, _ = places(y, x, ok, stride_cy, stride_cx, AP, POSITIONS)
        columns = tl.load(columns_ptr + of_column, of_some, 0.0)
        i = ky - block_y * BLOCK + HALO
        j = kx - block_x * BLOCK + HALO
        sees = (mine & (i >= 0) & (i < A) & (j >= 0) & (j < A))[:, None]
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        s = tl.dot(one_hot(i, POSITIONS, k.dtype), tl.trans(rows), s, input_precision=PRECISION)
        s = tl.dot(one_hot(j, POSITIONS, k.dtype), tl.trans(columns), s, input_precision=PRECISION) * LOG2E
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        p, ds = gradient(s - lse[None, :], dp - delta[None, :], sees)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dkv_ptr += b * stride_db + head * (D + DV) * stride_dc
    dk = (dk * scale).to(dkv_ptr.dtype.element_ty)
    tl.store(dkv_ptr + offsets(d, ky, kx, stride_dc, stride_dy, stride_dx), dk, of_k)
    dkv_ptr += tl.full((), D, tl.int64) * stride_dc
    dv = dv.to(dkv_ptr.dtype.element_ty)
    tl.store(dkv_ptr + offsets(e, ky, kx, stride_dc, stride_dy, stride_dx), dv, of_v)


# By element size in bytes and the wider of the padded head dims: most rows of the program's tile, rows per step, warps,
# stages. Chosen from ahead-of-time compilation (saccade.ops.aot, tools/kernel_bounds.py), not yet timed on a GPU: the
# tiles with the fewest instructions of those that do not spill on sm_90.
TILES = {
    (2, 16): (64, 32, 2, 1),
    (2, 32): (64, 32, 4, 1),
    (2, 64): (64, 32, 4, 1),
    (2, 128): (64, 32, 4, 1),
    (2, 256): (16, 16, 8, 1),
    (4, 16): (32, 32, 8, 1),
    (4, 32): (32, 32, 8, 1),
    (4, 64): (16, 32, 4, 2),
    (4, 128): (16, 16, 8, 1),
    (4, 256): (16, 16, 4, 1),
}
OF_KEYS = {(2, 16): (16, 64, 1, 1), (2, 32): (16, 64, 1, 1)}  # what differs for dkdv_kernel
MAX_HEAD_DIM, MAX_WINDOW = 256, 32  # that the kernels support


def launch_options(
    itemsize: int, D: int, Dv: int, block: int, halo: int, side: int, tokens: int, table: int, hip: bool, tiles=TILES
) -> dict:
    """Return constexprs and launch options for a tile in a block of `tokens` tokens. table: position logits per query
    in each table, a or more."""
    BLOCK_D, BLOCK_V = (max(16, triton.next_power_of_2(n)) for n in (D, Dv))
    most, walked, warps, stages = tiles[itemsize, max(BLOCK_D, BLOCK_V)]
    of_keys = tiles is not TILES
    positions = max(16, triton.next_power_of_2(table))
    if itemsize == 4 and positions > 16:  # position logits take twice the registers
        most, warps, walked = most if warps < 8 else max(16, most // 2), 8, min(walked, 16)
    elif itemsize == 2 and BLOCK_D > 32 and BLOCK_V == 128:
        walked, warps = 16, 8
    elif itemsize == 2 and positions > 16 and BLOCK_V <= 64:  # a row of the window does not fit in 16
        walked, warps = 64 // (1 + of_keys), 4
        if BLOCK_D > 32:
            walked //= 2
    if of_keys:  # of one block's queries at a time
        walked = min(walked, max(16, triton.next_power_of_2(side**2)))
    own = max(16, min(most, triton.next_power_of_2(tokens)))
    if itemsize == 2 and BLOCK_D + BLOCK_V < 192:
        warps = min(warps, own // 16)  # tensor cores take 16 rows a warp: more would repeat each other's work
    more = {}
    if of_keys:
        more["WIDTH"] = width = min(2 ** (own.bit_length() // 2), triton.next_power_of_2(block))
        count = triton.cdiv(block, width) * triton.cdiv(block, own // width)
        if warps == 1 and not hip:
            more["maxnreg"] = 255  # without, ptxas aims at 168 registers for some, and spills 8 bytes
    else:
        count = triton.cdiv(tokens, own)
    return more | dict(
        D=D,
        DV=Dv,
        BLOCK=block,
        HALO=halo,
        SIDE=side,
        BLOCK_D=BLOCK_D,
        BLOCK_V=BLOCK_V,
        AP=table,
        POSITIONS=positions,
        OWN=own,
        WALKED=walked,
        TILES=count,
        num_warps=warps,
        num_stages=1 if hip else stages,
    )


def key_options(*sizes) -> dict:
    """Return those of dkdv_kernel, whose tiles are of a block's keys."""
    return launch_options(*sizes, tiles=TILES | OF_KEYS)


def _launch(q: Tensor, kv: Tensor, tables: tuple[Tensor, Tensor], settings: Settings):
    """Return sizes, and the options for tiles of queries and of keys."""
    heads, block, halo, stride, scale, _ = settings
    (_, C, HQ, WQ), (_, CK, H, W) = q.shape, kv.shape
    side, hip = block // stride, torch.version.hip is not None
    fixed = q.element_size(), C // heads, (CK - C) // heads, block, halo, side
    options = (
        launch_options(*fixed, side**2, tables[0].shape[4], hip),
        key_options(*fixed, block**2, tables[0].shape[4], hip),
    )
    aligned = all(n % 8 == 0 for x in tables for n in x.stride()[:4])
    options = (one | dict(TABLE=8 if aligned else 1, PRECISION=precision(q)) for one in options)
    return (heads, H, W, HQ, WQ, triton.cdiv(H, block), triton.cdiv(W, block), scale), *options


def fwd(q: Tensor, kv: Tensor, rows: Tensor, columns: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return the output (B, heads · Dv, H', W') and, for the backward pass, the base-2 log-sum-exp of the logits
    (B, heads, H', W'). rows and columns (B, heads, H', W', a or more) are the position logits, with a contiguous last
    axis."""
    (B, C, HQ, WQ), heads = q.shape, settings.heads
    out = empty(q, kv.shape[1] - C)
    lse = q.new_empty(B, heads, HQ, WQ, dtype=torch.float32)
    sizes, options, _ = _launch(q, kv, (rows, columns), settings)
    strides = *q.stride(), *kv.stride(), *rows.stride()[:4], *columns.stride()[:4], *out.stride()
    grid = (B * sizes[5] * sizes[6] * options["TILES"] * heads,)
    with torch.cuda.device_of(q):
        launch(fwd_kernel, grid)(
            q, kv, rows, columns, out, lse, *strides, *sizes, Q=layout(q), KV=layout(kv), OUT=layout(out), **options
        )
    return out, lse


def bwd(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
    lse: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, kv, rows and columns."""
    dq, dkv = empty(q, q.shape[1]), empty(kv, kv.shape[1])
    drows, dcolumns, delta = (
        torch.empty_strided(z.shape, z.stride(), dtype=z.dtype, device=z.device) for z in (rows, columns, lse)
    )
    sizes, of_queries, of_keys = _launch(q, kv, (rows, columns), settings)
    strides = *q.stride(), *kv.stride(), *rows.stride()[:4], *columns.stride()[:4]
    forms = dict(Q=layout(q), KV=layout(kv), DOUT=layout(dout))
    programs = q.shape[0] * sizes[5] * sizes[6] * settings.heads
    with torch.cuda.device_of(q):
        launch(dq_kernel, (programs * of_queries["TILES"],))(
            q, kv, rows, columns, out, dout, lse, delta, dq, drows, dcolumns,
            *strides, *out.stride(), *dout.stride(), *dq.stride(), *sizes,
            **forms, OUT=layout(out), TO=layout(dq), **of_queries,
        )  # fmt: skip
        launch(dkdv_kernel, (programs * of_keys["TILES"],))(
            q, kv, rows, columns, dout, lse, delta, dkv, *strides, *dout.stride(), *dkv.stride(), *sizes,
            **forms, TO=layout(dkv), **of_keys,
        )  # fmt: skip
    return dq, dkv, drows, dcolumns


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: every tile of TILES, on maps of both memory formats, and with the widest windows."""
    itemsize = 4 if dtype == "fp32" else 2
    floats = dict(lse_ptr="*fp32", delta_ptr="*fp32")
    for D in (D for size, D in TILES if size == itemsize):
        for block, halo, form in ((8, 3, maps.CHANNELS + maps.ALIGNED), (8, 3, maps.COLUMNS), (14, 2, maps.COLUMNS)):
            for kernel in (fwd_kernel, dq_kernel, dkdv_kernel):
                make = key_options if kernel is dkdv_kernel else launch_options
                options = make(
                    itemsize, min(D, 64), D, block, halo, block, block**2, -(-(block + 2 * halo) // 8) * 8, hip
                )
                names = [name for name in ("Q", "KV", "OUT", "DOUT", "TO") if name in kernel.arg_names]
                yield kernel, floats, dict.fromkeys(names, form) | dict(TABLE=8) | options
