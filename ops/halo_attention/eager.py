"""Fast PyTorch implementation, used where the Triton kernels cannot run (mainly on CPUs).

It is fast for two reasons. The logits of a few windows at a time stay in cache; the backward pass recomputes them. And
logits are stored as (a · a, queries), with the cells of the window first: position logits are then a sum of two
broadcast tensors with a long innermost axis, and their gradients are sums over outer axes. With queries first, the
innermost axis has only `a` elements, which is three times slower.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ..dispatch import (
    definition_gradients,
    is_dynamic,
    is_exporting,
    is_saved_graph,
    use_definition,
    wants_definition_gradients,
)
from ..precision import no_autocast
from . import reference

# Bytes of logits per chunk, small enough for a cache that two cores share. From 1 to 12 MB there is little difference;
# with much more, glibc maps fresh pages for every buffer.
CHUNK_BYTES = 4 << 20


class Settings(NamedTuple):
    """The arguments of halo_attention that are not tensors."""

    heads: int
    block: int
    halo: int
    stride: int
    scale: float
    scale_pos: bool = False


def halo_attention(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, settings: Settings) -> Tensor:
    """See saccade.ops.halo_attention, which checks the arguments."""
    tensors = q, kv, height_rel, width_rel
    if torch.compiler.is_compiling() and not is_exporting():
        return plain(*tensors, *settings)
    if is_saved_graph():
        return gathered(*tensors, settings)
    if use_definition(q):
        return reference.halo_attention(*tensors, *settings)
    return HaloAttention.apply(*tensors, settings)


def gathered(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, settings: Settings) -> Tensor:
    """Compute what the reference does, for runtimes that read saved graphs: one gather of whole pixels makes all
    windows, and batched products of four axes follow. OpenVINO takes half the time that it takes for the reference."""
    heads, block, halo, stride, scale, scale_pos = settings
    B, _, H, W = kv.shape
    D, a, t = height_rel.shape[1], block + 2 * halo, block // stride
    M, N = (H + block - 1) // block, (W + block - 1) // block  # blocks
    rows, columns = M * block + 2 * halo, N * block + 2 * halo  # of the padded map
    pixels = F.pad(kv, (halo, columns - halo - W, halo, rows - halo - H))
    pixels = pixels.reshape(B, kv.shape[1], rows * columns).transpose(1, 2)
    cells = torch.arange(a, device=q.device)
    y, x = (torch.arange(n, device=q.device).unsqueeze(1) * block + cells for n in (M, N))  # (M, a), (N, a)
    index = (y[:, None, :, None] * columns + x[None, :, None]).reshape(-1)
    windows = pixels.index_select(1, index).reshape(B * M * N, a * a, heads, kv.shape[1] // heads).transpose(1, 2)
    k, v = windows[..., :D], windows[..., D:]  # (n, heads, a · a, ·) each

    q4 = F.pad(q, (0, N * t - q.shape[3], 0, M * t - q.shape[2])).reshape(B, heads, D, M, t, N, t)
    q4 = q4.permute(0, 3, 5, 1, 4, 6, 2).reshape(B * M * N, heads, t * t, D)
    by_place = q4.reshape(B * M * N * heads, t, t, D)
    of_rows, of_columns = (z.to(q.dtype).unfold(0, a, 1)[a - t :].flip(0) for z in (height_rel, width_rel))  # (t, D, a)
    position = (by_place @ of_rows).unsqueeze(4) + (by_place.transpose(1, 2) @ of_columns).transpose(1, 2).unsqueeze(3)
    position = position.reshape(B * M * N, heads, t * t, a * a) * (scale if scale_pos else 1.0)
    out = ((q4 * scale) @ k.transpose(2, 3) + position).softmax(-1) @ v  # (n, heads, t · t, Dv)
    out = out.reshape(B, M, N, heads, t, t, v.shape[3]).permute(0, 3, 6, 1, 4, 2, 5)
    out = out.reshape(B, heads * v.shape[3], M * t, N * t)
    if is_dynamic(q.shape[2]) or is_dynamic(q.shape[3]):  # of a slice, torch.export would not know the size
        y, x = (torch.arange(n, device=q.device) for n in q.shape[2:])
        return out.index_select(2, y).index_select(3, x)
    return out[:, :, : q.shape[2], : q.shape[3]]


def memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.stride(1) == 1 and x.stride(3) != 1 else torch.contiguous_format


def empty(like: Tensor, channels: int) -> Tensor:
    """Return an empty map with `channels` channels, else like another map and in its memory format."""
    B, _, H, W = like.shape
    return torch.empty((B, channels, H, W), dtype=like.dtype, device=like.device, memory_format=memory_format(like))


class HaloAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, settings: Settings) -> Tensor:
        ctx.save_for_backward(q, kv, height_rel, width_rel)
        ctx.settings = settings
        return forward(q, kv, height_rel, width_rel, settings)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if wants_definition_gradients(dout):

            def f(*tensors: Tensor) -> Tensor:
                with no_autocast(dout):
                    return reference.halo_attention(*tensors, *ctx.settings)

            return *definition_gradients(f, ctx.saved_tensors, ctx.needs_input_grad[:4], dout), None
        return *backward(dout, *ctx.saved_tensors, ctx.settings), None


def forward(q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, settings: Settings) -> Tensor:
    g, heads = Geometry(q, kv, height_rel, settings), settings.heads
    tables = [g.table(z) for z in (height_rel, width_rel)]
    out = g.empty(g.Dv)
    queries, outs, pixels = g.tiles(g.pad_to_tiles(q)), g.tiles(out), kv.unflatten(1, (heads, -1))
    for group in g.groups():
        keys, values = (g.windows(g.pad(z)) for z in pixels[group].split((g.D, g.Dv), 2))
        for m in g.rows():
            x, k, v = g.flat(queries[group][:, :, m]), g.cells(keys[:, :, m]), g.cells(values[:, :, m])
            o = outs[group][:, :, m]
            o.copy_((v.mT @ g.attention(x, k, tables)).view(o.shape))
    return g.crop(out)


def backward(
    dout: Tensor, q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, settings: Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g, heads, scale = Geometry(q, kv, height_rel, settings), settings.heads, settings.scale
    tables = [g.table(z) for z in (height_rel, width_rel)]
    dq, dkv = g.empty(g.D), empty(kv, kv.shape[1])
    queries, dqs, douts = g.tiles(g.pad_to_tiles(q)), g.tiles(dq), g.tiles(g.pad_to_tiles(dout))
    pixels, dpixels = kv.unflatten(1, (heads, -1)), dkv.unflatten(1, (heads, -1))
    dtables = [z.new_zeros(z.shape, dtype=torch.promote_types(z.dtype, torch.float32)) for z in tables]
    dlogits = torch.empty_like(g.logits)
    for group in g.groups():
        padded = [g.pad(z) for z in pixels[group].split((g.D, g.Dv), 2)]
        dpadded = [torch.zeros_like(z) for z in padded]
        keys, values = map(g.windows, padded)
        for m in g.rows():
            x, k, v = g.flat(queries[group][:, :, m]), g.cells(keys[:, :, m]), g.cells(values[:, :, m])
            do, dx = g.flat(douts[group][:, :, m]), dqs[group][:, :, m]
            p = g.attention(x, k, tables)
            ds = torch.bmm(v, do, out=dlogits[: len(x)])
            g.add(p @ do.mT, dpadded[1], m)
            torch._softmax_backward_data(ds, p, 1, p.dtype, grad_input=ds)
            g.add((ds @ x.mT).mul_(scale), dpadded[0], m)
            of_positions = g.position_gradients(ds, x, tables, dtables)
            dx.copy_(of_positions.baddbmm_(k.mT, ds, alpha=scale).view(dx.shape))
        for dz, dpad in zip(dpixels[group].split((g.D, g.Dv), 2), dpadded):
            dz.copy_(g.inside(dpad))
    dheight, dwidth = (g.dtable(dz, z) for dz, z in zip(dtables, (height_rel, width_rel)))
    return g.crop(dq), dkv, dheight, dwidth


# One node in the graphs of torch.compile: its loops would fix the sizes of the map in the graph.


@custom_op("saccade::halo_attention_plain", mutates_args=())
def plain(
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    heads: int,
    block: int,
    halo: int,
    stride: int,
    scale: float,
    scale_pos: bool,
) -> Tensor:
    return forward(q, kv, height_rel, width_rel, Settings(heads, block, halo, stride, scale, scale_pos))


@plain.register_fake
def _(q, kv, *rest):
    return empty(q, kv.shape[1] - q.shape[1])


@custom_op("saccade::halo_attention_plain_bwd", mutates_args=())
def plain_bwd(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    height_rel: Tensor,
    width_rel: Tensor,
    heads: int,
    block: int,
    halo: int,
    stride: int,
    scale: float,
    scale_pos: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(dout, q, kv, height_rel, width_rel, Settings(heads, block, halo, stride, scale, scale_pos))


@plain_bwd.register_fake
def _(dout, q, kv, height_rel, width_rel, *rest):
    return empty(q, q.shape[1]), empty(kv, kv.shape[1]), *(z.new_empty(z.shape) for z in (height_rel, width_rel))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.rest = inputs[4:]


def _backward(ctx, dout):
    return *plain_bwd(dout, *ctx.saved_tensors, *ctx.rest), *[None] * 6


plain.register_autograd(_backward, setup_context=_save)


class Geometry:
    """The partition of a map into windows, and the computation on n windows: those of a group of images and heads and
    of some rows of blocks."""

    def __init__(self, q: Tensor, kv: Tensor, height_rel: Tensor, settings: Settings):
        heads, block, halo, stride, scale, scale_pos = settings
        self.B, C, self.H, self.W = kv.shape
        self.q, self.heads, self.block, self.halo, self.scale = q, heads, block, halo, scale
        self.position_scale = scale if scale_pos else 1.0
        self.a, self.t = block + 2 * halo, block // stride
        self.D = height_rel.shape[1]
        self.Dv = C // heads - self.D
        self.M, self.N = -(-self.H // block), -(-self.W // block)  # blocks
        row = self.N * self.a**2 * self.t**2 * q.element_size()
        self.row_step = max(1, min(CHUNK_BYTES // row, self.M))
        self.head_step = max(1, min(CHUNK_BYTES // (row * self.M), heads))
        self.image_step = max(1, min(CHUNK_BYTES // (row * self.M * heads), self.B))
        n = self.image_step * self.head_step * self.row_step * self.N
        self.logits = q.new_empty(n, self.a**2, self.t**2)

    def groups(self) -> Iterator[tuple[slice, slice]]:
        return itertools.product(_slices(self.B, self.image_step), _slices(self.heads, self.head_step))

    def rows(self) -> Iterator[slice]:
        return _slices(self.M, self.row_step)

    def table(self, z: Tensor) -> Tensor:
        """Return (t, D, a): for row (or column) y of a tile, the a entries of a table that start at a - 1 - y."""
        z = z.to(self.q.dtype) * self.position_scale
        return z.unfold(0, self.a, 1)[self.a - self.t :].flip(0).contiguous()

    def dtable(self, dz: Tensor, z: Tensor) -> Tensor:
        total = dz.new_zeros(z.shape)
        for y in range(self.t):
            total[self.a - 1 - y : 2 * self.a - 1 - y] += dz[y].mT
        return (total * self.position_scale).to(z.dtype)

    # Queries: a tile is (channels, t, t), so that the innermost axis of every operation has t · t elements.

    def empty(self, channels: int) -> Tensor:
        """Return an empty map of queries, padded to whole tiles."""
        shape = self.B, self.heads * channels, self.M * self.t, self.N * self.t
        return torch.empty(shape, dtype=self.q.dtype, device=self.q.device, memory_format=memory_format(self.q))

    def pad_to_tiles(self, x: Tensor) -> Tensor:
        missing = self.N * self.t - x.shape[3], self.M * self.t - x.shape[2]
        return F.pad(x, (0, missing[0], 0, missing[1])) if any(missing) else x

    def crop(self, x: Tensor) -> Tensor:
        H, W = self.q.shape[2:]
        return x if x.shape[2:] == (H, W) else empty(self.q, x.shape[1]).copy_(x[:, :, :H, :W])

    def tiles(self, x: Tensor) -> Tensor:  # (B, heads, M, N, channels, t, t)
        x = x.unflatten(3, (self.N, self.t)).unflatten(2, (self.M, self.t)).unflatten(1, (self.heads, -1))
        return x.permute(0, 1, 3, 5, 2, 4, 6)

    def flat(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[4], self.t**2)

    # Keys and values: channels are last, so that rows of windows are copied in runs of a · D numbers.

    def pad(self, x: Tensor) -> Tensor:
        """Pad (B, heads, D, H, W) with the halo and to whole blocks: (B, heads, Hp, Wp, D)."""
        reach = -(-self.a // self.block) - 1
        y = x.new_zeros(*x.shape[:2], (self.M + reach) * self.block, (self.N + reach) * self.block, x.shape[2])
        self.inside(y).copy_(x)
        return y

    def inside(self, x: Tensor) -> Tensor:
        h = self.halo
        return x[:, :, h : h + self.H, h : h + self.W].permute(0, 1, 4, 2, 3)

    def windows(self, x: Tensor) -> Tensor:  # (B, heads, M, N, a, a, D)
        return x.unfold(2, self.a, self.block).unfold(3, self.a, self.block).permute(0, 1, 2, 3, 5, 6, 4)

    def cells(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.a**2, x.shape[6])

    def add(self, windows: Tensor, x: Tensor, m: slice) -> None:
        """Add windows (n, a · a, D) to the padded map x that they were cut from, one block of each window at a time."""
        a, b, M, N = self.a, self.block, m.stop - m.start, self.N
        windows = windows.view(*x.shape[:2], M, N, a, a, -1).transpose(3, 4)
        for i, j in itertools.product(range(0, a, b), repeat=2):
            blocks = x[:, :, m.start * b + i : m.stop * b + i, j : j + N * b]
            blocks = blocks.unflatten(3, (N, b)).unflatten(2, (M, b))
            piece = windows[:, :, :, i : i + b, :, j : j + b]
            blocks[:, :, :, : piece.shape[3], :, : piece.shape[5]].add_(piece)

    # Logits.

    def attention(self, x: Tensor, k: Tensor, tables: list[Tensor]) -> Tensor:
        """Return the softmax over the cells, (n, a · a, t · t), for queries x (n, D, t · t) and keys (n, a · a, D)."""
        n, a, t = len(x), self.a, self.t
        x4, (of_rows, of_columns) = x.view(n, -1, t, t), tables
        rows = torch.einsum("ydi,ndyx->niyx", of_rows, x4).reshape(n, a, 1, t * t)
        columns = torch.einsum("xdj,ndyx->njyx", of_columns, x4).reshape(n, 1, a, t * t)
        p = self.logits[:n]
        torch.add(rows, columns, out=p.view(n, a, a, t * t))
        p.baddbmm_(k, x, alpha=self.scale)
        return torch.softmax(p, 1, out=p)

    def position_gradients(self, ds: Tensor, x: Tensor, tables: list[Tensor], dtables: list[Tensor]) -> Tensor:
        """Return the gradient of the queries through the position logits; add that of the tables to dtables."""
        n, a, t = len(x), self.a, self.t
        ds, x4, (of_rows, of_columns) = ds.view(n, a, a, t * t), x.view(n, -1, t, t), tables
        drows, dcolumns = ds.sum(2).view(n, a, t, t), ds.sum(1).view(n, a, t, t)
        dtables[0] += torch.einsum("niyx,ndyx->ydi", drows, x4)
        dtables[1] += torch.einsum("njyx,ndyx->xdj", dcolumns, x4)
        dx = torch.einsum("ydi,niyx->ndyx", of_rows, drows) + torch.einsum("xdj,njyx->ndyx", of_columns, dcolumns)
        return dx.reshape(x.shape)


def _slices(size: int, step: int) -> Iterator[slice]:
    return (slice(i, min(i + step, size)) for i in range(0, size, step))
