"""Deformable attention in 3D and 2D: the reference against loops and the published values, the other forms against it,
and the contract."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import dfa3d, ms_deform_attn
from saccade.ops.dfa3d import eager, kernel, op, reference
from support import parity
from support.budget import assert_close
from support.ops import (
    COMPILED,
    DEVICE,
    DTYPES,
    FULL,
    accepts_empty,
    agree,
    autocast_changes_nothing,
    check,
    compiles,
    evaluate,
    exports,
    far_apart,
    flops,
    forced,
    gradients_are_right,
    grid,
    peak_bytes,
    rand,
    reads_any_gradient,
    refuses,
    refuses_second_derivative,
    registers,
    repeats,
    scripts,
)

torch.set_num_threads(1)

#    B, Q, heads, C, heads of depth, D, P, levels
SHAPES = [
    (2, 5, 2, 6, 1, 5, 3, [(2, 3), (1, 2)]),
    (1, 3, 3, 5, 3, 1, 2, [(1, 4)]),  # a depth a head, of one bin
    (1, 2, 1, 1, 1, 9, 1, [(3, 1), (1, 1), (2, 2)]),  # one channel, one head, one point; levels of one cell
    (2, 3, 2, 8, 0, 0, 4, [(2, 3), (1, 2)]),  # no depth: 2D
    (1, 3, 2, 16, 0, 0, 19, [(1, 3), (2, 1)]),  # more samples than a tile has
]
TINY = (2, 3, 1, 4, 1, 3, 2, [(1, 2)])  # the interpreter takes its time
TINY_2D = (2, 3, 1, 4, 0, 0, 2, [(1, 2)])
IDS = [f"{'2d' if shape[4] == 0 else '3d'}-{i}" for i, shape in enumerate(SHAPES)]
OPERATORS = ["op_borders", "op_depth1", "op_depth112", "op_far_out", "op_multi_level_cams", "op_single_level"]


def inputs(shape, dtype=torch.float32):
    B, Q, M, C, Md, D, P, shapes = shape
    S, L = sum(H * W for H, W in shapes), len(shapes)
    depth = [rand((B, S, Md, D), dtype, 1)] if Md else []
    locations = 0.5 + 0.6 * rand((B, Q, M, L, P, 3 if Md else 2), torch.float64, 2)  # a good few of them outside
    return rand((B, S, M, C), dtype), *depth, shapes, locations.to(dtype), rand((B, Q, M, L, P), dtype, 3)


def either(f):
    """f(value, depth or None, shapes, locations, weights) for the arguments of dfa3d or of ms_deform_attn."""
    return lambda value, *rest: f(value, *rest) if len(rest) == 4 else f(value, None, *rest)


definition = either(reference.dfa3d)


def operator(value, *rest):
    return dfa3d(value, *rest) if len(rest) == 4 else ms_deform_attn(value, *rest)


plain, triton = forced(operator, "torch"), forced(operator, "triton")
FORMS = pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])


def loops(value, depth, shapes, locations, weights):
    """Sample by sample, corner by corner: trilinear interpolation of value ⊗ depth, with zeros around it."""
    (B, _, M, C), (_, Q, _, L, P) = value.shape, weights.shape
    out = value.new_zeros(B, Q, M, C)
    for b, q, m, level, p in itertools.product(range(B), range(Q), range(M), range(L), range(P)):
        H, W = shapes[level]
        first = sum(h * w for h, w in shapes[:level])
        place = [n * u - 0.5 for n, u in zip((W, H, depth.shape[3]), locations[b, q, m, level, p].tolist())]
        if not all(-1 < u < n for u, n in zip(place, (W, H, depth.shape[3]))):
            continue
        for corner in itertools.product(*([math.floor(u), math.floor(u) + 1] for u in place)):
            x, y, z = corner
            if 0 <= x < W and 0 <= y < H and 0 <= z < depth.shape[3]:
                hat = math.prod(1 - abs(u - c) for u, c in zip(place, corner))
                product = value[b, first + y * W + x, m] * depth[b, first + y * W + x, m % depth.shape[2], z]
                out[b, q, m] += weights[b, q, m, level, p] * hat * product
    return out.flatten(2)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_reference_is_the_definition(shape):
    value, *depth, shapes, locations, weights = args = inputs(shape, torch.float64)
    if not depth:  # in the middle of the one bin, which is one everywhere
        depth = [torch.ones_like(value[:, :, :1, :1])]
        locations = F.pad(locations, (0, 1), value=0.5)
    assert_close(definition(*args), loops(value, *depth, shapes, locations, weights))


def test_reference_is_grid_sample():
    value, depth, shapes, locations, weights = inputs((2, 3, 2, 4, 2, 3, 5, [(3, 4)]), torch.float64)
    product = (value[..., None] * depth[:, :, :, None]).view(2, 3, 4, 2, 4, 3).permute(0, 3, 4, 5, 1, 2).flatten(0, 1)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B · heads, Q, 1, P, 3)
    sampled = F.grid_sample(product, grid, align_corners=False)[:, :, :, 0]
    expected = (sampled * weights.transpose(1, 2).reshape(4, 1, 3, 5)).sum(3).view(2, 8, 3).mT
    assert_close(dfa3d(value, depth, shapes, locations, weights), expected)


def published(fixture, spec):
    """An input of a fixture: seeded values or all combinations of coordinates, transformed."""
    if "grid" in spec:
        t = torch.cartesian_prod(
            *(torch.tensor([(i + 0.5) / n for i in cells], dtype=torch.float64) for cells, n in spec["grid"])
        )
    else:
        t = parity.seeded(spec["seed"], spec["shape"])
    for name, *args in spec.get("transform", []):
        t = {
            "affine": lambda t, a, b: a + b * t,
            "softmax": torch.softmax,
            "reshape": torch.reshape,
        }[name](t, *args)
    return t.requires_grad_()


def tensors(fixture):
    return {name: published(fixture, spec) for name, spec in fixture["inputs"].items()}


def assert_backward(fixture, out, given):
    (out * parity.seeded(fixture["grad_seed"], out.shape)).sum().backward()
    for name, expected in fixture["grads"].items():
        grad = torch.zeros_like(given[name]) if given[name].grad is None else given[name].grad
        parity.assert_equal(name, grad, expected)


@pytest.mark.parametrize("f", [reference.dfa3d, forced(dfa3d, "torch")], ids=["reference", "eager"])
@pytest.mark.parametrize("name", OPERATORS)
def test_published_values(name, f):
    fixture = parity.load("dfa3d", name)
    value, depth, locations, weights = (given := tensors(fixture)).values()
    out = f(value, depth, [tuple(n) for n in fixture["levels"]], locations, weights)
    score = reference.depth_score(depth, fixture["levels"], locations)
    parity.assert_equal("output", out, fixture["outputs"]["output"])
    parity.assert_equal("depth_score", score, fixture["outputs"]["depth_score"])
    update = (score.mean(-1) * weights).sum((3, 4))[..., None]
    parity.assert_equal("weight_update", update, fixture["outputs"]["weight_update"])
    assert_backward(fixture, out, given)


@pytest.mark.parametrize("f", [reference.dfa3d, eager.dfa3d], ids=["reference", "eager"])
def test_published_values_in_2d(f):
    fixture = parity.load("dfa3d", "op2d_ms_deform_attn")
    value, locations, weights = (given := tensors(fixture)).values()
    out = f(value, None, fixture["levels"], locations, weights)
    parity.assert_equal("output", out, fixture["outputs"]["output"])
    assert_backward(fixture, out, given)


def test_published_depth_score():
    fixture = parity.load("dfa3d", "stage1_depth_score_sample")
    depth, locations = (given := tensors(fixture)).values()
    S, M = depth.shape[1:3]
    value, weights = depth.new_zeros(len(depth), S, M, 1), torch.zeros_like(locations[..., 0])
    out, score = dfa3d(value, depth, fixture["levels"], locations, weights, return_depth_score=True)
    assert not out.any()
    parity.assert_equal("output", score, fixture["outputs"]["output"])
    assert_backward(fixture, score, given)


def test_published_layer():
    """DFA3D's attention layer: offsets in cells around the pillars' points, one softmax over levels and points."""
    fixture = parity.load("dfa3d", "mod_deform_attn")
    state = {key: t.requires_grad_() for key, t in parity.weights(fixture).items()}
    query, value, depth, reference_points = (given := tensors(fixture)).values()
    levels, M, P = fixture["constants"]["levels"], 4, 8
    B, Q, Z, _ = reference_points.shape

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    offsets = linear(query, "sampling_offsets").view(B, Q, M, len(levels), P, 2)
    deep = linear(query, "sampling_offsets_depth").view(B, Q, M, len(levels), P, 1)
    weights = linear(query, "attention_weights").view(B, Q, M, -1).softmax(-1).view(B, Q, M, len(levels), P)
    size = torch.tensor([(W, H, depth.shape[2]) for H, W in levels]).view(-1, 1, 3)
    anchors = reference_points[:, :, torch.arange(P) % Z].view(B, Q, 1, 1, P, 3)
    locations = anchors + torch.cat([offsets, deep], -1) / size
    rows = linear(value, "value_proj").unflatten(-1, (M, -1))
    out, score = dfa3d(rows, depth[:, :, None], levels, locations, weights, return_depth_score=True)
    parity.assert_equal("output", out, fixture["outputs"]["output"])
    update = (score.mean(-1) * weights).sum((3, 4))[..., None]
    parity.assert_equal("weight_update", update, fixture["outputs"]["weight_update"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    assert set(state) == set(fixture["grads"])
    for key, expected in fixture["grads"].items():
        assert abs(state[key].grad.norm().item() - expected) <= 1e-9 * expected, key
    for key, expected in fixture["input_grads"].items():
        parity.assert_equal(key, given[key].grad, expected)


@pytest.mark.parametrize("tile, group", [(eager.TILE, eager.GROUP), (40, 1)])
@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_eager_matches_reference(shape, tile, group, monkeypatch):
    monkeypatch.setattr(eager, "TILE", tile)
    monkeypatch.setattr(eager, "GROUP", group)
    agree(plain, definition, *inputs(shape, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]], ids=["3d", "2d"])
def test_eager_errs_no_more_than_reference(shape, dtype):
    check(plain, definition, *inputs(shape, dtype))


def test_kernels_need_no_data_from_the_host(monkeypatch):
    """A tensor made of Python numbers would be copied to the GPU, which CUDA graphs cannot record."""
    args = inputs((1, 2, 1, 2, 1, 3, 1, [(2, 1), (1, 2)]))
    expected = triton(*args)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, None)
    assert torch.equal(triton(*args), expected)


@grid(shape=SHAPES, dtype=DTYPES)
def test_triton_matches_reference(shape, dtype):
    check(triton, definition, *inputs(shape, dtype))


def test_an_image_at_a_time(monkeypatch):
    for shape in (TINY, TINY_2D):
        whole = evaluate(triton, inputs(shape))
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "GROUP", 1)
            assert all(map(torch.equal, whole, evaluate(triton, inputs(shape))))


def borders(dtype=torch.float32):
    """Points on centres, borders and gates of a map of 4 x 2 cells and 2 bins: ties that are exact."""
    axes = [
        torch.tensor([(i + 0.5) / n for i in (-1.5, -1, -0.5, 0, 0.5, n - 1, n - 0.5, n, n + 1)]) for n in (4, 2, 2)
    ]
    locations = torch.cartesian_prod(*axes).view(1, -1, 1, 1, 9, 3).to(DEVICE, dtype)
    weights = rand(locations.shape[:-1], dtype, 3)
    return rand((1, 8, 1, 4), dtype), rand((1, 8, 1, 2), dtype, 1), [(2, 4)], locations, weights


def test_gate_and_borders():
    check(triton, definition, *borders())
    agree(plain, definition, *borders(torch.float64))
    locations = borders()[3]
    dead = ((locations <= -0.5 / 2 + 1e-9) | (locations >= 1 + 0.5 / 2)).any(-1)  # of y and z: -1 and 2 of two cells
    for f in (definition, plain, triton):
        for grad in evaluate(f, borders())[3:]:
            assert not grad[dead].any()


@FORMS
def test_types_may_differ(f):
    value, depth, shapes, locations, weights = inputs(TINY)
    args = value.half(), depth.half(), shapes, locations, weights
    leaves = [t.requires_grad_() if torch.is_tensor(t) else t for t in args]
    out = f(*leaves)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), plain(value, *args[1:]), rtol=2e-3, atol=2e-3)  # maps rounded to float16
    out.sum().backward()
    assert [t.grad.dtype for t in leaves if torch.is_tensor(t)] == [torch.float16] * 2 + [torch.float32] * 2


def test_coordinates_are_in_full_precision():
    """A half-precision map wider than the precision of its type: locations in float32 find each cell."""
    W = 5000
    value = torch.arange(W, device=DEVICE).remainder(7).half().view(1, W, 1, 1)
    x = (torch.tensor([4000.0, 4001.0, 4999.0], device=DEVICE) + 0.5) / W
    locations = torch.stack([x, torch.full_like(x, 0.5)], -1).view(1, 3, 1, 1, 1, 2)
    out = plain(value, [(1, W)], locations, torch.ones(1, 3, 1, 1, 1, device=DEVICE))
    torch.testing.assert_close(out.flatten(), value.flatten()[[4000, 4001, 4999]], rtol=0, atol=1e-2)


@FORMS
def test_reads_views_of_bigger_maps(f):
    _, _, shapes, locations, _ = inputs(SHAPES[0])

    def of_views(f):
        def run(value, depth, locations, weights):
            return f(
                value[1:, 1:-1, ::2, 3:9], depth[:-1, 2:, :, 1:6], shapes, locations.transpose(0, 1), weights[..., :3]
            )

        return run

    maps = rand((3, 10, 4, 12)), rand((3, 10, 1, 7), seed=1)
    moved = locations.transpose(0, 1).contiguous(), rand((2, 5, 2, 2, 4), seed=3)
    check(of_views(f), of_views(reference.dfa3d), *maps, *moved)


@FORMS
def test_transposed_maps(f):
    value, depth, *rest = inputs(TINY)

    def transposed(f):
        return lambda value, depth, *rest: f(value.transpose(1, 3), depth.transpose(1, 3), *rest)

    check(transposed(f), transposed(reference.dfa3d), *(t.transpose(1, 3).contiguous() for t in (value, depth)), *rest)


def test_gradient_of_another_memory_format():
    value, depth, shapes, *rest = inputs(TINY)

    def of_value(f):
        return lambda value: f(value, depth.to(value.dtype), shapes, *(t.to(value.dtype) for t in rest))

    reads_any_gradient(of_value(triton), of_value(definition), value)


def test_offsets_beyond_31_bits(tmp_path):
    """Cells, or heads, of both maps 2**30 elements apart."""
    value, depth, shapes, locations, weights = inputs((1, 3, 4, 3, 4, 2, 2, [(2, 2)]), torch.float16)
    size = 3 * 2**30 + 4096
    big = far_apart(tmp_path, size)
    rest = locations, weights, [n for shape in shapes for n in shape]
    dout = rand((1, 3, 12), torch.float16, 4)
    for strides in [(2**30, 16), (16, 2**30)]:
        far = [big.as_strided(t.shape, (size, *strides, 1), offset) for t, offset in ((value, 0), (depth, 1024))]
        for t, near in zip(far, (value, depth)):
            t.copy_(near)
        assert torch.equal(kernel.fwd(value, depth, *rest), kernel.fwd(*far, *rest))
        for f in (kernel.bwd_samples, kernel.bwd_maps):
            assert all(map(torch.equal, f(dout, value, depth, *rest), f(dout, *far, *rest)))


@FORMS
@pytest.mark.parametrize("shape", [TINY, TINY_2D], ids=["3d", "2d"])
@pytest.mark.parametrize("which", ["locations", "weights"])
def test_nan_stays_with_its_query(which, shape, f):
    *maps, locations, weights = inputs(shape)
    clean = f(*maps, locations, weights)
    locations, weights = locations.clone(), weights.clone()
    (locations if which == "locations" else weights)[1, 2] = math.nan
    args = [t.requires_grad_() if torch.is_tensor(t) else t for t in (*maps, locations, weights)]
    out = f(*args)
    others = torch.ones(out.shape[:2], dtype=torch.bool, device=DEVICE)
    others[1, 2] = False
    assert torch.equal(out[others], clean[others])
    out[others].sum().backward()
    assert not args[-1].grad[others].isnan().any()
    assert not args[-2].grad[others].isnan().any()


@FORMS
def test_nan_in_a_map_reaches_who_samples_it(f):
    """Not those outside at the same border, nor the dead, whose places in the tables are somewhere."""
    value, depth, _, _, _ = inputs((1, 2, 1, 4, 1, 3, 1, [(3, 3)]))
    x = torch.tensor([-2.0, -0.4, 1.5, 1.6, 9.0], device=DEVICE)
    half = torch.full_like(x, 0.5)  # y is between rows 1 and 2
    locations = torch.stack([(x + 0.5) / 3, 1.2 * half, half], -1).view(1, 5, 1, 1, 1, 3)
    weights = torch.ones(1, 5, 1, 1, 1, device=DEVICE)
    for cell, hit in ((2, []), (3, [1]), (4, [2, 3]), (6, [1]), (8, [2, 3])):
        for broken in (value.clone(), depth.clone()):
            broken[0, cell] = math.nan
            maps = (broken, depth) if broken.shape == value.shape else (value, broken)
            out = f(*maps, [(3, 3)], locations, weights)
            assert out.isnan().any(-1).nonzero()[:, 1].tolist() == hit


def test_shapes_as_published():
    value, depth, shapes, locations, weights = args = inputs(SHAPES[0])
    expected = dfa3d(*args)
    for given in (
        torch.tensor(shapes),
        torch.tensor([(*n, 5) for n in shapes]),
        [[*n, 5] for n in shapes],
        tuple(shapes),
    ):
        assert torch.equal(dfa3d(value, depth, given, locations, weights), expected)
    flat = inputs(SHAPES[3])
    assert torch.equal(ms_deform_attn(flat[0], torch.tensor(flat[1]), *flat[2:]), ms_deform_attn(*flat))


def test_depth_shared_by_heads():
    value, depth, *rest = inputs(SHAPES[0], torch.float64)
    repeated = depth.expand(-1, -1, 2, -1).contiguous()
    ours, exact = evaluate(dfa3d, (value, depth, *rest)), evaluate(dfa3d, (value, repeated, *rest))
    exact[2] = exact[2].sum(2, keepdim=True)
    for a, b in zip(ours, exact, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_depth_score(name):
    value, depth, *rest = inputs(TINY)
    out, score = forced(dfa3d, name)(value, depth.requires_grad_(), *rest, return_depth_score=True)
    assert score.shape == (*rest[2].shape, 4)
    (out.sum() + score.sum()).backward()
    assert depth.grad.any()


BAD = {
    "rank": (
        dict(value=rand((2, 8, 12))),
        r"value must be .*\(B, S, heads, C\), got torch.float32 of shape \(2, 8, 12\)",
    ),
    "integers": (dict(value=torch.ones(2, 8, 2, 6).int()), "value must be floating point .* got torch.int32"),
    "cells": (dict(shapes=[(2, 3), (2, 2)]), r"shapes must have the S = 8 cells of value, got .*: 10"),
    "levels": (dict(shapes=[(2, 4)]), r"weights must be \(2, Q, 2, 1, P\) .* got \(2, 5, 2, 2, 3\)"),
    "numbers": (dict(shapes=[(2, 3, 5, 1), (1, 2)]), r"shapes must be one pair \(H, W\).* got \(2, 3, 5, 1\)"),
    "bins": (dict(shapes=[(2, 3, 4), (1, 2, 5)]), r"shapes must have the 5 bins of depth, got \(2, 3, 4\)"),
    "negative": (dict(shapes=[(-2, -3), (1, 2)]), r"shapes must be one pair .* got \(-2, -3\)"),
    "heads": (dict(weights=rand((2, 5, 1, 2, 3))), r"weights must be \(2, Q, 2, 2, P\) .* got \(2, 5, 1, 2, 3\)"),
    "batch": (dict(weights=rand((1, 5, 2, 2, 3))), r"weights must be .* got \(1, 5, 2, 2, 3\)"),
    "2d": (
        dict(locations=rand((2, 5, 2, 2, 3, 2))),
        r"locations must be \(2, 5, 2, 2, 3, 3\).* got \(2, 5, 2, 2, 3, 2\)",
    ),
    "points": (dict(locations=rand((2, 5, 2, 2, 4, 3))), r"locations must be .* got \(2, 5, 2, 2, 4, 3\)"),
    "location rank": (dict(locations=rand((5, 2, 2, 3, 3))), r"locations must be floating .* got .* \(5, 2, 2, 3, 3\)"),
    "weights": (dict(weights=torch.ones(2, 5, 2, 2, 3).long()), "weights must be floating point .* got torch.int64"),
    "depth": (dict(depth=rand((2, 8, 5))), r"depth must be .*\(B, S, heads or 1, D\), got .* \(2, 8, 5\)"),
    "depth's heads": (dict(depth=rand((2, 8, 3, 5))), r"depth must be \(2, 8, 2 or 1, D\) .* got \(2, 8, 3, 5\)"),
    "no bins": (dict(depth=rand((2, 8, 1, 0))), r"depth must be .* got \(2, 8, 1, 0\)"),
    "device": (dict(weights=torch.ones(2, 5, 2, 2, 3, device="meta")), "weights must be on .* as value is, got meta"),
    "depth's": (dict(depth=torch.ones(2, 8, 1, 5, device="meta")), "depth must be on .* as value is, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    names = ("value", "depth", "shapes", "locations", "weights")
    change, message = BAD[case]
    refuses(dfa3d, message, **dict(zip(names, inputs(SHAPES[0]))) | change)


def test_what_the_kernels_cannot_take():
    wide = inputs((1, 1, 1, 257, 1, 513, 1, [(1, 1)]))
    refuses(triton, "heads of 257 channels, over 256; 513 depth bins, over 512", *wide, error=RuntimeError)
    agree(plain, definition, *(t.double() if torch.is_tensor(t) else t for t in wide))


@FORMS
@pytest.mark.parametrize("B, Q, C, P, shapes", [(0, 3, 4, 2, [(2, 2)]), (1, 0, 4, 2, [(2, 2)]), (1, 3, 0, 2, [(2, 2)]),
                                               (1, 3, 4, 0, [(2, 2)]), (1, 3, 4, 2, [(0, 5)])])  # fmt: skip
def test_nothing_in_zeros_out(B, Q, C, P, shapes, f):
    for Md in (0, 1):
        accepts_empty(f, (B, Q, 2 * C), *inputs((B, Q, 2, C, Md, 3, P, shapes)))


@FORMS
def test_nobody_alive(f):
    value, depth, shapes, locations, weights = inputs(TINY)
    assert not any(t.any() for t in evaluate(f, (value, depth, shapes, locations + 9, weights)))


def test_a_level_without_cells():
    value, depth, _, locations, weights = inputs((1, 3, 2, 4, 1, 3, 2, [(2, 3), (0, 4), (1, 2)]))
    args = value, depth, [(2, 3), (0, 4), (1, 2)], locations, weights
    check(triton, definition, *args)
    check(plain, definition, *args)


@FORMS
@pytest.mark.parametrize("shape", [TINY, TINY_2D], ids=["3d", "2d"])
def test_runs_are_equal_to_the_bit(f, shape):
    repeats(f, *inputs(shape))


def test_gradients():
    for shape in ((1, 2, 2, 2, 1, 2, 2, [(2, 2), (1, 2)]), (1, 2, 2, 2, 0, 0, 2, [(2, 2), (1, 2)])):
        args = inputs(shape, torch.float64)
        gradients_are_right(plain, *args)
        gradients_are_right(definition, *args, twice=False)


def test_frozen_parts():
    args = inputs(TINY)
    for f in (plain, triton):
        out, *whole = evaluate(f, args)
        for i, j in enumerate((0, 1, 3, 4)):
            given = list(args)
            given[j] = given[j].detach().clone().requires_grad_()
            (grad,) = torch.autograd.grad(f(*given), given[j], rand(out.shape, torch.float16, 1234).float())
            assert torch.equal(grad.double(), whole[i])


def test_second_derivative_is_refused():
    for shape in (TINY, TINY_2D):
        refuses_second_derivative(triton, *inputs(shape))


@FULL
def test_registration(full):
    for shape in (TINY, TINY_2D):
        value, *depth, shapes, locations, weights = inputs(shape)
        depth = depth[0] if depth else None
        flat = [n for pair in shapes for n in pair]
        value = value.mT.contiguous().mT
        moved = locations.transpose(1, 3).contiguous().transpose(1, 3)
        registers(op.fwd, (value.clone().requires_grad_(), depth, moved, weights, flat), full)
        dout = rand((2, value.shape[3], 3), seed=5).mT
        for f in (op.bwd_samples, op.bwd_maps):
            registers(f, (dout, value, depth, moved, weights, flat), full)


def on_levels(f, shapes):
    return lambda value, *rest: f(value, *rest[:-2], shapes, *rest[-2:])


@COMPILED
@pytest.mark.parametrize("shape", [TINY, TINY_2D], ids=["3d", "2d"])
def test_compiles_in_one_graph(shape, name, dynamic):
    value, *depth, shapes, locations, weights = inputs(shape)
    args = value, *depth, locations, weights
    others = (tuple(t[:1] for t in args),) if dynamic else ()
    compiles(on_levels(operator, shapes), *args, name=name, dynamic=dynamic, others=others)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("shape", [TINY, TINY_2D], ids=["3d", "2d"])
def test_exports(shape, name):
    value, *depth, shapes, locations, weights = inputs(shape)
    args = value, *depth, locations, weights
    others = tuple(t.repeat_interleave(2, 0) for t in args)
    exports(on_levels(operator, shapes), args, others, name, "dfa3d_fwd", batched=tuple(range(len(args))))


def test_scripts():
    scripts(dfa3d, plain, *inputs(SHAPES[0]))
    scripts(ms_deform_attn, plain, *inputs(SHAPES[3]))


def test_meta_tensors_have_shapes():
    for shape in (SHAPES[0], SHAPES[3]):
        args = [t.to("meta") if torch.is_tensor(t) else t for t in inputs(shape)]
        assert operator(*args).shape == plain(*inputs(shape)).shape


@FORMS
def test_autocast_changes_nothing(f):
    for shape in (TINY, TINY_2D):
        for dtype in (torch.float32, torch.float16):
            autocast_changes_nothing(f, *inputs(shape, dtype))


def test_flops_are_those_of_the_rows():
    for shape in (TINY, TINY_2D):
        forward, backward = flops(triton, *(args := inputs(shape)))
        assert forward == 8 * args[-1].numel() * args[0].shape[3]
        assert backward == (3 if shape[4] else 2) * forward


@pytest.mark.exhaustive
def test_memory_of_the_torch_form(monkeypatch):
    """A gathered corner would be N · C numbers, the product of value and depth 112 times value."""
    monkeypatch.setattr(eager, "TILE", 1 << 13)
    B, Q, M, C, D, P, shapes = 1, 500, 8, 32, 112, 8, [(8, 13), (4, 7), (2, 4), (1, 2)]
    args = [t.requires_grad_() if torch.is_tensor(t) else t for t in inputs((B, Q, M, C, 1, D, P, shapes))]
    N = args[-1].numel()
    maps = sum(4 * t.numel() for t in args[:2])
    tile = 256 * eager.TILE  # 32 numbers of 8 bytes a sample
    out = 4 * B * Q * M * C
    with torch.no_grad():
        assert peak_bytes(lambda: plain(*args)) < maps + out + tile < N * C * 4 / 4
    gradients = sum(4 * t.numel() for t in args if torch.is_tensor(t))
    rows = 4 * C * eager.TILE
    held = peak_bytes(lambda: plain(*args).sum().backward())
    # The tables and their gradients, keys, parts and order: 56 bytes a sample while they are sorted.
    assert held < 3 * maps + gradients + 3 * out + tile + rows + 56 * N


def test_memory_of_the_kernels():
    """A depth score would be 16 bytes a sample, a depth repeated over heads eight of them, a gathered corner 4 · C."""
    shapes = [(1, 2)]
    value, depth, shapes, locations, weights = inputs((1, 64, 8, 8, 1, 16, 8, shapes))
    N, flat = weights.numel(), [1, 2]
    given = value, depth, locations, weights, flat
    out = 4 * 64 * 8 * 8
    assert peak_bytes(lambda: kernel.fwd(*given)) <= out + 1024 < out + 16 * N
    dout = rand((1, 64, 64))
    assert peak_bytes(lambda: kernel.bwd_samples(dout, *given)) <= 4 * locations.numel() + 4 * N + 1024
    maps = 4 * (value.numel() + depth.numel())
    table = 8 * 8 * 6 + 4 * 8 * 6
    assert peak_bytes(lambda: kernel.bwd_maps(dout, *given)) <= maps + table + 40 * N + 4096
