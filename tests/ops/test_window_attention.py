"""Window attention: the reference against loops and published values, the other forms against it, and the contract."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import backend, window_attention
from saccade.ops.window_attention import eager, kernel, op, reference
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
    exports,
    far_apart,
    flops,
    forced,
    gradients_are_right,
    grid,
    peak_bytes,
    rand,
    refuses,
    refuses_second_derivative,
    registers,
    repeats,
    scripts,
)

torch.set_num_threads(1)

plain, triton = forced(window_attention, "torch"), forced(window_attention, "triton")
FORMS = pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])

#         B, H, W, heads, D, window, shift, bias, pad
SHAPES = [
    (2, 2, 6, 2, 8, (2, 3), (0, 0), False, False),
    (1, 5, 3, 2, 24, (4, 3), (2, 1), True, True),  # padded below; a head dimension that is no power of two
    (2, 3, 3, 1, 5, (7, 7), (3, 3), True, True),  # a window larger than the map
    (1, 5, 2, 1, 16, (5, 1), (0, 0), False, False),  # stripes
    (1, 3, 4, 1, 8, (2, 4), (0, 1), False, True),
    (1, 3, 3, 1, 8, (2, 2), (1, 0), True, False),  # padding that is zeros
]
WIDE = (1, 2, 34, 1, 8, (2, 33), (1, 2), True, True)  # windows of more tokens than a tile, rows of more than another


@pytest.fixture
def walking(monkeypatch):
    """The kernels that walk a window in tiles, whatever its size, with few programs for the interpreter."""
    monkeypatch.setattr(kernel, "fits_tile", lambda itemsize, D, N: False)
    monkeypatch.setattr(kernel, "PROGRAMS", 1)


def inputs(shape, dtype=torch.float32):
    B, H, W, heads, D, (h, w), shift, bias, pad = shape
    return (
        rand((B, H, W, 3, heads * D), dtype),
        heads,
        (h, w),
        shift,
        rand((heads, 2 * h - 1, 2 * w - 1), dtype, 1) if bias else None,
        rand((3, heads * D), dtype, 2) if pad else None,
    )


def loops(qkv, heads, window, shift, bias, pad):
    """Query by query, key by key."""
    B, H, W, _, C = qkv.shape
    (h, w), D = window, C // heads
    height, width = -(-H // h) * h, -(-W // w) * w
    out = torch.empty(B, H, W, C, dtype=qkv.dtype)

    def rolled(i, s, size):  # where the roll takes a row or column, and whether it wraps around
        return (i - s) % size, i < s

    for b, y, x, m in itertools.product(range(B), range(H), range(W), range(heads)):
        own = slice(m * D, (m + 1) * D)
        (ry, wy), (rx, wx) = rolled(y, shift[0], height), rolled(x, shift[1], width)
        logits, values = [], []
        for ky, kx in itertools.product(range(height), range(width)):
            (sy, vy), (sx, vx) = rolled(ky, shift[0], height), rolled(kx, shift[1], width)
            if (ry // h, rx // w, wy, wx) != (sy // h, sx // w, vy, vx):
                continue
            zero = torch.zeros(3, C, dtype=qkv.dtype)
            token = qkv[b, ky, kx] if ky < H and kx < W else zero if pad is None else pad
            logit = qkv[b, y, x, 0, own] @ token[1, own] * D**-0.5
            logits.append(logit if bias is None else logit + bias[m, ry - sy + h - 1, rx - sx + w - 1])
            values.append(token[2, own])
        out[b, y, x, own] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_definition(shape):
    args = [t.cpu() if torch.is_tensor(t) else t for t in inputs(shape, torch.float64)]
    assert_close(reference.window_attention(*args), loops(*args))


def attention(x, state, f, window=(7, 7), heads=2):  # (B, H, W, C)
    weight, bias = state["qkv.weight"], state["qkv.bias"]
    qkv = F.linear(x, weight, bias).unflatten(-1, (3, -1))
    return F.linear(f(qkv, heads, window, pad=bias.view(3, -1)), state["proj.weight"], state["proj.bias"])


def published(name, module, f):
    fixture = parity.load("davit", name)
    state = {key: value.to(DEVICE).requires_grad_() for key, value in parity.weights(fixture).items()}
    x = parity.image(fixture).to(DEVICE).requires_grad_()
    y = module(x, state, f)
    parity.assert_equal("y", y.cpu(), fixture["outputs"]["y"])
    (y * parity.seeded(1, y.shape).to(DEVICE)).sum().backward()
    parity.assert_equal("grad_x", x.grad.cpu(), fixture["outputs"]["grad_x"])
    assert set(state) == set(fixture["grads"])
    for key, expected in fixture["grads"].items():
        assert abs(state[key].grad.norm().item() - expected) <= 1e-9 * expected, key


@pytest.mark.parametrize("f", [reference.window_attention, plain], ids=["reference", "eager"])
def test_published_window(f):
    def module(x, state, f):
        return attention(x.unflatten(1, (7, 7)), state, f).flatten(1, 2)

    published("window_attention", module, f)


@pytest.mark.parametrize("f", [reference.window_attention, plain], ids=["reference", "eager"])
def test_published_block(f):
    """DaViT's spatial block on a map that needs padding."""

    def module(x, state, f):
        def part(name):
            return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}

        def conv(x, name):
            return x + F.conv2d(x, *part(name).values(), padding=1, groups=64)

        def norm(x, name):
            return F.layer_norm(x.permute(0, 2, 3, 1), (64,), *part(name).values())

        x = conv(x, "cpe.0.proj")
        x = conv(x + attention(norm(x, "norm1"), part("attn"), f).permute(0, 3, 1, 2), "cpe.1.proj")
        mlp = F.linear(norm(x, "norm2"), *part("mlp.fc1").values())
        return x + F.linear(F.gelu(mlp), *part("mlp.fc2").values()).permute(0, 3, 1, 2)

    published("spatial_block_10x13", module, f)


