"""The budget rejects every planted fault and accepts every machine."""

import functools

import pytest
import torch
from saccade.ops.agent_attention.reference import agent_attention
from saccade.ops.bilevel_routing.reference import bilevel_routing_attention
from saccade.ops.channel_attention.reference import channel_attention
from saccade.ops.dfa3d.reference import dfa3d
from saccade.ops.gaussian_gate.reference import gaussian_gate
from saccade.ops.halo_attention.reference import halo_attention
from saccade.ops.relative_bias import buckets
from saccade.ops.sparse_attention.reference import sparse_attention
from saccade.ops.spatial_gate.reference import spatial_gate
from saccade.ops.strip_gate.reference import strip_gate
from saccade.ops.subspace_gate.reference import subspace_gate
from saccade.ops.window_attention.reference import window_attention
from support import budget
from support.ops import check, evaluate, rand
from torch.utils._python_dispatch import TorchDispatchMode

MASK = torch.tensor([0b1011, 0b111, 0b1110, 0b1101], dtype=torch.int32).view(1, 1, 4, 1)
ROUTES = torch.tensor([[[0, 1, 2], [1, 3, 0], [2, 0, 1], [3, 2, 1]]])


def window(qkv, bias, scale=0.5):
    return window_attention(qkv, 1, (2, 3), (1, 1), bias, None, scale)


def halo(q, kv, rows, columns, scale=0.5):
    return halo_attention(q, kv, rows, columns, 1, 2, 1, 1, scale)


def agent(q, k, v, agents, block, rows, columns, scale=0.5):
    factors = block, rows, columns
    return agent_attention(q, k, v, agents, factors, factors, 1, scale=scale)


def sparse(qkv, mask=MASK, scale=0.5):
    return sparse_attention(qkv, mask, 1, scale)


def bilevel(qkv, idx=ROUTES, scale=0.5):
    return bilevel_routing_attention(qkv, idx, 1, (2, 2), scale)


def channel(qkv, scale=0.5):
    return channel_attention(qkv, 2, scale)


def relative(qkv, table, scale=0.5):
    size = qkv.shape[1], qkv.shape[2]
    return window_attention(qkv, 1, size, bias=table[:, buckets(*size, qkv.device)], scale=scale)


def deform(value, depth, locations, weights, scale=1.0):
    return dfa3d(value, depth, [(2, 3)], locations, scale * weights)


def strip(x, weight, norm_weight, norm_bias, scale=1.0):
    return strip_gate(x, weight, norm_weight, scale * norm_bias, 2)


def gaussian(x, weight, norm_weight, norm_bias, scale=1.0):
    return gaussian_gate(x, weight, scale * norm_weight, norm_bias, training=True)


def spatial(x, weight, norm_weight, norm_bias, scale=1.0):
    return spatial_gate(x, scale * weight, norm_weight, norm_bias, training=True)


def subspace(x, weight, bias, norm_weight, norm_bias, point, point_bias, point_norm, point_norm_bias, scale=1.0):
    parameters = weight, bias, norm_weight, norm_bias, point, point_bias, scale * point_norm, point_norm_bias
    return subspace_gate(x, *parameters, training=True)


def tensors(*shapes):
    return [rand(shape, seed=i) for i, shape in enumerate(shapes)]


CASES = {
    window: tensors((1, 3, 4, 3, 8), (1, 3, 5)),
    halo: tensors((1, 8, 4, 3), (1, 16, 4, 3), (7, 8), (7, 8)),
    agent: tensors((1, 6, 8), (1, 6, 8), (1, 6, 8), (1, 3, 8), (1, 3, 3, 3), (1, 3, 2), (1, 3, 3)),
    sparse: tensors((1, 4, 24)),
    bilevel: tensors((1, 4, 4, 24)),
    channel: tensors((2, 9, 24)),
    relative: tensors((1, 3, 3, 3, 8), (1, 81)),
    deform: [
        *tensors((1, 6, 2, 4), (1, 6, 1, 3)),
        0.5 + rand((1, 5, 2, 1, 3, 3), seed=2) / 4,
        rand((1, 5, 2, 1, 3), seed=3),
    ],
    strip: tensors((2, 8, 4, 5), (8, 1, 3), (8,), (8,)),
    gaussian: tensors((4, 6, 3, 4), (6, 6, 2), (6,), (6,)),
    spatial: tensors((3, 6, 3, 4), (6,), (6,), (6,)),
    subspace: tensors((2, 6, 4, 4), (6,), (6,), (6,), (6,), (6,), (2,), (2,), (2,)),
}
EVERY = pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__)


