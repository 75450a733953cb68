"""Gaussian gate: the reference against loops and the published values, the other forms against it, and the contract."""

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import gaussian_gate
from saccade.ops.gaussian_gate import eager, kernel, op, reference
from support import parity
from support.budget import assert_close
from support.gates import LAYOUTS, MODES, Gate
from support.ops import DEVICE, DTYPES, FULL, agree, check, far_apart, forced, grid, rand, refuses, registers

torch.set_num_threads(1)

triton, plain = forced(gaussian_gate, "triton"), forced(gaussian_gate, "torch")
FORMS = pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
BOTH_LAYOUTS = [torch.contiguous_format, torch.channels_last]
NORMED = pytest.mark.parametrize("normed", [False, True], ids=["bare", "normed"])
SHAPES = [
    (3, 24, 5, 7),
    (3, 40, 1, 2),
    (2, 5, 35, 30),  # two stretches of positions
]


def parameters(C, dtype=torch.float32, normed=True):
    norms = [i % 2 + rand((C,), dtype, 2 + i) / 4 for i in (1, 0, 3, 2)[: 4 if normed else 2]]
    return [rand((C, C, 2), dtype, 1) / C**0.5, *norms]


def statistics(C, normed=True, dtype=torch.float32):
    statistics = [i % 2 + rand((C,), dtype, 6 + i).abs() / 4 for i in range(4)]
    return statistics if normed else [*statistics[:2], None, None]


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format, normed=True):
    x = rand(shape, dtype).contiguous(memory_format=layout) + 0.5
    return x, *parameters(shape[1], dtype, normed)


def run(f, training, normed=True):
    """f of x and of the parameters alone, with statistics of their type in evaluation."""

    def g(x, *params):
        running = [None] * 4 if training else statistics(x.shape[1], normed, x.dtype)
        return f(x, *params, *[None] * (5 - len(params)), *running, training)

    return g


def loops(x, weight, norm_weight, norm_bias, running, eps=1e-5):
    """Image by image, channel by channel; `running` None in training."""
    B, C, H, W = x.shape
    n = H * W
    t = torch.zeros(B, C, dtype=x.dtype)
    for b in range(B):
        for c in range(C):
            for m in range(C):
                mean = x[b, m].sum() / n
                t[b, c] += weight[c, m, 0] * mean
                t[b, c] += weight[c, m, 1] * ((x[b, m] - mean).square().sum() / (n - 1)).sqrt()
    y = torch.empty_like(x)
    for c in range(C):
        mean = t[:, c].sum() / B if running is None else running[0][c]
        var = (t[:, c] - mean).square().sum() / B if running is None else running[1][c]
        for b in range(B):
            gate = (t[b, c] - mean) / (var + eps).sqrt() * norm_weight[c] + norm_bias[c]
            y[b, c] = x[b, c] * min(max(gate.item() + 3, 0), 6) / 6
    return y


@MODES
def test_reference_is_the_definition(training):
    x, *params = inputs((3, 4, 3, 2), torch.float64)
    running = None if training else statistics(4, dtype=torch.float64)
    expected = loops(x, *params[:3], running)
    f = run(reference.gaussian_gate, training, False)
    assert_close(f(x, *params[:3]), expected)
    out_running = [None] * 2 if training else running[2:]
    expected = F.batch_norm(expected, *out_running, *params[3:], training)
    assert_close(run(reference.gaussian_gate, training)(x, *params), expected)


def srm(f, x, state, gate, out_norm=None):
    def of(norm, *names):
        return [None if norm is None else state[norm + name] for name in names]

    return f(
        x, state[gate + "cfc1.weight"].squeeze(2), *of(gate + "bn.", "weight", "bias"), *of(out_norm, "weight", "bias"),
        *of(gate + "bn.", "running_mean", "running_var"), *of(out_norm, "running_mean", "running_var"),
    )  # fmt: skip


def mixing(f, x, state, prefix=""):
    """The published partial convolution beside the operator, eight channels of 32."""
    y = F.conv2d(x[:, :8], state[prefix + "partial_conv3.weight"], padding=1)
    return torch.cat((y, srm(f, x[:, 8:], state, prefix + "attn.", prefix + "norm.")), 1)


