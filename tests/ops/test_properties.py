"""Properties of every public operator on random arguments: legal ones give what the reference gives, illegal ones are
refused by name."""

import importlib
import inspect
import zlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from saccade import ops
from support import calls
from support.levels import exhaustive
from support.ops import check, forced, rand
from torch import Tensor

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FEW, MANY = 3, 200


def reference(folder: str, name: str | None = None):
    """Return the definition of an operator."""
    return getattr(importlib.import_module(f"saccade.ops.{folder}.reference"), name or folder)


class Case:
    """Draws the arguments of one call: tensors of a dtype whose memory layout is drawn too, and numbers."""

    def __init__(self, draw, dtype: torch.dtype):
        self.draw, self.dtype, self.count = draw, dtype, 0
        self.batch = self.number(0, 2)

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def tensor(self, *shape: int) -> Tensor:
        """Return a tensor that is contiguous, a part of a larger one, or transposed in memory."""
        self.count += 1
        layout = self.draw(st.sampled_from(["contiguous", "part", "transposed"]))
        if layout == "part":
            return rand((*shape[:-1], shape[-1] + 3), self.dtype, self.count)[..., 1 : shape[-1] + 1]
        if layout == "transposed" and len(shape) > 2:
            x = rand((shape[0], shape[2], shape[1], *shape[3:]), self.dtype, self.count)
            return x.transpose(1, 2)
        return rand(shape, self.dtype, self.count)

    def norm(self, size: int) -> list[Tensor]:
        return [1 + 0.1 * self.tensor(size), 0.1 * self.tensor(size)]

    def attention(self, least: int = 1) -> tuple[int, int, int, int]:
        """Return height, width, heads and channels of a map."""
        heads = self.number(1, 3)
        return self.number(least, 6), self.number(least, 6), heads, heads * self.number(1, 9)


def with_running(case: Case, name: str, *sizes: int):
    """Return a gate and its reference with running statistics of these sizes, which get no gradients."""
    values = [x for n in sizes for x in (0.1 * case.tensor(n), 1 + 0.1 * case.tensor(n).abs())]

    def bind(f):
        return lambda x, *rest: f(x, *rest, *(value.to(x.dtype) for value in values))

    return bind(getattr(ops, name)), bind(reference(name))


def _window(case: Case):
    H, W, heads, C = case.attention()
    window = case.number(1, 4), case.number(1, 4)
    shift = case.number(0, window[0] - 1), case.number(0, window[1] - 1)
    with_bias = case.number(0, 1)
    bias = case.tensor(heads, 2 * window[0] - 1, 2 * window[1] - 1) if with_bias else None
    pad = case.tensor(3, C) if case.number(0, 1) else None
    arguments = [case.tensor(case.batch, H, W, 3, C), heads, window, shift, bias, pad]
    return ops.window_attention, reference("window_attention"), arguments


def _channel(case: Case):
    H, W, heads, C = case.attention()
    shape = (case.batch, H * W, 3 * C) if case.number(0, 1) else (case.batch, H, W, 3 * C)
    return ops.channel_attention, reference("channel_attention"), [case.tensor(*shape), heads]


def _neighborhood(case: Case):
    _, _, heads, C = case.attention()
    kernel, dilation = (case.number(1, 4), case.number(1, 4)), (case.number(1, 2), case.number(1, 2))
    stride = case.number(1, kernel[0]), case.number(1, kernel[1])
    H, W = (k * d + case.number(0, 4) for k, d in zip(kernel, dilation))
    bias = case.tensor(heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1) if stride == (1, 1) and case.number(0, 1) else None
    arguments = [case.tensor(case.batch, H, W, 3, C), heads, kernel, bias, dilation, stride]
    return ops.neighborhood_attention, reference("neighborhood_attention"), arguments


