"""Triton kernels of the Gaussian gate for the passes over the map, forward and backward, and their launchers.

    moments_kernel   mean of each channel of each image, and the sum of squared deviations
    sums_kernel      backward, sums of dy and of dy · x over each channel of each image
    affine_kernel    y = scale · x + shift; backward, dx = scale · dy + linear · x + constant

The computation on (B, C) between them, including a matrix product with B rows, is in eager.Gate. Forward, the map is
read twice and written once, in training too; backward, dy and x are read twice and dx is written once.

A program has BLOCK_C channels of an image and a range of positions, BLOCK_P at a time. There are no atomics: partial
sums are added in a fixed order. Both memory formats and views are read without copying; offsets are 64-bit.
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
STRIDES = [f"stride_{tensor}{axis}" for tensor in ("", "d", "o", "y") for axis in "bchw"]


@triton.jit
def program(C, P, STRETCH: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a program's image, channels, first position, and index in the partial sums (B, stretches, C)."""
    pid = tl.program_id(0)
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    stretches = (P + STRETCH - 1) // STRETCH
    c = (pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    pid = pid // blocks
    return (pid // stretches).to(tl.int64), c, pid % stretches * STRETCH, pid.to(tl.int64) * C + c


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def moments_kernel(
    x_ptr, mean_ptr, square_ptr, stride_b, stride_c, stride_h, stride_w, C, W, P,
    X: tl.constexpr, FLAT: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    C, W = known_sizes(C, W, X)
    P = known_positions(P, X)
    b, c, first, to = program(C, P, STRETCH, BLOCK_C)
    last = min(first + STRETCH, P)
    x_ptr += b * stride_b + (c * stride_c)[:, None]
    total = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = (c < C)[:, None] & (p < P)[None, :]
        total += tl.load(x_ptr + positions_at(p, W, stride_h, stride_w, FLAT)[None, :], ok, 0.0).to(tl.float32)
    mean = tl.sum(total, 1) / (last - first)
    square = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    for start in range(first, last, BLOCK_P):  # second pass, around the mean, to avoid cancellation
        p = start + tl.arange(0, BLOCK_P)
        ok = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + positions_at(p, W, stride_h, stride_w, FLAT)[None, :], ok, 0.0).to(tl.float32)
        x = tl.where(ok, x - mean[:, None], 0.0)
        square += x * x
    tl.store(mean_ptr + to, mean, c < C)
    tl.store(square_ptr + to, tl.sum(square, 1), c < C)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def sums_kernel(
    dy_ptr, x_ptr, dshift_ptr, dscale_ptr,
    stride_db, stride_dc, stride_dh, stride_dw, stride_b, stride_c, stride_h, stride_w, C, W, P,
    DY: tl.constexpr, X: tl.constexpr, FLAT: tl.constexpr,
    STRETCH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_db, stride_dc, stride_dh, stride_dw = known_strides(stride_db, stride_dc, stride_dh, stride_dw, DY)
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    C, W = known_sizes(C, W, X)
    P = known_positions(P, X)
    b, c, first, to = program(C, P, STRETCH, BLOCK_C)
    last = min(first + STRETCH, P)
    x_ptr += b * stride_b + (c * stride_c)[:, None]
    dy_ptr += b * stride_db + (c * stride_dc)[:, None]
    shift = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    scale = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = (c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptr + positions_at(p, W, stride_h, stride_w, FLAT)[None, :], ok, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + positions_at(p, W, stride_dh, stride_dw, FLAT)[None, :], ok, 0.0).to(tl.float32)
        shift += dy
        scale += dy * x
    tl.store(dshift_ptr + to, tl.sum(shift, 1), c < C)
    tl.store(dscale_ptr + to, tl.sum(scale, 1), c < C)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def affine_kernel(
    x_ptr, other_ptr, scale_ptr, linear_ptr, shift_ptr, y_ptr,
    stride_b, stride_c, stride_h, stride_w, stride_ob, stride_oc, stride_oh, stride_ow,
    stride_yb, stride_yc, stride_yh, stride_yw, C, W, P,
    X: tl.constexpr, OTHER: tl.constexpr, Y: tl.constexpr, FLAT: tl.constexpr,
    GRAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    stride_ob, stride_oc, stride_oh, stride_ow = known_strides(stride_ob, stride_oc, stride_oh, stride_ow, OTHER)
    stride_yb, stride_yc, stride_yh, stride_yw = known_strides(stride_yb, stride_yc, stride_yh, stride_yw, Y)
    C, W = known_sizes(C, W, X)
    P = known_positions(P, X)
    b, c, first, _ = program(C, P, BLOCK_P, BLOCK_C)
    p = first + tl.arange(0, BLOCK_P)
    ok = (c < C)[:, None] & (p < P)[None, :]
    x_ptr += b * stride_b + (c * stride_c)[:, None] + positions_at(p, W, stride_h, stride_w, FLAT)[None, :]
    scale = tl.load(scale_ptr + b * C + c, c < C, 0.0)[:, None]
    shift = tl.load(shift_ptr + (b * C + c if GRAD else c), c < C, 0.0)[:, None]
    y = tl.load(x_ptr, ok, 0.0).to(tl.float32) * scale + shift
    if GRAD:
        other_ptr += b * stride_ob + (c * stride_oc)[:, None] + positions_at(p, W, stride_oh, stride_ow, FLAT)[None, :]
        y += tl.load(other_ptr, ok, 0.0).to(tl.float32) * tl.load(linear_ptr + b * C + c, c < C, 0.0)[:, None]
    y_ptr += b * stride_yb + (c * stride_yc)[:, None] + positions_at(p, W, stride_yh, stride_yw, FLAT)[None, :]
    tl.store(y_ptr, y.to(y_ptr.dtype.element_ty), ok)


# Elements of a tile and its warps. Chosen from the registers of ahead-of-time compilation (saccade.ops.aot); not yet
# timed on a GPU.
TILE, WARPS = 1024, 4
STRETCH = 1024  # positions per summing program: with 32 channels, the second pass of moments_kernel reads them from L1
CHANNELS = 32  # contiguous channels per program of a channels-last map: whole sectors in half precision


def tile(C: int, P: int, channels_last: bool) -> dict:
    """Return a tile that extends along the inner axis first, then along the other."""
    if channels_last:
        c = min(CHANNELS, triton.next_power_of_2(C))
        p = min(TILE // c, triton.next_power_of_2(P))
    else:
        p = min(256, triton.next_power_of_2(P))
        c = min(TILE // p, triton.next_power_of_2(C))
    return dict(BLOCK_C=c, BLOCK_P=p, num_warps=WARPS)


def _tile(x: Tensor) -> tuple[dict, tuple[int, int, int], int]:
    """Return options, sizes, and the number of channel tiles per image."""
    _, C, H, W = x.shape
    options = tile(C, H * W, x.stride(1) == 1 and x.stride(3) != 1)
    return options, (C, W, H * W), triton.cdiv(C, options["BLOCK_C"])


def _partial(kernel, *given: Tensor) -> Tensor:
    """Run a kernel that sums; return its two partial sums, (2, B, stretches, C)."""
    xs, flat = flattened(*given)
    x = xs[-1]
    options, sizes, blocks = _tile(x)
    stretches = triton.cdiv(sizes[2], STRETCH)
    parts = x.new_empty(2, x.shape[0], stretches, sizes[0], dtype=torch.float32)
    names, strides = (("DY", "X")[-len(xs) :], [s for m in xs for s in m.stride()])
    forms = {name: layout(m) for name, m in zip(names, xs)}
    with torch.cuda.device_of(x):
        launch(kernel, (x.shape[0] * stretches * blocks,))(
            *xs, *parts, *strides, *sizes, **forms, FLAT=flat, STRETCH=STRETCH, **options
        )
    return parts


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation of each channel of each image, (B, C), float32."""
    (mean, square), n = _partial(moments_kernel, x), x.shape[2] * x.shape[3]
    if mean.shape[1] == 1:
        return mean[:, 0].clone(), (square[:, 0] / (n - 1)).sqrt()
    count = torch.full((mean.shape[1], 1), STRETCH, device=x.device, dtype=torch.float32)
    count[-1] = n - STRETCH * (mean.shape[1] - 1)
    centre = (mean * (count / n)).sum(1)
    square = (square + (mean - centre[:, None]).square() * count).sum(1)
    return centre, (square / (n - 1)).sqrt()


def sums(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of dy and dy · x over each channel of each image, (B, C), float32."""
    dshift, dscale = _partial(sums_kernel, dy, x).sum(2)
    return dshift, dscale


def affine(
    x: Tensor, scale: Tensor, shift: Tensor | None, other: Tensor | None = None, linear: Tensor | None = None
) -> Tensor:
    """Return scale · x + shift for scale (B, C) and shift (C,); or scale · x + linear · other + shift with the strides
    of other, where all factors are (B, C)."""
    grad = other is not None and linear is not None
    y = torch.empty_like(other if grad else x)
    other, linear = (other, linear) if grad else (x, scale)
    (x, other, z), flat = flattened(x, other, y)
    options, sizes, blocks = _tile(x)
    strides = (*x.stride(), *other.stride(), *z.stride())
    shift = scale.new_zeros(sizes[0]) if shift is None else shift
    scale, linear, shift = (v.contiguous() for v in (scale, linear, shift))
    tiles = blocks * triton.cdiv(sizes[2], options["BLOCK_P"])
    with torch.cuda.device_of(x):
        launch(affine_kernel, (x.shape[0] * tiles,))(
            x, other, scale, linear, shift, z, *strides, *sizes,
            X=layout(x), OTHER=layout(other), Y=layout(z), FLAT=flat, GRAD=grad, **options,
        )  # fmt: skip
    return y


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: the tiles of the smallest and of the largest maps, in both memory formats."""
    in_dtype = ("x_ptr", "y_ptr", "dy_ptr", "other_ptr")
    for kernel in (moments_kernel, sums_kernel, affine_kernel):
        pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr") and name not in in_dtype}
        for form, flat in ((maps.CHANNELS + maps.ALIGNED, True), (maps.COLUMNS, True), (0, False)):
            forms = {name: form for name in ("X", "DY", "OTHER", "Y") if name in kernel.arg_names}
            for C, P in ((48, 3136), (384, 49)):
                options = forms | dict(FLAT=flat) | tile(C, P, bool(form & maps.CHANNELS))
                if kernel is not affine_kernel:
                    yield kernel, pointers, options | dict(STRETCH=STRETCH)
                else:
                    for grad in (False, True):
                        yield kernel, pointers, options | dict(GRAD=grad)
