"""Triton kernels of deformable attention; DEPTH False, it is the 2D one. N = B · Q · heads · L · P samples.

`fwd_kernel` and `samples_kernel` take a few queries of a head, BLOCK_Q x BLOCK_S samples at once: it is their rows of
value, C side by side, that are read, mostly from L2. The depth score of a corner is two more numbers, made where it is
used, forward and backward: no buffer holds it, and heads that share a depth share its memory.

The gradients of value and depth would be atomic sums. Instead every cell owns its: `keys_kernel` gives each sample the
number of its upper left cell, one stable sort makes lists of them, and `maps_kernel` walks, for a cell, the samples of
the four upper left cells that touch it: two runs in the list, since neighbours in a row have neighbouring numbers. So
every run gives the same bits, for 16 bytes a sample (and the sort's own 16), a group of images at a time.
"""

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def place(loc_ptr, levels_ptr, n, s, ok, P, D, DEPTH: tl.constexpr):
    """Of samples n, which are s in their query and head: (x, y, z) in cells and bins, the level's height, width, first
    cell and first key, and whether the sample is alive."""
    DIMS: tl.constexpr = 3 if DEPTH else 2
    levels_ptr += tl.where(ok, s // P, 0) * 4
    H, W = tl.load(levels_ptr), tl.load(levels_ptr + 1)
    first, first_key = tl.load(levels_ptr + 2), tl.load(levels_ptr + 3)
    x = tl.load(loc_ptr + n * DIMS, ok, 0.0).to(tl.float32) * W - 0.5
    y = tl.load(loc_ptr + n * DIMS + 1, ok, 0.0).to(tl.float32) * H - 0.5
    alive = ok & (x > -1) & (x < W) & (y > -1) & (y < H)
    z = x
    if DEPTH:
        z = tl.load(loc_ptr + n * DIMS + 2, ok, 0.0).to(tl.float32) * D - 0.5
        alive = alive & (z > -1) & (z < D)
    return x, y, z, H, W, first, first_key, alive


@triton.jit
def corner(x0, y0, H, W, first, alive, dx: tl.constexpr, dy: tl.constexpr):
    """The cell of a corner, and whether it is in the map."""
    cx = x0.to(tl.int32) + dx
    cy = y0.to(tl.int32) + dy
    inside = alive & (cx >= 0) & (cx < W) & (cy >= 0) & (cy < H)
    return (first + cy * W + cx).to(tl.int64), inside


@triton.jit
def bins(depth_ptr, cell, stride_ds, z0, inside, D):
    """depth in the two bins around z."""
    bin = z0.to(tl.int32)
    depth_ptr += cell * stride_ds + bin
    near = tl.load(depth_ptr, inside & (bin >= 0), 0.0).to(tl.float32)
    return near, tl.load(depth_ptr + 1, inside & (bin + 1 < D), 0.0).to(tl.float32)


@triton.jit
def program(Q, M, BLOCK_Q: tl.constexpr):
    """A program's image, head and queries. Tiles of queries first: programs that run together share a head's map.
    64-bit, all that is multiplied by strides."""
    pid = tl.program_id(0)
    tiles = (Q + BLOCK_Q - 1) // BLOCK_Q
    q = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    pid = pid // tiles
    return (pid // M).to(tl.int64), (pid % M).to(tl.int64), q


# What changes from one image to the next is not specialised on.
SIZES = ["B", "Q", "S", "keys", "first_image"]


@triton.jit(do_not_specialize=SIZES)
def fwd_kernel(
    value_ptr, depth_ptr, loc_ptr, weight_ptr, levels_ptr, out_ptr,
    stride_vb, stride_vs, stride_vm, stride_db, stride_ds, stride_dm,
    Q, M, LP, P, D,
    C: tl.constexpr, DEPTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, m, q = program(Q, M, BLOCK_Q)
    c = tl.arange(0, BLOCK_C)
    value_ptr += b * stride_vb + m * stride_vm
    depth_ptr += b * stride_db + m * stride_dm
    bag = (b * Q + q) * M + m
    out = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for start in range(0, LP, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        n = bag[:, None] * LP + s
        ok = (q < Q)[:, None] & (s < LP)
        x, y, z, H, W, first, _, alive = place(loc_ptr, levels_ptr, n, s, ok, P, D, DEPTH)
        x0, y0, z0 = tl.floor(x), tl.floor(y), tl.floor(z)
        fx, fy, fz = x - x0, y - y0, z - z0
        a = tl.load(weight_ptr + n, ok, 0.0).to(tl.float32)
        rows = tl.zeros((BLOCK_Q, BLOCK_S, BLOCK_C), tl.float32)
        for dy in tl.static_range(2):
            for dx in tl.static_range(2):
                cell, inside = corner(x0, y0, H, W, first, alive, dx, dy)
                w = a * (fy if dy else 1 - fy) * (fx if dx else 1 - fx)
                if DEPTH:
                    near, far = bins(depth_ptr, cell, stride_ds, z0, inside, D)
                    w *= near + fz * (far - near)
                w = tl.where(inside, w, 0.0)
                at = (cell * stride_vs)[:, :, None] + c[None, None, :]
                row = tl.load(value_ptr + at, inside[:, :, None] & (c < C)[None, None, :], 0.0)
                rows += w[:, :, None] * row.to(tl.float32)
        out += tl.sum(rows, 1)
    at = bag[:, None] * C + c[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), (q < Q)[:, None] & (c < C)[None, :])


@triton.jit(do_not_specialize=SIZES)
def samples_kernel(
    value_ptr, depth_ptr, loc_ptr, weight_ptr, levels_ptr, dout_ptr, dloc_ptr, dweight_ptr,
    stride_vb, stride_vs, stride_vm, stride_db, stride_ds, stride_dm,
    Q, M, LP, P, D,
    C: tl.constexpr, DEPTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b, m, q = program(Q, M, BLOCK_Q)
    c = tl.arange(0, BLOCK_C)
    value_ptr += b * stride_vb + m * stride_vm
    depth_ptr += b * stride_db + m * stride_dm
    bag = (b * Q + q) * M + m
    dout = dout_ptr + bag[:, None] * C + c[None, :]
    dout = tl.load(dout, (q < Q)[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
    DIMS: tl.constexpr = 3 if DEPTH else 2
    for start in range(0, LP, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[None, :]
        n = bag[:, None] * LP + s
        ok = (q < Q)[:, None] & (s < LP)
        x, y, z, H, W, first, _, alive = place(loc_ptr, levels_ptr, n, s, ok, P, D, DEPTH)
        x0, y0, z0 = tl.floor(x), tl.floor(y), tl.floor(z)
        fx, fy, fz = x - x0, y - y0, z - z0
        da = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
        du = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
        dv = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
        dw = tl.zeros((BLOCK_Q, BLOCK_S), tl.float32)
        for dy in tl.static_range(2):
            for dx in tl.static_range(2):
                cell, inside = corner(x0, y0, H, W, first, alive, dx, dy)
                at = (cell * stride_vs)[:, :, None] + c[None, None, :]
                row = tl.load(value_ptr + at, inside[:, :, None] & (c < C)[None, None, :], 0.0)
                t = tl.sum(dout[:, None, :] * row.to(tl.float32), 2)
                hy = fy if dy else 1 - fy
                hx = fx if dx else 1 - fx
                if DEPTH:
                    near, far = bins(depth_ptr, cell, stride_ds, z0, inside, D)
                    dw += hy * hx * t * (far - near)
                    t *= near + fz * (far - near)
                da += hy * hx * t
                du += (hy if dx else -hy) * t
                dv += (hx if dy else -hx) * t
        a = tl.load(weight_ptr + n, ok, 0.0).to(tl.float32)
        tl.store(dweight_ptr + n, tl.where(alive, da, 0.0).to(dweight_ptr.dtype.element_ty), ok)
        dloc_n = dloc_ptr + n * DIMS
        tl.store(dloc_n, tl.where(alive, a * W * du, 0.0).to(dloc_ptr.dtype.element_ty), ok)
        tl.store(dloc_n + 1, tl.where(alive, a * H * dv, 0.0).to(dloc_ptr.dtype.element_ty), ok)
        if DEPTH:
            tl.store(dloc_n + 2, tl.where(alive, a * D * dw, 0.0).to(dloc_ptr.dtype.element_ty), ok)


@triton.jit(do_not_specialize=[*SIZES, "N"])
def keys_kernel(
    loc_ptr, levels_ptr, keys_ptr, N, Q, M, LP, P, D, keys, dead,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The upper left cell of each of N samples, image and head first; `dead` of a dead one."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = n < N
    x, y, _, _, W, _, first_key, alive = place(loc_ptr, levels_ptr, n, n % LP, ok, P, D, DEPTH)
    bag = n // LP
    cell = first_key + (tl.floor(y).to(tl.int32) + 1) * (W + 1) + tl.floor(x).to(tl.int32) + 1
    key = (bag // M // Q * M + bag % M) * keys + cell
    tl.store(keys_ptr + n, tl.where(alive, key, dead).to(keys_ptr.dtype.element_ty), ok)


@triton.jit(do_not_specialize=[*SIZES, "L"])
def maps_kernel(
    value_ptr, depth_ptr, loc_ptr, weight_ptr, levels_ptr, dout_ptr, order_ptr, starts_ptr, dvalue_ptr, ddepth_ptr,
    stride_vb, stride_vs, stride_vm, stride_db, stride_ds, stride_dm,
    S, Q, M, L, LP, D, keys, first_image,
    C: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns a cell: of one head, or with a shared depth of all HEADS."""
    pid = tl.program_id(0)
    cell = S - 1 - pid % S  # the coarse levels come last and have the long lists: these start first
    pid = pid // S
    groups = M // HEADS
    group = (pid % groups).to(tl.int64)
    image = (pid // groups).to(tl.int64)  # in the list
    b = first_image + image
    l = tl.arange(0, BLOCK_L)
    level = tl.sum((tl.load(levels_ptr + l * 4 + 2, l < L, S) <= cell).to(tl.int32), 0) - 1
    levels_ptr += level * 4
    H, W = tl.load(levels_ptr), tl.load(levels_ptr + 1)
    here = cell - tl.load(levels_ptr + 2)
    cx, cy = here % W, here // W
    upper = tl.load(levels_ptr + 3) + cy * (W + 1) + cx  # from the cell above and left; to the right of it our own
    cell = cell.to(tl.int64)

    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    DIMS: tl.constexpr = 3 if DEPTH else 2
    bags = first_image * Q * M  # of the images before
    dscore = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    bins = tl.zeros((BLOCK_D,), tl.float32)
    if DEPTH:
        bins = tl.load(depth_ptr + b * stride_db + cell * stride_ds + group * stride_dm + d, d < D, 0.0).to(tl.float32)
    for head in range(HEADS):
        m = group * HEADS + head
        at = b * stride_vb + cell * stride_vs + m * stride_vm + c
        row = tl.load(value_ptr + at, c < C, 0.0).to(tl.float32)
        starts = starts_ptr + (image * M + m) * keys + upper
        run = tl.load(starts)
        length = tl.load(starts + 2) - run
        next_run = tl.load(starts + W + 1)
        total = (length + tl.load(starts + W + 3) - next_run).to(tl.int32)
        drow = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start in range(0, total, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            ok = i < total
            n = tl.load(order_ptr + tl.where(i < length, run + i, next_run + i - length), ok, 0)
            n += bags * LP
            bag = n // LP
            x = tl.load(loc_ptr + n * DIMS, ok, 0.0).to(tl.float32) * W - 0.5
            y = tl.load(loc_ptr + n * DIMS + 1, ok, 0.0).to(tl.float32) * H - 0.5
            w = tl.load(weight_ptr + n, ok, 0.0).to(tl.float32)
            w *= tl.maximum(1 - tl.abs(x - cx), 0.0) * tl.maximum(1 - tl.abs(y - cy), 0.0)
            dout = dout_ptr + bag[:, None] * C + c[None, :]
            dout = tl.load(dout, ok[:, None] & (c < C)[None, :], 0.0).to(tl.float32)
            if DEPTH:
                z = tl.load(loc_ptr + n * DIMS + 2, ok, 0.0).to(tl.float32) * D - 0.5
                hat = tl.maximum(1 - tl.abs(z[:, None] - d[None, :]), 0.0)
                dg = w * tl.sum(dout * row[None, :], 1)
                dscore += tl.where(hat > 0, hat * dg[:, None], 0.0)
                w *= tl.sum(tl.where(hat > 0, hat * bins[None, :], 0.0), 1)
            drow += w[:, None] * dout
        at = ((b * S + cell) * M + m) * C + c
        tl.store(dvalue_ptr + at, tl.sum(drow, 0).to(dvalue_ptr.dtype.element_ty), c < C)
    if DEPTH:
        at = ((b * S + cell) * groups + group) * D + d
        tl.store(ddepth_ptr + at, tl.sum(dscore, 0).to(ddepth_ptr.dtype.element_ty), d < D)


# Chosen by registers from ahead-of-time compilation (saccade.ops.aot), not yet timed on a GPU: elements of the widest
# tile of a program, and its warps. Eight registers a thread of rows leave room for those of four corners in flight;
# with sixteen, the compiler spilled rather than take more than 64.
ROWS, ROW_WARPS = 2048, 8
OWNED, OWNER_WARPS = 2048, 4  # lists are short, a dozen samples on fine levels: taller tiles would be empty
KEYS = 512
GROUP = 1 << 23  # samples sorted at a time, in whole images


def row_tile(C: int, LP: int) -> dict:
    """As many samples of a query as there are, then further queries."""
    BLOCK_C = max(4, triton.next_power_of_2(C))
    BLOCK_S = min(triton.next_power_of_2(LP), ROWS // BLOCK_C, 32)
    return dict(BLOCK_Q=ROWS // BLOCK_C // BLOCK_S, BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=ROW_WARPS)


def owner_tile(C: int, D: int) -> dict:
    BLOCK_C, BLOCK_D = max(4, triton.next_power_of_2(C)), triton.next_power_of_2(max(D, 1))
    BLOCK_N = min(32, OWNED // max(BLOCK_C, BLOCK_D))
    return dict(BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D, num_warps=OWNER_WARPS)


@functools.lru_cache(64)
def _levels(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 4): height, width, first cell, first key. Each way a key more than cells: upper left ones may lie outside."""
    rows, cell, key = [], 0, 0
    for H, W in zip(shapes[::2], shapes[1::2]):
        rows.append((H, W, cell, key))
        cell, key = cell + H * W, key + (H + 1) * (W + 1)
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device=device)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _common(value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]):
    """Tensors and strides as the kernels take them."""
    value = _rows(value)
    depth = value if depth is None else _rows(depth)
    tensors = value, depth, locations.contiguous(), weights.contiguous(), _levels(tuple(shapes), value.device)
    shared = depth.shape[2] == 1 and value.shape[2] > 1
    return tensors, (*value.stride()[:3], *depth.stride()[:2], 0 if shared else depth.stride(2))


def _launch_rows(kernel, value, depth, locations, weights, shapes, *rest) -> None:
    B, Q, M, L, P = weights.shape
    C, D = value.shape[3], 1 if depth is None else depth.shape[3]
    tensors, strides = _common(value, depth, locations, weights, shapes)
    options = row_tile(C, L * P)
    grid = (B * M * triton.cdiv(Q, options["BLOCK_Q"]),)
    with torch.cuda.device_of(value):
        kernel[grid](*tensors, *rest, *strides, Q, M, L * P, P, D, C=C, DEPTH=depth is not None, **options)


def fwd(value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    B, Q, M, _, _ = weights.shape
    out = value.new_empty(B, Q, M * value.shape[3])
    _launch_rows(fwd_kernel, value, depth, locations, weights, shapes, out)
    return out


def bwd_samples(
    dout: Tensor, value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]
):
    """Gradients to locations and weights."""
    dloc, dweights = locations.new_empty(locations.shape), weights.new_empty(weights.shape)
    _launch_rows(samples_kernel, value, depth, locations, weights, shapes, dout.contiguous(), dloc, dweights)
    return dloc, dweights


def bwd_maps(dout: Tensor, value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]):
    """Gradients to value and depth; without a depth, an empty one."""
    B, Q, M, L, P = weights.shape
    (S, C), D = (value.shape[1], value.shape[3]), 1 if depth is None else depth.shape[3]
    tensors, strides = _common(value, depth, locations, weights, shapes)
    locations, levels, dout = tensors[2], tensors[4], dout.contiguous()
    dvalue = value.new_empty(value.shape)
    ddepth = value.new_empty(0) if depth is None else depth.new_empty(depth.shape)
    keys = sum((H + 1) * (W + 1) for H, W in zip(shapes[::2], shapes[1::2]))
    options = owner_tile(C, 1 if depth is None else D)
    heads = 1 if depth is None else M // depth.shape[2]
    step = max(1, GROUP // (Q * M * L * P))
    for first in range(0, B, step):
        images = min(step, B - first)
        dead, n = images * M * keys, images * Q * M * L * P
        key = torch.empty(n, dtype=torch.int32 if dead < 2**31 else torch.int64, device=value.device)
        with torch.cuda.device_of(value):
            keys_kernel[(triton.cdiv(n, KEYS),)](
                locations[first:], levels, key, n, Q, M, L * P, P, D, keys, dead, DEPTH=depth is not None, BLOCK=KEYS
            )
            key, order = key.sort(stable=True)
            starts = torch.searchsorted(key, torch.arange(dead + 1, dtype=key.dtype, device=key.device))
            maps_kernel[(images * (M // heads) * S,)](
                *tensors, dout, order, starts, dvalue, ddepth, *strides, S, Q, M, L, L * P, D, keys, first,
                C=C, DEPTH=depth is not None, HEADS=heads, BLOCK_L=triton.next_power_of_2(L), **options,
            )  # fmt: skip
    return dvalue, ddepth


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """For saccade.ops.aot: the lifter's, two detectors' and the widest."""
    types = dict(levels_ptr="*i32", keys_ptr="*i32", order_ptr="*i64", starts_ptr="*i64")
    types |= dict(loc_ptr="*fp32", dloc_ptr="*fp32")  # as they come under autocast
    for C, D, LP, HEADS in ((32, 112, 32, 8), (32, 112, 8, 1), (32, 0, 16, 1), (32, 0, 4, 1), (256, 512, 32, 8)):
        for kernel in (fwd_kernel, samples_kernel):
            yield kernel, types, dict(C=C, DEPTH=D > 0) | row_tile(C, LP)
        yield maps_kernel, types, dict(C=C, DEPTH=D > 0, HEADS=HEADS, BLOCK_L=4) | owner_tile(C, D)
    for depth in (False, True):
        yield keys_kernel, types, dict(DEPTH=depth, BLOCK=KEYS)
