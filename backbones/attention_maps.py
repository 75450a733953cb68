"""What the attention of a model does with images, in one form for all families.

`model.attention_maps(images)` returns an `AttentionMap` or more for every layer with attention. Operators are fused and
store no weights: hooks record the input of each mixer, and the weights are recomputed from it, in float32 or wider.

A family contributes a function for each of its mixers, beside the mixer, which gets the mixer and its inputs:

    @describe.register(WindowAttention)
    def _(mixer: WindowAttention, x: Tensor) -> Iterator[AttentionMap]:
        yield window_map(mixer.qkv(x), mixer.heads, x.shape[1:3], (mixer.window, mixer.window))

Layers that are inserted into other networks are described too: `saccade.backbones.attention_maps(model, images)`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.precision import full

Size = tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionMap:
    """What one layer does, as a map over the cells of its input; see `map`.

    layer: the mixer's name in the model. kind: what the map shows, unique within the layer; `name` joins both.
    grid: (H, W), the cells of the map, which divide the image evenly. heads: number of heads, channels or subspaces.
    images: batch size. query_grid: (rows, columns) of the queries; None: the map depends on no query.
    """

    layer: str = ""
    kind: str
    grid: Size
    heads: int
    images: int
    query_grid: Size | None = None
    query_tokens: int = 0  # class tokens among the queries

    @property
    def name(self) -> str:
        return f"{self.layer}:{self.kind}"

    @property
    def has_query(self) -> bool:
        return self.query_grid is not None

    def map(self, query: Size | None = None, head: int | None = None, image: int = 0) -> Tensor:
        """Return the map (H, W) in float32, on the CPU.

        query: the (row, column) in `query_grid`; None for the class token, or for maps without a query. head: None for
        the mean over heads. Raises ValueError where one of them does not exist.
        """
        raise NotImplementedError

    def query_at(self, y: float, x: float, size: Size) -> Size:
        """Return the query that holds the point (y, x), in pixels from the corner, of an image of `size` (H, W)."""
        assert self.query_grid is not None
        (rows, columns), (height, width) = self.query_grid, size
        if not (0 <= y < height and 0 <= x < width):
            raise ValueError(f"the query must lie in the image of {width} x {height} pixels, got x={x:g}, y={y:g}")
        return int(y * rows / height), int(x * columns / width)

    def _check(self, head: int | None, image: int) -> None:
        if head is not None and not 0 <= head < self.heads:
            raise ValueError(f"head must be from 0 to {self.heads - 1} in {self.name}, got {head}")
        if not 0 <= image < self.images:
            raise ValueError(f"image must be from 0 to {self.images - 1}, got {image}")

    def _index(self, query: Size | None) -> int:
        """Return the index of a query among all, class tokens first."""
        assert self.query_grid is not None
        rows, columns = self.query_grid
        if query is None:
            if not self.query_tokens:
                raise ValueError(f"query must be a cell (row, column) of {rows} x {columns} for {self.name}, got None")
            return 0
        if not (0 <= query[0] < rows and 0 <= query[1] < columns):
            raise ValueError(f"query must be a cell (row, column) of {rows} x {columns} in {self.name}, got {query}")
        return self.query_tokens + query[0] * columns + query[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class QueryMap(AttentionMap):
    """The weights of each query for all keys.

    weights: indices (n,) of queries -> (B, heads, n, K). Keys are class tokens, then the cells of `frame`, row by row.
    frame: (rows, columns, top, left): the keys' grid, larger than `grid` where a layer pads its input, and where `grid`
    begins in it. None: the grid itself. Weights of padding are not part of a map.
    values: (B, heads, K, D), what the weights multiply in the layer, if anything.
    normalized: whether the weights of a query sum to 1.
    """

    weights: Callable[[Tensor], Tensor]
    tokens: int = 0  # class tokens among the keys
    frame: tuple[int, int, int, int] | None = None
    values: Tensor | None = None
    normalized: bool = True

    @property
    def num_queries(self) -> int:
        assert self.query_grid is not None
        return self.query_tokens + self.query_grid[0] * self.query_grid[1]

    @property
    def is_token_to_token(self) -> bool:
        """Whether queries and keys are the same tokens, with weights that sum to 1, as attention rollout needs."""
        return self.normalized and self.query_grid == self.grid and self.query_tokens == self.tokens

    def on_grid(self, weights: Tensor) -> Tensor:
        """Crop weights (…, K) to those of the map's own cells: (…, H, W)."""
        rows, columns, top, left = self.frame or (*self.grid, 0, 0)
        cells = weights[..., self.tokens :].unflatten(-1, (rows, columns))
        return cells[..., top : top + self.grid[0], left : left + self.grid[1]]

    @torch.no_grad()
    def map(self, query: Size | None = None, head: int | None = None, image: int = 0) -> Tensor:
        self._check(head, image)
        weights = self.weights(torch.tensor([self._index(query)]))[image, :, 0]
        return self.on_grid(weights.mean(0) if head is None else weights[head]).float().cpu()


