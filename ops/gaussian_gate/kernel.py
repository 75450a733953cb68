"""Triton kernels of the Gaussian gate for the passes over the map, forward and backward, and their launchers.

    moments_kernel   mean of each channel of each image, and the sum of squared deviations
    sums_kernel      backward, sums of dy and of dy · x over each channel of each image
    affine_kernel    y = scale · x + shift; backward, dx = scale · dy + linear · x + constant

Forward, the map is read twice and written once, in training too; backward, dy and x are read twice and dx is written
once. Between the passes there are small kernels, which compute what eager.Gate does:

    merge_kernel     mean and deviation from partial moments
    gate_kernel      both norms and the hardsigmoid, from the product of moments and weights
    dgate_kernel     backward, from the sums to the gradient of that product
    through_kernel   backward, linear and constant from the gradients of mean and deviation

A program of the second and third has some channels of all images, over which it walks a few times: the data are in L1.
The matrix products are PyTorch's.

A program has BLOCK_C channels of an image and a range of positions, BLOCK_P at a time. There are no atomics: partial
sums are added in a fixed order. Both memory formats and views are read without copying; offsets are 64-bit.
"""

import itertools
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


@triton.jit(do_not_specialize=["N", "C", "P", "stretches"])
def merge_kernel(mean_ptr, square_ptr, u_ptr, N, C, P, stretches, STRETCH: tl.constexpr, BLOCK: tl.constexpr):
    """From the moments of stretches of positions, (B, stretches, C), to mean and deviation, (B, C, 2)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < N
    at = (i // C).to(tl.int64) * stretches * C + i % C
    mean = tl.full((BLOCK,), 0, tl.float32)
    for s in range(stretches):
        count = tl.minimum(P - s * STRETCH, STRETCH).to(tl.float32)
        mean += tl.load(mean_ptr + at + s * C, ok, 0.0) * (count / P)
    square = tl.full((BLOCK,), 0, tl.float32)
    for s in range(stretches):
        count = tl.minimum(P - s * STRETCH, STRETCH).to(tl.float32)
        off = tl.load(mean_ptr + at + s * C, ok, 0.0) - mean
        square += tl.load(square_ptr + at + s * C, ok, 0.0) + off * off * count
    tl.store(u_ptr + 2 * i.to(tl.int64), mean, ok)
    tl.store(u_ptr + 2 * i.to(tl.int64) + 1, tl.sqrt_rn(square / (P - 1).to(tl.float32)), ok)


@triton.jit
def vector(ptr, c, C):
    """Load a vector (C,) in float32."""
    return tl.load(ptr + c, c < C, 0.0).to(tl.float32)


@triton.jit
def images(start, c, B, C, BLOCK_B: tl.constexpr):
    """Return the offsets in (B, C) of channels c of the images from start on, and which of them exist."""
    b = start + tl.arange(0, BLOCK_B)
    return b.to(tl.int64)[:, None] * C + c[None, :], (b < B)[:, None] & (c < C)[None, :]


@triton.jit
def gated(t, centre, rstd, weight, bias):
    """Return t in the norm, the gate, and whether the gate has a slope there."""
    t = (t - centre[None, :]) * rstd[None, :]
    s = t * weight[None, :] + bias[None, :]
    nan = s != s
    g = tl.where(nan, s, tl.minimum(tl.maximum(s + 3, 0.0), 6.0) / 6)
    return t, g, (s > -3) & (s < 3) | nan


@triton.jit(do_not_specialize=["B", "C", "P"])
def gate_kernel(
    t_ptr, u_ptr, weight_ptr, bias_ptr, out_weight_ptr, out_bias_ptr,
    centre_ptr, var_ptr, out_centre_ptr, out_var_ptr, scale_ptr, shift_ptr, eps, B, C, P,
    TRAINING: tl.constexpr, OUT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From t (B, C) to scale (B, C) and shift (C,); the statistics (C,) are results in training, else inputs."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight, bias = vector(weight_ptr, c, C), vector(bias_ptr, c, C)
    if TRAINING:
        total = tl.full((BLOCK_B, BLOCK_C), 0, tl.float32)
        for start in range(0, B, BLOCK_B):
            at, ok = images(start, c, B, C, BLOCK_B)
            total += tl.load(t_ptr + at, ok, 0.0)
        centre = tl.sum(total, 0) / B
        total = tl.full((BLOCK_B, BLOCK_C), 0, tl.float32)
        for start in range(0, B, BLOCK_B):
            at, ok = images(start, c, B, C, BLOCK_B)
            off = tl.where(ok, tl.load(t_ptr + at, ok, 0.0) - centre[None, :], 0.0)
            total += off * off
        var = tl.sum(total, 0) / B
        tl.store(centre_ptr + c, centre, c < C)
        tl.store(var_ptr + c, var, c < C)
    else:
        centre, var = vector(centre_ptr, c, C), vector(var_ptr, c, C)
    rstd = tl.rsqrt(var + eps)
    gain = tl.full((BLOCK_C,), 1, tl.float32)
    shift = tl.full((BLOCK_C,), 0, tl.float32)
    if OUT:
        if TRAINING:
            total = tl.full((BLOCK_B, BLOCK_C), 0, tl.float32)
            for start in range(0, B, BLOCK_B):
                at, ok = images(start, c, B, C, BLOCK_B)
                _, g, _ = gated(tl.load(t_ptr + at, ok, 0.0), centre, rstd, weight, bias)
                total += g * tl.load(u_ptr + 2 * at, ok, 0.0)
            out_centre = tl.sum(total, 0) / B
            total = tl.full((BLOCK_B, BLOCK_C), 0, tl.float32)
            for start in range(0, B, BLOCK_B):
                at, ok = images(start, c, B, C, BLOCK_B)
                _, g, _ = gated(tl.load(t_ptr + at, ok, 0.0), centre, rstd, weight, bias)
                off = g * tl.load(u_ptr + 2 * at, ok, 0.0) - out_centre[None, :]
                deviation = g * tl.load(u_ptr + 2 * at + 1, ok, 0.0)
                total += tl.where(ok, deviation * deviation * ((P - 1).to(tl.float32) / P) + off * off, 0.0)
            out_var = tl.sum(total, 0) / B
            tl.store(out_centre_ptr + c, out_centre, c < C)
            tl.store(out_var_ptr + c, out_var, c < C)
        else:
            out_centre, out_var = vector(out_centre_ptr, c, C), vector(out_var_ptr, c, C)
        gain = vector(out_weight_ptr, c, C) * tl.rsqrt(out_var + eps)
        shift = vector(out_bias_ptr, c, C) - gain * out_centre
    tl.store(shift_ptr + c, shift, c < C)
    for start in range(0, B, BLOCK_B):
        at, ok = images(start, c, B, C, BLOCK_B)
        _, g, _ = gated(tl.load(t_ptr + at, ok, 0.0), centre, rstd, weight, bias)
        tl.store(scale_ptr + at, gain[None, :] * g, ok)


@triton.jit(do_not_specialize=["B", "C", "P"])
def dgate_kernel(
    dshift_ptr, dscale_ptr, t_ptr, u_ptr, weight_ptr, bias_ptr, out_weight_ptr,
    centre_ptr, var_ptr, out_centre_ptr, out_var_ptr,
    dt_ptr, du_ptr, scale_ptr, dweight_ptr, dbias_ptr, dout_weight_ptr, dout_bias_ptr, eps, B, C, P,
    TRAINING: tl.constexpr, OUT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From the sums (B, C) of dy and dy · x to the gradient of t, to scale, and to the gradients of the norms'
    parameters; du (B, C, 2) is the gradient of mean and deviation through the statistics of the second norm."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight, bias = vector(weight_ptr, c, C), vector(bias_ptr, c, C)
    centre, rstd = vector(centre_ptr, c, C), tl.rsqrt(vector(var_ptr, c, C) + eps)
    gain = tl.full((BLOCK_C,), 1, tl.float32)
    if OUT:
        out_weight, out_centre = vector(out_weight_ptr, c, C), vector(out_centre_ptr, c, C)
        out_rstd = tl.rsqrt(vector(out_var_ptr, c, C) + eps)
        gain = out_weight * out_rstd
        total = tl.full((BLOCK_B, BLOCK_C), 0, tl.float32)
        total_shift = tl.full((BLOCK_B, BLOCK_C), 0, tl.float32)
        for start in range(0, B, BLOCK_B):
            at, ok = images(start, c, B, C, BLOCK_B)
            _, g, _ = gated(tl.load(t_ptr + at, ok, 0.0), centre, rstd, weight, bias)
            total += tl.load(dscale_ptr + at, ok, 0.0) * g
            total_shift += tl.load(dshift_ptr + at, ok, 0.0)
        dshift = tl.sum(total_shift, 0)
        dgain = tl.sum(total, 0) - dshift * out_centre
        tl.store(dout_weight_ptr + c, (dgain * out_rstd).to(dout_weight_ptr.dtype.element_ty), c < C)
        tl.store(dout_bias_ptr + c, dshift.to(dout_bias_ptr.dtype.element_ty), c < C)
        dvar = (-dgain * gain * out_rstd * out_rstd / B)[None, :]  # twice the gradient of the variance
        dcentre = (gain * dshift / B)[None, :]
        part = (P - 1).to(tl.float32) / P
    dweight = tl.full((BLOCK_B, BLOCK_C), 0, tl.float32)
    dbias = tl.full((BLOCK_B, BLOCK_C), 0, tl.float32)
    for start in range(0, B, BLOCK_B):
        at, ok = images(start, c, B, C, BLOCK_B)
        t, g, slope = gated(tl.load(t_ptr + at, ok, 0.0), centre, rstd, weight, bias)
        dg = gain[None, :] * tl.load(dscale_ptr + at, ok, 0.0)
        if OUT and TRAINING:
            mean = tl.load(u_ptr + 2 * at, ok, 0.0)
            std = tl.load(u_ptr + 2 * at + 1, ok, 0.0)
            dgmean = dvar * (g * mean - out_centre[None, :]) - dcentre
            dg += dvar * g * (std * std * part) + dgmean * mean
            tl.store(du_ptr + 2 * at, dgmean * g, ok)
            tl.store(du_ptr + 2 * at + 1, dvar * g * g * std * part, ok)
        dn = tl.where(slope & ok, dg / 6, 0.0)
        dweight += tl.where(ok, dn * t, 0.0)
        dbias += dn
        tl.store(scale_ptr + at, gain[None, :] * g, ok)
        tl.store(dt_ptr + at, dn, ok)
    dweight, dbias = tl.sum(dweight, 0), tl.sum(dbias, 0)
    tl.store(dweight_ptr + c, dweight.to(dweight_ptr.dtype.element_ty), c < C)
    tl.store(dbias_ptr + c, dbias.to(dbias_ptr.dtype.element_ty), c < C)
    tl.debug_barrier()  # dn, which other threads may have stored, is visible to all
    for start in range(0, B, BLOCK_B):
        at, ok = images(start, c, B, C, BLOCK_B)
        dn = tl.load(dt_ptr + at, ok, 0.0)
        if TRAINING:
            t, _, _ = gated(tl.load(t_ptr + at, ok, 0.0), centre, rstd, weight, bias)
            dn -= (t * dweight[None, :] + dbias[None, :]) / B
        tl.store(dt_ptr + at, dn * (weight * rstd)[None, :], ok)


@triton.jit(do_not_specialize=["N", "P"])
def through_kernel(u_ptr, du_ptr, linear_ptr, constant_ptr, N, P, BLOCK: tl.constexpr):
    """From mean and deviation (B, C, 2) and their gradients to linear and constant, (B, C)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < N
    std = tl.load(u_ptr + 2 * i + 1, ok, 1.0)
    dstd = tl.where(std == 0, 0.0, tl.load(du_ptr + 2 * i + 1, ok, 0.0))
    linear = dstd / tl.where(std == 0, 1.0, std) / (P - 1).to(tl.float32)
    constant = tl.load(du_ptr + 2 * i, ok, 0.0) / P - linear * tl.load(u_ptr + 2 * i, ok, 0.0)
    tl.store(linear_ptr + i, linear, ok)
    tl.store(constant_ptr + i, constant, ok)


