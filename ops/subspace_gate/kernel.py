"""Triton kernels of the subspace gate for the passes over the map, forward and backward, and their launchers.

    moments_kernel   mean of each channel of each image, and the sum of squared deviations   (training only)
    scores_kernel    Σ_c v_c · maxpool3(relu(scale_c · x + shift_c)), one map per subspace
    gate_kernel      x · (1 + attention)
    dgate_kernel     Σ_c dy · x, one map per subspace
    dmap_kernel      the gradient through pooling and ReLU: its sums over each channel, or dx, or both

The computation on single channels and one-channel maps between them is in eager.Middle. y and dx are the only maps of
x's size that are allocated: the affine map, the ReLU and the pooling are recomputed from x where they are needed.

In the backward pass, position q of channel c gets D(q) · v_c, where D(q) is the sum of ds over those of the nine
windows around q whose first maximum is at q, if it is positive. This depends on 5 x 5 neighbours. The gradients of the
parameters only need Σ D and Σ D · x of each channel, since a window's maximum is scale · x + shift at its q. In
training dx needs these sums first, so `dmap_kernel` runs twice, else once.

A program has BLOCK_C channels of one subspace and BLOCK_P positions at a time. Where neighbours are needed, these are
columns, and it walks down the rows: each row is loaded once, shifted by up to two columns (L1 has these), and what the
windows need of the rows above is kept in registers. There are no atomics: partial sums are per image and added in a
fixed order. Both memory formats and views are read without copying. Offsets within an image are 32-bit (see `REACH`).
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
def affine_at(x_ptr, w, on, scale, shift, W):
    """Return scale · x + shift of columns w of a row, -inf outside the map or if the row is not `on` it. x_ptr points
    to the columns, (BLOCK_C, BLOCK_P)."""
    ok = on & ((w >= 0) & (w < W))[None, :]
    x = tl.load(x_ptr, ok, 0.0).to(tl.float32)
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


@triton.jit(do_not_specialize=[*SIZES, *STRIDES, "rows"])
def scores_kernel(
    x_ptr, scale_ptr, shift_ptr, point_ptr, s_ptr, stride_b, stride_c, stride_h, stride_w, B, g, G, H, W, rows,
    X: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """s (tiles of channels, B, g, H, W): each program has a tile of channels and of columns, and some rows."""
    stride_b, stride_c, stride_h, stride_w = known_strides(stride_b, stride_c, stride_h, stride_w, X)
    G, W = known_sizes(G, W, X)
    tiles = (W + BLOCK_P - 1) // BLOCK_P
    pid = tl.program_id(0)
    w = pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    pid = pid // tiles
    parts = (H + rows - 1) // rows
    first = pid % parts * rows
    pid = pid // parts
    b, n, c, has = subspace(pid, g, G, BLOCK_C)
    channel = n.to(tl.int64) * G + c
    scale = tl.load(scale_ptr + channel, has, 0.0)[:, None]
    shift = tl.load(shift_ptr + channel, has, 0.0)[:, None]
    point = tl.load(point_ptr + channel, has, 0.0)[:, None]
    x_ptr += b * stride_b + (channel * stride_c)[:, None] + (w * stride_w)[None, :]
    s_ptr += ((pid % ((G + BLOCK_C - 1) // BLOCK_C) * B + b) * g + n) * H * W
    above = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)  # of three columns, after the ReLU: one row up, and two
    pair = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
    for h in range(first - 1, tl.minimum(first + rows, H) + 1):
        on = has[:, None] & ((h >= 0) & (h < H))
        x = x_ptr + h * stride_h
        line = tl.full((BLOCK_C, BLOCK_P), 0, tl.float32)
        for j in tl.static_range(-1, 2):
            line = largest(line, affine_at(x + j * stride_w, w + j, on, scale, shift, W))
        s = tl.sum(largest(pair, line) * point, 0)
        tl.store(s_ptr + (h - 1) * W + w, s, (w < W) & (h > first))
        pair = largest(above, line)
        above = line


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
def three(value, dtype: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Return three tensors. Of two names for one, Triton 3.6 takes the second for unchanged by a loop that swaps
    them."""
    return tl.full((M, N), value, dtype), tl.full((M, N), value, dtype), tl.full((M, N), value, dtype)


@triton.jit
def greater(a, b, c, A, B, C):
    """Return three comparisons a > A, b > B and c > C as bits 0, 1 and 2."""
    return tl.where(a > A, 1, 0) | tl.where(b > B, 2, 0) | tl.where(c > C, 4, 0)


@triton.jit
def grads_at(ds_ptr, h, w, H, W):
    """Return ds in row h, one column before w, at w and after it."""
    on = (h >= 0) & (h < H)
    ds_ptr += h * W + w
    before = tl.load(ds_ptr - 1, on & (w > 0) & (w <= W), 0.0)
    after = tl.load(ds_ptr + 1, on & (w + 1 < W), 0.0)
    return before[None, :], tl.load(ds_ptr, on & (w < W), 0.0)[None, :], after[None, :]


