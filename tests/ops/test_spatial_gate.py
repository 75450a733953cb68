"""Spatial gate: the reference against loops and the published values, the other forms against it, and the contract."""

import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import gaussian_gate, spatial_gate
from saccade.ops.spatial_gate import eager, kernel, op, reference
from support import parity
from support.budget import assert_close
from support.gates import LAYOUTS, MODES, Gate
from support.ops import DTYPES, FULL, agree, check, far_apart, forced, grid, rand, refuses, registers

torch.set_num_threads(1)

triton, plain = forced(spatial_gate, "triton"), forced(spatial_gate, "torch")
FORMS = pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
BOTH_LAYOUTS = [torch.contiguous_format, torch.channels_last]
SHAPES = [
    (3, 24, 5, 7),
    (2, 33, 9, 15),  # two tiles of positions, three of channels
    (1, 16, 1, 2),
]


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format):
    C = shape[1]
    x = rand(shape, dtype).contiguous(memory_format=layout) + 0.5
    return x, 3 * rand((C,), dtype, 1) / C**0.5, 1 + rand((C,), dtype, 2) / 4, rand((C,), dtype, 3) / 4


def statistics(C, dtype=torch.float32):
    return [rand((C,), dtype, 6) / 4, 1 + rand((C,), dtype, 7).abs() / 4]


def run(f, training):
    """f of x and of the parameters alone, with statistics of the parameters' type in evaluation."""

    def g(x, weight, *norm):
        running = [None] * 2 if training else statistics(x.shape[1], weight.dtype)
        return f(x, weight, *norm, *running, training)

    return g


def loops(x, weight, norm_weight, norm_bias, running, eps=1e-5):
    """Position by position, channel by channel; `running` None in training."""
    B, C, H, W = x.shape
    z = torch.empty_like(x)
    for b in range(B):
        for h in range(H):
            for w in range(W):
                s = sum((weight[c] * x[b, c, h, w]).item() for c in range(C))
                z[b, :, h, w] = x[b, :, h, w] * min(max(s + 3, 0), 6) / 6
    for c in range(C):
        mean = z[:, c].sum() / (B * H * W) if running is None else running[0][c]
        var = (z[:, c] - mean).square().sum() / (B * H * W) if running is None else running[1][c]
        z[:, c] = (z[:, c] - mean) / (var + eps).sqrt() * norm_weight[c] + norm_bias[c]
    return z


@MODES
def test_reference_is_the_definition(training):
    args = inputs((2, 4, 3, 2), torch.float64)
    expected = loops(*args, None if training else statistics(4, torch.float64))
    assert_close(run(reference.spatial_gate, training)(*args), expected)


def halves(f, x, state, prefix=""):
    """The published layer around the operator, on 32 channels: gated, and normed and convolved."""

    def norm(name):
        return [state[f"{prefix}{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")]

    weight, bias, *statistics = norm("norm2")
    b = F.conv2d(F.batch_norm(x[:, 16:], *statistics, weight, bias), state[prefix + "conv.weight"])
    return torch.cat((f(x[:, :16], state[prefix + "conv_attn.weight"].flatten(), *norm("norm")), b), 1)


def block(f, x, state):
    """The published block with a Gaussian gate in its mixing and this one after its MLP."""
    mix = {key.removeprefix("spatial_mixing."): value for key, value in state.items()}
    names = ("attn.cfc1.weight", "attn.bn.weight", "attn.bn.bias", "norm.weight", "norm.bias")
    weight, *params = (mix[name] for name in names)
    running = [mix[f"{norm}.running_{what}"] for norm in ("attn.bn", "norm") for what in ("mean", "var")]
    y = F.conv2d(x[:, :8], mix["partial_conv3.weight"], padding=1)
    mixed = torch.cat((y, gaussian_gate(x[:, 8:], weight.squeeze(2), *params, *running)), 1)
    norm = [state["mlp.1." + name] for name in ("running_mean", "running_var", "weight", "bias")]
    hidden = F.relu(F.batch_norm(F.conv2d(mixed, state["mlp.0.weight"]), *norm))
    return x + halves(f, F.conv2d(hidden, state["mlp.3.weight"]), state, "mlp.4.")


