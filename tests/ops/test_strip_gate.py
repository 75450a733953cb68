"""Strip gate: the reference against loops and the published values, the other forms against it, and the contract."""

import math

import pytest
import torch
from saccade.ops import strip_gate
from saccade.ops.strip_gate import eager, kernel, op, reference
from support import parity
from support.budget import assert_close
from support.gates import launches
from support.operators import Operator
from support.ops import (
    DEVICE,
    DTYPES,
    FULL,
    agree,
    check,
    evaluate,
    far_apart,
    forced,
    grid,
    keeps_memory_format,
    peak_bytes,
    rand,
    registers,
)

torch.set_num_threads(1)

#          B, C, H, W, channels a convolution group, kernel, normalisation groups
SHAPES = [
    (2, 8, 5, 7, 1, 5, 4),
    (1, 24, 3, 3, 8, 7, 4),  # groups of six channels over groups of eight; strips shorter than the kernel
    (3, 16, 1, 9, 8, 5, 2),  # one row
    (1, 40, 9, 1, 1, 7, 8),  # one column; no power of two
    (1, 2, 70, 40, 2, 3, 1),  # more than one tile both ways
]
FIXTURES = [
    "ela_t_c64_14x14",
    "ela_b_c64_14x14",
    "ela_s_c64_14x14",
    "ela_l_c64_14x14",
    "ela_l_c144_13x7",
    "ela_s_c96_3x2",
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format):
    B, C, H, W, M, K, G = shape
    x = rand((B, C, H, W), dtype).contiguous(memory_format=layout)
    return x, rand((C, M, K), dtype, 1) / (M * K) ** 0.5, 1 + rand((C,), dtype, 2) / 4, rand((C,), dtype, 3) / 4, G


plain, triton = forced(strip_gate, "torch"), forced(strip_gate, "triton")


def loops(x, weight, norm_weight, norm_bias, groups, eps=1e-5):
    """Channel by channel, tap by tap, group by group."""

    def gate(z):  # (C, L)
        (C, L), (_, M, K) = z.shape, weight.shape
        u = torch.zeros_like(z)
        for c in range(C):
            for i in range(L):
                for m in range(M):
                    for k in range(K):
                        if 0 <= i + k - K // 2 < L:
                            u[c, i] += weight[c, m, k] * z[c // M * M + m, i + k - K // 2]
        for g in range(groups):
            own = slice(g * C // groups, (g + 1) * C // groups)
            mean = u[own].sum() / u[own].numel()
            var = (u[own] - mean).square().sum() / u[own].numel()
            u[own] = (u[own] - mean) / (var + eps).sqrt() * norm_weight[own, None] + norm_bias[own, None]
        return 1 / (1 + (-u).exp())

    y = torch.empty_like(x)
    for b in range(x.shape[0]):
        a_h, a_w = gate(x[b].sum(2) / x.shape[3]), gate(x[b].sum(1) / x.shape[2])
        y[b] = x[b] * a_h[:, :, None] * a_w[:, None, :]
    return y


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 3, 2, 1, 5, 2), (1, 6, 2, 4, 3, 3, 3)], ids=str)
def test_reference_is_the_definition(shape, residual):
    x, *rest = inputs(shape, torch.float64)
    expected = loops(x, *rest) + residual * x
    assert_close(reference.strip_gate(x, *rest, residual=residual), expected)


