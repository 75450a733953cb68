"""Triton kernels of the strip gate for the passes over the map, forward and backward, and their launchers.

Forward, `sums_kernel` reads the map once and computes both strips; `gate_kernel` reads it again and writes the gated
map. Backward, `sums_kernel` reads dy and x and computes the gradients of both gates; `gate_kernel` reads dy and writes
dx. The computation on the strips between them is in eager.Gates. So forward reads the map twice and writes it once,
backward reads three maps and writes one; the published implementation, with a pass per mean and product, reads four
maps and writes two in the forward pass alone.

A program has BLOCK_C channels x BLOCK_W columns x ROWS rows, BLOCK_H at a time. Strips that are longer than a program's
tile are partial sums, which are added in a fixed order, without atomics. Triton orders a tile by the axis with stride
1, so both memory formats and views are read without copying.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import maps
from ..maps import known_sizes, known_strides, layout
from ..tune import launch

SIZES = ["B", "C", "H", "W"]
STRIDES = [f"stride_{tensor}{axis}" for tensor in ("", "d", "y") for axis in "bchw"]


@triton.jit
def offsets(c, h, w, stride_c, stride_h, stride_w):
    """Return the offsets of a tile of channels c, rows h and columns w."""
    return (c * stride_c)[:, None, None] + (h * stride_h)[None, :, None] + (w * stride_w)[None, None, :]


@triton.jit
def program(H, W, ROWS, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr):
    """Return a program's image, channels, first row and columns, 64-bit if multiplied by strides; and the indices of
    its row tile and column tile."""
    pid = tl.program_id(0)  # of tiles and images; the second axis is for channels: two divisions less
    column_tiles = (W + BLOCK_W - 1) // BLOCK_W
    row_tiles = (H + ROWS - 1) // ROWS
    column_tile = pid % column_tiles
    pid = pid // column_tiles
    row_tile = pid % row_tiles
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    w = (column_tile * BLOCK_W + tl.arange(0, BLOCK_W)).to(tl.int64)
    return (pid // row_tiles).to(tl.int64), c, row_tile * ROWS, w, row_tile, column_tile


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def sums_kernel(
    x_ptr, dy_ptr, ah_ptr, aw_ptr, rows_ptr, columns_ptr,
    stride_b, stride_c, stride_h, stride_w, stride_db, stride_dc, stride_dh, stride_dw,
    B, C, H, W,
    X: tl.constexpr, DY: tl.constexpr, GRAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    stride_db, stride_dc, stride_dh, stride_dw = known_strides(stride_db, stride_dc, stride_dh, stride_dw, DY)
    C, W = known_sizes(C, W, X)
    b, c, top, w, row_tile, column_tile = program(H, W, ROWS, BLOCK_C, BLOCK_W)
    inside = (c < C)[:, None, None] & (w < W)[None, None, :]
    strip = b * C + c  # index in (B, C)
    x_ptr += b * stride_b
    dy_ptr += b * stride_db
    rows_ptr += column_tile.to(tl.int64) * B * C * H
    columns_ptr += row_tile.to(tl.int64) * B * C * W
    of_w = strip[:, None] * W + w[None, :]
    has_w = (c < C)[:, None] & (w < W)[None, :]
    if GRAD:
        aw = tl.load(aw_ptr + of_w, has_w, 0.0)
    columns = tl.full((BLOCK_C, BLOCK_H, BLOCK_W), 0, tl.float32)  # summed over rows once, behind the loop
    for start in range(top, min(top + ROWS, H), BLOCK_H):
        h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
        ok = inside & (h < H)[None, :, None]
        of_h = strip[:, None] * H + h[None, :]
        has_h = (c < C)[:, None] & (h < H)[None, :]
        x = tl.load(x_ptr + offsets(c, h, w, stride_c, stride_h, stride_w), ok, 0.0).to(tl.float32)
        if GRAD:
            x *= tl.load(dy_ptr + offsets(c, h, w, stride_dc, stride_dh, stride_dw), ok, 0.0).to(tl.float32)
            ah = tl.load(ah_ptr + of_h, has_h, 0.0)
            rows = tl.sum(x * aw[:, None, :], 2)
            columns += x * ah[:, :, None]
        else:
            rows = tl.sum(x, 2) * (1 / W.to(tl.float32))
            columns += x
        tl.store(rows_ptr + of_h, rows, has_h)
    total = tl.sum(columns, 1)
    if not GRAD:
        total *= 1 / H.to(tl.float32)
    tl.store(columns_ptr + of_w, total, has_w)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def gate_kernel(
    x_ptr, ah_ptr, aw_ptr, dzh_ptr, dzw_ptr, y_ptr,
    stride_b, stride_c, stride_h, stride_w, stride_yb, stride_yc, stride_yh, stride_yw,
    C, H, W,
    X: tl.constexpr, Y: tl.constexpr, GRAD: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    stride_yb, stride_yc, stride_yh, stride_yw = known_strides(stride_yb, stride_yc, stride_yh, stride_yw, Y)
    C, W = known_sizes(C, W, X)
    b, c, top, w, _, _ = program(H, W, BLOCK_H, BLOCK_C, BLOCK_W)
    h = (top + tl.arange(0, BLOCK_H)).to(tl.int64)
    strip = b * C + c
    of_h = strip[:, None] * H + h[None, :]
    of_w = strip[:, None] * W + w[None, :]
    has_h = (c < C)[:, None] & (h < H)[None, :]
    has_w = (c < C)[:, None] & (w < W)[None, :]
    ok = has_h[:, :, None] & (w < W)[None, None, :]
    x = tl.load(x_ptr + b * stride_b + offsets(c, h, w, stride_c, stride_h, stride_w), ok, 0.0).to(tl.float32)
    a = tl.load(ah_ptr + of_h, has_h, 0.0)[:, :, None] * tl.load(aw_ptr + of_w, has_w, 0.0)[:, None, :]
    if RESIDUAL:
        a += 1
    y = x * a
    if GRAD:
        dzh = tl.load(dzh_ptr + of_h, has_h, 0.0) / W
        dzw = tl.load(dzw_ptr + of_w, has_w, 0.0) / H
        y += dzh[:, :, None] + dzw[:, None, :]
    y_ptr += b * stride_yb + offsets(c, h, w, stride_yc, stride_yh, stride_yw)
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), ok)


# Elements of a tile, and its warps: 16 elements per thread, since what a program computes once, places and sums, is
# most of what it does at small maps; 8 of a channels-last map, where 16 of dy · x take over 200 registers and halve the
# occupancy. Chosen from the code of ahead-of-time compilation (saccade.ops.aot, tools/kernel_bounds.py); not yet timed
# on a GPU.
TILE = 2048
ROWS = 64  # rows per program of sums_kernel: the partial sums of z_w have H / 64 rows, a few per cent of the map
CHANNELS = 32  # contiguous channels per program of a channels-last map: whole sectors in half precision


def tile(C: int, H: int, W: int, channels_last: bool) -> dict:
    """Return a tile that extends along the inner axis first, then along the next."""
    if channels_last:
        c = min(CHANNELS, triton.next_power_of_2(C))
        w = min(32, triton.next_power_of_2(W))
        h = min(TILE // c // w, ROWS, triton.next_power_of_2(H))
    else:
        w = min(32, triton.next_power_of_2(W))
        h = min(8, triton.next_power_of_2(H))
        c = min(TILE // w // h, triton.next_power_of_2(C))
    return dict(BLOCK_C=c, BLOCK_H=h, BLOCK_W=w, num_warps=8 if channels_last else 4)


def _tile(x: Tensor) -> dict:
    return tile(*x.shape[1:], x.stride(1) == 1 and x.stride(3) != 1)


def _grid(x: Tensor, rows: int, options: dict) -> tuple[int, int]:
    (B, C, H, W), cdiv = x.shape, triton.cdiv
    return B * cdiv(H, rows) * cdiv(W, options["BLOCK_W"]), cdiv(C, options["BLOCK_C"])


def _sums(x: Tensor, dy: Tensor | None = None, a_h: Tensor | None = None, a_w: Tensor | None = None):
    B, C, H, W = x.shape
    options, grad = _tile(x), dy is not None
    rows = x.new_empty(triton.cdiv(W, options["BLOCK_W"]), B, C, H, dtype=torch.float32)
    columns = x.new_empty(triton.cdiv(H, ROWS), B, C, W, dtype=torch.float32)
    dy = x if dy is None else dy
    a_h = rows if a_h is None else a_h.contiguous()  # not read if None
    a_w = columns if a_w is None else a_w.contiguous()
    with torch.cuda.device_of(x):
        launch(sums_kernel, _grid(x, ROWS, options))(
            x, dy, a_h, a_w, rows, columns, *x.stride(), *dy.stride(), *x.shape,
            X=layout(x), DY=layout(dy), GRAD=grad, ROWS=ROWS, **options,
        )  # fmt: skip
    return tuple(parts[0] if len(parts) == 1 else parts.sum(0) for parts in (rows, columns))


def strip_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return means over W, (B, C, H), and over H, (B, C, W), in float32."""
    return _sums(x)


