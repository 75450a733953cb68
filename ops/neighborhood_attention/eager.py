"""Fast implementations in plain PyTorch, for devices and modes without Triton.

Both split the residue classes of the map into tiles of queries and gather for each tile the rectangle of keys that is
the union of its windows: with k = 7 and tiles of 4 x 4, each key is copied 6 times and not 49. Pairs in the rectangle
that are in no window are masked.

`neighborhood_attention` runs on CPUs. Tiles with equal window offsets form a kind and share one mask and bias. A few
tiles are processed at a time, so that they and their logits stay in the cache; the backward pass recomputes the logits.
Gathered tokens are (tokens, tiles, C), so (tile, head) is one batch axis of stride D for the matrix products. Where a
class has as many members as the kernel (DiNAT's dilated layers at 224 pixels), it is one tile with nothing masked.

`definition` uses out-of-place PyTorch operators only, for graphs and transforms.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ..dispatch import at_most, definition_gradients, is_compiled, wants_definition_gradients
from ..precision import full, no_autocast

# Queries per tile along an axis: for classes of at least LONG members, and for shorter ones, where the overhead of more
# kinds of tiles would outweigh the fewer masked pairs.
LONG, TILES = 20, (4, 7)
# Size of the tiles processed at a time: of their queries, keys and values, or of their logits if larger.
CHUNK_BYTES = 2 << 20


def neighborhood_attention(
    qkv: Tensor,
    heads: int,
    kernel: tuple[int, int],
    bias: Tensor | None = None,
    dilation: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    scale: float | None = None,
) -> Tensor:
    """Run on a CPU; saccade.ops.neighborhood_attention documents and checks the arguments."""
    if is_compiled():
        return plain(
            qkv, bias, heads, kernel, dilation, stride, (qkv.shape[4] // heads) ** -0.5 if scale is None else scale
        )
    return NeighborhoodAttention.apply(qkv, heads, kernel, bias, dilation, stride, scale)


class NeighborhoodAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        heads: int,
        kernel: tuple[int, int],
        bias: Tensor | None,
        dilation: tuple[int, int],
        stride: tuple[int, int],
        scale: float | None,
    ) -> Tensor:
        ctx.save_for_backward(qkv, bias)
        ctx.scale = (qkv.shape[4] // heads) ** -0.5 if scale is None else scale
        ctx.rest = heads, tuple(kernel), tuple(dilation), tuple(stride)
        return finite_forward(qkv, bias, ctx.rest, ctx.scale)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        if wants_definition_gradients(dout):
            dqkv, dbias = definition_gradients(
                partial(definition, rest=ctx.rest, scale=ctx.scale), (qkv, bias), needed, dout
            )
        else:
            dqkv, dbias = finite_backward(dout, qkv, bias, needed[1], ctx.rest, ctx.scale)
        return dqkv, None, None, dbias, None, None, None


# A masked NaN or infinity times the probability 0 is NaN: results that are not finite are computed by exact tiles.


def finite_forward(qkv: Tensor, bias: Tensor | None, rest: tuple, scale: float) -> Tensor:
    with no_autocast(qkv):
        out = forward(qkv, bias, Tiles.of(qkv, *rest), scale)
        return out if all_finite(out) else forward(qkv, bias, Tiles.of(qkv, *rest, exact=True), scale)


def finite_backward(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, of_bias: bool, rest: tuple, scale: float
) -> tuple[Tensor, Tensor | None]:
    with no_autocast(qkv):
        grads = backward(dout, qkv, bias, of_bias, Tiles.of(qkv, *rest), scale)
        if not all_finite(grads[0]):
            grads = backward(dout, qkv, bias, of_bias, Tiles.of(qkv, *rest, exact=True), scale)
        return grads


def all_finite(x: Tensor) -> bool:
    return bool(x.sum(dtype=full(x)).isfinite())


def forward(qkv: Tensor, bias: Tensor | None, run: "Tiles", scale: float) -> Tensor:
    B, H, W, _, C = qkv.shape
    out, masks = qkv.new_empty(B, H * W, C), [kind.mask(bias, run.dtype) for kind in run.kinds]
    tokens = qkv.contiguous().view(B, H * W * 3, C)
    for images in run.images:
        x, o = tokens[images].flatten(0, 1), run.buffer(out[images])
        for part in run.parts:
            (q,), (k, v) = run.read(x, part.q), run.read(x, part.kv)
            p = run.probabilities(q, k, masks[part.kind], scale)
            o.index_copy_(0, part.out.flatten(), run.rows(torch.bmm(p.mT, v)))
        run.store(o, out[images])
    return out.view(B, H, W, C)


def backward(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, of_bias: bool, run: "Tiles", scale: float
) -> tuple[Tensor, Tensor | None]:
    B, H, W, _, C = qkv.shape
    dqkv, masks = qkv.new_empty(B, H * W * 3, C), [kind.mask(bias, run.dtype) for kind in run.kinds]
    tokens, douts = qkv.contiguous().view(B, H * W * 3, C), dout.contiguous().view(B, H * W, C)
    dlogits: list[Any] = [0] * len(run.kinds)  # summed over the tiles of a kind, keys by queries
    for images in run.images:
        x, dy, dx = tokens[images].flatten(0, 1), douts[images].flatten(0, 1), run.buffer(dqkv[images])
        dx.zero_()
        for part in run.parts:
            (q,), (k, v), (do,) = run.read(x, part.q), run.read(x, part.kv), run.read(dy, part.out)
            p = run.probabilities(q, k, masks[part.kind], scale)
            dv = torch.bmm(p, do)
            ds = torch.bmm(v, do.mT).mul_(p)
            ds.addcmul_(p, ds.sum(1, keepdim=True), value=-1)
            dx.index_copy_(0, part.q.flatten(), run.rows(torch.bmm(ds.mT, k)).mul_(scale))
            dx.index_add_(0, part.kv[0].flatten(), run.rows(torch.bmm(ds, q)), alpha=scale)
            dx.index_add_(0, part.kv[1].flatten(), run.rows(dv))
            if of_bias:
                dlogits[part.kind] = dlogits[part.kind] + ds.unflatten(0, (-1, run.heads)).sum(0)
        run.store(dx, dqkv[images])
    dbias = None
    if of_bias and bias is not None:
        dbias = sum(kind.of_bias(ds) for kind, ds in zip(run.kinds, dlogits)).to(bias.dtype)
    return dqkv.view(qkv.shape), dbias


# One node in the graphs of torch.compile, which would take ten times as long to compile the definition.


@custom_op("saccade::neighborhood_attention_plain", mutates_args=())
def plain(
    qkv: Tensor,
    bias: Tensor | None,
    heads: int,
    kernel: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    scale: float,
) -> Tensor:
    return finite_forward(qkv, bias, (heads, tuple(kernel), tuple(dilation), tuple(stride)), scale)


@plain.register_fake
def _(qkv, *rest):
    B, H, W, _, C = qkv.shape
    return qkv.new_empty(B, H, W, C)


@custom_op("saccade::neighborhood_attention_plain_bwd", mutates_args=())
def plain_bwd(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    heads: int,
    kernel: Sequence[int],
    dilation: Sequence[int],
    stride: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    rest = heads, tuple(kernel), tuple(dilation), tuple(stride)
    dqkv, dbias = finite_backward(dout, qkv, bias, bias is not None, rest, scale)
    return dqkv, qkv.new_empty(0) if dbias is None else dbias


@plain_bwd.register_fake
def _(dout, qkv, bias, *rest):
    return qkv.new_empty(qkv.shape), qkv.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.rest = inputs[2:]


def _backward(ctx, dout):
    dqkv, dbias = plain_bwd(dout, *ctx.saved_tensors, *ctx.rest)
    return dqkv, None if ctx.saved_tensors[1] is None else dbias, *[None] * 5


plain.register_autograd(_backward, setup_context=_save)


class Line(NamedTuple):
    """Tiles of one kind along an axis: T queries each, and the U keys in the union of their windows."""

    k: int
    low: int  # distance from the first query to the first key, in steps of the dilation
    masked: Tensor  # (T, U)
    queries: Tensor  # (tiles, T) positions
    keys: Tensor  # (tiles, U)


def lines(L: int, k: int, d: int, s: int, exact: bool) -> list[Line]:
    """Return all kinds of tiles along an axis (names as in reference.py). If exact, no pair in a tile is masked."""
    kinds: dict[tuple, list[tuple[int, int]]] = {}
    for g in range(d):
        n = -(-(L - g) // d)
        tiles = 1 if n == k else n if exact else -(-n // TILES[n < LONG])
        T = -(-n // tiles)
        for q in range(0, n, T):
            first = [min(max(i // s * s + s // 2 - k // 2, 0), n - k) - q for i in range(q, min(q + T, n))]
            kinds.setdefault(tuple(first), []).append((g, q))
    result = []
    for first, where in kinds.items():
        low, T, U = first[0], len(first), first[-1] + k - first[0]
        start, key = torch.tensor(first)[:, None], low + torch.arange(U)
        origin = torch.tensor([g + d * q for g, q in where])[:, None]
        seen = (key >= start) & (key < start + k)
        result.append(Line(k, low, ~seen, origin + d * torch.arange(T), origin + d * key))
    return result


class Kind(NamedTuple):
    """Tiles of one kind on the map."""

    y: Line
    x: Line

    def mask(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return the bias and the mask of a tile's logits, (1 or heads, keys, queries), or None."""
        masked = (self.y.masked.mT[:, None, :, None] | self.x.masked.mT[:, None]).flatten(2, 3).flatten(0, 1)
        if bias is not None:
            z = toeplitz(bias.to(dtype), self.x)  # (heads, 2 kh - 1, Tx, Ux)
            z = toeplitz(z.movedim(1, 3), self.y)  # (heads, Tx, Ux, Ty, Uy)
            mask = z.permute(0, 4, 2, 3, 1).flatten(3, 4).flatten(1, 2)
        elif masked.any():
            mask = torch.zeros(1, *masked.shape, dtype=dtype)
        else:
            return None
        return mask.masked_fill_(masked, float("-inf"))

    def of_bias(self, ds: Tensor) -> Tensor:
        """Return the gradient of the table, given that of the logits (heads, keys, queries)."""
        (Ty, Uy), (Tx, Ux) = self.y.masked.shape, self.x.masked.shape
        ds = ds.view(-1, Uy, Ux, Ty, Tx).permute(0, 2, 4, 3, 1)
        ds = diagonals(ds, self.y.low, self.y.k).permute(0, 3, 2, 1)  # (heads, 2 kh - 1, Tx, Ux)
        return diagonals(ds, self.x.low, self.x.k)