@pytest.mark.parametrize("f", [reference.strip_gate, plain], ids=["reference", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", FIXTURES)
def test_published_values(name, layout, f):
    fixture = parity.load("ela", name)
    state = {key: value.requires_grad_() for key, value in parity.weights(fixture).items()}
    x = parity.image(fixture).contiguous(memory_format=layout).requires_grad_()
    out = f(x, state["conv.weight"], state["gn.weight"], state["gn.bias"], 32 if "_t_" in name else 16)
    parity.assert_equal("out", out, fixture["outputs"]["out"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, fixture["outputs"]["grad_x"])
    assert set(state) == set(fixture["grads"])
    for key, expected in fixture["grads"].items():
        assert abs(state[key].grad.norm().item() - expected) <= 1e-9 * expected, key


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_matches_reference(shape, layout, residual):
    agree(plain, reference.strip_gate, *inputs(shape, torch.float64, layout), 1e-5, residual)


@grid(also=[(SHAPES[-1], LAYOUTS[1], DTYPES[0])], shape=SHAPES, layout=LAYOUTS, dtype=DTYPES)
def test_triton_matches_reference(shape, layout, dtype):
    check(triton, reference.strip_gate, *inputs(shape, dtype, layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_residual(dtype):
    check(triton, reference.strip_gate, *inputs(SHAPES[0], dtype), 1e-3, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_errs_no_more_than_reference(dtype):
    check(plain, reference.strip_gate, *inputs(SHAPES[0], dtype))


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_parameters_of_another_type(f):
    x, *rest = inputs(SHAPES[0])
    args = [x.half().requires_grad_(), *(p.requires_grad_() for p in rest[:-1]), rest[-1]]
    out = f(*args)
    torch.testing.assert_close(out.float(), plain(x, *rest), rtol=2e-3, atol=2e-3)  # x rounded to float16
    out.sum().backward()
    assert [p.grad.dtype for p in args[:-1]] == [torch.float16, *[torch.float32] * 3]


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_memory_format_is_kept(f, layout):
    x, *rest = inputs(SHAPES[0], layout=layout)
    keeps_memory_format(lambda x: f(x, *rest), x)


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_reads_a_view_of_a_bigger_map(f):
    _, *rest = inputs(SHAPES[0])

    def of_view(f):
        return lambda big: f(big[:, 3:11, 1:-2, ::2], *rest)

    check(of_view(f), of_view(reference.strip_gate), rand((2, 12, 8, 13)))
    check(of_view(f), of_view(reference.strip_gate), rand((2, 12, 8, 13)).contiguous(memory_format=torch.channels_last))


class TestStripGate(Operator):
    operator, reference = staticmethod(strip_gate), staticmethod(reference.strip_gate)
    EXPORTED = "strip_gate_fwd"
    SCRIPTED = {"map": inputs(SHAPES[0])}
    EMPTY = {
        str((B, H, W)): ((B, 8, H, W), *inputs((B, 8, H, W, 1, 5, 4))) for B, H, W in [(0, 6, 5), (2, 0, 5), (2, 6, 0)]
    }
    REPEATED = {str(layout): inputs(SHAPES[0], layout=layout) for layout in LAYOUTS}
    SMOOTH = {
        "gate": (*inputs((1, 4, 2, 3, 2, 3, 2), torch.float64), 1e-5, False),
        "residual": (*inputs((1, 4, 2, 3, 2, 3, 2), torch.float64), 1e-5, True),
    }
    BAD = {
        "rank": (dict(x=rand((8, 5, 7))), r"x must be .*\(B, C, H, W\), got torch.float32 of shape \(8, 5, 7\)"),
        "integers": (dict(x=torch.ones(2, 8, 5, 7, dtype=torch.int64)), "x must be floating point .* got torch.int64"),
        "channels": (
            dict(weight=rand((6, 1, 5))),
            r"weight must be \(8, M, K\) with M dividing C = 8, got \(6, 1, 5\)",
        ),
        "divides": (dict(weight=rand((8, 3, 5))), r"weight must be .* got \(8, 3, 5\)"),
        "no group": (dict(weight=rand((8, 0, 5))), r"weight must be .* got \(8, 0, 5\)"),
        "weight rank": (dict(weight=rand((8, 1))), r"weight must be .* got \(8, 1\)"),
        "even": (dict(weight=rand((8, 1, 4))), "weight must have an odd kernel size, got 4"),
        "norm_weight": (dict(norm_weight=rand((4,))), r"norm_weight must be \(8,\), got \(4,\)"),
        "norm_bias": (dict(norm_bias=rand((8, 1))), r"norm_bias must be \(8,\), got \(8, 1\)"),
        "groups": (dict(norm_groups=3), "norm_groups must divide the C = 8 channels of x, got 3"),
        "no groups": (dict(norm_groups=0), "norm_groups must divide .* got 0"),
        "device": (dict(weight=torch.ones(8, 1, 5, device="meta")), "weight must be on .* as x is, got meta"),
        "dtype": (
            dict(norm_bias=torch.ones(8, dtype=torch.int32)),
            "norm_bias must be floating point, got torch.int32",
        ),
    }
    COUNTED = (inputs(SHAPES[1]), 2 * 1 * 24 * 8 * 7 * (3 + 3))  # of the convolutions, 2 B C M K (H + W)

    def inputs(self, batch=2, dtype=torch.float32):
        return inputs((batch, *SHAPES[0][1:]), dtype)


def test_offsets_beyond_31_bits(tmp_path):
    """Rows of the map 2**30 elements apart."""
    x = rand((1, 4, 4, 3), torch.float16)
    size = 3 * 2**30 + 1024
    big = far_apart(tmp_path, size)
    apart = big.as_strided(x.shape, (size, 4, 2**30, 1))
    apart.copy_(x)
    z, far = kernel.strip_means(x), kernel.strip_means(apart)
    assert all(map(torch.equal, z, far))
    assert all(map(torch.equal, kernel.strip_sums(x, x, *z), kernel.strip_sums(apart, apart, *z)))
    assert torch.equal(kernel.gate(x, *z, False, *z), kernel.gate(apart, *z, False, *z))


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nan_stays_in_its_image(f, layout):
    x, *rest = inputs(SHAPES[2], layout=layout)
    clean = evaluate(f, (x, *rest))
    x = x.clone()
    x[1, 3, 0, 4] = math.nan
    for ours, exact in zip(evaluate(f, (x, *rest))[:2], clean[:2]):
        assert ours[1].isnan().any()
        assert torch.equal(ours[[0, 2]], exact[[0, 2]])


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("B", [1, 2])
def test_a_group_of_one_value_is_its_bias(B, f):
    x, *rest = inputs((B, 8, 1, 1, 1, 5, 8))
    out = f(x, *rest)
    assert_close(out, x * rest[2].sigmoid().square()[:, None, None])


@pytest.mark.parametrize("channels_last", [False, True])
def test_tiles_cover_little_else(channels_last):
    for C, H, W in [(64, 7, 7), (144, 56, 56), (960, 7, 7), (16, 112, 112), (1, 1, 1), (3, 800, 1333)]:
        t = kernel.tile(C, H, W, channels_last)
        assert t["BLOCK_C"] * t["BLOCK_H"] * t["BLOCK_W"] <= kernel.TILE
        assert t["BLOCK_H"] <= kernel.ROWS
        assert kernel.ROWS % t["BLOCK_H"] == 0


@FULL
def test_registration(full):
    x, *rest = inputs(SHAPES[0])
    view = rand((2, 12, 8, 13))[:, 3:11, 1:6, :7]
    rest = (*rest, 1e-5, True)
    for t in (x, x.clone().requires_grad_(), x.contiguous(memory_format=torch.channels_last), view, x.transpose(2, 3)):
        registers(op.fwd, (t, *rest), full)
    for layout in LAYOUTS:
        t, dy = (rand(x.shape, seed=i).contiguous(memory_format=layout) for i in (0, 5))
        _, *z = op.fwd(t, *rest)
        for g in (dy, dy.transpose(2, 3).contiguous().transpose(2, 3)):
            registers(op.bwd, (g, t, *rest[:3], *z, *rest[3:]), full)


def test_frozen_parameters_and_frozen_map():
    x, weight, *rest = inputs(SHAPES[0], torch.float64)
    whole = evaluate(plain, (x, weight, *rest))
    dy = rand(x.shape, torch.float16, 1234).double()
    (dx,) = torch.autograd.grad(plain(x.requires_grad_(), weight, *rest), x, dy)
    (dweight,) = torch.autograd.grad(plain(x.detach(), weight.requires_grad_(), *rest), weight, dy)
    assert_close(dx, whole[1])
    assert_close(dweight, whole[2])


@pytest.mark.parametrize(("H", "counts"), [(7, (6, 21)), (5, (8, 39))], ids=["square", "not square"])
def test_little_is_launched(H, counts):
    """Strips of different lengths are processed one after the other. On a GPU a convolution, here one, is a few."""
    x, weight, norm_weight, norm_bias, groups = inputs((2, 24, H, 7, 8, 5, 4))
    assert launches(lambda *args: triton(*args, groups), kernel, x, weight, norm_weight, norm_bias) == counts


# Forward: the output, the strips, and no map besides (the published form has one more, the product with one gate).
# Backward: the gradient, and on a channels-last map one product of which PyTorch takes the sums.
@pytest.mark.parametrize(
    ("f", "layout", "shape", "bounds"),
    [
        (plain, torch.contiguous_format, (2, 32, 56, 56, 8, 5, 16), (1.3, 2.3)),
        (plain, torch.channels_last, (2, 32, 56, 56, 8, 5, 16), (1.3, 3.3)),
        (triton, torch.contiguous_format, (1, 8, 24, 24, 1, 5, 4), (1.3, 2.8)),
    ],
    ids=["eager", "eager, channels last", "triton"],
)
def test_memory(f, layout, shape, bounds):
    x, *rest = inputs(shape, layout=layout)
    *leaves, groups = (t.requires_grad_() if torch.is_tensor(t) else t for t in (x, *rest))
    dy = torch.ones_like(x)
    with torch.no_grad():
        assert x.nbytes <= peak_bytes(lambda: f(*leaves, groups)) < bounds[0] * x.nbytes
    both = peak_bytes(lambda: torch.autograd.grad(f(*leaves, groups), leaves, dy))
    assert 2 * x.nbytes <= both < bounds[1] * x.nbytes


def test_means_are_in_full_precision():
    x = torch.full((1, 1, 1, 4096), 60000.0, dtype=torch.float16, device=DEVICE)
    assert eager.strip_means(x)[0].item() == 60000
