"""Triton kernels of bi-level routing attention, forward and backward, and their launchers.

A program holds one tile of tokens and loops over a list of other tokens: `fwd_kernel` and `dq_kernel` hold queries and
loop over keys, `dkdv_kernel` holds keys and loops over queries. There are two variants:

gather  The tile lies in one region. Queries loop over the tokens of the K regions they are routed to, keys over those
        of the regions that are routed to them (the inverse list).
dense   The tile spans several regions, in region-major order, and loops over every token of the image. A table of
        P x P bits masks the pairs that are not routed.

Why two: in stage 3 at 224² a region has t = 4 tokens, but the smallest tile of a tensor core has 16 rows. With gather,
three quarters of it are padding, and 64 keys are loaded for 4 queries: 16 rows of K and V per query, and 256 logits
with padding. With dense, a query takes N = 196 logits and, in tiles of 64, 196 / 64 = 3 rows. Per clock, an SM of an
H100 does 16 exp2 and gets 23 bytes from L2. So a key of 128 bytes (K and V of head dim 32, in half precision) takes
16/16 + 128/23 = 6.5 clocks with gather and 64/16 + 128/23 = 9.5 with dense. A query takes 6.5 K clocks with gather (K t
keys for t ≤ 16 queries) and 9.5 N / 64 with dense: equal at N = 44 K. Above 16 tokens per region, gather has little
padding and is faster.

The gathered list is indexed as one flat list, i = slot · t + j, and each lane computes its own region: t is 16, 24, 64,
77, 273, 308, …, and a loop region by region in masked tiles of 32 would waste a quarter at 24 and 77, where the flat
list wastes less than one tile in total. It takes three divisions per lane by numbers known at launch, each a
multiplication and a shift (`divide`).

The dense variant does not skip tiles without routed pairs: 16 query regions choose 16 of 49 each, so there are hardly
any. Offsets are 64-bit: B·H·W·3C exceeds 2**31 at a batch of 128 maps of 200 x 336 with C = 96.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import FLOOR, LOG2E, once, precision, softmax_step
from ..tune import launch

SHIFT = tl.constexpr(44)


@triton.jit
def divide(n, magic, d):
    """Return n // d and n % d for n >= 0, with magic = ceil(2**44 / d). Exact for n·d < 2**44 and n / d < 2**19."""
    q = ((n.to(tl.uint32).to(tl.uint64) * magic.to(tl.uint64)) >> SHIFT).to(tl.int32)
    return q, n - q * d


@triton.jit
def pixel(r, j, h, w, Rw, magic_w, magic_Rw):
    """Return row and column on the map of token j of region r, 64-bit because they are multiplied by strides."""
    ry, rx = divide(r, magic_Rw, Rw)
    jy, jx = divide(j, magic_w, w)
    return (ry * h + jy).to(tl.int64), (rx * w + jx).to(tl.int64)