def _halo(case: Case):
    heads, D, block, halo = case.number(1, 2), case.number(1, 8), case.number(1, 4), case.number(0, 2)
    H, W = block * case.number(1, 3), block * case.number(1, 2)
    a = block + 2 * halo
    arguments = [case.tensor(case.batch, heads * D, H, W), case.tensor(case.batch, heads * (D + 4), H, W)]
    arguments += [case.tensor(2 * a - 1, D), case.tensor(2 * a - 1, D), heads, block, halo]
    return ops.halo_attention, reference("halo_attention"), arguments


def _bilevel(case: Case):
    _, _, heads, C = case.attention()
    regions = case.number(1, 3), case.number(1, 3)
    P = regions[0] * regions[1]
    K = case.number(1, P)
    H, W = regions[0] * case.number(1, 3), regions[1] * case.number(1, 3)
    generator = torch.Generator().manual_seed(case.number(0, 99))
    shape = (case.batch, P)
    idx = torch.rand(*shape, P, generator=generator).argsort(-1)[..., :K]
    arguments = [case.tensor(case.batch, H, W, 3 * C), idx, heads, regions, 0.3]
    return ops.bilevel_routing_attention, reference("bilevel_routing", "bilevel_routing_attention"), arguments


def _deform(case: Case):
    heads, C, L, P, Q = case.number(1, 2), case.number(1, 5), case.number(1, 2), case.number(1, 3), case.number(1, 4)
    shapes = [(case.number(1, 4), case.number(1, 4)) for _ in range(L)]
    S = sum(h * w for h, w in shapes)
    value, weights = case.tensor(case.batch, S, heads, C), case.tensor(case.batch, Q, heads, L, P)
    depth = case.tensor(case.batch, S, 1, case.number(1, 4))
    locations = case.tensor(case.batch, Q, heads, L, P, 3)
    return ops.dfa3d, reference("dfa3d"), [value, depth, shapes, locations, weights]


def _ms_deform(case: Case):
    _, _, (value, _, shapes, locations, weights) = _deform(case)
    locations = locations[..., :2]
    return (
        ops.ms_deform_attn,
        lambda value, shapes, *rest: reference("dfa3d")(value, None, shapes, *rest),
        [value, shapes, locations, weights],
    )


def _strip(case: Case):
    groups = case.number(1, 2)
    C, K = groups * case.number(1, 4), case.number(0, 2) * 2 + 1
    x = case.tensor(case.batch, C, case.number(2, 6), case.number(2, 6))
    arguments = [x, case.tensor(C, 1, K), *case.norm(C), groups]
    return ops.strip_gate, reference("strip_gate"), arguments


def _spatial(case: Case):
    C = case.number(1, 5)
    x = case.tensor(case.batch, C, case.number(1, 6), case.number(1, 6))
    return *with_running(case, "spatial_gate", C), [x, case.tensor(C), *case.norm(C)]


def _gaussian(case: Case):
    C = case.number(1, 4)
    x = case.tensor(case.batch, C, case.number(2, 6), case.number(1, 6))
    return *with_running(case, "gaussian_gate", C, C), [x, case.tensor(C, C, 2), *case.norm(C), *case.norm(C)]


def _subspace(case: Case):
    groups = case.number(1, 2)
    C = groups * case.number(1, 3)
    x = case.tensor(case.batch, C, case.number(1, 5), case.number(1, 5))
    arguments = [x, case.tensor(C), case.tensor(C), *case.norm(C), case.tensor(C), case.tensor(groups)]
    return *with_running(case, "subspace_gate", C, groups), [*arguments, *case.norm(groups)]


def _agent(case: Case):
    h, w, heads, C = case.attention()
    a, S = case.number(1, 4), case.number(1, 3)

    def factors() -> tuple[Tensor, Tensor, Tensor]:
        return case.tensor(heads, a, S, S), case.tensor(heads, a, h), case.tensor(heads, a, w)

    q, k, v = (case.tensor(case.batch, h * w, C) for _ in range(3))
    tensors = [q, k, v, case.tensor(case.batch, a, C), *factors(), *factors()]

    def spread(f):
        return lambda q, k, v, agents, *t: f(q, k, v, agents, t[:3], t[3:6], heads)

    return spread(ops.agent_attention), spread(reference("agent_attention")), tensors