@pytest.mark.parametrize("f", [reference.spatial_gate, plain], ids=["reference", "eager"])
@LAYOUTS
@pytest.mark.parametrize("name", ["op_pat_sp", "op_block_ch_sp"])
def test_published_values(name, layout, f):
    fixture = parity.load("patnet", name)
    state = parity.weights(fixture)
    leaves = {key: state[key].requires_grad_() for key in fixture["grads"]}
    x = parity.image(fixture).contiguous(memory_format=layout).requires_grad_()
    out = (halves if name == "op_pat_sp" else block)(f, x, state)
    parity.assert_equal("out", out, fixture["outputs"]["out"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, fixture["outputs"]["grad_x"])
    for key, leaf in leaves.items():
        expected = fixture["grads"][key]
        assert abs(leaf.grad.norm().item() - expected) <= 1e-9 * expected, key


@MODES
@LAYOUTS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_matches_reference(shape, layout, training):
    agree(run(plain, training), run(reference.spatial_gate, training), *inputs(shape, torch.float64, layout))


@grid(
    also=[(SHAPES[1], torch.channels_last, True, torch.float32)],
    shape=SHAPES[:2],
    layout=BOTH_LAYOUTS,
    training=[True, False],
    dtype=DTYPES,
)
def test_triton_matches_the_definition(shape, layout, training, dtype):
    """On a map in half precision and parameters in float32, as usual."""

    def mixed(f):
        def g(x, weight, *norm):
            running = [None] * 2 if training else statistics(shape[1], weight.dtype)
            return f(x, weight, *norm, *running, training)

        return g

    x, *params = inputs(shape, layout=layout)
    check(mixed(triton), mixed(eager.definition), x.to(dtype), *params)


def test_offsets_beyond_31_bits(tmp_path):
    """Rows of the map 2**30 elements apart."""
    x, weight, *_ = inputs((1, 4, 4, 3))
    x = x.half()
    size = 3 * 2**30 + 1024
    apart = far_apart(tmp_path, size).as_strided(x.shape, (size, 4, 2**30, 1))
    apart.copy_(x)
    g, *moments = kernel.gate(x, weight)
    results = [
        [g, *moments, kernel.norm(m, g, *moments), *kernel.sums(m, m, g), *kernel.grad(m, m, g, *[weight] * 4)]
        for m in (x, apart)
    ]
    assert all(map(torch.equal, *results))
    assert all(map(torch.equal, kernel.gate(x, weight), kernel.gate(apart, weight)))


@FORMS
@LAYOUTS
def test_nan_stays_in_its_position(f, layout):
    x, *params = inputs(SHAPES[0], layout=layout)
    clean = run(f, False)(x, *params)
    x = x.clone()
    x[1, 3, 2, 2] = math.nan
    out = run(f, False)(x, *params)
    assert out[1, :, 2, 2].isnan().all()
    out[1, :, 2, 2] = clean[1, :, 2, 2]
    assert torch.equal(out, clean)


NAMES = ("x", "weight", "norm_weight", "norm_bias", "running_mean", "running_var")
BAD = {
    "rank": (dict(x=rand((8, 5, 7))), r"x must be .*\(B, C, H, W\), got torch.float32 of shape \(8, 5, 7\)"),
    "integers": (dict(x=torch.ones(2, 8, 5, 7, dtype=torch.int64)), "x must be floating point .* got torch.int64"),
    "weight": (dict(weight=rand((1, 8, 1, 1))), r"weight must be \(8,\), got \(1, 8, 1, 1\)"),
    "norm_bias": (dict(norm_bias=rand((4,))), r"norm_bias must be \(8,\), got \(4,\)"),
    "no statistics": (dict(running_var=None), "running_var must be given unless training, got None"),
    "device": (dict(weight=torch.ones(8, device="meta")), "weight must be on .* as x is, got meta"),
    "dtype": (
        dict(norm_weight=torch.ones(8, dtype=torch.int32)),
        "norm_weight must be floating point, got torch.int32",
    ),
    "one value": (dict(x=rand((1, 8, 1, 1)), training=True), "training needs more than one value per channel, got x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    change, message = BAD[case]
    refuses(spatial_gate, message, **dict(zip(NAMES, (*inputs((2, 8, 3, 3)), *statistics(8)))) | change)


@FULL
def test_registration(full):
    big = rand((2, 12, 6, 5)).contiguous(memory_format=torch.channels_last)
    for x, training in ((big[:, 4:], True), (big[:, :8].contiguous(), False)):
        params, running = inputs((1, 8, 1, 1))[1:], statistics(8)
        registers(op.fwd, (x.requires_grad_(), *params, *([None] * 2 if training else running), training, 1e-5), full)
        x = x.detach()
        y, g, _ = op.fwd(x, *params, *running, training, 1e-5)
        dy = rand(y.shape, seed=5).transpose(2, 3).contiguous().transpose(2, 3)
        registers(op.bwd, (dy, x, *params, *running, g, training, 1e-5), full)


class TestGate(Gate):
    operator = staticmethod(spatial_gate)
    reference = staticmethod(reference.spatial_gate)
    inputs = staticmethod(inputs)
    statistics = staticmethod(statistics)
    MACS = 2 * 8 * 12
    LAUNCHES = 22, 23
    # Nothing of the size of the map is kept but the output. The kernels never have the gated map; PyTorch has it for as
    # long as the norm takes, and backward again beside the gradient to it.
    MEMORY: ClassVar = dict(torch=((4, 32, 28, 28), 2.3, 4.5), triton=((2, 8, 32, 32), 1.3, 2.5))
