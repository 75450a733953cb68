"""Triton kernels of deformable attention, 3D and (with DEPTH False) 2D. There are N = B · Q · heads · L · P samples.

`fwd_kernel` and `samples_kernel` process a few queries of a head, BLOCK_Q x BLOCK_S samples at once, and read their
rows of value (C contiguous channels), mostly from L2. The depth score of a corner takes two more reads and is computed
where it is used, forward and backward: no buffer holds it, and heads that share a depth share its memory.

The gradients of value and depth are sums over samples, but without atomics: every cell has a program that owns its sum.
`keys_kernel` gives each sample the index of its upper left cell, one stable sort makes lists of them, and `maps_kernel`
loops, for each cell, over the samples of the four upper left cells that touch it. These are two ranges of the list,
since neighbours in a row have consecutive indices. This is deterministic and takes 16 bytes per sample (and 16 for the
sort), for a group of images at a time.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tune import launch


@triton.jit
def level_geometry(shapes, level):
    """Return the height, width, first cell and first key of levels, from shapes (H0, W0, H1, W1, …). An upper left cell
    may lie outside, so there is one key more per axis than there are cells."""
    H = level * 0 + shapes[0]
    W = level * 0 + shapes[1]
    cell = shapes[0] * shapes[1]
    key = (shapes[0] + 1) * (shapes[1] + 1)
    first = level * 0
    first_key = level * 0
    for i in tl.static_range(1, len(shapes) // 2):
        H = tl.where(level == i, shapes[2 * i], H)
        W = tl.where(level == i, shapes[2 * i + 1], W)
        first = tl.where(level == i, cell, first)
        first_key = tl.where(level == i, key, first_key)
        cell += shapes[2 * i] * shapes[2 * i + 1]
        key += (shapes[2 * i] + 1) * (shapes[2 * i + 1] + 1)
    return H, W, first, first_key


@triton.jit
def level_of(shapes, cell):
    """Return the level of a cell."""
    level = cell * 0
    first = 0
    for i in tl.static_range(len(shapes) // 2 - 1):
        first += shapes[2 * i] * shapes[2 * i + 1]
        level += (cell >= first).to(tl.int32)
    return level


@triton.jit
def sample_positions(loc_ptr, shapes, n, s, ok, P, D, DEPTH: tl.constexpr):
    """Return for samples n, with index s in their query and head: (x, y, z) in cells and bins; height, width, first
    cell and first key of the level; and whether the sample is alive, that is less than a cell or bin outside."""
    DIMS: tl.constexpr = 3 if DEPTH else 2
    H, W, first, first_key = level_geometry(shapes, tl.where(ok, s // P, 0).to(tl.int32))
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
    """Return the cell of a corner, and whether it is in the map."""
    cx = x0.to(tl.int32) + dx
    cy = y0.to(tl.int32) + dy
    inside = alive & (cx >= 0) & (cx < W) & (cy >= 0) & (cy < H)
    return (first + cy * W + cx).to(tl.int64), inside


@triton.jit
def bins(depth_ptr, cell, stride_ds, z0, inside, D):
    """Load depth in the two bins around z."""
    bin = z0.to(tl.int32)
    depth_ptr += cell * stride_ds + bin
    near = tl.load(depth_ptr, inside & (bin >= 0), 0.0).to(tl.float32)
    return near, tl.load(depth_ptr + 1, inside & (bin + 1 < D), 0.0).to(tl.float32)


@triton.jit
def program(Q, M, BLOCK_Q: tl.constexpr):
    """Return a program's image, head and queries, 64-bit if multiplied by strides. Tiles of queries are the fastest
    index, so that concurrent programs share a head's map."""
    pid = tl.program_id(0)
    tiles = (Q + BLOCK_Q - 1) // BLOCK_Q
    q = pid % tiles * BLOCK_Q + tl.arange(0, BLOCK_Q)
    pid = pid // tiles
    return (pid // M).to(tl.int64), (pid % M).to(tl.int64), q


# Not specialised on, since they change with the image size.
SIZES = ["B", "Q", "S", "shapes", "keys", "dead", "first_image"]


@triton.jit(do_not_specialize=SIZES)
def fwd_kernel(
    value_ptr, depth_ptr, loc_ptr, weight_ptr, out_ptr,
    stride_vb, stride_vs, stride_vm, stride_db, stride_ds, stride_dm,
    Q, M, LP, P, D, shapes,
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
        x, y, z, H, W, first, _, alive = sample_positions(loc_ptr, shapes, n, s, ok, P, D, DEPTH)
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
    value_ptr, depth_ptr, loc_ptr, weight_ptr, dout_ptr, dloc_ptr, dweight_ptr,
    stride_vb, stride_vs, stride_vm, stride_db, stride_ds, stride_dm,
    Q, M, LP, P, D, shapes,
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
        x, y, z, H, W, first, _, alive = sample_positions(loc_ptr, shapes, n, s, ok, P, D, DEPTH)
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
    loc_ptr, keys_ptr, N, Q, M, LP, P, D, shapes, keys, dead,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store the index of image, head and upper left cell of N samples; `dead` for samples that are not alive."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = n < N
    x, y, _, _, W, _, first_key, alive = sample_positions(loc_ptr, shapes, n, n % LP, ok, P, D, DEPTH)
    bag = n // LP
    cell = first_key + (tl.floor(y).to(tl.int32) + 1) * (W + 1) + tl.floor(x).to(tl.int32) + 1
    key = (bag // M // Q * M + bag % M) * keys + cell
    tl.store(keys_ptr + n, tl.where(alive, key, dead).to(keys_ptr.dtype.element_ty), ok)


@triton.jit(do_not_specialize=SIZES)
def maps_kernel(
    value_ptr, depth_ptr, loc_ptr, weight_ptr, dout_ptr, order_ptr, starts_ptr, dvalue_ptr, ddepth_ptr,
    stride_vb, stride_vs, stride_vm, stride_db, stride_ds, stride_dm,
    S, Q, M, LP, D, shapes, keys, first_image,
    C: tl.constexpr, DEPTH: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of one cell: of one head, or of all HEADS if they share a depth."""
    pid = tl.program_id(0)
    cell = S - 1 - pid % S  # coarse levels, which come last, have the longest lists: start with them
    pid = pid // S
    groups = M // HEADS
    group = (pid % groups).to(tl.int64)
    image = (pid // groups).to(tl.int64)  # its index in the list
    b = first_image + image
    H, W, first, first_key = level_geometry(shapes, level_of(shapes, cell))
    here = cell - first
    cx, cy = here % W, here // W
    upper = first_key + cy * (W + 1) + cx  # the cell above and left; the one to its right is next
    cell = cell.to(tl.int64)

    c = tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    DIMS: tl.constexpr = 3 if DEPTH else 2
    bags = first_image * Q * M  # bags of the images before
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


# Elements of the widest tile of a program, and its warps. Chosen from the registers of ahead-of-time compilation
# (saccade.ops.aot); not yet timed on a GPU. Eight registers per thread for a row leave room for four corners in flight;
# with sixteen, the compiler spilled.
ROWS, ROW_WARPS = 2048, 8
OWNED, OWNER_WARPS = 2048, 4  # lists are short, a dozen samples on fine levels, so taller tiles would be mostly empty
KEYS = 512
GROUP = 1 << 23  # most samples sorted at a time, in whole images


def row_tile(C: int, LP: int) -> dict:
    """Return the tile of the row kernels: all samples of a query if they fit, then more queries."""
    BLOCK_C = max(4, triton.next_power_of_2(C))
    BLOCK_S = min(triton.next_power_of_2(LP), ROWS // BLOCK_C, 32)
    return dict(BLOCK_Q=ROWS // BLOCK_C // BLOCK_S, BLOCK_S=BLOCK_S, BLOCK_C=BLOCK_C, num_warps=ROW_WARPS)


def owner_tile(C: int, D: int) -> dict:
    BLOCK_C, BLOCK_D = max(4, triton.next_power_of_2(C)), triton.next_power_of_2(max(D, 1))
    BLOCK_N = min(32, OWNED // max(BLOCK_C, BLOCK_D))
    return dict(BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D, num_warps=OWNER_WARPS)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _common(value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor):
    """Return tensors and strides in the order of the kernels' arguments."""
    value = _rows(value)
    depth = value if depth is None else _rows(depth)
    tensors = value, depth, locations.contiguous(), weights.contiguous()
    shared = depth.shape[2] == 1 and value.shape[2] > 1
    return tensors, (*value.stride()[:3], *depth.stride()[:2], 0 if shared else depth.stride(2))


def _launch_rows(kernel, value, depth, locations, weights, shapes, *rest) -> None:
    B, Q, M, L, P = weights.shape
    C, D = value.shape[3], 1 if depth is None else depth.shape[3]
    tensors, strides = _common(value, depth, locations, weights)
    options = row_tile(C, L * P)
    grid = (B * M * triton.cdiv(Q, options["BLOCK_Q"]),)
    with torch.cuda.device_of(value):
        launch(kernel, grid)(
            *tensors, *rest, *strides, Q, M, L * P, P, D, tuple(shapes), C=C, DEPTH=depth is not None, **options
        )


def fwd(value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]) -> Tensor:
    B, Q, M, _, _ = weights.shape
    out = value.new_empty(B, Q, M * value.shape[3])
    _launch_rows(fwd_kernel, value, depth, locations, weights, shapes, out)
    return out


def bwd_samples(
    dout: Tensor, value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]
):
    """Return the gradients of locations and weights."""
    dloc, dweights = locations.new_empty(locations.shape), weights.new_empty(weights.shape)
    _launch_rows(samples_kernel, value, depth, locations, weights, shapes, dout.contiguous(), dloc, dweights)
    return dloc, dweights


def bwd_maps(dout: Tensor, value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor, shapes: list[int]):
    """Return the gradients of value and depth; the latter is empty without depth."""
    B, Q, M, L, P = weights.shape
    (S, C), D = (value.shape[1], value.shape[3]), 1 if depth is None else depth.shape[3]
    tensors, strides = _common(value, depth, locations, weights)
    locations, dout, shapes = tensors[2], dout.contiguous(), tuple(shapes)
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
            launch(keys_kernel, (triton.cdiv(n, KEYS),))(
                locations[first:], key, n, Q, M, L * P, P, D, shapes, keys, dead, DEPTH=depth is not None, BLOCK=KEYS
            )
            key, order = key.sort(stable=True)
            starts = torch.searchsorted(key, torch.arange(dead + 1, dtype=key.dtype, device=key.device))
            launch(maps_kernel, (images * (M // heads) * S,))(
                *tensors, dout, order, starts, dvalue, ddepth, *strides, S, Q, M, L * P, D, shapes, keys, first,
                C=C, DEPTH=depth is not None, HEADS=heads, **options,
            )  # fmt: skip
    return dvalue, ddepth


def aot(dtype: str, hip: bool) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Yield for saccade.ops.aot: the sizes of the lifter, of two detectors, and the widest."""
    types = dict(shapes=("i32",) * 8, keys_ptr="*i32", order_ptr="*i64", starts_ptr="*i64")
    types |= dict(loc_ptr="*fp32", dloc_ptr="*fp32")  # as under autocast
    for C, D, LP, HEADS in ((32, 112, 32, 8), (32, 112, 8, 1), (32, 0, 16, 1), (32, 0, 4, 1), (256, 512, 32, 8)):
        for kernel in (fwd_kernel, samples_kernel):
            yield kernel, types, dict(C=C, DEPTH=D > 0) | row_tile(C, LP)
        yield maps_kernel, types, dict(C=C, DEPTH=D > 0, HEADS=HEADS) | owner_tile(C, D)
    for depth in (False, True):
        yield keys_kernel, types, dict(DEPTH=depth, BLOCK=KEYS)
