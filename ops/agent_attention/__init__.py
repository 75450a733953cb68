"""Agent attention (arXiv 2312.08874): a few agent tokens attend to all keys, and every query attends to the agents."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import is_compiled, is_exporting, use_definition, use_triton
from ..precision import no_autocast
from . import eager, reference, tables
from .eager import Inputs
from .tables import Factors

__all__ = ["agent_attention", "pool_agents", "resize_agent_bias"]

MAX_HEAD_DIM = 64  # that the kernels support


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    key_bias: Factors,
    query_bias: Factors,
    heads: int,
    token_bias: tuple[Tensor, Tensor] | None = None,
    dwc_weight: Tensor | None = None,
    dwc_bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q Aᵀ + B2) softmax(scale · A kᵀ + B1) v per head, A the agents, plus a depthwise convolution.

    q           (B, N, C), k and v (B, M, C): tokens, row-major over a map; head j has channels j·D to (j+1)·D. The
                kernels read views of packed projections in place if their last axis has stride 1, else they copy.
    agents      (B, a, C), usually `pool_agents` of q.
    key_bias    (block, rows, columns): the factors of B1, in any floating-point dtype. block (heads, a, S, S) is
                resized bilinearly to the h x w map of the keys, rows are (heads, a, h), columns (heads, a, w); M = h·w.
    query_bias  the factors of B2, for the map of the queries. It is another map where keys come from a smaller one.
    heads       the number of heads, which divides C.
    token_bias  the class token's entries of B1 and B2, each (heads, a), if a class token precedes both maps
                (N = 1 + h·w, and likewise M).
    dwc_weight  (C, 1, 3, 3) and dwc_bias (C,): a depthwise convolution of v with zero padding 1, added to the output.
                The class token takes no part in it. Values of a smaller map are resized bilinearly first.
    scale       factor of the logits; D ** -0.5 if None.

    Returns (B, N, C), contiguous. All tensors get gradients, and these are deterministic. The kernels compute softmaxes
    and sums in float32; autocast has no effect. A NaN in a query affects only its row of the output; one in an agent,
    key or value affects its whole image.
    """
    if torch.jit.is_scripting():
        return reference.agent_attention(
            q, k, v, agents, key_bias, query_bias, heads, token_bias, dwc_weight, dwc_bias, scale
        )
    else:
        inputs = Inputs(q, k, v, agents, key_bias, query_bias, heads, token_bias, dwc_weight, dwc_bias)
        _check(inputs)
        parameters = _parameters(inputs)
        if q.numel() == 0:  # an empty result that depends on every input, for autograd
            total: Any = sum(x.sum() for x in (k, v, agents, *parameters))
            return q + total.to(q.dtype)
        D = q.shape[2] // heads
        scale = D**-0.5 if scale is None else scale
        cannot = [f"a head dimension of {D}, over {MAX_HEAD_DIM}"] if D > MAX_HEAD_DIM else []
        one_size = dwc_weight is None or _size(key_bias) == _size(query_bias)
        if not one_size:
            inputs = inputs._replace(dwc_weight=None, dwc_bias=None)
        with no_autocast(q):
            if use_triton(q, *parameters, cannot=cannot):
                out = _triton(inputs, scale)
            elif use_definition(q) and not is_exporting() and not (is_compiled() and q.device.type == "cpu"):
                out = reference.agent_attention(*inputs, scale)
            else:
                out = eager.agent_attention(inputs, scale)
            if dwc_weight is None or one_size:
                return out
            x = tables.resize(v, _size(key_bias), _size(query_bias)).permute(0, 3, 1, 2)
            conv = reference.convolve(x, dwc_weight, dwc_bias).flatten(2).transpose(1, 2)
            return out + F.pad(conv, (0, 0, out.shape[1] - conv.shape[1], 0))


def _parameters(inputs: Inputs) -> list[Tensor]:
    *_, key_bias, query_bias, _, token_bias, dwc_weight, dwc_bias = inputs
    return [x for x in (*key_bias, *query_bias, *(token_bias or ()), dwc_weight, dwc_bias) if x is not None]


def _size(bias: Factors) -> tuple[int, int]:
    return bias[1].shape[2], bias[2].shape[2]


def _triton(inputs: Inputs, scale: float) -> Tensor:
    from . import op  # imports Triton, so not at the top of the file

    q, k, v, agents, key_bias, query_bias, heads, token_bias, dwc_weight, dwc_bias = inputs
    key_token, query_token = token_bias or (None, None)
    b1, b2 = tables.for_kernels(key_bias, key_token), tables.for_kernels(query_bias, query_token)
    return op.fwd(q, k, v, agents, *b1, *b2, dwc_weight, dwc_bias, heads, scale)[0]


