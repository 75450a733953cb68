"""Triton kernels of the spatial gate for the passes over the map, forward and backward, and their launchers.

    gate_kernel   g = hardsigmoid(Σ_c w_c x_c), and the output; in training, instead of it, moments of x · g
    norm_kernel   the output, gain · x · g + shift                                                 (training only)
    sums_kernel   backward, sums of dy and of dy · x · g over each channel
    grad_kernel   backward, dx and the gradient of the weight

A program has all channels of BLOCK_P positions of an image, BLOCK_C at a time. gate_kernel and grad_kernel loop over
them twice, first for the sums over channels; the second time they are in L1 or L2. Forward, the map is read and written
once, in training read twice; backward, dy and x are read twice and dx is written once.

There are no atomics: sums over positions are partial sums, one per program, which are added in a fixed order. Both
memory formats and views are read without copying; offsets are 64-bit.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import maps
from ..maps import flattened, known_positions, known_sizes, known_strides, layout, positions_at
from ..tune import launch

SIZES = ["C", "W", "P"]
STRIDES = [f"stride_{tensor}{axis}" for tensor in ("", "d", "x", "y") for axis in "bchw"]


@triton.jit
def positions(W, P, stride_b, stride_h, stride_w, FLAT: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return a program's offsets in a map, a mask of those that exist, and its positions in (B, P)."""
    tiles = (P + BLOCK_P - 1) // BLOCK_P
    b = (tl.program_id(0) // tiles).to(tl.int64)
    p = tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    return (b * stride_b + positions_at(p, W, stride_h, stride_w, FLAT))[None, :], p < P, b * P + p


@triton.jit
def hardsigmoid(s):
    return tl.where(s != s, s, tl.minimum(tl.maximum(s + 3, 0.0), 6.0) / 6)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def gate_kernel(
    x_ptr, weight_ptr, gain_ptr, shift_ptr, g_ptr, y_ptr, mean_ptr, square_ptr,
    stride_b, stride_c, stride_h, stride_w, stride_yb, stride_yc, stride_yh, stride_yw, C, W, P,
    X: tl.constexpr, Y: tl.constexpr, FLAT: tl.constexpr,
    TRAINING: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    stride_yb, stride_yc, stride_yh, stride_yw = known_strides(stride_yb, stride_yc, stride_yh, stride_yw, Y)
    C, W = known_sizes(C, W, X)
    P = known_positions(P, X)
    at, has, to = positions(W, P, stride_b, stride_h, stride_w, FLAT, BLOCK_P)
    at_y, _, _ = positions(W, P, stride_yb, stride_yh, stride_yw, FLAT, BLOCK_P)
    s = tl.full((BLOCK_P,), 0, tl.float32)
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        ok = (c < C)[:, None] & has[None, :]
        x = tl.load(x_ptr + at + (c * stride_c)[:, None], ok, 0.0).to(tl.float32)
        s += tl.sum(x * tl.load(weight_ptr + c, c < C, 0.0)[:, None], 0)
    g = hardsigmoid(s)
    tl.store(g_ptr + to, g, has)
    count = tl.sum(has.to(tl.float32), 0)
    part = tl.program_id(0).to(tl.int64) * C
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        ok = (c < C)[:, None] & has[None, :]
        z = tl.load(x_ptr + at + (c * stride_c)[:, None], ok, 0.0).to(tl.float32) * g[None, :]
        if TRAINING:
            mean = tl.sum(tl.where(ok, z, 0.0), 1) / count
            off = tl.where(ok, z - mean[:, None], 0.0)
            tl.store(mean_ptr + part + c, mean, c < C)
            tl.store(square_ptr + part + c, tl.sum(off * off, 1), c < C)
        else:
            gain = tl.load(gain_ptr + c, c < C, 0.0)[:, None]
            y = z * gain + tl.load(shift_ptr + c, c < C, 0.0)[:, None]
            tl.store(y_ptr + at_y + (c * stride_yc)[:, None], y.to(y_ptr.dtype.element_ty), ok)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def norm_kernel(
    x_ptr, g_ptr, gain_ptr, shift_ptr, y_ptr,
    stride_b, stride_c, stride_h, stride_w, stride_yb, stride_yc, stride_yh, stride_yw, C, W, P,
    X: tl.constexpr, Y: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    stride_yb, stride_yc, stride_yh, stride_yw = known_strides(stride_yb, stride_yc, stride_yh, stride_yw, Y)
    C, W = known_sizes(C, W, X)
    P = known_positions(P, X)
    at, has, to = positions(W, P, stride_b, stride_h, stride_w, FLAT, BLOCK_P)
    at_y, _, _ = positions(W, P, stride_yb, stride_yh, stride_yw, FLAT, BLOCK_P)
    g = tl.load(g_ptr + to, has, 0.0)[None, :]
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        ok = (c < C)[:, None] & has[None, :]
        x = tl.load(x_ptr + at + (c * stride_c)[:, None], ok, 0.0).to(tl.float32)
        y = x * g * tl.load(gain_ptr + c, c < C, 0.0)[:, None] + tl.load(shift_ptr + c, c < C, 0.0)[:, None]
        tl.store(y_ptr + at_y + (c * stride_yc)[:, None], y.to(y_ptr.dtype.element_ty), ok)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def sums_kernel(
    dy_ptr, x_ptr, g_ptr, dbias_ptr, dyz_ptr,
    stride_db, stride_dc, stride_dh, stride_dw, stride_b, stride_c, stride_h, stride_w, C, W, P,
    DY: tl.constexpr, X: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_db, stride_dc, stride_dh, stride_dw = known_strides(stride_db, stride_dc, stride_dh, stride_dw, DY)
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    C, W = known_sizes(C, W, X)
    P = known_positions(P, X)
    at, has, to = positions(W, P, stride_b, stride_h, stride_w, FLAT, BLOCK_P)
    at_d, _, _ = positions(W, P, stride_db, stride_dh, stride_dw, FLAT, BLOCK_P)
    g = tl.load(g_ptr + to, has, 0.0)[None, :]
    part = tl.program_id(0).to(tl.int64) * C
    for start in range(0, C, BLOCK_C):
        c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
        ok = (c < C)[:, None] & has[None, :]
        x = tl.load(x_ptr + at + (c * stride_c)[:, None], ok, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at_d + (c * stride_dc)[:, None], ok, 0.0).to(tl.float32)
        tl.store(dbias_ptr + part + c, tl.sum(dy, 1), c < C)
        tl.store(dyz_ptr + part + c, tl.sum(dy * x * g, 1), c < C)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def grad_kernel(
    dy_ptr, x_ptr, g_ptr, weight_ptr, gain_ptr, linear_ptr, constant_ptr, dx_ptr, dweight_ptr,
    stride_db, stride_dc, stride_dh, stride_dw, stride_b, stride_c, stride_h, stride_w,
    stride_xb, stride_xc, stride_xh, stride_xw, C, W, P,
    DY: tl.constexpr, X: tl.constexpr, DX: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_db, stride_dc, stride_dh, stride_dw = known_strides(stride_db, stride_dc, stride_dh, stride_dw, DY)
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    stride_xb, stride_xc, stride_xh, stride_xw = known_strides(stride_xb, stride_xc, stride_xh, stride_xw, DX)
    C, W = known_sizes(C, W, X)
    P = known_positions(P, X)
    at, has, to = positions(W, P, stride_b, stride_h, stride_w, FLAT, BLOCK_P)
    at_d, _, _ = positions(W, P, stride_db, stride_dh, stride_dw, FLAT, BLOCK_P)
    at_x, _, _ = positions(W, P, stride_xb, stride_xh, stride_xw, FLAT, BLOCK_P)
    g = tl.load(g_ptr + to, has, 0.0)
    ds = tl.full((BLOCK_P,), 0, tl.float32)
    part = tl.program_id(0).to(tl.int64) * C
    for walk in tl.static_range(2):
        for start in range(0, C, BLOCK_C):
            c = (start + tl.arange(0, BLOCK_C)).to(tl.int64)
            ok = (c < C)[:, None] & has[None, :]
            x = tl.load(x_ptr + at + (c * stride_c)[:, None], ok, 0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at_d + (c * stride_dc)[:, None], ok, 0.0).to(tl.float32)
            dz = dy * tl.load(gain_ptr + c, c < C, 0.0)[:, None]
            dz += x * g[None, :] * tl.load(linear_ptr + c, c < C, 0.0)[:, None]
            dz += tl.load(constant_ptr + c, c < C, 0.0)[:, None]
            if walk == 0:
                ds += tl.sum(dz * x, 0)
            else:
                dx = dz * g[None, :] + ds[None, :] * tl.load(weight_ptr + c, c < C, 0.0)[:, None]
                tl.store(dx_ptr + at_x + (c * stride_xc)[:, None], dx.to(dx_ptr.dtype.element_ty), ok)
                tl.store(dweight_ptr + part + c, tl.sum(tl.where(ok, x * ds[None, :], 0.0), 1), c < C)
        if walk == 0:
            ds = tl.where((g > 0) & (g < 1) | (g != g), ds / 6, 0.0)


TILE, WARPS = 2048, 8  # elements of a tile and its warps: by the registers of ahead-of-time compilation; not yet timed
POSITIONS = 128  # per program: two float32 partial sums per channel are 1/32 of the map in half precision


def tile(C: int, P: int) -> dict:
    p = max(16, min(POSITIONS, triton.next_power_of_2(P)))
    return dict(BLOCK_C=min(TILE // p, triton.next_power_of_2(C)), BLOCK_P=p, num_warps=WARPS)


def _launch(kernel, *tensors: Tensor, X: Tensor, flags: dict | None = None, **others: Tensor) -> None:
    """Launch a kernel; X and others are its maps by the names of their layouts, in the order of their strides."""
    (B, C, H, W), options = X.shape, tile(X.shape[1], X.shape[2] * X.shape[3])
    given = {name: dict(X=X, **others)[name] for name in kernel.arg_names if name in ("X", *others)}
    xs, flat = flattened(*given.values())
    forms = {name: layout(m) for name, m in zip(given, xs)}
    strides = [s for m in xs for s in m.stride()]
    with torch.cuda.device_of(X):
        launch(kernel, (B * triton.cdiv(H * W, options["BLOCK_P"]),))(
            *tensors, *strides, C, W, H * W, **forms, FLAT=flat, **(flags or {}), **options
        )


def _parts(x: Tensor, n: int) -> Tensor:
    """Allocate n partial sums per channel and program, (n, programs, C)."""
    B, C, H, W = x.shape
    return x.new_empty(n, B * triton.cdiv(H * W, tile(C, H * W)["BLOCK_P"]), C, dtype=torch.float32)


def gate(x: Tensor, weight: Tensor, gain: Tensor | None = None, shift: Tensor | None = None):
    """Return the gates (B, 1, H, W); and the output or, without gain and shift, mean and biased variance of x · g."""
    B, C, H, W = x.shape
    g, training = x.new_empty(B, 1, H, W, dtype=torch.float32), gain is None or shift is None
    y, parts = (x, _parts(x, 2)) if training else (torch.empty_like(x), [g, g])
    gain, shift = (weight, weight) if gain is None or shift is None else (gain, shift)
    vectors = (v.contiguous() for v in (weight, gain, shift))
    _launch(gate_kernel, x, *vectors, g, y, *parts, X=x, Y=y, flags=dict(TRAINING=training))
    if not training:
        return g, y
    mean, square = parts
    block = tile(C, H * W)["BLOCK_P"]
    count = torch.arange(0, H * W, block, device=x.device).neg_().add_(H * W).clamp_(max=block).repeat(B)[:, None]
    n = B * H * W
    centre = (mean * (count / n)).sum(0)
    return g, centre, (square + (mean - centre).square() * count).sum(0) / n


def norm(x: Tensor, g: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    y = torch.empty_like(x)
    _launch(norm_kernel, x, g, gain.contiguous(), shift.contiguous(), y, X=x, Y=y)
    return y


def sums(dy: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of dy and dy · x · g over each channel."""
    parts = _parts(x, 2)
    _launch(sums_kernel, dy, x, g, *parts, X=x, DY=dy)
    dbias, dyz = parts.sum(1)
    return dbias, dyz


def grad(dy: Tensor, x: Tensor, g: Tensor, weight: Tensor, gain: Tensor, linear: Tensor, constant: Tensor):
    """Return the gradients of x and of the weight."""
    dx, (parts,) = torch.empty_like(x), _parts(x, 1)
    vectors = (v.contiguous() for v in (weight, gain, linear, constant))
    _launch(grad_kernel, dy, x, g, *vectors, dx, parts, X=x, DY=dy, DX=dx)
    return dx, parts.sum(0)


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: the tiles of large and of small maps, in both memory formats."""
    in_dtype = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr")
    for kernel in (gate_kernel, norm_kernel, sums_kernel, grad_kernel):
        pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr") and name not in in_dtype}
        for form, flat in ((maps.CHANNELS + maps.ALIGNED, True), (maps.COLUMNS, True), (0, False)):
            forms = {name: form for name in ("X", "DY", "DX", "Y") if name in kernel.arg_names}
            for C, P in ((32, 3136), (256, 49)):
                for flags in [dict(TRAINING=t) for t in (False, True)] if kernel is gate_kernel else [{}]:
                    yield kernel, pointers, forms | dict(FLAT=flat) | flags | tile(C, P)