def strip_sums(dy: Tensor, x: Tensor, a_h: Tensor, a_w: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of dy · x: over W, weighted with a_w, (B, C, H); over H, weighted with a_h, (B, C, W); in float32."""
    return _sums(x, dy, a_h, a_w)


def gate(
    x: Tensor,
    a_h: Tensor,
    a_w: Tensor,
    residual: bool,
    dz_h: Tensor | None = None,
    dz_w: Tensor | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """Return x · (a_h · a_w, or 1 + a_h · a_w), plus dz_h / W + dz_w / H if given, with the strides of `like` or x."""
    y, options, grad = torch.empty_like(x if like is None else like), _tile(x), dz_h is not None
    a_h, a_w = a_h.contiguous(), a_w.contiguous()
    dz_h, dz_w = (a_h, a_w) if dz_h is None or dz_w is None else (dz_h.contiguous(), dz_w.contiguous())
    with torch.cuda.device_of(x):
        launch(gate_kernel, _grid(x, options["BLOCK_H"], options))(
            x, a_h, a_w, dz_h, dz_w, y, *x.stride(), *y.stride(), *x.shape[1:],
            X=layout(x), Y=layout(y), GRAD=grad, RESIDUAL=residual, **options,
        )  # fmt: skip
    return y


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: the tiles of the smallest and of the largest maps, in both memory formats."""
    strips = dict.fromkeys(("ah_ptr", "aw_ptr", "rows_ptr", "columns_ptr", "dzh_ptr", "dzw_ptr"), "*fp32")
    for channels_last in (False, True):
        for size in (7, 14, 112):
            options = tile(64, size, size, channels_last)
            form = maps.CHANNELS + maps.ALIGNED if channels_last else maps.COLUMNS
            for grad in (False, True):
                yield sums_kernel, strips, dict(X=form, DY=form, GRAD=grad, ROWS=ROWS) | options
                yield gate_kernel, strips, dict(X=form, Y=form, GRAD=grad, RESIDUAL=True) | options
