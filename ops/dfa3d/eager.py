"""Fast PyTorch implementation: `embedding_bag` sums weighted rows without gathering them first.

Its table is value, (B · S · M, C), below a first row of zeros. Corners outside the map point to that row, so that a NaN
at the edge affects only queries that sample it. The L · P samples of one query and head are one bag per corner. depth
has its own table, with an additional zero bin at both ends.

In the backward pass, the gradient of value has one bag per cell. The samples are sorted by their upper left cell, with
one stable sort for all four corners, which are then added one cell apart. Products with rows of value need these
gathered: this is done for a tile of queries at a time, so that the rows and the dozen numbers per sample that are
computed from the locations stay in cache.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import definition_gradients, wants_definition_gradients
from ..precision import no_autocast
from . import reference

TILE = 1 << 15  # samples per tile, which fit in cache
GROUP = 1 << 22  # most samples sorted at a time (28 bytes each), in whole images


def dfa3d(
    value: Tensor, depth: Tensor | None, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """See saccade.ops.dfa3d, which checks the arguments."""
    return DeformAttn.apply(value, depth, shapes, locations, weights)


class DeformAttn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        depth: Tensor | None,
        shapes: list[tuple[int, int]],
        locations: Tensor,
        weights: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(value, depth, locations, weights)
        ctx.shapes = shapes
        B, Q, M, _, _ = weights.shape
        C = value.shape[3]
        samples = Samples(value, depth, shapes, locations, weights)
        out = value.new_empty(B * Q, M * C)
        for rows in samples.tiles(0, B * Q):
            tile = Tile(samples, rows)
            total = None
            for corner in range(4):
                row, w, *score = tile.corner(corner)
                w = w.mul_(tile.a).mul_(score[0]) if score else w.mul_(tile.a)
                bags = F.embedding_bag(
                    row.view(-1, samples.LP), samples.value, per_sample_weights=w.view(-1, samples.LP), mode="sum"
                )
                total = bags if total is None else total.add_(bags)
            out[rows] = total.view(-1, M * C)
        return out.view(B, Q, M * C)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        value, depth, locations, weights = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if wants_definition_gradients(dout):

            def f(value: Tensor, depth: Tensor | None, locations: Tensor, weights: Tensor) -> Tensor:
                with no_autocast(value):
                    return reference.dfa3d(value, depth, ctx.shapes, locations, weights)

            tensors = value, depth, locations, weights
            dvalue, ddepth, *rest = definition_gradients(f, tensors, (*needed[:2], *needed[3:]), dout)
            return dvalue, ddepth, None, *rest
        with no_autocast(dout):  # autocast may be on in the backward pass
            dvalue, ddepth, *rest = _backward(dout, value, depth, ctx.shapes, locations, weights, needed[0])
        return dvalue, ddepth, None, *rest


class Samples:
    """The tables of rows, and what all queries share: vectors over the K = M · L · P samples of a query."""

    def __init__(self, value: Tensor, depth: Tensor | None, shapes, locations: Tensor, weights: Tensor):
        B, self.S, self.M, C = value.shape
        self.Q, L, P = weights.shape[1], *weights.shape[3:]
        self.LP, self.K = L * P, self.M * L * P
        self.full = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
        self.locations, self.weights = locations.reshape(-1, self.K, locations.shape[5]), weights.reshape(-1, self.K)

        sizes = torch.tensor(shapes, device=value.device)  # (L, 2)
        head = torch.arange(self.M, device=value.device)[:, None]

        def columns(t: Tensor) -> Tensor:  # t must broadcast to (M, L)
            return t.expand(self.M, L).repeat_interleave(P, 1).flatten()

        def start(t: Tensor) -> Tensor:
            return t.cumsum(0) - t

        self.H, self.W = map(columns, sizes.unbind(1))
        self.height, self.width = self.H.to(self.full), self.W.to(self.full)
        self.first = columns(start(sizes.prod(1)) * self.M + head) + 1  # after the row of zeros
        # The upper left cell of a sample starts at (-1, -1): one more per axis than the map has cells.
        self.first_key = columns(start((sizes + 1).prod(1)) * self.M + head)
        self.keys = int((sizes + 1).prod(1).sum()) * self.M

        self.value = value.new_zeros(1 + B * self.S * self.M, C, dtype=self.full)
        self.value[1:].view(value.shape).copy_(value)
        self.depth = None
        if depth is not None:
            self.Md, self.D = depth.shape[2:]
            self.depth = value.new_zeros(1 + B * self.S * self.Md, self.D + 2, dtype=self.full)
            self.depth[1:, 1:-1].unflatten(0, depth.shape[:3]).copy_(depth)
            self.first_depth = columns(start(sizes.prod(1)) * self.Md + head % self.Md) + 1

    def tiles(self, start: int, stop: int) -> list[slice]:
        """Return slices of the B · Q rows from start to stop."""
        step = max(1, TILE // self.K)
        return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]


class Tile:
    """The samples of R rows, (R, K): weight a, cell and fractions. `dead` samples, too far outside or NaN, have weight
    0 and all corners outside."""

    def __init__(self, samples: Samples, rows: slice):
        self.all = s = samples
        loc = s.locations[rows]
        x = (loc[..., 0].to(s.full) * s.width).sub_(0.5)
        y = (loc[..., 1].to(s.full) * s.height).sub_(0.5)
        alive = ((x > -1) & (x < s.width)).logical_and_(y > -1).logical_and_(y < s.height)
        if s.depth is not None:
            z = (loc[..., 2].to(s.full) * s.D).sub_(0.5)
            alive.logical_and_(z > -1).logical_and_(z < s.D)
        self.dead = ~alive
        if s.depth is not None:
            z0 = z.masked_fill_(self.dead, 0).floor()
            self.fz, self.bin = z.sub_(z0), z0.long().add_(1)  # after the zero bin
        self.a = s.weights[rows].to(s.full).masked_fill(self.dead, 0)
        x0, y0 = x.masked_fill_(self.dead, -1).floor(), y.masked_fill_(self.dead, -1).floor()
        self.fx, self.fy = x.sub_(x0), y.sub_(y0)
        self.hats = (1 - self.fx, self.fx), (1 - self.fy, self.fy)
        self.x0, self.y0 = x0.long(), y0.long()
        self.inside = (
            (self.x0 >= 0, self.x0 + 1 < s.W),
            ((self.y0 >= 0).logical_and_(alive), (self.y0 + 1 < s.H).logical_and_(alive)),
        )
        self.image = torch.arange(rows.start, rows.stop, device=loc.device).div(s.Q, rounding_mode="floor")[:, None]
        self.cell = (self.y0 * s.W).add_(self.x0).add_(self.image * s.S)

    def corner(self, k: int) -> tuple[Tensor, ...]:
        """Return row of value and bilinear weight; with depth also its score, the lower bin's index and both bins."""
        s, dy, dx = self.all, k // 2, k % 2
        inside = self.inside[0][dx] & self.inside[1][dy]
        cell = self.cell + s.W if dy else self.cell
        cell = cell + dx if dx else cell
        row = (cell * s.M).add_(s.first).mul_(inside)
        hat = self.hats[0][dx] * self.hats[1][dy]
        if s.depth is None:
            return row, hat
        at = (cell * s.Md).add_(s.first_depth).mul_(inside).mul_(s.D + 2).add_(self.bin)
        flat = s.depth.view(-1)
        near, far = (flat.index_select(0, (at + d).view(-1)).view_as(hat) for d in range(2))
        return row, hat, torch.lerp(near, far, self.fz), at, near, far

    def key(self, first: int) -> Tensor:
        """Return the index of upper left cell and head, counted from image `first`; -1 if dead."""
        s = self.all
        key = (self.y0 + 1).mul_(s.W + 1).add_(self.x0 + 1).mul_(s.M).add_(s.first_key)
        return key.add_((self.image - first) * s.keys).masked_fill_(self.dead, -1)