def toeplitz(table: Tensor, line: Line) -> Tensor:
    """Expand a table (..., 2k-1) to (..., T, U): the entries for the distances of keys and queries."""
    T, U = line.masked.shape
    first = line.low - T + line.k  # the entry of the last query and the first key
    return F.pad(table, (-first, first + T + U - 2 * line.k)).unfold(-1, U, 1).flip(-2)


def diagonals(ds: Tensor, low: int, k: int) -> Tensor:
    """Sum ds (..., T, U) over the pairs at each distance low + j - i of key j and query i: (..., 2k-1)."""
    T, U = ds.shape[-2:]
    ds = F.pad(ds.flip(-2), (0, T)).flatten(-2)[..., : T * (U + T - 1)]  # reading rows as one shorter shifts each
    ds, first = ds.unflatten(-1, (T, U + T - 1)).sum(-2), low - T + k
    return F.pad(ds, (first, 2 * k - T - U - first))


def definition(qkv: Tensor, bias: Tensor | None, rest: tuple, scale: float | None) -> Tensor:
    """Compute the operator in the dtype of qkv; rest: heads, kernel, dilation and stride."""
    heads, kernel, dilation, stride = rest
    with no_autocast(qkv):
        bias = None if bias is None else bias.to(qkv.dtype)
        return tiled(qkv, heads, kernel, bias, dilation, stride, scale)