@triton.jit
def own(tile, r, t, P, BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """Return region and index within it of the tokens of a program's tile, and the mask of lanes that hold one."""
    n = tile * BLOCK + tl.arange(0, BLOCK)
    if DENSE:  # tiles of the whole image, region-major
        ok = n < P * t
        n = tl.where(ok, n, 0)
        return n // t, n % t, ok
    else:  # tiles of region r
        ok = n < t
        return r + tl.full((BLOCK,), 0, tl.int32), tl.where(ok, n, 0), ok


@triton.jit
def listed(list_ptr, i, total, t, P, magic_t, DENSE: tl.constexpr):
    """Return region and index within it of the listed tokens i, the mask of lanes within the list, and the mask of
    those whose region exists."""
    ok = i < total
    slot, j = divide(tl.where(ok, i, 0), magic_t, t)
    if DENSE:
        return slot, j, ok, ok
    else:
        r = tl.load(list_ptr + slot)
        valid = (r >= 0) & (r < P)  # before the cast: an int64 index may wrap
        return tl.where(valid, r, 0).to(tl.int32), j, ok, ok & valid


@triton.jit
def routed_pairs(bits_ptr, r, i, start, t, P, magic_t):
    """Return the mask of routed pairs of the tile's regions r and the 32 listed tokens i that begin at start.

    It is read from the bit table (P, P // 32 + 2). A 64-bit window of each row, which begins at the region of start,
    holds all the bits: no table lookup per pair.
    """
    first = ((magic_t.to(tl.int64) * start) >> SHIFT).to(tl.int32)
    word = bits_ptr + r * (P // 32 + 2) + (first >> 5)
    low, high = tl.load(word).to(tl.uint32), tl.load(word + 1).to(tl.uint32)
    window = ((high.to(tl.uint64) << 32) | low.to(tl.uint64)) >> (first & 31).to(tl.uint64)
    slot, _ = divide(i, magic_t, t)
    return ((window.to(tl.uint32)[:, None] >> (slot - first).to(tl.uint32)[None, :]) & 1) != 0


# Arguments that change from one image size to the next are not specialised on: no recompilation for a divisible one.
SIZES = ["B", "heads", "h", "w", "Rw", "P", "K", "magic_t", "magic_w", "magic_Rw"]


@triton.jit(do_not_specialize=SIZES)
def fwd_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, stride_b, stride_h, stride_w,
    heads, h, w, Rw, P, K, magic_t, magic_w, magic_Rw, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    t = h * w
    C = heads * D
    pid = tl.program_id(0)
    head = pid % heads  # fastest: the heads of a token share its cache lines
    pid = pid // heads
    span = P * t if DENSE else t
    tiles = (span + BLOCK_M - 1) // BLOCK_M
    tile = pid % tiles
    region = 0 if DENSE else pid // tiles % P
    b = (pid // tiles if DENSE else pid // tiles // P).to(tl.int64)

    r, j, row = own(tile, region, t, P, BLOCK_M, DENSE)
    y, x = pixel(r, j, h, w, Rw, magic_w, magic_Rw)
    d = tl.arange(0, BLOCK_D)
    q_ptr = qkv_ptr + b * stride_b + head * D
    q = tl.load(q_ptr + (y * stride_h + x * stride_w)[:, None] + d[None, :], row[:, None] & (d < D)[None, :], 0.0)
    if DENSE:  # (B, P, P // 32 + 2): bit r of row p if region p is routed to r, bit P if it has an index out of range
        table_ptr += b * P * (P // 32 + 2)
        broken = (tl.load(table_ptr + r * (P // 32 + 2) + P // 32) >> (P % 32)) & 1 != 0
        total = P * t
    else:  # (B, P, K)
        table_ptr += (b * P + region) * K
        total = K * t

    m = tl.full((BLOCK_M,), FLOOR, tl.float32)
    l = tl.full((BLOCK_M,), 0, tl.float32)
    acc = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    astray = tl.full((BLOCK_N,), 0, tl.int1)
    for start in range(0, total, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        kr, kj, ok, there = listed(table_ptr, i, total, t, P, magic_t, DENSE)
        ky, kx = pixel(kr, kj, h, w, Rw, magic_w, magic_Rw)
        key = ky * stride_h + kx * stride_w
        inside = there[:, None] & (d < D)[None, :]
        k = tl.load(q_ptr + C + key[:, None] + d[None, :], inside, 0.0)
        v = tl.load(q_ptr + 2 * C + key[:, None] + d[None, :], inside, 0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        if DENSE:
            see = routed_pairs(table_ptr, r, i, start, t, P, magic_t)
        else:
            see = (i < total)[None, :]
            astray = astray | (ok & ~there)
        s = tl.where(see, s, float("-inf"))
        m, l, acc = softmax_step(s, v, m, l, acc, PRECISION)
    if not DENSE:  # all rows share the list
        broken = tl.max(astray.to(tl.int32), 0) != 0
    l = tl.where(broken, float("nan"), l)

    W = Rw * w
    N = P * t
    pix = y * W + x
    lse_ptr += (b * heads + head) * N + r * t + j  # region-major, so that dkdv_kernel needs only one division
    tl.store(lse_ptr, m + tl.log2(l), row)  # base 2, like the logits
    out = (acc / l[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (b * N + pix)[:, None] * C + head * D + d[None, :], out, row[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    qkv_ptr, table_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr,
    stride_b, stride_h, stride_w, stride_db, stride_dh, stride_dw,
    heads, h, w, Rw, P, K, magic_t, magic_w, magic_Rw, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    t = h * w
    C = heads * D
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    span = P * t if DENSE else t
    tiles = (span + BLOCK_M - 1) // BLOCK_M
    tile = pid % tiles
    region = 0 if DENSE else pid // tiles % P
    b = (pid // tiles if DENSE else pid // tiles // P).to(tl.int64)

    W = Rw * w
    N = P * t
    r, j, row = own(tile, region, t, P, BLOCK_M, DENSE)
    y, x = pixel(r, j, h, w, Rw, magic_w, magic_Rw)
    pix = y * W + x
    d = tl.arange(0, BLOCK_D)
    mine = row[:, None] & (d < D)[None, :]
    q_ptr = qkv_ptr + b * stride_b + head * D
    q = tl.load(q_ptr + (y * stride_h + x * stride_w)[:, None] + d[None, :], mine, 0.0)
    dout_ptr += b * stride_db + head * D
    dout = tl.load(dout_ptr + (y * stride_dh + x * stride_dw)[:, None] + d[None, :], mine, 0.0)
    out = tl.load(out_ptr + (b * N + pix)[:, None] * C + head * D + d[None, :], mine, 0.0)
    n = (b * heads + head) * N + r * t + j
    lse = tl.load(lse_ptr + n, row, 0.0)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)  # stored for dkdv_kernel, so this one runs first
    tl.store(delta_ptr + n, delta, row)
    if DENSE:
        table_ptr += b * P * (P // 32 + 2)
        total = P * t
    else:
        table_ptr += (b * P + region) * K
        total = K * t

    dq = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for start in range(0, total, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        kr, kj, _, ok = listed(table_ptr, i, total, t, P, magic_t, DENSE)
        ky, kx = pixel(kr, kj, h, w, Rw, magic_w, magic_Rw)
        key = ky * stride_h + kx * stride_w
        inside = ok[:, None] & (d < D)[None, :]
        k = tl.load(q_ptr + C + key[:, None] + d[None, :], inside, 0.0)
        v = tl.load(q_ptr + 2 * C + key[:, None] + d[None, :], inside, 0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        see = routed_pairs(table_ptr, r, i, start, t, P, magic_t) if DENSE else (i < total)[None, :]
        ds = tl.where(see, tl.exp2(s - lse[:, None]) * (dp - delta[:, None]), 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq = tl.where((lse == lse)[:, None], dq, lse[:, None])  # a NaN query stays NaN, even without a valid key
    dqkv_ptr += (b * N + pix)[:, None] * (3 * C) + head * D + d[None, :]
    tl.store(dqkv_ptr, (dq * scale).to(dqkv_ptr.dtype.element_ty), mine)


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    qkv_ptr, table_ptr, start_ptr, order_ptr, lse_ptr, dout_ptr, delta_ptr, dqkv_ptr,
    stride_b, stride_h, stride_w, stride_db, stride_dh, stride_dw,
    B, heads, h, w, Rw, P, K, magic_t, magic_w, magic_Rw, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DENSE: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):  # fmt: skip
    t = h * w
    C = heads * D
    pid = tl.program_id(0)
    head = pid % heads
    pid = pid // heads
    b = (pid % B).to(tl.int64)
    pid = pid // B
    span = P * t if DENSE else t
    tiles = (span + BLOCK_M - 1) // BLOCK_M
    tile = pid % tiles
    if DENSE:
        region = 0
        table_ptr += b * P * (P // 32 + 2)
        total = P * t
    else:
        # Regions that are chosen most often come first: programs start in this order, and a long one that starts last
        # would run alone at the end.
        region = tl.load(order_ptr + b * P + pid // tiles).to(tl.int32)
        start_ptr += b * (P + 1) + region
        first = tl.load(start_ptr)
        table_ptr += b * P * K + first  # the inverse list: the regions routed to this one, P·K entries per image
        total = ((tl.load(start_ptr + 1) - first) * t).to(tl.int32)  # 0 if there are none: zeros are stored below

    W = Rw * w
    N = P * t
    r, j, row = own(tile, region, t, P, BLOCK_M, DENSE)
    y, x = pixel(r, j, h, w, Rw, magic_w, magic_Rw)
    d = tl.arange(0, BLOCK_D)
    mine = row[:, None] & (d < D)[None, :]
    q_ptr = qkv_ptr + b * stride_b + head * D
    dout_ptr += b * stride_db + head * D
    lse_ptr += (b * heads + head) * N
    delta_ptr += (b * heads + head) * N
    key = (y * stride_h + x * stride_w)[:, None] + d[None, :]
    k = tl.load(q_ptr + C + key, mine, 0.0)
    v = tl.load(q_ptr + 2 * C + key, mine, 0.0)

    dk = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    dv = tl.full((BLOCK_M, BLOCK_D), 0, tl.float32)
    for start in range(0, total, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        qr, qj, _, ok = listed(table_ptr, i, total, t, P, magic_t, DENSE)
        qy, qx = pixel(qr, qj, h, w, Rw, magic_w, magic_Rw)
        n = qr * t + qj
        lse = once(tl.load(lse_ptr + n, ok, float("inf")))  # exp2(s - inf) = 0 masks lanes without a query
        delta = once(tl.load(delta_ptr + n, ok, 0.0))
        if DENSE:  # a NaN query reaches the keys it is routed to, by p and ds, but must not reach others as 0 · NaN
            ok = ok & (lse == lse)
        inside = ok[:, None] & (d < D)[None, :]
        q = tl.load(q_ptr + (qy * stride_h + qx * stride_w)[:, None] + d[None, :], inside, 0.0)
        dout = tl.load(dout_ptr + (qy * stride_dh + qx * stride_dw)[:, None] + d[None, :], inside, 0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.exp2(s - lse[None, :])
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if DENSE:
            see = routed_pairs(table_ptr, r, i, start, t, P, magic_t)
            p = tl.where(see, p, 0.0)
            ds = tl.where(see, ds, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dqkv_ptr += (b * N + y * W + x)[:, None] * (3 * C) + head * D + d[None, :]
    tl.store(dqkv_ptr + C, (dk * scale).to(dqkv_ptr.dtype.element_ty), mine)
    tl.store(dqkv_ptr + 2 * C, dv.to(dqkv_ptr.dtype.element_ty), mine)


# By element size in bytes and head dim: rows of the tallest tile, its warps, the warps of the lowest tile (16 rows),
# stages. Chosen for the highest occupancy on sm_90 without spills, from ahead-of-time compilation (saccade.ops.aot);
# not yet timed on a GPU. Loops in steps of 64 tokens would take 1.5 times the registers, for lists of only 64 to 384
# tokens; taller tiles load the listed tokens from L2 fewer times.
TILES = {
    (2, 32): (128, 8, 1, 3),
    (2, 64): (64, 8, 2, 3),
    (2, 128): (64, 8, 4, 2),
    (4, 32): (32, 4, 4, 3),
    (4, 64): (32, 8, 4, 2),
    (4, 128): (32, 8, 8, 2),
}
WALKED = 32  # listed tokens per step, in at most as many regions, as `routed_pairs` requires


def is_dense(t: int, K: int, P: int) -> bool:
    """Return whether the dense variant is faster (see the module docstring)."""
    return t <= 16 and P * t <= 44 * K


def launch_options(itemsize: int, D: int, t: int, dense: bool, hip: bool) -> dict:
    """Return constexprs and launch options. In the gather variant a tile is no taller than a region of t tokens
    needs."""
    BLOCK_D = max(16, triton.next_power_of_2(D))
    most, warps, least_warps, stages = TILES[itemsize, max(32, BLOCK_D)]
    rows = most if dense else max(16, min(most, triton.next_power_of_2(t)))
    return dict(
        D=D,
        BLOCK_D=BLOCK_D,
        BLOCK_M=rows,
        BLOCK_N=WALKED,
        DENSE=dense,
        num_warps=max(least_warps, warps * rows // most),
        num_stages=2 if hip else stages,
    )


def _magic(d: int) -> int:
    return -(-(1 << SHIFT.value) // d)


def _launch(qkv: Tensor, K: int, heads: int, regions: tuple[int, int], scale: float) -> tuple[bool, int, tuple, dict]:
    """Return what the three kernels share: the variant, the number of tiles per image, sizes, and options."""
    _, H, W, C3 = qkv.shape
    Rh, Rw = regions
    h, w, P = H // Rh, W // Rw, Rh * Rw
    t = h * w
    dense = is_dense(t, K, P)
    hip = torch.version.hip is not None
    options = launch_options(qkv.element_size(), C3 // 3 // heads, t, dense, hip) | dict(PRECISION=precision(qkv))
    tiles = triton.cdiv(P * t, options["BLOCK_M"]) if dense else P * triton.cdiv(t, options["BLOCK_M"])
    return dense, tiles, (heads, h, w, Rw, P, K, _magic(t), _magic(w), _magic(Rw), scale), options


def _bits(idx: Tensor, P: int, of_keys: bool = False) -> Tensor:
    """Return the bit table (B, P, P // 32 + 2), int32: row p has bit r if region p is routed to region r (with of_keys:
    if r is routed to p), and bit P if an index of region p is out of range."""
    member = torch.zeros(*idx.shape[:2], 32 * (P // 32 + 2), dtype=torch.int32, device=idx.device)
    member.scatter_(2, idx.where((idx >= 0) & (idx < P), P).long(), 1)
    if of_keys:
        member[..., :P] = member[..., :P].mT.clone()
    bit = torch.arange(32, dtype=torch.int32, device=idx.device)
    return (member.unflatten(2, (-1, 32)) << bit).sum(-1, dtype=torch.int32)


def _inverse(idx: Tensor, P: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return list and start, where list[b, start[b, r] : start[b, r + 1]] are the regions routed to region r, and the
    regions, most chosen first.

    Sorted, not scattered, so that the order of all sums is deterministic. Indices out of range sort before start[b, 0]
    or after start[b, P], and are never read.
    """
    B, _, K = idx.shape
    chosen, place = idx.flatten(1).sort(stable=True)
    start = torch.searchsorted(chosen, torch.arange(P + 1, dtype=idx.dtype, device=idx.device).repeat(B, 1))
    order = start.diff().argsort(descending=True, stable=True)
    return (place // K).int(), start, order


def fwd(qkv: Tensor, idx: Tensor, heads: int, regions: tuple[int, int], scale: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, W, C) and, for the backward pass, the base-2 log-sum-exp of each query's logits,
    (B, heads, H·W) in region-major order."""
    B, H, W, C3 = qkv.shape
    out = qkv.new_empty(B, H, W, C3 // 3)
    lse = qkv.new_empty(B, heads, H * W, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if qkv.stride(3) != 1:
        qkv = qkv.contiguous()
    dense, tiles, sizes, options = _launch(qkv, idx.shape[2], heads, regions, scale)
    table = _bits(idx, idx.shape[1]) if dense else idx.contiguous()
    with torch.cuda.device_of(qkv):
        launch(fwd_kernel, (B * tiles * heads,))(qkv, table, out, lse, *qkv.stride()[:3], *sizes, **options)
    return out, lse


def bwd(
    dout: Tensor, qkv: Tensor, idx: Tensor, out: Tensor, lse: Tensor, heads: int, regions: tuple[int, int], scale: float
) -> Tensor:
    """Return the gradient of qkv, (B, H, W, 3C) contiguous. Each element is written once, by one program."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if dqkv.numel() == 0:
        return dqkv
    if qkv.stride(3) != 1:
        qkv = qkv.contiguous()
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    P = idx.shape[1]
    dense, tiles, sizes, options = _launch(qkv, idx.shape[2], heads, regions, scale)
    if dense:
        table, walks = _bits(idx, P), _bits(idx, P, of_keys=True)
        start = order = walks  # not read
    else:
        table = idx.contiguous()
        walks, start, order = _inverse(table, P)
    delta = torch.empty_like(lse)
    strides, grid = (*qkv.stride()[:3], *dout.stride()[:3]), (qkv.shape[0] * tiles * heads,)
    with torch.cuda.device_of(qkv):
        launch(dq_kernel, grid)(qkv, table, out, lse, dout, delta, dqkv, *strides, *sizes, **options)
        launch(dkdv_kernel, grid)(
            qkv, walks, start, order, lse, dout, delta, dqkv, *strides, qkv.shape[0], *sizes, **options
        )
    return dqkv


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: every tile of TILES, in both variants."""
    itemsize = 4 if dtype == "fp32" else 2
    floats = dict(lse_ptr="*fp32", delta_ptr="*fp32")
    gather = floats | dict(table_ptr="*i64")
    inverse = floats | dict(table_ptr="*i32", start_ptr="*i64", order_ptr="*i64")
    bits = floats | dict(table_ptr="*i32", start_ptr="*i32", order_ptr="*i32")
    for D in (D for size, D in TILES if size == itemsize):
        for kernel in (fwd_kernel, dq_kernel, dkdv_kernel):
            yield kernel, bits, launch_options(itemsize, D, 1, True, hip)
            for n in range(4, TILES[itemsize, D][0].bit_length()):
                pointers = inverse if kernel is dkdv_kernel else gather
                yield kernel, pointers, launch_options(itemsize, D, 1 << n, False, hip)
