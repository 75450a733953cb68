"""Every operator as a function of batched tensors and parameters: for tests of tracers, exporters and transforms."""

from collections.abc import Callable, Sequence

import torch
from saccade.ops import (
    agent_attention,
    bilevel_routing_attention,
    channel_attention,
    connectivity,
    dfa3d,
    gaussian_gate,
    halo_attention,
    ms_deform_attn,
    neighborhood_attention,
    pool_agents,
    predict_mask,
    region_routing,
    relative_bias_attention,
    sparse_attention,
    spatial_gate,
    strip_gate,
    subspace_gate,
    window_attention,
)
from torch import Tensor, nn


class Call(nn.Module):
    """An operator: forward(*inputs) takes tensors of these shapes after a batch; it has parameters and constants."""

    def __init__(
        self,
        f: Callable[..., Tensor],
        shapes: list[tuple[int, ...]],
        others: list[Tensor],
        constants: Sequence[Tensor] = (),
    ):
        super().__init__()
        self.f, self.shapes = f, shapes
        self.others = nn.ParameterList(nn.Parameter(x) for x in others)
        for i, x in enumerate(constants):
            self.register_buffer(f"constant{i}", x)

    def inputs(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(seed)
        return tuple(torch.rand(batch, *s, generator=g).mul(2).sub(0.8).to(self.dtype) for s in self.shapes)

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.others), self.kind)

    kind = torch.float32

    def to_dtype(self, dtype: torch.dtype) -> "Call":
        self.kind = dtype
        return self.to(dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.f(*inputs, *self.others, *self.buffers())


def _sparse(qkv: Tensor, *predictor: Tensor) -> Tensor:
    q, k, _ = qkv.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return sparse_attention(qkv, predict_mask(q, k, *predictor, budget=9, topk=3), 2)


def _bilevel(qkv: Tensor) -> Tensor:
    return bilevel_routing_attention(qkv, region_routing(qkv, (2, 2), 2), 2, (2, 3))


def _agent(q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
    agents = pool_agents(q.unflatten(1, (4, 3)), (2, 2))
    return agent_attention(q, k, v, agents, tables[:3], tables[3:6], 2, None, tables[6], tables[7])


def build(name: str) -> Call:
    g = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g) - 0.4

    def norm(n: int) -> list[Tensor]:  # weight, bias
        return [rand(n) + 1, rand(n)]

    def running(*sizes: int) -> list[Tensor]:
        return [x for n in sizes for x in (rand(n), rand(n) + 1)]

    predictor = [rand(3, 4), rand(3), rand(3, 4), rand(3), rand(35, 5), rand(35, 5)]
    tables = [rand(2, 4, 3, 3), rand(2, 4, 4), rand(2, 4, 3)] * 2
    if name == "strip_gate":
        return Call(lambda x, *p: strip_gate(x, *p, 2), [(4, 5, 6)], [rand(4, 2, 3), *norm(4)])
    if name == "subspace_gate":
        params = [rand(4), rand(4), *norm(4), rand(4), rand(2), *norm(2)]
        return Call(subspace_gate, [(4, 5, 6)], params, running(4, 2))
    if name == "spatial_gate":
        return Call(spatial_gate, [(3, 5, 6)], [rand(3), *norm(3)], running(3))
    if name == "gaussian_gate":
        params = [rand(3, 3, 2), *norm(3), *norm(3)]
        return Call(gaussian_gate, [(3, 5, 6)], params, running(3, 3))
    if name == "channel_attention":
        return Call(lambda x: channel_attention(x, 2), [(7, 24)], [])
    if name == "window_attention":
        return Call(
            lambda x, b, p: window_attention(x, 2, (4, 3), (2, 1), b, p), [(5, 7, 3, 8)], [rand(2, 7, 5), rand(3, 8)]
        )
    if name == "relative_bias_attention":
        return Call(lambda x, t: relative_bias_attention(x, 2, t), [(3, 4, 3, 8)], [rand(2, 81)])
    if name == "halo_attention":
        return Call(
            lambda q, kv, *t: halo_attention(q, kv, *t, 2, 2, 1), [(8, 5, 4), (20, 5, 4)], [rand(7, 4), rand(7, 4)]
        )
    if name == "neighborhood_attention":
        return Call(lambda x, b: neighborhood_attention(x, 2, (3, 2), b, (1, 2)), [(4, 5, 3, 8)], [rand(2, 5, 3)])
    if name == "bilevel_routing_attention":
        return Call(_bilevel, [(4, 6, 24)], [])
    if name == "sparse_attention":
        return Call(_sparse, [(35, 24)], predictor)
    if name == "connectivity":
        return Call(lambda q, k, *p: connectivity(q, k, *p, topk=3), [(2, 35, 4), (2, 35, 4)], predictor)
    if name == "agent_attention":
        return Call(_agent, [(12, 8)] * 3, [*tables, rand(8, 1, 3, 3), rand(8)])
    if name == "dfa3d":
        f = lambda *x: dfa3d(*x[:2], [(3, 4), (2, 2)], *x[2:])  # noqa: E731
        return Call(f, [(16, 2, 3), (16, 1, 5), (6, 2, 2, 2, 3), (6, 2, 2, 2)], [])
    if name == "ms_deform_attn":
        f = lambda *x: ms_deform_attn(x[0], [(3, 4), (2, 2)], *x[1:])  # noqa: E731
        return Call(f, [(16, 2, 3), (6, 2, 2, 2, 2), (6, 2, 2, 2)], [])
    raise KeyError(name)


OPERATORS = [
    "agent_attention",
    "bilevel_routing_attention",
    "channel_attention",
    "connectivity",
    "dfa3d",
    "gaussian_gate",
    "halo_attention",
    "ms_deform_attn",
    "neighborhood_attention",
    "relative_bias_attention",
    "sparse_attention",
    "spatial_gate",
    "strip_gate",
    "subspace_gate",
    "window_attention",
]
