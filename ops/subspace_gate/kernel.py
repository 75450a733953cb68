"""Triton kernels of the subspace gate for the passes over the map, forward and backward, and their launchers.

    moments_kernel   mean of each channel of each image, and the sum of squared deviations   (training only)
    scores_kernel    Σ_c v_c · maxpool3(relu(scale_c · x + shift_c)), one map per subspace
    gate_kernel      x · (1 + attention)
    dgate_kernel     Σ_c dy · x, one map per subspace
    dmap_kernel      the gradient through pooling and ReLU: its sums over each channel, or dx, or both

The computation on single channels and one-channel maps between them is in eager.Middle. y and dx are the only maps of
x's size that are allocated: the affine map, the ReLU and the pooling are recomputed from x where they are needed.

In the backward pass, position q of channel c gets D(q) · v_c, where D(q) is the sum of ds over those of the nine
windows around q whose first maximum is at q, if it is positive. This depends on 5 x 5 neighbours, most of them read
from L1. The gradients of the parameters only need Σ D and Σ D · x of each channel, since a window's maximum is scale ·
x + shift at its q. In training dx needs these sums first, so `dmap_kernel` runs twice, else once.

A program has BLOCK_C channels of one subspace and BLOCK_P positions at a time. There are no atomics: partial sums are
per image and added in a fixed order. Both memory formats and views are read without copying. Offsets within an image
are 32-bit (see `REACH`), since 64-bit offsets of 24 neighbours would fill the registers.
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import maps
from ..maps import known_sizes, known_strides
from ..tune import launch

SIZES = ["B", "g", "G", "H", "W"]
STRIDES = [f"stride_{tensor}{axis}" for tensor in ("", "d", "x", "y") for axis in "bchw"]
NAN = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def subspace(pid, g, G, BLOCK_C: tl.constexpr):
    """Return a program's image, subspace, channels within it, and a mask of those that exist."""
    blocks = (G + BLOCK_C - 1) // BLOCK_C
    c = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pid = pid // blocks
    return (pid // g).to(tl.int64), pid % g, c, c < G


@triton.jit
def offsets(h, w, stride_h, stride_w):
    return (h * stride_h + w * stride_w)[None, :]


@triton.jit
def affine_at(x_ptr, h, w, scale, shift, ok, H, W, stride_h, stride_w):
    """Return scale · x + shift at (h, w), -inf outside the map. x_ptr points to position 0 of channels (BLOCK_C, 1)."""
    ok = ok & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[None, :]
    x = tl.load(x_ptr + offsets(h, w, stride_h, stride_w), ok, 0.0).to(tl.float32)
    return tl.where(ok, x * scale + shift, float("-inf"))


@triton.jit
def largest(a, b):
    return tl.maximum(a, b, propagate_nan=NAN)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def moments_kernel(
    x_ptr, mean_ptr, square_ptr, stride_b, stride_c, stride_h, stride_w, g, G, H, W,
    X: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    G, W = known_sizes(G, W, X)
    b, n, c, has = subspace(tl.program_id(0), g, G, BLOCK_C)
    channel = n.to(tl.int64) * G + c
    x_ptr += b * stride_b + (channel * stride_c)[:, None]
    total = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    for start in range(0, H * W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        total += tl.load(x_ptr + offsets(p // W, p % W, stride_h, stride_w), has[:, None] & (p < H * W)[None, :], 0.0)
    mean = tl.sum(total, 1) / (H * W)
    square = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    for start in range(0, H * W, BLOCK_P):  # second pass, around the mean, to avoid cancellation
        p = start + tl.arange(0, BLOCK_P)
        ok = has[:, None] & (p < H * W)[None, :]
        x = tl.load(x_ptr + offsets(p // W, p % W, stride_h, stride_w), ok, 0.0).to(tl.float32)
        x = tl.where(ok, x - mean[:, None], 0.0)
        square += x * x
    tl.store(mean_ptr + b * g * G + channel, mean, has)
    tl.store(square_ptr + b * g * G + channel, tl.sum(square, 1), has)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def scores_kernel(
    x_ptr, scale_ptr, shift_ptr, point_ptr, s_ptr, stride_b, stride_c, stride_h, stride_w, g, G, H, W,
    X: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    G, W = known_sizes(G, W, X)
    tiles = (H * W + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    p = pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    b, n = (pid // tiles // g).to(tl.int64), (pid // tiles % g).to(tl.int64)
    h, w = p // W, p % W
    s = tl.full((BLOCK_P,), 0, tl.float32)
    for start in range(0, G, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        has = c < G
        channel = n * G + c
        scale = tl.load(scale_ptr + channel, has, 0.0)[:, None]
        shift = tl.load(shift_ptr + channel, has, 0.0)[:, None]
        x = x_ptr + b * stride_b + (channel * stride_c)[:, None]
        ok = has[:, None] & (p < H * W)[None, :]
        pool = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)  # the ReLU
        for i in tl.static_range(-1, 2):
            for j in tl.static_range(-1, 2):
                pool = largest(pool, affine_at(x, h + i, w + j, scale, shift, ok, H, W, stride_h, stride_w))
        s += tl.sum(pool * tl.load(point_ptr + channel, has, 0.0)[:, None], 0)
    tl.store(s_ptr + (b * g + n) * H * W + p, s, p < H * W)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def gate_kernel(
    x_ptr, attention_ptr, y_ptr,
    stride_b, stride_c, stride_h, stride_w, stride_yb, stride_yc, stride_yh, stride_yw, g, G, H, W,
    X: tl.constexpr, Y: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    stride_yb, stride_yc, stride_yh, stride_yw = known_strides(stride_yb, stride_yc, stride_yh, stride_yw, Y)
    G, W = known_sizes(G, W, X)
    tiles = (H * W + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    p = pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    b, n, c, has = subspace(pid // tiles, g, G, BLOCK_C)
    h, w = p // W, p % W
    ok = has[:, None] & (p < H * W)[None, :]
    channel = (n.to(tl.int64) * G + c)[:, None]
    a = tl.load(attention_ptr + (b * g + n) * H * W + p, p < H * W, 0.0)[None, :]
    x = tl.load(x_ptr + b * stride_b + channel * stride_c + offsets(h, w, stride_h, stride_w), ok, 0.0).to(tl.float32)
    y_ptr += b * stride_yb + channel * stride_yc + offsets(h, w, stride_yh, stride_yw)
    tl.store(y_ptr, (x + x * a).to(y_ptr.dtype.element_ty), ok)


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def dgate_kernel(
    dy_ptr, x_ptr, da_ptr,
    stride_db, stride_dc, stride_dh, stride_dw, stride_b, stride_c, stride_h, stride_w, g, G, H, W,
    DY: tl.constexpr, X: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_db, stride_dc, stride_dh, stride_dw = known_strides(stride_db, stride_dc, stride_dh, stride_dw, DY)
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    G, W = known_sizes(G, W, X)
    tiles = (H * W + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    p = pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    b, n = (pid // tiles // g).to(tl.int64), (pid // tiles % g).to(tl.int64)
    h, w = p // W, p % W
    total = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    for start in range(0, G, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        ok = (c < G)[:, None] & (p < H * W)[None, :]
        channel = (n * G + c)[:, None]
        x = tl.load(x_ptr + b * stride_b + channel * stride_c + offsets(h, w, stride_h, stride_w), ok, 0.0)
        dy = tl.load(dy_ptr + b * stride_db + channel * stride_dc + offsets(h, w, stride_dh, stride_dw), ok, 0.0)
        total += x.to(tl.float32) * dy.to(tl.float32)
    tl.store(da_ptr + (b * g + n) * H * W + p, tl.sum(total, 0), p < H * W)


@triton.jit
def grad_at(ds_ptr, h, w, H, W):
    return tl.load(ds_ptr + h * W + w, (h >= 0) & (h < H) & (w >= 0) & (w < W), 0.0)[None, :]


@triton.jit(do_not_specialize=[*SIZES, *STRIDES])
def dmap_kernel(
    x_ptr, dy_ptr, ds_ptr, attention_ptr, scale_ptr, shift_ptr, point_ptr, constant_ptr, linear_ptr,
    dx_ptr, sum_ptr, sumx_ptr,
    stride_b, stride_c, stride_h, stride_w, stride_db, stride_dc, stride_dh, stride_dw,
    stride_xb, stride_xc, stride_xh, stride_xw, g, G, H, W,
    X: tl.constexpr, DY: tl.constexpr, TO: tl.constexpr,
    SUMS: tl.constexpr, DX: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    stride_db, stride_dc, stride_dh, stride_dw = known_strides(stride_db, stride_dc, stride_dh, stride_dw, DY)
    stride_xb, stride_xc, stride_xh, stride_xw = known_strides(stride_xb, stride_xc, stride_xh, stride_xw, TO)
    G, W = known_sizes(G, W, X)
    b, n, c, has = subspace(tl.program_id(0), g, G, BLOCK_C)
    channel = n.to(tl.int64) * G + c
    scale = tl.load(scale_ptr + channel, has, 0.0)[:, None]
    shift = tl.load(shift_ptr + channel, has, 0.0)[:, None]
    x_ptr += b * stride_b + (channel * stride_c)[:, None]
    ds_ptr += (b * g + n) * H * W
    if DX:
        dy_ptr += b * stride_db + (channel * stride_dc)[:, None]
        dx_ptr += b * stride_xb + (channel * stride_xc)[:, None]
        attention_ptr += (b * g + n) * H * W
        gain = scale * tl.load(point_ptr + channel, has, 0.0)[:, None]
        constant = tl.load(constant_ptr + channel, has, 0.0)[:, None]
        linear = tl.load(linear_ptr + channel, has, 0.0)[:, None]
    total = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    totalx = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    for start in range(0, H * W, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = has[:, None] & (p < H * W)[None, :]
        h, w = p // W, p % W
        x = tl.load(x_ptr + offsets(h, w, stride_h, stride_w), ok, 0.0).to(tl.float32)
        z = x * scale + shift
        # Is z the first maximum of the window centred k columns away? In its row, values to the left must be smaller
        # and values to the right not larger; rows above must be smaller, rows below not larger.
        left = z > affine_at(x_ptr, h, w - 1, scale, shift, ok, H, W, stride_h, stride_w)
        right = z >= affine_at(x_ptr, h, w + 1, scale, shift, ok, H, W, stride_h, stride_w)
        first = left & (z > affine_at(x_ptr, h, w - 2, scale, shift, ok, H, W, stride_h, stride_w))
        last = right & (z >= affine_at(x_ptr, h, w + 2, scale, shift, ok, H, W, stride_h, stride_w))
        d = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
        for k in tl.static_range(-1, 2):
            wins = first if k == -1 else (left & right if k == 0 else last)
            up = wins
            down = wins
            middle = wins
            for i in tl.static_range(1, 3):
                above = float("-inf")
                below = float("-inf")
                for j in tl.static_range(-1, 2):
                    column = w + k + j
                    above = tl.maximum(
                        above, affine_at(x_ptr, h - i, column, scale, shift, ok, H, W, stride_h, stride_w)
                    )
                    below = tl.maximum(
                        below, affine_at(x_ptr, h + i, column, scale, shift, ok, H, W, stride_h, stride_w)
                    )
                up = up & (z > above)
                down = down & (z >= below)
                if i == 1:
                    middle = up & down
            d += tl.where(up, grad_at(ds_ptr, h - 1, w + k, H, W), 0.0)
            d += tl.where(middle, grad_at(ds_ptr, h, w + k, H, W), 0.0)
            d += tl.where(down, grad_at(ds_ptr, h + 1, w + k, H, W), 0.0)
        d = tl.where(ok & (z > 0), d, 0.0)
        if SUMS:
            total += d
            totalx += d * x
        if DX:
            dy = tl.load(dy_ptr + offsets(h, w, stride_dh, stride_dw), ok, 0.0).to(tl.float32)
            a = tl.load(attention_ptr + p, p < H * W, 0.0)[None, :]
            dx = dy + dy * a + gain * d + (constant + linear * x)
            tl.store(dx_ptr + offsets(h, w, stride_xh, stride_xw), dx.to(dx_ptr.dtype.element_ty), ok)
    if SUMS:
        tl.store(sum_ptr + b * g * G + channel, tl.sum(total, 1), has)
        tl.store(sumx_ptr + b * g * G + channel, tl.sum(totalx, 1), has)


# Elements of a tile and its warps, by kernel. Chosen from the registers of ahead-of-time compilation (saccade.ops.aot);
# not yet timed on a GPU. `dmap_kernel`, which reads 24 neighbours, spills with eight elements per thread.
TILES = {
    moments_kernel: (1024, 4),
    scores_kernel: (512, 4),
    gate_kernel: (1024, 4),
    dgate_kernel: (1024, 4),
    dmap_kernel: (256, 8),
}
CHANNELS = 32  # contiguous channels per program of a channels-last map: whole sectors in half precision
REACH = 2**31  # limit of the distance in memory between an image's first and last element


def tile(kernel, G: int, P: int, channels_last: bool) -> dict:
    """Return a tile that extends along the inner axis first, then along the other."""
    elements, warps = TILES[kernel]
    if channels_last:
        c = min(CHANNELS, triton.next_power_of_2(G))
        p = min(elements // c, triton.next_power_of_2(P))
    else:
        p = min(64, triton.next_power_of_2(P))
        c = min(elements // p, triton.next_power_of_2(G))
    return dict(BLOCK_C=c, BLOCK_P=p, num_warps=warps)


def _launch(kernel, x: Tensor, g: int) -> tuple[tuple, dict, int, int]:
    """Return sizes, options, and the numbers of channel tiles and position tiles."""
    _, C, H, W = x.shape
    options = tile(kernel, C // g, H * W, x.stride(1) == 1 and x.stride(3) != 1)
    channels, positions = triton.cdiv(C // g, options["BLOCK_C"]), triton.cdiv(H * W, options["BLOCK_P"])
    return (g, C // g, H, W), options, channels, positions


def _layout(x: Tensor, g: int) -> int:
    """Return the layout of a map, aligned only if every subspace is."""
    form = maps.layout(x)
    return form if form & maps.COLUMNS or x.shape[1] // g % 8 == 0 else form & maps.CHANNELS


def moments(x: Tensor, g: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, float32."""
    (B, C, H, W), (sizes, options, channels, _) = x.shape, _launch(moments_kernel, x, g)
    mean, square = (x.new_empty(B, C, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(x):
        launch(moments_kernel, (B * g * channels,))(x, mean, square, *x.stride(), *sizes, X=_layout(x, g), **options)
    var, centre = torch.var_mean(mean, 0, correction=0)
    return centre, square.sum(0) / (B * H * W) + var


def scores(x: Tensor, scale: Tensor, shift: Tensor, point_weight: Tensor, g: int) -> Tensor:
    (B, _, H, W), (sizes, options, _, positions) = x.shape, _launch(scores_kernel, x, g)
    s = x.new_empty(B, g, H, W, dtype=torch.float32)
    vectors = (v.contiguous() for v in (scale, shift, point_weight))
    with torch.cuda.device_of(x):
        launch(scores_kernel, (B * g * positions,))(x, *vectors, s, *x.stride(), *sizes, X=_layout(x, g), **options)
    return s


def gate(x: Tensor, attention: Tensor) -> Tensor:
    y, (B, g) = torch.empty_like(x), attention.shape[:2]
    sizes, options, channels, positions = _launch(gate_kernel, x, g)
    with torch.cuda.device_of(x):
        launch(gate_kernel, (B * g * channels * positions,))(
            x, attention.contiguous(), y, *x.stride(), *y.stride(), *sizes,
            X=_layout(x, g), Y=_layout(y, g), **options,
        )  # fmt: skip
    return y


def gate_gradient(dy: Tensor, x: Tensor, attention: Tensor) -> Tensor:
    da, (B, g) = torch.empty_like(attention, memory_format=torch.contiguous_format), attention.shape[:2]
    sizes, options, _, positions = _launch(dgate_kernel, x, g)
    with torch.cuda.device_of(x):
        launch(dgate_kernel, (B * g * positions,))(
            dy, x, da, *dy.stride(), *x.stride(), *sizes, DY=_layout(dy, g), X=_layout(x, g), **options
        )
    return da


def map_gradient(dy: Tensor, x: Tensor, ds: Tensor, attention: Tensor, middle) -> tuple[Tensor, ...]:
    """Return the gradient of x, and what `middle.map_backward` makes of the sums: gradients of the channels'
    parameters."""
    (B, C, _, _), g = x.shape, ds.shape[1]
    sizes, options, channels, _ = _launch(dmap_kernel, x, g)
    sums = x.new_empty(2, B, C, dtype=torch.float32)
    vectors = [v.contiguous() for v in (middle.scale, middle.shift, middle.point_weight)]
    dx = torch.empty_like(x)
    inputs, strides = (x, dy, ds.contiguous(), attention.contiguous()), (*x.stride(), *dy.stride(), *dx.stride())
    forms = dict(X=_layout(x, g), DY=_layout(dy, g), TO=_layout(dx, g))

    def run(constant: Tensor, linear: Tensor, **which) -> None:
        with torch.cuda.device_of(x):
            launch(dmap_kernel, (B * g * channels,))(
                *inputs, *vectors, constant, linear, dx, *sums, *strides, *sizes, **forms, **which, **options
            )

    zeros = torch.zeros_like(vectors[0])
    run(zeros, zeros, SUMS=True, DX=not middle.training)
    grads, constant, linear = middle.map_backward(*sums.sum(1), x)
    if middle.training:
        run(constant, linear, SUMS=False, DX=True)
    return dx, *grads


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: the tiles of small and of large subspaces, in both memory formats."""
    in_dtype = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr")
    for kernel in TILES:
        pointers = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr") and name not in in_dtype}
        passes = ((True, True), (True, False), (False, True)) if kernel is dmap_kernel else (None,)
        layouts = maps.CHANNELS + maps.ALIGNED, maps.COLUMNS
        for form, (G, P), which in itertools.product(layouts, ((8, 49), (128, 196)), passes):
            options = {name: form for name in ("X", "DY", "TO", "Y") if name in kernel.arg_names}
            options |= tile(kernel, G, P, bool(form & maps.CHANNELS))
            yield kernel, pointers, options if which is None else options | dict(zip(("SUMS", "DX"), which))