def _backward(dout: Tensor, value: Tensor, depth: Tensor | None, shapes, locations, weights, with_value: bool):
    B, Q, M, _, _ = weights.shape
    C = value.shape[3]
    s = Samples(value, depth, shapes, locations, weights)
    dout = dout.reshape(B * Q * M, C).to(s.full)
    dlocations, dweights = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (locations, weights))
    dloc, dw = dlocations.view(B * Q, s.K, -1), dweights.view(B * Q, s.K)
    dvalue = value.new_zeros(value.shape, dtype=s.full) if with_value else None
    if s.depth is not None:
        ddepth = torch.zeros_like(s.depth)
        bins = ddepth.view(-1)
    images = max(1, GROUP // (Q * s.K))
    for first in range(0, B, images):
        start, stop = first * Q, min(first + images, B) * Q
        if with_value:
            keys = torch.empty(stop - start, s.K, dtype=torch.int64, device=value.device)
            parts = dout.new_empty(4, stop - start, s.K)
        for rows in s.tiles(start, stop):
            tile = Tile(s, rows)
            own = slice(rows.start - start, rows.stop - start)
            if with_value:
                keys[own] = tile.key(first)
            G = dout[rows.start * M : rows.stop * M, None]  # (R · M, 1, C)
            u, dz = [], 0
            for corner in range(4):
                row, hat, *score = tile.corner(corner)
                t = (G @ s.value.index_select(0, row.view(-1)).view(-1, s.LP, C).mT).view_as(hat)
                part = hat.mul_(tile.a)
                if score:
                    g, at, near, far = score
                    dg = part * t
                    dz = far.sub_(near).mul_(dg).add_(dz)
                    upper = tile.fz * dg
                    bins.index_add_(0, at.view(-1), dg.sub_(upper).view(-1))
                    bins.index_add_(0, at.view(-1).add_(1), upper.view(-1))
                    part.mul_(g)
                    t.mul_(g)
                u.append(t)
                if with_value:
                    parts[corner, own] = part
            upper, lower = torch.lerp(u[0], u[1], tile.fx), torch.lerp(u[2], u[3], tile.fx)
            dw[rows] = torch.lerp(upper, lower, tile.fy)
            dloc[rows, :, 0] = torch.lerp(u[1].sub_(u[0]), u[3].sub_(u[2]), tile.fy).mul_(tile.a).mul_(s.width)
            dloc[rows, :, 1] = lower.sub_(upper).mul_(tile.a).mul_(s.height)
            if s.depth is not None:
                dloc[rows, :, 2] = dz.mul_(s.D)
        if with_value:
            _scatter(
                dvalue[first : first + images], keys.view(-1), parts.flatten(1), dout[start * M : stop * M], s, shapes
            )
    return (
        dvalue.to(value.dtype) if with_value else None,
        None if depth is None else ddepth[1:, 1:-1].reshape(depth.shape).to(depth.dtype),
        dlocations,
        dweights,
    )


def _scatter(dvalue: Tensor, keys: Tensor, parts: Tensor, dout: Tensor, s: Samples, shapes) -> None:
    """Add the rows of dout, times parts (4, n), to dvalue (B, S, M, C) at the four corners of their keys' cells."""
    B, _, M, C = dvalue.shape
    counts = torch.bincount(keys + 1, minlength=1 + B * s.keys)  # dead samples first
    order = keys.sort(stable=True)[1][int(counts[0]) :]
    counts[0] = 0
    bag, starts = order.div(s.LP, rounding_mode="floor"), counts.cumsum(0)
    for corner, part in enumerate(parts):
        dy, dx = corner // 2, corner % 2
        rows = F.embedding_bag(
            bag, dout, starts, per_sample_weights=part[order], mode="sum", include_last_offset=True
        ).view(B, -1, M * C)
        at = key = 0
        for H, W in shapes:
            block = rows[:, key : key + (H + 1) * (W + 1)].view(B, H + 1, W + 1, M * C)
            dvalue[:, at : at + H * W].view(B, H, W, M * C).add_(block[:, 1 - dy : 1 - dy + H, 1 - dx : 1 - dx + W])
            at, key = at + H * W, key + (H + 1) * (W + 1)
