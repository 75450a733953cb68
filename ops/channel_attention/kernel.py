"""Triton kernels of channel attention, forward and backward, and their launchers.

    products_kernel  Xᵀ Y of each head over a range of tokens: forward Kᵀ V, backward doutᵀ Q
    softmax_kernel   the sum S over the ranges and A = softmax(S); backward, dS = scale · A (dA - Σ A dA)
    out_kernel       Q Aᵀ
    dqkv_kernel      dout A, V dSᵀ and K dS: the three parts of the gradient

Forward, q, k and v are read once and the output is written once. Backward, q, k and v are read once, dout twice, and
the gradient is written once. The intermediate result has D x D numbers per head and range of 32 D tokens, 1/32 of its k
and v in half precision. There are no atomics: the ranges are summed in a fixed order. Heads are the fastest program
index, since they share the cache lines of a token. Offsets are 64-bit.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import LOG2E, precision
from ..tune import launch

SIZES = ["heads", "W", "N"]


@triton.jit
def token_offsets(n, W, stride_h, stride_w):
    """Return the offsets of tokens n of an image, 64-bit."""
    return (n // W).to(tl.int64) * stride_h + (n % W).to(tl.int64) * stride_w


@triton.jit(do_not_specialize=SIZES)
def products_kernel(
    x_ptr, y_ptr, part_ptr, stride_xb, stride_xh, stride_xw, stride_yb, stride_yh, stride_yw,
    heads, W, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, STRETCH: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    stretches = (N + STRETCH - 1) // STRETCH
    first = pid // heads % stretches * STRETCH
    b = (pid // heads // stretches).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    x_ptr += b * stride_xb + head * D + d[None, :]
    y_ptr += b * stride_yb + head * D + d[None, :]
    acc = tl.full((BLOCK_D, BLOCK_D), 0, tl.float32)
    for start in range(first, min(first + STRETCH, N), BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        ok = (n < N)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + token_offsets(n, W, stride_xh, stride_xw)[:, None], ok, 0.0)
        y = tl.load(y_ptr + token_offsets(n, W, stride_yh, stride_yw)[:, None], ok, 0.0)
        acc = tl.dot(tl.trans(x), y, acc, input_precision=PRECISION)
    part_ptr += pid.to(tl.int64) * D * D + (d * D)[:, None] + d[None, :]
    tl.store(part_ptr, acc, (d < D)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["heads", "stretches"])
def softmax_kernel(
    part_ptr, a_ptr, to_ptr, heads, stretches, scale,
    GRAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = pid % (BLOCK_D // ROWS) * ROWS + tl.arange(0, ROWS)
    pid = pid // (BLOCK_D // ROWS)
    d = tl.arange(0, BLOCK_D)
    at = (row * D)[:, None] + d[None, :]
    ok = (row < D)[:, None] & (d < D)[None, :]
    part_ptr += (pid // heads * stretches * heads + pid % heads).to(tl.int64) * D * D + at
    s = tl.full((ROWS, BLOCK_D), 0, tl.float32)
    for _ in range(stretches):
        s += tl.load(part_ptr, ok, 0.0)
        part_ptr += heads * D * D
    if GRAD:
        a = tl.load(a_ptr + pid.to(tl.int64) * D * D + at, ok, 0.0)
        y = a * (s - tl.sum(a * s, 1)[:, None]) * scale
    else:
        s = tl.where((d < D)[None, :], s * (scale * LOG2E), float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        y = p / tl.sum(p, 1)[:, None]
    tl.store(to_ptr + pid.to(tl.int64) * D * D + at, y, ok)


@triton.jit
def mix(x_ptr, row, m_ptr, stride_in, stride_out, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Return x M for a tile of tokens x, masked by `row`, and a D x D matrix M in float32. It takes 32 channels of x at
    a time, since a product in float32 would hold all of M in registers. Each slice of M is scaled to at most 1 before
    it is cast to half precision: gradients summed over 67,000 tokens may exceed the range of float16."""
    d = tl.arange(0, BLOCK_D)
    BLOCK_K: tl.constexpr = min(32, BLOCK_D)
    y = tl.full((row.shape[0], BLOCK_D), 0, tl.float32)
    for start in range(0, D, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k[None, :], row[:, None] & (k < D)[None, :], 0.0)
        inside = (k < D)[:, None] & (d < D)[None, :]
        m = tl.load(m_ptr + (k * stride_in)[:, None] + (d * stride_out)[None, :], inside, 0.0)
        top = tl.max(tl.max(tl.abs(m), 1), 0)
        top = tl.where(top > 0, top, 1.0)
        y += tl.dot(x, (m / top).to(x.dtype), input_precision=PRECISION) * top
    return y