# Elements of a tile and its warps. Chosen from the registers of ahead-of-time compilation (saccade.ops.aot); not yet
# timed on a GPU.
TILE, WARPS = 1024, 4
STRETCH = 1024  # positions per summing program: with 32 channels, the second pass of moments_kernel reads them from L1
SMALL, BLOCK_B, BLOCK_C = 256, 32, 16  # elements, images and channels of a program between the passes
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


def moments(x: Tensor) -> Tensor:
    """Return mean and unbiased standard deviation of each channel of each image, (B, C, 2), float32."""
    parts, (_, _, H, W) = _partial(moments_kernel, x), x.shape
    _, B, stretches, C = parts.shape
    u = x.new_empty(B, C, 2, dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch(merge_kernel, (triton.cdiv(B * C, SMALL),))(
            *parts, u, B * C, C, H * W, stretches, STRETCH=STRETCH, BLOCK=SMALL, num_warps=WARPS
        )
    return u


def gate(u: Tensor, n: int, *args) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return from the moments of n positions: what eager.Gate calls scale and shift, its t, and its batch()."""
    weight, *rest, training, eps = args
    t = u.flatten(1) @ weight.flatten(1).to(u.dtype).mT
    out, statistics = rest[2] is not None, rest[4:]
    if training:
        statistics = [t.new_empty(t.shape[1]) for _ in range(4 if out else 2)]
    scale, shift = torch.empty_like(t), t.new_empty(t.shape[1])
    _per_channel(gate_kernel, t, u, *_vectors(rest[:4], statistics), scale, shift, n=n, eps=eps, flags=(training, out))
    return scale, shift, t, statistics if training else []


def gate_gradient(dshift: Tensor, dscale: Tensor, t: Tensor, u: Tensor, n: int, statistics, *args):
    """Return the gradients of the parameters, and scale, linear and constant, as eager.Gate's. statistics: those that
    the norms used."""
    *params, training, eps = args
    weight, out = params[0], params[3] is not None
    dt, scale, linear, constant = (torch.empty_like(t) for _ in range(4))
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params[1:] if p is not None]
    du = torch.empty_like(u)
    vectors = _vectors(params[1:], statistics)
    del vectors[3]  # the second norm's bias has no part in the gradients
    _per_channel(
        dgate_kernel, dshift.contiguous(), dscale.contiguous(), t, u, *vectors, dt, du, scale,
        *grads, *[t] * (4 - len(grads)), n=n, eps=eps, flags=(training, out),
    )  # fmt: skip
    rows = weight.flatten(1).to(u.dtype)
    through = torch.addmm(du.flatten(1), dt, rows) if training and out else dt @ rows
    N = dt.numel()
    with torch.cuda.device_of(t):
        launch(through_kernel, (triton.cdiv(N, SMALL),))(
            u, through, linear, constant, N, n, BLOCK=SMALL, num_warps=WARPS
        )
    dweight = (dt.mT @ u.flatten(1)).view(weight.shape).to(weight.dtype)
    return [dweight, *grads], scale, linear, constant


def _vectors(params, statistics) -> list[Tensor]:
    """Return the norms' four parameters and four statistics; the first of them for what is not there."""
    given = [*params, *statistics, *[None] * (4 - len(statistics))]
    return [given[0] if v is None else v.contiguous() for v in given]


def _per_channel(kernel, *tensors: Tensor, n: int, eps: float, flags: tuple[bool, bool]) -> None:
    (B, C), options = tensors[2 if kernel is dgate_kernel else 0].shape, dict(zip(("TRAINING", "OUT"), flags))
    with torch.cuda.device_of(tensors[0]):
        launch(kernel, (triton.cdiv(C, BLOCK_C),))(
            *tensors, eps, B, C, n, **options, BLOCK_B=BLOCK_B, BLOCK_C=BLOCK_C, num_warps=WARPS
        )


def sums(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of dy and dy · x over each channel of each image, (B, C), float32."""
    parts = _partial(sums_kernel, dy, x)
    dshift, dscale = parts[:, :, 0] if parts.shape[2] == 1 else parts.sum(2)
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
    for kernel in (merge_kernel, through_kernel, gate_kernel, dgate_kernel):
        types = {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")} | dict(eps="fp32")
        if kernel in (merge_kernel, through_kernel):
            yield kernel, types, dict(BLOCK=SMALL, STRETCH=STRETCH, num_warps=WARPS)
            continue
        for training, out in itertools.product((False, True), repeat=2):
            options = dict(TRAINING=training, OUT=out, BLOCK_B=BLOCK_B, BLOCK_C=BLOCK_C, num_warps=WARPS)
            yield kernel, types, options