def block(f, x, state):
    hidden = F.conv2d(mixing(f, x, state, "spatial_mixing."), state["mlp.0.weight"])
    norm = [state["mlp.1." + name] for name in ("running_mean", "running_var", "weight", "bias")]
    return x + F.conv2d(F.gelu(F.batch_norm(hidden, *norm)), state["mlp.3.weight"])


@pytest.mark.parametrize("f", [reference.gaussian_gate, plain], ids=["reference", "eager"])
@LAYOUTS
@pytest.mark.parametrize("name", ["op_srm", "op_pat_ch", "op_block_ch"])
def test_published_values(name, layout, f):
    fixture = parity.load("patnet", name)
    state = parity.weights(fixture)
    leaves = {key: state[key].requires_grad_() for key in fixture["grads"]}
    x = parity.image(fixture).contiguous(memory_format=layout).requires_grad_()
    out = srm(f, x, state, "") if name == "op_srm" else (mixing if name == "op_pat_ch" else block)(f, x, state)
    parity.assert_equal("out", out, fixture["outputs"]["out"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, fixture["outputs"]["grad_x"])
    for key, leaf in leaves.items():
        expected = fixture["grads"][key]
        assert abs(leaf.grad.norm().item() - expected) <= 1e-9 * expected, key


@NORMED
@MODES
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_matches_reference(shape, layout, training, normed):
    args = inputs(shape, torch.float64, layout, normed)
    agree(run(plain, training, normed), run(reference.gaussian_gate, training, normed), *args)


@grid(
    also=[(SHAPES[2], torch.channels_last, True, torch.float32)],
    shape=SHAPES,
    layout=BOTH_LAYOUTS,
    training=[True, False],
    dtype=DTYPES,
)
def test_triton_matches_the_definition(shape, layout, training, dtype):
    """On a map in half precision and parameters in float32, as usual."""

    def mixed(f):
        def g(x, *params):
            running = [None] * 4 if training else statistics(shape[1], dtype=params[0].dtype)
            return f(x, *params, *running, training)

        return g

    x, *params = inputs(shape, layout=layout)
    check(mixed(triton), mixed(eager.definition), x.to(dtype), *params)


@MODES
def test_triton_without_the_second_norm(training):
    args = inputs(SHAPES[0], normed=False)
    check(run(triton, training, False), run(reference.gaussian_gate, training, False), *args)


def test_offsets_beyond_31_bits(tmp_path):
    """Rows of the map 2**30 elements apart."""
    x = rand((1, 4, 4, 3), torch.float16)
    size = 3 * 2**30 + 1024
    apart = far_apart(tmp_path, size).as_strided(x.shape, (size, 4, 2**30, 1))
    apart.copy_(x)
    u = kernel.moments(x)
    assert torch.equal(u, kernel.moments(apart))
    mean, std = u.unbind(2)
    assert all(map(torch.equal, kernel.sums(x, x), kernel.sums(apart, apart)))
    assert torch.equal(kernel.affine(x, mean, std, x, std), kernel.affine(apart, mean, std, apart, std))


@FORMS
@LAYOUTS
def test_deviation_is_exact_far_from_zero(f, layout):
    """A difference of E[x²] and the squared mean would leave nothing of it."""
    x, *params = inputs(SHAPES[0], layout=layout)
    y = run(f, False)(x + 1000, *params)
    torch.testing.assert_close(
        y,
        run(reference.gaussian_gate, False)((x + 1000).double(), *(p.double() for p in params)).float(),
        rtol=1e-4,
        atol=1e-2,
    )


@FORMS
@MODES
def test_constant_channels_get_no_gradient_through_their_deviation(f, training):
    x, *params = inputs((2, 24, 4, 4))
    x[0, 3] = 0.25
    x[:, 5] = 0
    check(run(f, training), run(reference.gaussian_gate, training), x, *params)


@FORMS
def test_gate_is_flat_beyond_three(f):
    x, weight, norm_weight, norm_bias, *_ = inputs((2, 24, 4, 4))
    norm_bias += 10.0 * torch.arange(-12, 12, device=DEVICE).sign()
    args = x, 5 * weight, norm_weight, norm_bias
    check(run(f, False, False), run(reference.gaussian_gate, False, False), *args)


@FORMS
def test_one_position_has_no_deviation(f):
    assert run(f, False)(*inputs((2, 8, 1, 1))).isnan().all()


@FORMS
@LAYOUTS
def test_nan_stays_in_its_image(f, layout):
    x, *params = inputs(SHAPES[0], layout=layout)
    clean = run(f, False)(x, *params)
    x = x.clone()
    x[1, 3, 2, 2] = math.nan
    out = run(f, False)(x, *params)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


NAMES = (
    "x", "weight", "norm_weight", "norm_bias", "out_norm_weight", "out_norm_bias",
    "running_mean", "running_var", "out_running_mean", "out_running_var",
)  # fmt: skip
BAD = {
    "rank": (dict(x=rand((8, 5, 7))), r"x must be .*\(B, C, H, W\), got torch.float32 of shape \(8, 5, 7\)"),
    "integers": (dict(x=torch.ones(2, 8, 5, 7, dtype=torch.int64)), "x must be floating point .* got torch.int64"),
    "weight": (dict(weight=rand((8, 8))), r"weight must be \(8, 8, 2\), got \(8, 8\)"),
    "norm_bias": (dict(norm_bias=rand((4,))), r"norm_bias must be \(8,\), got \(4,\)"),
    "half a norm": (dict(out_norm_bias=None), "out_norm_bias must be given, since out_norm needs both"),
    "no statistics": (dict(out_running_var=None), "out_running_var must be given unless training, got None"),
    "statistics": (dict(running_var=rand((9,))), r"running_var must be \(8,\), got \(9,\)"),
    "device": (dict(weight=torch.ones(8, 8, 2, device="meta")), "weight must be on .* as x is, got meta"),
    "dtype": (
        dict(norm_weight=torch.ones(8, dtype=torch.int32)),
        "norm_weight must be floating point, got torch.int32",
    ),
    "one image": (dict(x=rand((1, 8, 3, 3)), training=True), "training needs more than one image, got x of shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    change, message = BAD[case]
    refuses(gaussian_gate, message, **dict(zip(NAMES, (*inputs((2, 8, 3, 3)), *statistics(8)))) | change)


@FULL
def test_registration(full):
    big = rand((2, 12, 6, 5)).contiguous(memory_format=torch.channels_last)
    for x, normed, training in ((big[:, 4:], True, True), (big[:, :8].contiguous(), False, False)):
        bare = [None] * (0 if normed else 2)
        running = [None] * 4 if training else statistics(8, normed)
        args = (x.requires_grad_(), *parameters(8, normed=normed), *bare, *running)
        registers(op.fwd, (*args, training, 1e-5), full)
        x = x.detach()
        y, u, t, batch = op.fwd(x, *args[1:], training, 1e-5)
        dy = rand(y.shape, seed=5).transpose(2, 3).contiguous().transpose(2, 3)
        used = batch if training else [m for m in running if m is not None]
        registers(op.bwd, (dy, x, *args[1:6], u, t, used, training, 1e-5), full)


class TestGate(Gate):
    operator = staticmethod(gaussian_gate)
    reference = staticmethod(reference.gaussian_gate)
    inputs = staticmethod(inputs)
    statistics = staticmethod(lambda C, dtype=torch.float32: statistics(C, True, dtype))
    MACS = 2 * 8 * 16
    LAUNCHES = 5, 6  # two passes over the map each way; a product of matrices forward, two backward
    # Nothing of the size of the map but the output and, backward, the gradient: the gated map before its norm, or the
    # products of dy and x apart from the gradient, would be one more each.
    MEMORY: ClassVar = dict(torch=((4, 48, 28, 28), 1.3, 2.5), triton=((2, 4, 32, 32), 1.3, 2.5))