@triton.jit(do_not_specialize=SIZES)
def out_kernel(
    q_ptr, a_ptr, out_ptr, stride_b, stride_h, stride_w, heads, W, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    tiles = (N + BLOCK_N - 1) // BLOCK_N
    n = pid // heads % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (pid // heads // tiles).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q_ptr += b * stride_b + head * D + token_offsets(n, W, stride_h, stride_w)[:, None]
    out = mix(q_ptr, n < N, a_ptr + (b * heads + head) * D * D, 1, D, D, BLOCK_D, PRECISION)
    out_ptr += (b * N + n)[:, None] * (heads * D) + head * D + d[None, :]
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), (n < N)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def dqkv_kernel(
    qkv_ptr, dout_ptr, a_ptr, ds_ptr, dqkv_ptr, stride_b, stride_h, stride_w, stride_db, stride_dh, stride_dw,
    heads, W, N,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    pid = tl.program_id(0)
    head = pid % heads
    tiles = (N + BLOCK_N - 1) // BLOCK_N
    n = pid // heads % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (pid // heads // tiles).to(tl.int64)
    C = heads * D
    d = tl.arange(0, BLOCK_D)
    ok = (n < N)[:, None] & (d < D)[None, :]
    qkv_ptr += b * stride_b + head * D + token_offsets(n, W, stride_h, stride_w)[:, None]
    dout_ptr += b * stride_db + head * D + token_offsets(n, W, stride_dh, stride_dw)[:, None]
    dqkv_ptr += (b * N + n)[:, None] * (3 * C) + head * D + d[None, :]
    matrix = (b * heads + head) * D * D
    dq = mix(dout_ptr, n < N, a_ptr + matrix, D, 1, D, BLOCK_D, PRECISION)
    tl.store(dqkv_ptr, dq.to(dqkv_ptr.dtype.element_ty), ok)
    dk = mix(qkv_ptr + 2 * C, n < N, ds_ptr + matrix, 1, D, D, BLOCK_D, PRECISION)
    tl.store(dqkv_ptr + C, dk.to(dqkv_ptr.dtype.element_ty), ok)
    dv = mix(qkv_ptr + C, n < N, ds_ptr + matrix, D, 1, D, BLOCK_D, PRECISION)
    tl.store(dqkv_ptr + 2 * C, dv.to(dqkv_ptr.dtype.element_ty), ok)


# By element size in bytes and padded head dim: tokens per tile and warps. Chosen from the registers and shared memory
# of ahead-of-time compilation (saccade.ops.aot); not yet timed on a GPU.
TILES = {
    (2, 32): (128, 4),
    (2, 64): (64, 4),
    (2, 128): (64, 8),
    (4, 32): (64, 4),
    (4, 64): (32, 4),
    (4, 128): (16, 8),
}
ROWS = 16  # rows of A per program of softmax_kernel


def launch_options(itemsize: int, D: int) -> dict:
    BLOCK_D = max(16, triton.next_power_of_2(D))
    tokens, warps = TILES[itemsize, max(32, BLOCK_D)]
    return dict(D=D, BLOCK_D=BLOCK_D, BLOCK_N=tokens, num_warps=warps)


def stretch(BLOCK_D: int) -> int:
    """Return the tokens per program of products_kernel."""
    return 32 * BLOCK_D


def _matrices(x: Tensor, y: Tensor, heads: int, scale: float, options: dict, a: Tensor | None = None) -> Tensor:
    """Return A = softmax(scale · Xᵀ Y), (B, heads, D, D); or, if A is given, the gradient dS from dA = Xᵀ Y."""
    B, H, W, _ = x.shape
    D, BLOCK_D = options["D"], options["BLOCK_D"]
    stretches = triton.cdiv(H * W, stretch(BLOCK_D))
    parts = x.new_empty(B, stretches, heads, D, D, dtype=torch.float32)
    out = x.new_empty(B, heads, D, D, dtype=torch.float32)
    launch(products_kernel, (B * stretches * heads,))(
        x, y, parts, *x.stride()[:3], *y.stride()[:3], heads, W, H * W, STRETCH=stretch(BLOCK_D), **options
    )
    launch(softmax_kernel, (B * heads * (BLOCK_D // ROWS),))(
        parts,
        out if a is None else a,
        out,
        heads,
        stretches,
        scale,
        GRAD=a is not None,
        D=D,
        BLOCK_D=BLOCK_D,
        ROWS=ROWS,
    )
    return out


def fwd(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, W, C) and, for the backward pass, A (B, heads, D, D) in float32."""
    B, H, W, C = *qkv.shape[:3], qkv.shape[3] // 3
    if qkv.stride(3) != 1:
        qkv = qkv.contiguous()
    options = launch_options(qkv.element_size(), C // heads) | dict(PRECISION=precision(qkv))
    q, k, v = qkv.split(C, 3)
    out = qkv.new_empty(B, H, W, C)
    with torch.cuda.device_of(qkv):
        a = _matrices(k, v, heads, scale, options)
        tiles = triton.cdiv(H * W, options["BLOCK_N"])
        launch(out_kernel, (B * tiles * heads,))(q, a, out, *q.stride()[:3], heads, W, H * W, **options)
    return out, a


def bwd(dout: Tensor, qkv: Tensor, a: Tensor, heads: int, scale: float) -> Tensor:
    """Return the gradient of qkv, (B, H, W, 3C) contiguous."""
    B, H, W, C = dout.shape
    if qkv.stride(3) != 1:
        qkv = qkv.contiguous()
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    options = launch_options(qkv.element_size(), C // heads) | dict(PRECISION=precision(qkv))
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    with torch.cuda.device_of(qkv):
        ds = _matrices(dout, qkv[..., :C], heads, scale, options, a)
        tiles = triton.cdiv(H * W, options["BLOCK_N"])
        strides = (*qkv.stride()[:3], *dout.stride()[:3])
        launch(dqkv_kernel, (B * tiles * heads,))(qkv, dout, a, ds, dqkv, *strides, heads, W, H * W, **options)
    return dqkv


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: every tile of TILES."""
    fp32 = dict.fromkeys(("part_ptr", "a_ptr", "to_ptr", "ds_ptr"), "*fp32")
    for D in (32, 64, 128):
        options = launch_options(4 if dtype == "fp32" else 2, D)
        yield products_kernel, fp32, options | dict(STRETCH=stretch(options["BLOCK_D"]))
        yield out_kernel, fp32, options
        yield dqkv_kernel, fp32, options
        for grad in (False, True):
            yield softmax_kernel, fp32, dict(GRAD=grad, D=D, BLOCK_D=options["BLOCK_D"], ROWS=ROWS)