def pool_agents(q: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pool the agents from a map of queries, by adaptive average pooling: bins overlap where the grid does not divide.

    q     (B, h, w, C); a view of packed projections is not copied.
    grid  (p_h, p_w).

    Returns (B, p_h·p_w, C), row-major over the grid. The gradient is deterministic.
    """
    if not torch.jit.is_scripting():
        if q.dim() != 4 or not q.dtype.is_floating_point:
            raise ValueError(f"q must be floating point of shape (B, h, w, C), got {q.dtype} of shape {tuple(q.shape)}")
        if grid[0] < 1 or grid[1] < 1:
            raise ValueError(f"grid must be at least 1 x 1, got {grid[0]} x {grid[1]}")
        with no_autocast(q):
            return tables.pool_agents(q, grid)
    return tables.pool_agents(q, grid)


def resize_agent_bias(factors: Factors, size: tuple[int, int], grid: tuple[int, int]) -> Factors:
    """Resize the factors of a bias to another map and another grid of agents.

    The bias is linear in its factors, so resizing them is the same as resizing the bias: bilinearly over the map, and
    its agents bilinearly over their grid.

    factors  (block, rows, columns) as in agent_attention, for a = p·p agents.
    size     (h, w) of the new map.
    grid     (p_h, p_w) of the new agents.

    Returns the new (block, rows, columns).
    """
    if not torch.jit.is_scripting():
        _check_factors("factors", factors, factors[0].shape[0], factors[0].shape[1])
        if tables.root(factors[0].shape[1]) ** 2 != factors[0].shape[1]:
            raise ValueError(f"factors must have a square number of agents, got {factors[0].shape[1]}")
        if any(n < 1 for n in (*size, *grid)):  # min would compare symbolic sizes with each other
            raise ValueError(f"size and grid must be at least 1 x 1, got {size} and {grid}")
        with no_autocast(factors[0]):
            return tables.resize_agent_bias(factors, size, grid)
    return tables.resize_agent_bias(factors, size, grid)


def _check_factors(name: str, factors: Factors, heads: int, a: int) -> None:
    if len(factors) != 3 or any(not x.dtype.is_floating_point for x in factors):
        raise ValueError(f"{name} must be three floating-point tensors: block, rows and columns")
    block, rows, columns = factors
    if (
        block.dim() != 4
        or block.shape[:2] != (heads, a)
        or block.shape[2] != block.shape[3]
        or any(x.dim() != 3 or x.shape[:2] != (heads, a) for x in (rows, columns))
    ):
        raise ValueError(
            f"{name} must be block ({heads}, {a}, S, S), rows ({heads}, {a}, h) and columns ({heads}, {a}, w), "
            f"got {', '.join(str(tuple(x.shape)) for x in factors)}"
        )


def _check(inputs: Inputs) -> None:
    q, k, v, agents, key_bias, query_bias, heads, token_bias, dwc_weight, dwc_bias = inputs
    if q.dim() != 3 or not q.dtype.is_floating_point:
        raise ValueError(f"q must be floating point of shape (B, N, C), got {q.dtype} of shape {tuple(q.shape)}")
    B, _, C = q.shape
    if heads < 1 or C % heads:
        raise ValueError(f"heads must divide the C = {C} channels of q, got {heads}")
    for name, x in (("k", k), ("v", v), ("agents", agents)):
        if x.dim() != 3 or x.shape[0] != B or x.shape[2] != C:
            raise ValueError(f"{name} must be ({B}, tokens, {C}) to match q, got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} as q is, got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v must be {tuple(k.shape)} as k is, got {tuple(v.shape)}")
    a = agents.shape[1]
    if a < 1:
        raise ValueError("agents must have at least one token, got none")
    T = 0 if token_bias is None else 1
    for name, bias, of, x in (("key_bias", key_bias, "k", k), ("query_bias", query_bias, "q", q)):
        _check_factors(name, bias, heads, a)
        h, w = _size(bias)
        if x.shape[1] != T + h * w:
            raise ValueError(
                f"{name} must fit the {x.shape[1]} tokens of {of}{', the first a class token' if T else ''}, "
                f"got a bias for a map of {h} x {w}"
            )
    if q.numel() and not k.numel():
        raise ValueError("k must have tokens if q has, got none")
    if token_bias is not None and (len(token_bias) != 2 or any(x.shape != (heads, a) for x in token_bias)):
        raise ValueError(
            f"token_bias must be two tensors of shape ({heads}, {a}), got {[tuple(x.shape) for x in token_bias]}"
        )
    if dwc_weight is None:
        if dwc_bias is not None:
            raise ValueError("dwc_bias must be None if dwc_weight is None, got a tensor")
    elif dwc_weight.shape != (C, 1, 3, 3):
        raise ValueError(f"dwc_weight must be ({C}, 1, 3, 3), got {tuple(dwc_weight.shape)}")
    if dwc_bias is not None and dwc_bias.shape != (C,):
        raise ValueError(f"dwc_bias must be ({C},), got {tuple(dwc_bias.shape)}")
    named: list[tuple[str, Tensor | None]]
    named = [("k", k), ("v", v), ("agents", agents), ("dwc_weight", dwc_weight), ("dwc_bias", dwc_bias)]
    named += [(name, x) for name, xs in (("key_bias", key_bias), ("query_bias", query_bias)) for x in xs]
    named += [("token_bias", x) for x in token_bias or ()]
    for name, x in named:  # type: ignore[assignment]
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {x.device}")
        if x is not None and not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