@triton.jit
def taken(bits, before, at, after):
    """Return the sum of the gradients whose bits are set."""
    d = tl.where((bits & 1) != 0, before, 0.0)
    d += tl.where((bits & 2) != 0, at, 0.0)
    return d + tl.where((bits & 4) != 0, after, 0.0)


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
    for start in range(0, W, BLOCK_P):
        w = start + tl.arange(0, BLOCK_P)
        x_at = x_ptr + (w * stride_w)[None, :]
        # Bits 0, 1 and 2 are of the windows centred one column before w, at w, and after it. `mine`: z is positive and
        # the first maximum of the window's row, values to the left smaller and those to the right not larger. `over`
        # and `over2`: the row's maximum is larger than that one row up, two rows up. A window's first maximum is at z
        # if `mine`, rows above have smaller maxima and rows below none that is larger. What later rows need of a row:
        # bits 0 to 2, mine and over, over2; 3 to 5, mine and over; 6 to 8, mine; 9 to 11, over.
        a1, b1, c1 = three(float("-inf"), tl.float32, BLOCK_C, BLOCK_P)  # the maxima one row up
        a2, b2, c2 = three(float("-inf"), tl.float32, BLOCK_C, BLOCK_P)  # two rows up
        bits1, bits2, _ = three(0, tl.int32, BLOCK_C, BLOCK_P)
        up_a, up_b, up_c = three(0, tl.float32, 1, BLOCK_P)
        at_a, at_b, at_c = three(0, tl.float32, 1, BLOCK_P)
        for t in range(H + 2):
            on = has[:, None] & (t < H)
            x = x_at + t * stride_h
            z = affine_at(x, w, on, scale, shift, W)
            l1 = affine_at(x - stride_w, w - 1, on, scale, shift, W)
            l2 = affine_at(x - 2 * stride_w, w - 2, on, scale, shift, W)
            r1 = affine_at(x + stride_w, w + 1, on, scale, shift, W)
            r2 = affine_at(x + 2 * stride_w, w + 2, on, scale, shift, W)
            left = (z > l1) & (z > 0)
            right = (z >= r1) & (z > 0)
            mine = tl.where(left & (z > l2), 1, 0) | tl.where(left & right, 2, 0) | tl.where(right & (z >= r2), 4, 0)
            inner = tl.maximum(z, r1)
            am = tl.maximum(tl.maximum(l2, l1), z)
            bm = tl.maximum(l1, inner)
            cm = tl.maximum(inner, r2)
            over = greater(am, bm, cm, a1, b1, c1)
            over2 = greater(am, bm, cm, a2, b2, c2)
            # All is known of row h = t - 2.
            h = t - 2
            down_a, down_b, down_c = grads_at(ds_ptr, h + 1, w, H, W)
            not_below = bits2 >> 3 & ~(bits1 >> 9 | bits1 >> 6 & ~7)  # bits 3 to 5: mine
            d = taken(bits2, up_a, up_b, up_c)
            d += taken(not_below, at_a, at_b, at_c)
            d += taken(not_below >> 3 & ~over2, down_a, down_b, down_c)
            ok = has[:, None] & (w < W)[None, :] & (h >= 0)
            x = tl.load(x_at + h * stride_h, ok, 0.0).to(tl.float32)
            if SUMS:
                total += d
                totalx += d * x
            if DX:
                dy = tl.load(dy_ptr + h * stride_dh + (w * stride_dw)[None, :], ok, 0.0).to(tl.float32)
                a = tl.load(attention_ptr + h * W + w, (w < W) & (h >= 0), 0.0)[None, :]
                dx = dy + dy * a + gain * d + (constant + linear * x)
                tl.store(dx_ptr + h * stride_xh + (w * stride_xw)[None, :], dx.to(dx_ptr.dtype.element_ty), ok)
            a2, b2, c2, a1, b1, c1 = a1, b1, c1, am, bm, cm
            both = mine & over
            bits2, bits1 = bits1, both & over2 | both << 3 | mine << 6 | over << 9
            up_a, up_b, up_c, at_a, at_b, at_c = at_a, at_b, at_c, down_a, down_b, down_c
    if SUMS:
        tl.store(sum_ptr + b * g * G + channel, tl.sum(total, 1), has)
        tl.store(sumx_ptr + b * g * G + channel, tl.sum(totalx, 1), has)


# Elements of a tile and its warps, by kernel. Chosen from the registers of ahead-of-time compilation (saccade.ops.aot);
# not yet timed on a GPU.
TILES = {
    moments_kernel: (1024, 4),
    scores_kernel: (1024, 4),
    gate_kernel: (1024, 4),
    dgate_kernel: (1024, 4),
    dmap_kernel: (256, 4),
}
ROWS = 32  # most rows that a program of scores_kernel walks
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
    P = W if kernel in (scores_kernel, dmap_kernel) else H * W
    options = tile(kernel, C // g, P, x.stride(1) == 1 and x.stride(3) != 1)
    channels, positions = triton.cdiv(C // g, options["BLOCK_C"]), triton.cdiv(P, options["BLOCK_P"])
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
    (B, _, H, W), (sizes, options, channels, columns) = x.shape, _launch(scores_kernel, x, g)
    rows = min(H, ROWS)
    s = x.new_empty(channels, B, g, H, W, dtype=torch.float32)
    vectors = (v.contiguous() for v in (scale, shift, point_weight))
    with torch.cuda.device_of(x):
        launch(scores_kernel, (B * g * channels * triton.cdiv(H, rows) * columns,))(
            x, *vectors, s, *x.stride(), B, *sizes, rows, X=_layout(x, g), **options
        )
    return s[0] if channels == 1 else s.sum(0)


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