@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
@pytest.mark.parametrize("chunk", [1, eager.CHUNK_BYTES])
def test_eager_matches_reference(shape, chunk, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK_BYTES", chunk)
    agree(plain, reference.window_attention, *inputs(shape, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_errs_no_more_than_reference(dtype):
    check(plain, reference.window_attention, *inputs(SHAPES[1], dtype))


@grid(shape=SHAPES, dtype=DTYPES)
def test_triton_matches_reference(shape, dtype):
    check(triton, reference.window_attention, *inputs(shape, dtype))


@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_triton_in_tiles(shape, walking):
    check(triton, reference.window_attention, *inputs(shape))


def test_triton_walks_wide_windows(walking):
    check(triton, reference.window_attention, *inputs(WIDE, torch.float16))


def test_triton_divides_windows_among_programs(monkeypatch, walking):
    monkeypatch.setattr(kernel, "PROGRAMS", 6)
    check(triton, reference.window_attention, *inputs((3, 1, 2, 1, 4, (1, 2), (0, 1), True, True)))


@FORMS
def test_scale_is_a_parameter(f):
    check(f, reference.window_attention, *inputs(SHAPES[3]), 0.7)


@FORMS
def test_reads_half_of_the_channels_where_they_lie(f):
    def of_view(f):
        return lambda big: f(big[..., 8:], 1, (2, 2))

    check(of_view(f), of_view(reference.window_attention), rand((1, 2, 4, 3, 16)))


@FORMS
def test_channels_first_memory(f):
    qkv, *rest = inputs(SHAPES[3])
    channels_first = qkv.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    assert torch.equal(f(channels_first, *rest), f(qkv, *rest))


def test_offsets_beyond_31_bits(tmp_path):
    """Rows of the map 2**30 elements apart."""
    qkv = rand((1, 4, 2, 3, 16), torch.float16)
    size = 3 * 2**30 + 1024
    big = far_apart(tmp_path, size)
    apart = big.as_strided(qkv.shape, (size, 2**30, 48, 16, 1))
    apart.copy_(qkv)
    rest = (None, None, 1, [4, 2], [0, 0], 0.25)
    out, lse = kernel.fwd(qkv, *rest)
    assert torch.equal(out, kernel.fwd(apart, *rest)[0])
    results = [kernel.bwd(out, t, *rest[:2], out, lse, *rest[2:])[0] for t in (qkv, apart)]
    assert torch.equal(*results)


@FORMS
def test_a_nan_in_a_query_stays_there(f):
    qkv, *rest = inputs(SHAPES[1])
    clean = f(qkv, *rest)
    qkv[0, 2, 1, 0, 3] = math.nan  # of the first head
    out = f(qkv, *rest)
    assert out[0, 2, 1, :24].isnan().all()
    out[0, 2, 1, :24] = clean[0, 2, 1, :24]
    assert torch.equal(out, clean)


QKV = rand((1, 4, 6, 3, 8))
BAD = {
    "rank": (dict(qkv=QKV[0]), r"qkv must be .*\(B, H, W, 3, C\), got torch.float32 of shape \(4, 6, 3, 8\)"),
    "three": (dict(qkv=QKV[:, :, :, :2]), r"qkv must be .* got torch.float32 of shape \(1, 4, 6, 2, 8\)"),
    "integers": (dict(qkv=QKV.long()), "qkv must be floating point .* got torch.int64"),
    "heads": (dict(heads=3), "heads must divide the C = 8 channels of qkv, got 3"),
    "no heads": (dict(heads=0), "heads must divide .* got 0"),
    "window": (dict(window=(0, 3)), "window must be at least 1 x 1, got 0 x 3"),
    "shift": (dict(shift=(2, 0)), "shift must be from 0 to below the window of 2 x 3, got 2, 0"),
    "negative": (dict(shift=(0, -1)), "shift must be .* got 0, -1"),
    "bias": (dict(bias=rand((2, 3, 3))), r"bias must be .* \(2, 3, 5\), got torch.float32 of shape \(2, 3, 3\)"),
    "pad": (dict(pad=rand((8,))), r"pad must be .* \(3, 8\), got torch.float32 of shape \(8,\)"),
    "pad type": (dict(pad=torch.ones(3, 8, dtype=torch.int32)), "pad must be floating point .* got torch.int32"),
    "device": (dict(pad=torch.ones(3, 8, device="meta")), "pad must be on .* as qkv is, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    change, message = BAD[case]
    refuses(window_attention, message, **dict(qkv=QKV, heads=2, window=(2, 3)) | change)


def test_what_kernels_cannot_take_is_said():
    refuses(
        triton,
        "a head dimension of 129, over 128, in torch.float32",
        rand((1, 1, 1, 3, 129)),
        1,
        (1, 1),
        error=RuntimeError,
    )


@FORMS
@pytest.mark.parametrize("B, H, W", [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_nothing_in_nothing_out(B, H, W, f):
    accepts_empty(f, (B, H, W, 48), *inputs((B, H, W, *SHAPES[1][3:])))


@FORMS
def test_parameters_of_another_type(f):
    qkv, heads, window, shift, bias, pad = inputs(SHAPES[1])
    leaves = [qkv.half().requires_grad_(), bias.requires_grad_(), pad.requires_grad_()]
    out = f(leaves[0], heads, window, shift, *leaves[1:])
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), plain(*inputs(SHAPES[1])), rtol=1e-2, atol=1e-2)  # inputs in float16
    out.sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float16, torch.float32, torch.float32]


def test_runs_are_equal_to_the_bit(walking):
    repeats(triton, *inputs((1, 2, 1, 1, 4, (2, 1), (0, 0), True, False)))


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
@FULL
def test_registration(shape, full):
    qkv, heads, window, shift, bias, pad = inputs(shape)
    rest = (bias, pad, heads, list(window), list(shift), 0.25)
    swapped = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    registers(op.fwd, (swapped.requires_grad_(), *rest), full)
    out, lse = op.fwd(qkv, *rest)
    registers(op.bwd, (out.mT.contiguous().mT, qkv, bias, pad, out, lse, *rest[2:]), full)


@FULL
def test_registration_of_the_plain_form(full):
    for shape in SHAPES[1], SHAPES[4]:
        qkv, heads, window, shift, bias, pad = inputs(shape)
        rest = (bias, pad, heads, list(window), list(shift), 0.25)
        swapped = qkv.transpose(1, 2).contiguous().transpose(1, 2)
        registers(eager.plain, (swapped.requires_grad_(), *rest), full)
        registers(eager.plain_bwd, (rand(eager.plain(qkv, *rest).shape), qkv, *rest), full)


def test_gradcheck():
    gradients_are_right(plain, *inputs((1, 3, 2, 1, 2, (2, 2), (1, 0), True, True), torch.float64))


def test_second_derivative_in_triton():
    refuses_second_derivative(triton, *inputs((1, 1, 2, 1, 4, (1, 2), (0, 0), False, False)))


# Where PyTorch traces the definition, the batch alone: proving the shapes of all sizes takes it minutes.
@COMPILED
def test_compiles_in_one_graph(name, dynamic):
    dynamic = None if dynamic and name == "torch" else dynamic
    qkv, *rest = inputs(SHAPES[4])

    def f(qkv, pad):
        return window_attention(qkv, *rest[:-1], pad)

    others = ((rand((2, 3, 4, 3, 8)), rest[-1]),) if dynamic is not False else ()
    compiles(f, qkv, rest[-1], name=name, dynamic=dynamic, others=others)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports(name):
    _, *shape = SHAPES[5]
    args, others = inputs((2, *shape)), inputs((3, *shape))

    def f(qkv, bias):
        return window_attention(qkv, *args[1:4], bias)

    exports(f, (args[0], args[4]), (others[0], others[4]), name, "window_attention_fwd")


def test_scripts():
    scripts(window_attention, plain, *inputs(SHAPES[1]))


def test_meta_tensors_have_shapes():
    args = [t.to("meta") if torch.is_tensor(t) else t for t in inputs(SHAPES[1])]
    assert window_attention(*args).shape == (1, 5, 3, 48)


@FORMS
def test_autocast(f):
    autocast_changes_nothing(f, *inputs(SHAPES[4]))


def test_flops_are_those_of_attention():
    _, H, W, heads, D, (h, w), *_ = SHAPES[4]
    args = inputs(SHAPES[4])
    forward, backward = flops(triton, *args)
    assert forward == 4 * H * W * h * w * heads * D
    assert backward == 2.5 * forward


def test_eager_holds_little():
    """A map at 28 x 28 in Swin's second stage, shifted: the logits of all images (1.5 maps in each of their forms), a
    padded, a rolled and a partitioned map (3 each) would not fit these bounds."""
    qkv, bias = rand((16, 28, 28, 3, 192)).requires_grad_(), rand((6, 13, 13)).requires_grad_()
    size = qkv.numel() // 3 * 4

    def forward():
        return plain(qkv, 6, (7, 7), (3, 3), bias)

    with torch.no_grad():
        assert peak_bytes(forward) < 2.2 * size  # the output, and a chunk

    def both():
        out = forward()
        torch.autograd.grad(out, (qkv, bias), out)

    assert peak_bytes(both) < 6.5 * size  # the output, the gradient (3), and a chunk


def test_kernels_hold_little(walking):
    """Beyond output and gradients, two numbers for each query and head, and dS by distance of rows: not N x N."""
    qkv, heads, window, shift, bias, _ = inputs((1, 8, 8, 1, 16, (8, 8), (0, 0), True, False))
    rest = (bias, None, heads, list(window), list(shift), 0.25)
    out, lse = kernel.fwd(qkv, *rest)
    held = peak_bytes(lambda: kernel.bwd(out, qkv, *rest[:2], out, lse, *rest[2:]))
    logits, owned = 64 * 64 * 4, 15 * 8 * 8 * 4
    assert held < qkv.numel() * 4 + 5 * owned + 2048
    assert owned < logits / 4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_diagonals(n):
    x = rand((2, n, n))
    expected = torch.stack([x.diagonal(-d, 1, 2).sum(-1) for d in range(1 - n, n)], -1)
    assert_close(eager.sum_diagonals(x), expected)


def test_backend_is_left_as_it_was():
    with backend("torch"):
        assert window_attention(*inputs(SHAPES[0])).is_contiguous()