CASES = dict(
    agent_attention=_agent,
    bilevel_routing_attention=_bilevel,
    channel_attention=_channel,
    dfa3d=_deform,
    gaussian_gate=_gaussian,
    halo_attention=_halo,
    ms_deform_attn=_ms_deform,
    neighborhood_attention=_neighborhood,
    spatial_gate=_spatial,
    strip_gate=_strip,
    subspace_gate=_subspace,
    window_attention=_window,
)
# Without a floating-point result, or with the same reference: their own tests compare them with brute force.
OTHERS = {"backend", "connectivity", "pool_agents", "predict_mask", "region_routing", "relative_bias_attention"}
OTHERS |= {"resize_agent_bias", "sparse_attention", "sparse_mask", "unpack_mask"}
LEVELS = [("torch", FEW), exhaustive("torch", MANY), exhaustive("triton", 30)]


def steady(name: str, examples: int):
    """Return settings of hypothesis under which a test draws the same examples each time."""
    options = dict(max_examples=examples, deadline=None, derandomize=True, database=None)
    return settings(**options, suppress_health_check=list(HealthCheck))


def test_every_operator_is_here():
    assert CASES.keys() | OTHERS == set(ops.__all__) and not CASES.keys() & OTHERS


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend, examples", LEVELS)
def test_operators(name, backend, examples):
    """Random sizes, strides, dtypes, batches of 0, 1 and 2: outputs and gradients are finite and within the budget."""

    @steady(name, examples)
    @given(st.data(), st.sampled_from(DTYPES if backend == "torch" else DTYPES[:1] + DTYPES[2:]))
    def run(data, dtype):
        op, reference, arguments = CASES[name](Case(data.draw, dtype))
        result = op(*arguments)
        assert result.isfinite().all()
        if result.numel():
            check(forced(op, backend), reference, *arguments)

    run()


ILLEGAL = ["rank", "dtype", "size"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("examples", [FEW, exhaustive(MANY)])
def test_illegal_arguments_are_named(name, examples):
    """One argument of a legal call with another rank, dtype or size: ValueError or TypeError, unless that is legal."""

    @steady(name, examples)
    @given(st.data(), st.sampled_from(ILLEGAL))
    def run(data, kind):
        case = Case(data.draw, torch.float32)
        case.batch = 2
        op, _, arguments = CASES[name](case)
        places = [i for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.is_floating_point()]
        place = data.draw(st.sampled_from(places))
        x = arguments[place]
        changed = dict(rank=x[0] if x.dim() else x[None], dtype=x.long())
        changed["size"] = torch.cat([x, x[..., :1]], -1) if x.dim() else x
        arguments[place] = changed[kind]
        try:
            result = op(*arguments)
        except (ValueError, TypeError) as error:
            if name in ("agent_attention",):  # whose factors are in tuples
                return
            parameters = list(inspect.signature(getattr(ops, name)).parameters)
            assert any(parameter in str(error) for parameter in parameters), error
        else:
            assert kind == "size" or (kind == "rank" and result.dim()), (name, kind, place)

    run()


@pytest.mark.parametrize("name", calls.OPERATORS)
def test_two_runs_agree(name):
    """To the bit, on every operator with fixed sizes, and on an empty batch."""
    call = calls.build(name)
    inputs = call.inputs(2, zlib.crc32(name.encode()) % 100)
    first, again = call(*inputs), call(*inputs)
    assert torch.equal(first, again) and first.isfinite().all()
    empty = call(*(x[:0] for x in inputs))
    assert empty.shape == (0, *first.shape[1:])