def tiled(
    qkv: Tensor,
    heads: int,
    kernel: tuple[int, int],
    bias: Tensor | None,
    dilation: tuple[int, int],
    stride: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Run on maps of any size, also in traced graphs. All tiles have one size; the last ones repeat queries."""
    B, H, W, _, C = qkv.shape
    D = C // heads
    rows, key_rows, dy, seen_y, of_row = axis(H, kernel[0], dilation[0], stride[0], qkv)
    columns, key_columns, dx, seen_x, of_column = axis(W, kernel[1], dilation[1], stride[1], qkv)
    M, T, U = dy.shape
    N, S, V = dx.shape
    q = qkv[:, :, :, 0].index_select(1, rows).index_select(2, columns)
    q = q.reshape(B, M, T, N, S, heads, D).permute(0, 1, 3, 5, 2, 4, 6).reshape(B, M, N, heads, T * S, D)
    kv = qkv[:, :, :, 1:].index_select(1, key_rows).index_select(2, key_columns)
    kv = kv.reshape(B, M, U, N, V, 2, heads, D).permute(5, 0, 1, 3, 6, 2, 4, 7).reshape(2, B, M, N, heads, U * V, D)
    k, v = kv[0], kv[1]
    logits = q @ k.transpose(-2, -1) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        z = bias[:, dy[:, None, :, None, :, None], dx[None, :, None, :, None, :]]  # (heads, M, N, T, S, U, V)
        logits = logits + z.permute(1, 2, 0, 3, 4, 5, 6).reshape(M, N, heads, T * S, U * V)
    seen = seen_y[:, None, :, None, :, None] & seen_x[None, :, None, :, None, :]
    logits = logits.masked_fill(~seen.reshape(M, N, 1, T * S, U * V), float("-inf"))
    out = (logits.softmax(-1) @ v).reshape(B, M, N, heads, T, S, D).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(B, M * T, N * S, C).index_select(1, of_row).index_select(2, of_column)


def axis(L: int, k: int, d: int, s: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return for all tiles along an axis: positions of queries (tiles · T) and of keys (tiles · U); for their pairs
    (tiles, T, U) the index in the table and whether the query sees the key; for each position its query."""
    longest = (L + d - 1) // d  # members of the first class
    T = at_most(longest, 7)
    U = at_most(longest, 6 + k + s - 1)
    tiles = (longest + T - 1) // T
    g = torch.arange(d, device=like.device).view(d, 1, 1)
    n = (L - g + d - 1) // d
    i = torch.minimum(torch.arange(tiles * T, device=like.device).view(1, tiles, T), n - 1)
    first = torch.minimum((i // s * s + s // 2 - k // 2).clamp(min=0), n - k)
    keys = first[:, :, 0].unsqueeze(2) + torch.arange(U, device=like.device)
    queries, cells = g + d * i, g + d * torch.minimum(keys, n - 1)
    seen = (keys[:, :, None] >= first[..., None]) & (keys[:, :, None] < first[..., None] + k)
    entry = (keys[:, :, None] - i[..., None] + k - 1).clamp(0, 2 * k - 2)
    x = torch.arange(L, device=like.device)
    of_position = x % d * (tiles * T) + x // d
    return queries.flatten(), cells.flatten(), entry.flatten(0, 1), seen.flatten(0, 1), of_position


class Part(NamedTuple):
    """Some tiles of one kind. Tensors are row indices: into maps (H, W, 3, C) for q and kv, (H, W, C) for out."""

    kind: int
    q: Tensor  # (1, T², tiles)
    kv: Tensor  # (2, U², tiles)
    out: Tensor  # (1, T², tiles)


class Tiles:
    """The tiles of a few images. The indices take about 100 bytes per token."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        heads: int,
        kernel: tuple[int, int],
        dilation: tuple[int, int],
        stride: tuple[int, int],
        exact: bool,
        chunk_bytes: int,
    ):
        B, H, W, _, C = shape
        self.heads, self.dtype = heads, dtype
        n = max(1, chunk_bytes // (H * W * 3 * C * dtype.itemsize))
        n = next(m for m in range(min(n, B), 0, -1) if B % m == 0)
        self.images = [slice(b, b + n) for b in range(0, B, n)]
        axes = [lines(*given, exact) for given in zip((H, W), kernel, dilation, stride)]
        self.kinds = [Kind(y, x) for y, x in itertools.product(*axes)]
        self.parts = list(self._parts(n, H, W, C, chunk_bytes))

    @staticmethod
    @functools.lru_cache(maxsize=64)
    def cached(*args) -> "Tiles":
        return Tiles(*args)

    @staticmethod
    def of(qkv: Tensor, heads: int, kernel, dilation, stride, exact: bool = False) -> "Tiles":
        return Tiles.cached(qkv.shape, full(qkv), heads, kernel, dilation, stride, exact, CHUNK_BYTES)

    def _parts(self, n: int, H: int, W: int, C: int, chunk_bytes: int) -> Iterator[Part]:
        image = torch.arange(n)[:, None] * H * W
        for i, (y, x) in enumerate(self.kinds):

            def tokens(rows: Tensor, columns: Tensor) -> Tensor:  # (tokens of a tile, tiles)
                places = rows[:, None, :, None] * W + columns[None, :, None, :]  # (tiles, tiles, rows, columns)
                return (image + places.permute(2, 3, 0, 1).flatten(2).flatten(0, 1)[:, None]).flatten(1)

            q, k = tokens(y.queries, x.queries), tokens(y.keys, x.keys)
            at_once = len(k) * max(3 * C, self.heads * len(q)) * self.dtype.itemsize
            chunks = (z.split(max(1, chunk_bytes // at_once), 1) for z in (q, k))
            for own, seen in zip(*chunks):
                yield Part(i, 3 * own[None], torch.stack((3 * seen + 1, 3 * seen + 2)), own[None])

    def read(self, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        """Gather rows (T, tokens, tiles) of x as T tensors (tiles · heads, tokens, D)."""
        x = x.index_select(0, rows.flatten()).to(self.dtype).view(*rows.shape, self.heads, -1)
        return x.flatten(2, 3).transpose(1, 2).unbind(0)

    def buffer(self, x: Tensor) -> Tensor:
        """Return where to compute x (images, rows, C): a view if it has the dtype of the sums, else a new tensor."""
        return x.view(-1, x.shape[2]) if x.dtype == self.dtype else x.new_empty(x.shape, dtype=self.dtype).flatten(0, 1)

    def store(self, rows: Tensor, x: Tensor) -> None:
        if x.dtype != self.dtype:
            x.copy_(rows.view(x.shape))

    def rows(self, x: Tensor) -> Tensor:
        """(tiles · heads, tokens, D) -> (tokens · tiles, C)"""
        return x.transpose(0, 1).reshape(-1, self.heads * x.shape[2])

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Return probabilities (.., keys, queries): in this order the softmax vectorizes over the queries."""
        if mask is None:
            p = torch.bmm(k, q.mT).mul_(scale)
        else:
            p = k.new_empty(len(k) // len(mask), *mask.shape).copy_(mask).flatten(0, 1)
            p.baddbmm_(k, q.mT, alpha=scale)
        return torch.softmax(p, 1, out=p)
