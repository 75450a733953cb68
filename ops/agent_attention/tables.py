"""The factors of the biases, and the pooling of agents: small linear maps that all implementations share.

They are products with constant matrices: PyTorch's own resizing and adaptive pooling sum with atomics on a GPU, which
makes their gradients nondeterministic, and they copy a map that is a view of a packed one.
"""

import torch
from torch import Tensor

from ..dispatch import use_definition
from ..precision import no_autocast

Factors = tuple[Tensor, Tensor, Tensor]


class Product(torch.autograd.Function):
    """constant @ x. Autocast affects neither it nor its gradient."""

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
    """Return the (length, size) matrix of linear interpolation from size points to length points."""
    # (x + ½) size / length − ½ in integers: exactly the identity if the sizes are equal.
    x = torch.arange(length, device=like.device).unsqueeze(1)
    s = (((2 * x + 1) * size - length).to(like.dtype) / (2 * length)).clamp(0, size - 1)
    return (1 - (s - torch.arange(size, device=like.device)).abs()).clamp(min=0)


def pooling(length: int, bins: int, like: Tensor) -> Tensor:
    """Return (bins, length): means over floor(i·length / bins) … ceil((i + 1)·length / bins) − 1, at least float32."""
    i = torch.arange(bins, device=like.device).unsqueeze(1)
    x = torch.arange(length, device=like.device)
    start, end = i * length // bins, ((i + 1) * length + bins - 1) // bins
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return ((x >= start) & (x < end)).to(dtype) / (end - start)


def along_rows(factors: Factors) -> Tensor:
    """Return block resized along y plus the rows' bias, (heads, a, h, S). The interpolation along x may come after this
    sum, since its weights sum to one."""
    block, rows, _ = factors
    return product(resizing(rows.shape[2], block.shape[2], block), block) + rows.unsqueeze(3)


def whole(factors: Factors) -> Tensor:
    """Return the whole bias, (heads, a, h·w), shared by the batch."""
    columns = factors[2]
    along = resizing(columns.shape[2], factors[0].shape[3], columns)
    return (product(along, along_rows(factors).transpose(-2, -1)).transpose(-2, -1) + columns.unsqueeze(2)).flatten(2)


def for_kernels(factors: Factors, token: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the tables that the kernels read, in float32 with the agents innermost: `along_rows` (heads, h, S, a),
    columns (heads, w, a), and the class token's bias (heads, a). At most 7 (h + w) / (h·w) of the bias' size."""
    factors = (factors[0].float(), factors[1].float(), factors[2].float())
    rows = along_rows(factors).permute(0, 2, 3, 1).contiguous()
    return rows, factors[2].transpose(-2, -1).contiguous(), None if token is None else token.float().contiguous()


def root(a: int) -> int:
    """Return the smallest p with p·p >= a; in integer arithmetic, which torch.compile and torch.jit can trace."""
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
    """Resize a map of `source` pixels, (B, [1 +] h·w, C), bilinearly to (B, *size, C), without its class token."""
    x = x[:, x.shape[1] - source[0] * source[1] :].unflatten(1, source)
    rows, columns = (resizing(to, of, x) for to, of in zip(size, source))
    return product(columns, product(rows, x.flatten(2)).unflatten(2, x.shape[2:]))