def rejects(f, fault) -> None:
    check(f, f, *CASES[f])
    with pytest.raises(AssertionError, match=r"error .*, budget"):
        check(fault, f, *CASES[f])


@EVERY
def test_a_scale_wrong_by_a_thousandth(f):
    scale = f.__defaults__[-1]
    rejects(f, functools.partial(f, scale=1.001 * scale))


@EVERY
def test_an_output_wrong_by_a_ten_thousandth(f):
    rejects(f, lambda *args: 1.0001 * f(*args))


def test_a_dropped_key():
    rejects(sparse, functools.partial(sparse, mask=MASK & 0b0111))
    rejects(bilevel, functools.partial(bilevel, idx=ROUTES[..., :-1]))
    rejects(relative, lambda qkv, table: relative(qkv, table.clone().index_fill(1, torch.tensor([43]), -1e4)))
    rejects(window, lambda qkv, bias: window(qkv, bias.clone().index_fill(2, torch.tensor([4]), -1e4)))
    rejects(agent, lambda q, k, v, *rest: agent(q, *(torch.cat((t[:, :5], t[:, :1]), 1) for t in (k, v)), *rest))
    rejects(halo, lambda q, kv, *rest: halo(q, kv * (torch.arange(3) < 2), *rest))
    rejects(channel, lambda qkv: channel(qkv * (torch.arange(9) > 0)[:, None]))
    rejects(deform, lambda value, depth, loc, w: deform(value, depth, loc, w * (torch.arange(3) > 0)))


def test_a_bias_off_by_one():
    rejects(window, lambda qkv, bias: window(qkv, bias.roll(1, 2)))
    rejects(relative, lambda qkv, table: relative(qkv, table.roll(1, 1)))
    rejects(halo, lambda q, kv, rows, columns: halo(q, kv, rows.roll(1, 0), columns))
    rejects(agent, lambda *args: agent(*args[:-1], args[-1].roll(1, 2)))
    rejects(strip, lambda *args: strip(*args[:-1], args[-1].roll(1, 0)))
    rejects(spatial, lambda *args: spatial(*args[:-1], args[-1].roll(1, 0)))


class BFloat16Accumulators(TorchDispatchMode):
    """Round every product of matrices and every sum to bfloat16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func.overloadpacket in budget.PRODUCTS | budget.SUMS | {torch.ops.aten.convolution}:
            out.copy_(out.bfloat16())
        return out


@EVERY
def test_an_accumulator_in_bfloat16(f):
    def fault(*args):
        with BFloat16Accumulators():
            return f(*args)

    rejects(f, fault)


@EVERY
def test_a_wrong_gradient(f):
    def fault(x, *args):
        return f(x.detach() + 1.001 * (x - x.detach()), *args)

    rejects(f, fault)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@EVERY
def test_other_machines_are_accepted(f, dtype):
    """Machines that round elsewhere than those the budget was made from."""
    args = [t.to(dtype) for t in CASES[f]]
    exact = evaluate(f, [t.double() for t in args])
    samples = budget.simulate(lambda mode: evaluate(f, args, mode=mode))
    for seed in range(100, 103):
        ours = evaluate(f, args, mode=budget.Rounding(seed))
        budget.assert_within(ours, exact, samples, exact, torch.finfo(dtype).eps / 2)