@dataclass(frozen=True, eq=False, kw_only=True)
class GateMap(AttentionMap):
    """Gates that multiply the input: of channels, positions or both.

    gate: (B, G, H or 1, W or 1); a "head" is one of the G gates. magnitude: (B, G, H, W): the mean over gates is
    weighted by it, which makes a gate per channel a map: the share of the input that passes. None: the plain mean.
    """

    gate: Tensor
    magnitude: Tensor | None = None

    @torch.no_grad()
    def map(self, query: Size | None = None, head: int | None = None, image: int = 0) -> Tensor:
        self._check(head, image)
        gate = self.gate[image].to(full(self.gate))
        if head is not None:
            chosen = gate[head]
        elif self.magnitude is None:
            chosen = gate.mean(0)
        else:
            magnitude = self.magnitude[image].to(gate)
            chosen = (gate * magnitude).sum(0) / magnitude.sum(0).clamp_min(torch.finfo(gate.dtype).tiny)
        return chosen.expand(self.grid).float().cpu()


@dataclass(frozen=True, eq=False, kw_only=True)
class ChannelMap(AttentionMap):
    """Attention between the channels of each head: the map is the magnitude of what a head writes at each position.

    weights: (B, heads, D, D), of each output channel for the input channels; they sum to 1. values: (B, heads, N, D),
    which they mix at every position.
    """

    weights: Tensor
    values: Tensor

    @torch.no_grad()
    def map(self, query: Size | None = None, head: int | None = None, image: int = 0) -> Tensor:
        self._check(head, image)
        out = self.values[image] @ self.weights[image].to(self.values).mT  # (heads, N, D)
        norms = out.to(full(out)).square().mean(2).sqrt()
        return (norms.mean(0) if head is None else norms[head]).unflatten(0, self.grid).float().cpu()


@dataclass(frozen=True, eq=False, kw_only=True)
class SamplingMap(QueryMap):
    """The points that deformable attention samples, from several sources (cameras, or frames) with levels of maps.

    shapes: (H, W) of each level, of which `grid` is the first. Keys are the cells of all levels, source by source.
    points: (image, query index) -> a table of all samples, see `samples`.
    """

    sources: int
    shapes: Sequence[Size]
    points: Callable[[int, int], dict[str, Tensor]]

    @torch.no_grad()
    def samples(self, query: Size, image: int = 0) -> dict[str, Tensor]:
        """Return the samples of a query, one row each: `source`, `level` and `head` (n,) int64; `x`, `y` and, with
        depth, `z`, from 0 to 1 over the map and the depth range; `weight` (n,), the attention's, before depth."""
        self._check(None, image)
        return {name: column.cpu() for name, column in self.points(image, self._index(query)).items()}

    @torch.no_grad()
    def map(
        self,
        query: Size | None = None,
        head: int | None = None,
        image: int = 0,
        source: int | None = None,
        level: int = 0,
    ) -> Tensor:
        """Return the weight of every cell of a level, (H, W) of that level. source: None for the one with the most."""
        self._check(head, image)
        if not 0 <= level < len(self.shapes):
            raise ValueError(f"level must be from 0 to {len(self.shapes) - 1} in {self.name}, got {level}")
        if source is not None and not 0 <= source < self.sources:
            raise ValueError(f"source must be from 0 to {self.sources - 1} in {self.name}, got {source}")
        weights = self.weights(torch.tensor([self._index(query)]))[image, :, 0]
        weights = (weights.mean(0) if head is None else weights[head]).unflatten(0, (self.sources, -1))
        chosen = weights[int(weights.sum(1).argmax()) if source is None else source]
        start = sum(h * w for h, w in self.shapes[:level])
        height, width = self.shapes[level]
        return chosen[start : start + height * width].unflatten(0, (height, width)).float().cpu()


@singledispatch
def describe(mixer: nn.Module, *inputs: Any) -> Iterator[AttentionMap]:
    """Yield what a mixer does with its inputs; register a function for each class of mixers."""
    raise NotImplementedError(f"no attention is described of {type(mixer).__name__}")


