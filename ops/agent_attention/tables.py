"""The small factors of the biases, and the agents: linear maps with few outputs, the same PyTorch in every form.

All of them are products with matrices made of sizes alone: PyTorch's own resizing and adaptive pooling sum with atomics
on a GPU, so that their gradients change from run to run, and copy a map that is a view of a packed one.
"""

import torch
from torch import Tensor

from ..dispatch import use_definition
from ..precision import no_autocast

Factors = tuple[Tensor, Tensor, Tensor]


class Product(torch.autograd.Function):
    """constant @ x, whose gradient is computed without autocast too."""

    @staticmethod
    def forward(ctx, constant: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(constant)
        return constant @ x

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor]:
        (constant,) = ctx.saved_tensors
        with no_autocast(dy):
            return None, constant.mT @ dy


def product(constant: Tensor, x: Tensor) -> Tensor:
    if torch.jit.is_scripting():
        return constant @ x
    else:
        return constant @ x if use_definition(x) else Product.apply(constant, x)


def resizing(length: int, size: int, like: Tensor) -> Tensor:
    """(length, size): bilinear interpolation from size points to length points, of which each reads two."""
    # (x + ½) size / length − ½ in whole numbers: exactly the identity where the sizes are equal.
    x = torch.arange(length, device=like.device).unsqueeze(1)
    s = (((2 * x + 1) * size - length).to(like.dtype) / (2 * length)).clamp(0, size - 1)
    return (1 - (s - torch.arange(size, device=like.device)).abs()).clamp(min=0)


def pooling(length: int, bins: int, like: Tensor) -> Tensor:
    """(bins, length): the mean over floor(i·length / bins) … ceil((i + 1)·length / bins) − 1, in float32 at least."""
    i = torch.arange(bins, device=like.device).unsqueeze(1)
    x = torch.arange(length, device=like.device)
    start, end = i * length // bins, ((i + 1) * length + bins - 1) // bins
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return ((x >= start) & (x < end)).to(dtype) / (end - start)


def along_rows(factors: Factors) -> Tensor:
    """(heads, a, h, S): block resized along y, and the row's bias: the weights along x sum to one, so it fits in."""
    block, rows, _ = factors
    return product(resizing(rows.shape[2], block.shape[2], block), block) + rows.unsqueeze(3)


def whole(factors: Factors) -> Tensor:
    """(heads, a, h·w): the bias itself, shared by the batch."""
    columns = factors[2]
    along = resizing(columns.shape[2], factors[0].shape[3], columns)
    return (product(along, along_rows(factors).transpose(-2, -1)).transpose(-2, -1) + columns.unsqueeze(2)).flatten(2)


def for_kernels(factors: Factors, token: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the kernels look them up, in float32 and with the agents side by side: `along_rows` (heads, h, S, a), columns
    (heads, w, a), and the class token's (heads, a). Small: 7 (h + w) / (h·w) of the bias itself or less."""
    factors = (factors[0].float(), factors[1].float(), factors[2].float())
    rows = along_rows(factors).permute(0, 2, 3, 1).contiguous()
    return rows, factors[2].transpose(-2, -1).contiguous(), None if token is None else token.float().contiguous()


def root(a: int) -> int:
    """The smallest p with p·p >= a; in whole numbers, which torch.compile and torch.jit follow."""
    p = 1
    while p * p < a:
        p += 1
    return p


def resize_agent_bias(factors: Factors, size: tuple[int, int], grid: tuple[int, int]) -> Factors:
    """See saccade.ops.resize_agent_bias, which checks the arguments."""
    block, rows, columns = factors
    rows = product(resizing(size[0], rows.shape[2], rows), rows.transpose(-2, -1)).transpose(-2, -1)
    columns = product(resizing(size[1], columns.shape[2], columns), columns.transpose(-2, -1)).transpose(-2, -1)
    block_of = _agents_resized(block.flatten(2), grid).unflatten(2, (block.shape[2], block.shape[3]))
    return block_of, _agents_resized(rows, grid), _agents_resized(columns, grid)


def _agents_resized(table: Tensor, grid: tuple[int, int]) -> Tensor:  # (heads, p·p, n) -> (heads, p_h·p_w, n)
    heads, a, n = table.shape
    p = root(a)
    t = product(resizing(grid[0], p, table), table.reshape(heads, p, p * n))  # (heads, p_h, p·n)
    return product(resizing(grid[1], p, table), t.view(heads, grid[0], p, n)).flatten(1, 2)


def pool_agents(q: Tensor, grid: tuple[int, int]) -> Tensor:
    """See saccade.ops.pool_agents, which checks the arguments."""
    h, w = q.shape[1], q.shape[2]
    weight = pooling(h, grid[0], q)[:, None, :, None] * pooling(w, grid[1], q)[:, None]  # (p_h, p_w, h, w)
    return product(weight.reshape(grid[0] * grid[1], h * w).to(q.dtype), q.flatten(1, 2))


def resize(x: Tensor, source: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(B, [1 +] h·w, C) of a map of `source` bilinearly to (B, *size, C), without a class token."""
    x = x[:, x.shape[1] - source[0] * source[1] :].unflatten(1, source)
    rows, columns = (resizing(to, of, x) for to, of in zip(size, source))
    return product(columns, product(rows, x.flatten(2)).unflatten(2, x.shape[2:]))