def has_description(module: nn.Module) -> bool:
    return describe.dispatch(type(module)) is not describe.dispatch(object)


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Any, **options: Any) -> list[AttentionMap]:
    """Run a model on its inputs and return what each of its attention layers does with them, in the order they run.

    model: one of ours, or any that has layers of ours; it runs in evaluation mode, and keeps its mode. A model without
    such layers has an empty list.
    """
    described: dict[str, list[AttentionMap]] = {}

    def recorder(name: str) -> Callable:
        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:  # at once: a later layer may overwrite inputs
            described[name] = [replace(one, layer=name) for one in describe(module, *args, **kwargs)]

        return record

    modes = {module: module.training for module in model.modules()}
    mixers = {name: module for name, module in model.named_modules() if has_description(module)}
    hooks = [mixer.register_forward_pre_hook(recorder(name), with_kwargs=True) for name, mixer in mixers.items()]
    try:
        model.eval()(*inputs, **options)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return [one for ones in described.values() for one in ones]


class HasAttentionMaps:
    """A model with `attention_maps`."""

    @torch.jit.ignore
    def attention_maps(self, *inputs: Any, **options: Any) -> list[AttentionMap]:
        """Return what each attention layer does with the inputs of `forward`: see saccade.backbones.attention_maps."""
        return attention_maps(self, *inputs, **options)  # type: ignore[arg-type]


# Parts that several families share.


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed map (B, H, W, 3C) or tokens (B, N, 3C) into q, k and v, (B, heads, N, D) each."""
    B, C3 = qkv.shape[0], qkv.shape[-1]
    q, k, v = qkv.reshape(B, -1, 3, heads, C3 // 3 // heads).permute(2, 0, 3, 1, 4)
    return q, k, v


def softmax_map(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Size,
    scale: float | None = None,
    bias: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> QueryMap:
    """Describe softmax(scale · q kᵀ + bias) v, with q (B, heads, N, D) and k, v (B, heads, K, ·).

    bias: indices (n,) of queries -> what is added to their logits, broadcast to (B, heads, n, K); -inf for keys that a
    query does not see. options: further fields of QueryMap.
    """
    wide = full(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    def weights(index: Tensor) -> Tensor:
        index = index.to(q.device)
        logits = scale * q[:, :, index].to(wide) @ k.to(wide).mT
        if bias is not None:
            logits = logits + bias(index).to(wide)
        return logits.softmax(-1)

    fields = dict(grid=grid, query_grid=grid, heads=q.shape[1], images=q.shape[0], values=v) | options
    return QueryMap(kind=kind, weights=weights, **fields)  # type: ignore[arg-type]


def hidden_unless(seen: Tensor) -> Tensor:
    """Return 0 where `seen`, else -inf: a bias that hides keys."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)


def window_map(
    qkv: Tensor,
    heads: int,
    grid: Size,
    window: Size,
    shift: Size = (0, 0),
    bias: Tensor | None = None,
    kind: str = "window",
) -> QueryMap:
    """Describe attention within windows of a padded map: qkv (B, rows, columns, 3C), whose sides windows divide.

    grid: the map without padding. shift: how far the windows are shifted (Swin). bias: (heads, 2h-1, 2w-1).
    """
    (rows, columns), (h, w) = qkv.shape[1:3], window
    q, k, v = split_heads(qkv, heads)
    y, x = (torch.arange(n, device=qkv.device) for n in (rows, columns))
    y, x = (y - shift[0]) % rows, (x - shift[1]) % columns  # where the roll by -shift takes each row and column
    cell = (y // h)[:, None] * (columns // w) + x // w
    cell = 4 * cell + 2 * (y >= rows - shift[0])[:, None] + (x >= columns - shift[1])  # and its side of the seam
    y, x = (y % h)[:, None].expand(rows, columns), (x % w).expand(rows, columns)

    def added(index: Tensor) -> Tensor:
        of = index // grid[1] * columns + index % grid[1]  # in the padded map
        seen = hidden_unless(cell.flatten()[of, None] == cell.flatten())
        if bias is None:
            return seen
        dy = (y.flatten()[of, None] - y.flatten() + h - 1).clamp(0, 2 * h - 2)
        dx = (x.flatten()[of, None] - x.flatten() + w - 1).clamp(0, 2 * w - 2)
        return bias[:, dy, dx] + seen

    q = q.unflatten(2, (rows, columns))[:, :, : grid[0], : grid[1]].flatten(2, 3)
    return softmax_map(kind, q, k, v, grid, bias=added, frame=(rows, columns, 0, 0))
