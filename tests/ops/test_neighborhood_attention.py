"""Neighborhood attention: the reference against loops and recorded values, the fast forms against it, the contract."""

import functools
import itertools
import math

import pytest
import torch
from saccade.ops import neighborhood_attention, window_attention
from saccade.ops.neighborhood_attention import eager, kernel, op, reference
from support import parity
from support.budget import assert_close
from support.levels import exhaustive
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
    refuses,
    refuses_second_derivative,
    registers,
    repeats,
    scripts,
)

torch.set_num_threads(1)

plain, triton = forced(neighborhood_attention, "torch"), forced(neighborhood_attention, "triton")
FORMS = pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])

#         B, H, W, heads, D, kernel, bias, dilation, stride
SHAPES = [
    (1, 5, 9, 1, 16, (3, 3), True, (1, 1), (1, 1)),  # several tiles, the last of one query
    (1, 3, 6, 2, 24, (3, 3), True, (1, 2), (1, 1)),  # windows that are the whole map; no power of two
    (2, 4, 5, 1, 5, (3, 1), False, (1, 2), (1, 1)),  # classes of two lengths
    (1, 6, 5, 1, 16, (4, 3), True, (1, 1), (3, 2)),  # strides, an even kernel
]
LARGE = [
    (2, 22, 21, 2, 8, (7, 7), True, (1, 1), (1, 1)),
    (1, 17, 31, 1, 4, (5, 3), True, (3, 2), (2, 1)),
    (1, 13, 24, 2, 4, (13, 8), False, (1, 1), (13, 5)),
    (1, 9, 9, 1, 4, (9, 2), True, (1, 4), (4, 2)),
]


def inputs(shape, dtype=torch.float32):
    B, H, W, heads, D, k, bias, *rest = shape
    table = rand((heads, 2 * k[0] - 1, 2 * k[1] - 1), dtype, 1) if bias else None
    return rand((B, H, W, 3, heads * D), dtype), heads, k, table, *rest


def loops(qkv, heads, kernel, bias, dilation, stride):
    """Query by query, key by key."""
    B, H, W, _, C = qkv.shape
    D, out = C // heads, torch.empty(B, H, W, C, dtype=qkv.dtype)

    def window(x, axis, size):
        k, d, s = kernel[axis], dilation[axis], stride[axis]
        members = [y for y in range(size) if y % d == x % d]
        i = members.index(x)
        centre = min(i - i % s + s // 2, len(members) - 1)
        first = min(max(centre - k // 2, 0), len(members) - k)
        return [(members[j], j - i + k - 1) for j in range(first, first + k)]

    for b, y, x, m in itertools.product(range(B), range(H), range(W), range(heads)):
        own, logits, values = slice(m * D, (m + 1) * D), [], []
        for (ky, i), (kx, j) in itertools.product(window(y, 0, H), window(x, 1, W)):
            logit = qkv[b, y, x, 0, own] @ qkv[b, ky, kx, 1, own] * D**-0.5
            logits.append(logit if bias is None else logit + bias[m, i, j])
            values.append(qkv[b, ky, kx, 2, own])
        out[b, y, x, own] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_is_the_definition(shape):
    args = [t.cpu() if torch.is_tensor(t) else t for t in inputs(shape, torch.float64)]
    assert_close(reference.neighborhood_attention(*args), loops(*args))


RECORDED = sorted(path.stem for path in (parity.FIXTURES / "nat").glob("op_*.json"))


def definition(qkv, heads, kernel, bias, dilation, stride, scale=None):
    return eager.definition(qkv, bias, (heads, kernel, dilation, stride), scale)


@pytest.mark.parametrize("f", [reference.neighborhood_attention, plain, definition], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", RECORDED)
def test_published_values(name, f):
    want = parity.load("nat", name)
    config = {key: tuple(want["config"][key]) for key in ("kernel", "dilation", "stride")}
    tensors = {key: x["gain"] * parity.seeded(x["seed"], x["shape"]) for key, x in want["inputs"].items()}
    leaves = {key: x.requires_grad_() for key, x in tensors.items()}
    qkv = torch.stack([leaves[key] for key in "qkv"], 3).flatten(4)
    heads, bias = leaves["q"].shape[3], leaves.get("rpb")
    out = f(qkv, heads, config["kernel"], bias, config["dilation"], config["stride"], want["config"]["scale"])
    out = out.view(leaves["v"].shape)
    parity.assert_equal("out", out, want["outputs"]["out"])
    (out * parity.seeded(want["grad_seed"], out.shape)).sum().backward()
    for key, x in leaves.items():
        parity.assert_equal(f"grad_{key}", x.grad, want["outputs"][f"grad_{key}"])


@pytest.mark.parametrize("shape", [*SHAPES, *LARGE], ids=str)
@pytest.mark.parametrize("chunk", [1, eager.CHUNK_BYTES])
def test_eager_matches_reference(shape, chunk, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK_BYTES", chunk)
    agree(plain, reference.neighborhood_attention, *inputs(shape, torch.float64))


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_definition_matches_reference(shape):
    agree(definition, reference.neighborhood_attention, *inputs(shape, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_errs_no_more_than_reference(dtype):
    check(plain, reference.neighborhood_attention, *inputs(SHAPES[3], dtype))


@pytest.fixture
def few(monkeypatch):
    """Few programs, for the interpreter: each sums the bias gradient of several tiles."""
    monkeypatch.setattr(kernel, "PROGRAMS", 1)


@grid(shape=SHAPES, dtype=DTYPES)
def test_triton_matches_reference(shape, dtype, few):
    check(triton, reference.neighborhood_attention, *inputs(shape, dtype))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "shape",
    [
        (1, 19, 20, 1, 16, (5, 7), True, (1, 1), (1, 1)),
        (2, 14, 15, 1, 32, (7, 7), True, (2, 2), (1, 1)),
        (1, 17, 13, 1, 16, (8, 5), True, (1, 1), (4, 5)),
        (1, 14, 13, 1, 64, (13, 13), True, (1, 1), (1, 1)),
        (1, 7, 7, 1, 128, (7, 7), True, (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_triton_on_larger_maps(shape):
    check(triton, reference.neighborhood_attention, *inputs(shape))


@pytest.mark.parametrize(("k", "s"), [(k, s) for k in (1, 2, 3, 4, 7, 8) for s in (1, 2, 3, 7) if s <= k])
def test_spans_hold_all_windows(k, s):
    """Of all tiles, for classes of many lengths: the rectangles that the kernels walk have all pairs."""
    for L, d, t in itertools.product((k, k + 1, 2 * k + 3, 23), (1, 2), (4, 8)):
        if k * d > L:
            continue
        keys, queries, low, members = kernel.spans(L, k, d, s, t)
        positions, _ = reference.neighbors(L, k, d, s, torch.device("cpu"))
        for g in range(d):
            windows = positions[g::d] // d
            n = len(windows)
            for own in range(0, n, t):
                tile, origin = windows[own : own + t], min(own, max(n - t, 0))
                assert tile.max() - tile.min() < keys
                assert low <= tile.min() - origin and tile.max() - origin < low + members
                seeing = [i for i in range(n) if ((windows[i] >= own) & (windows[i] < own + t)).any()]
                assert seeing[-1] - seeing[0] < queries


@FORMS
def test_scale_is_a_parameter(f, few):
    check(f, reference.neighborhood_attention, *inputs(SHAPES[1]), 0.7)


# What the operator is a general case of, and what is a special case of it (docs/operators.md).


def test_whole_map_as_window_is_full_attention():
    qkv, heads, *_ = inputs((2, 3, 4, 2, 8, (3, 4), False, (1, 1), (1, 1)), torch.float64)
    q, k, v = qkv.flatten(1, 2).unflatten(-1, (heads, -1)).permute(2, 0, 3, 1, 4)
    full = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert_close(plain(qkv, heads, (3, 4)).flatten(1, 2), full)


def test_windows_of_the_stride_are_swins():
    """Their tables are indexed by query - key, ours by key - query."""
    qkv, heads, k, bias, *_ = inputs((1, 6, 8, 2, 4, (3, 4), True, (1, 1), (3, 4)), torch.float64)
    assert_close(plain(qkv, heads, k, bias, (1, 1), k), window_attention(qkv, heads, k, bias=bias.flip(1, 2)))


def test_dilation_that_fills_the_map_is_window_attention_on_a_strided_view():
    qkv, heads, k, bias, dilation, _ = inputs((1, 6, 6, 2, 4, (3, 2), True, (2, 3), (1, 1)), torch.float64)
    out = plain(qkv, heads, k, bias, dilation)
    for y, x in itertools.product(range(2), range(3)):
        window = window_attention(qkv[:, y::2, x::3], heads, k, bias=bias.flip(1, 2))
        assert_close(out[:, y::2, x::3], window)


def test_interior_blocks_are_halonets():
    """Windows of b + 2h and strides of b, away from the border, see a block and a halo around it."""
    b, h = 4, 2
    positions, _ = reference.neighbors(20, b + 2 * h, 1, b, torch.device("cpu"))
    for x in range(b, 20 - b):
        assert positions[x].tolist() == list(range(x // b * b - h, x // b * b + b + h))


@FORMS
def test_reads_half_of_the_channels_in_place(f, few):
    def of_view(f):
        return lambda big: f(big[..., 8:], 1, (2, 2))

    check(of_view(f), of_view(reference.neighborhood_attention), rand((1, 2, 4, 3, 16)))


@FORMS
def test_channels_first_memory(f):
    qkv, *rest = inputs(SHAPES[1])
    channels_first = qkv.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    assert torch.equal(f(channels_first, *rest), f(qkv, *rest))


def test_offsets_beyond_31_bits(tmp_path):
    """Rows of the map 2**30 elements apart."""
    qkv = rand((1, 3, 2, 3, 16), torch.float16)
    size = 2 * 2**30 + 1024
    apart = far_apart(tmp_path, size).as_strided(qkv.shape, (size, 2**30, 48, 16, 1))
    apart.copy_(qkv)
    rest = (1, [3, 2], [1, 1], [1, 1], 0.25)
    out, lse = kernel.fwd(qkv, None, *rest)
    assert torch.equal(out, kernel.fwd(apart, None, *rest)[0])
    results = [kernel.bwd(out, t, None, out, lse, *rest)[0] for t in (qkv, apart)]
    assert torch.equal(*results)


@FORMS
def test_a_nan_in_a_query_stays_there(f):
    qkv, *rest = inputs(SHAPES[0])
    clean = f(qkv, *rest)
    qkv[0, 2, 1, 0, 3] = math.nan
    out = f(qkv, *rest)
    assert out[0, 2, 1].isnan().all()
    out[0, 2, 1] = clean[0, 2, 1]
    torch.testing.assert_close(out, clean)


@FORMS
@pytest.mark.parametrize("part", [1, 2], ids=["key", "value"])
def test_a_nan_in_a_key_or_value_reaches_those_who_see_it(f, part):
    """Also backward: a NaN in the output's gradient stays with the keys of its query."""
    qkv, *rest = inputs((1, 5, 7, 1, 16, (3, 3), True, (1, 1), (1, 1)))
    clean = evaluate(f, (qkv, *rest))
    qkv[0, 1, 5, part, 3] = math.nan
    out, dqkv, _ = evaluate(f, (qkv, *rest))
    sees = torch.zeros(5, 7, dtype=torch.bool)
    sees[:3, 4:] = True  # windows at the border hold column 5 from column 4 on
    assert out[0].isnan().any(-1)[sees].all()
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(out[0][~sees], clean[0][0][~sees])
    assert dqkv[0, :, :, 0][sees].isnan().all()
    close(dqkv[0, :, :, 0][~sees], clean[1][0, :, :, 0][~sees])
    seen = torch.zeros(5, 7, dtype=torch.bool)
    seen[:4, 3:] = True  # the keys of those queries
    close(dqkv[0, :, :, 1:][~seen], clean[1][0, :, :, 1:][~seen])


QKV = rand((1, 4, 6, 3, 8))
BAD = {
    "rank": (dict(qkv=QKV[0]), r"qkv must be .*\(B, H, W, 3, C\), got torch.float32 of shape \(4, 6, 3, 8\)"),
    "three": (dict(qkv=QKV[:, :, :, :2]), r"qkv must be .* got torch.float32 of shape \(1, 4, 6, 2, 8\)"),
    "integers": (dict(qkv=QKV.long()), "qkv must be floating point .* got torch.int64"),
    "heads": (dict(heads=3), "heads must divide the C = 8 channels of qkv, got 3"),
    "no heads": (dict(heads=0), "heads must divide .* got 0"),
    "kernel": (dict(kernel=3), "kernel must be two numbers of at least 1, for rows and columns, got 3"),
    "no kernel": (dict(kernel=(3, 0)), r"kernel must be two numbers .* got \(3, 0\)"),
    "dilation": (dict(dilation=(0, 1)), r"dilation must be two numbers .* got \(0, 1\)"),
    "map": (dict(kernel=(5, 3)), "kernel times dilation must be at most the map of 4 x 6, got 5 x 3 times 1, 1: pad"),
    "dilated": (dict(dilation=(1, 3)), "kernel times dilation must be .* got 3 x 3 times 1, 3"),
    "stride": (dict(stride=(1, 4)), "stride must be at most the kernel of 3 x 3, got 1, 4"),
    "bias": (dict(bias=rand((2, 3, 5))), r"bias must be .* \(2, 5, 5\), got torch.float32 of shape \(2, 3, 5\)"),
    "bias type": (dict(bias=torch.ones(2, 5, 5).int()), r"bias must be floating .* got torch.int32"),
    "device": (dict(bias=torch.ones(2, 5, 5, device="meta")), "bias must be on .* as qkv is, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    change, message = BAD[case]
    refuses(neighborhood_attention, message, **dict(qkv=QKV, heads=2, kernel=(3, 3)) | change)


def test_what_kernels_cannot_take_is_said():
    refuses(triton, "a head dimension of 129, over 128", rand((1, 1, 1, 3, 129)), 1, (1, 1), error=RuntimeError)
    refuses(triton, "a map of 1 x 32768, over 32767", rand((1, 1, 2**15, 3, 1)), 1, (1, 1), error=RuntimeError)


@FORMS
@pytest.mark.parametrize("B, H, W", [(0, 4, 6), (2, 0, 6), (2, 4, 0)])
def test_nothing_in_nothing_out(B, H, W, f):
    accepts_empty(f, (B, H, W, 48), *inputs((B, H, W, *SHAPES[1][3:])))


@FORMS
def test_a_table_of_another_type(f, few):
    qkv, heads, k, bias, *rest = inputs(SHAPES[1])
    leaves = [qkv.half().requires_grad_(), bias.requires_grad_()]
    out = f(leaves[0], heads, k, leaves[1], *rest)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), plain(*inputs(SHAPES[1])), rtol=1e-2, atol=1e-2)  # inputs in float16
    out.sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.float16, torch.float32]


@FORMS
def test_runs_are_equal_to_the_bit(f, few):
    repeats(f, *inputs((1, 2, 5, 1, 4, (2, 2), True, (1, 1), (1, 1))))


@pytest.mark.parametrize("shape", SHAPES[1:3], ids=str)
@FULL
def test_registration(shape, full, few):
    qkv, heads, k, bias, dilation, stride = inputs(shape)
    rest = (bias, heads, list(k), list(dilation), list(stride), 0.25)
    swapped = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    registers(op.fwd, (swapped.requires_grad_(), *rest), full)
    out, lse = op.fwd(qkv, *rest)
    registers(op.bwd, (out.mT.contiguous().mT, qkv, bias, out, lse, *rest[1:]), full)


@FULL
def test_registration_of_the_plain_form(full):
    for shape in SHAPES[1], SHAPES[2]:
        qkv, heads, k, bias, dilation, stride = inputs(shape)
        rest = (bias, heads, list(k), list(dilation), list(stride), 0.25)
        registers(eager.plain, (qkv.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(), *rest), full)
        registers(eager.plain_bwd, (rand(eager.plain(qkv, *rest).shape), qkv, *rest), full)


def test_gradcheck():
    gradients_are_right(plain, *inputs((1, 3, 3, 1, 2, (2, 3), True, (1, 1), (1, 1)), torch.float64))


def test_second_derivative_in_triton(few):
    refuses_second_derivative(triton, *inputs((1, 1, 2, 1, 4, (1, 2), False, (1, 1), (1, 1))))


# Where PyTorch traces the definition, only the batch is dynamic: proving the shapes of all sizes takes minutes.
@COMPILED
def test_compiles_in_one_graph(name, dynamic, few):
    dynamic = None if dynamic and name == "torch" else dynamic
    qkv, heads, k, bias, *rest = inputs((1, 3, 4, 1, 4, (2, 3), True, (1, 1), (1, 1)))

    def f(qkv, bias):
        return neighborhood_attention(qkv, heads, k, bias, *rest)

    others = ((rand((2, 3, 4, 3, 4)), bias),) if dynamic is not False else ()
    compiles(f, qkv, bias, name=name, dynamic=dynamic, others=others)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports(name):
    shape = (3, 5, 1, 4, (2, 3), True, (1, 1), (1, 1))
    args, others = inputs((2, *shape)), inputs((3, *shape))

    def f(qkv, bias):
        return neighborhood_attention(qkv, args[1], args[2], bias, *args[4:])

    exports(f, (args[0], args[3]), (others[0], others[3]), name, "neighborhood_attention_fwd")


def test_scripts():
    scripts(neighborhood_attention, plain, *inputs(SHAPES[3]))


def test_meta_tensors_have_shapes():
    args = [t.to("meta") if torch.is_tensor(t) else t for t in inputs(SHAPES[1])]
    assert neighborhood_attention(*args).shape == (1, 3, 6, 48)


@FORMS
def test_autocast(f, few):
    autocast_changes_nothing(f, *inputs((1, 2, 5, 1, 4, (2, 2), True, (1, 1), (1, 1))))


def test_flops_are_those_of_the_windows(few):
    B, H, W, heads, D, (h, w), *_ = SHAPES[1]
    forward, backward = flops(triton, *inputs(SHAPES[1]))
    assert forward == 4 * B * H * W * h * w * heads * D
    assert backward == 2.5 * forward


@pytest.mark.parametrize("dilation", [(1, 1), exhaustive((2, 2))], ids=str)
def test_eager_holds_little(dilation):
    """On NAT's first stage: the gathered keys and values would be 98 maps, the logits 3 of each kind."""
    qkv, bias = rand((1, 56, 56, 3, 64)).requires_grad_(), rand((2, 13, 13)).requires_grad_()
    size = qkv.numel() // 3 * 4

    def forward():
        return plain(qkv, 2, (7, 7), bias, dilation)

    forward()  # makes the indices of the tiles, which are kept
    with torch.no_grad():
        assert peak_bytes(forward) < 2 * size + 2 * eager.CHUNK_BYTES
    step = lambda: torch.autograd.grad(forward().sum(), (qkv, bias))  # noqa: E731
    assert peak_bytes(step) < 7 * size + 5 * eager.CHUNK_BYTES


def test_kernels_hold_little(few):
    """Beyond output and gradients, two numbers per query and head, and dS of one tile: not N x k²."""
    qkv, heads, k, bias, *rest = inputs((1, 8, 8, 1, 16, (7, 7), True, (1, 1), (1, 1)))
    rest = (heads, list(k), *map(list, rest), 0.25)
    out, lse = kernel.fwd(qkv, bias, *rest)
    held = peak_bytes(lambda: kernel.bwd(out, qkv, bias, out, lse, *rest))
    tile = 4 * 8 * 11 * 14 * 4  # queries by keys
    assert held < qkv.numel() * 4 + 8 * tile


@pytest.mark.parametrize("low", [-2, 0])
def test_diagonals(low):
    """The sums and their inverse, on a tile of 3 queries and 4 keys for a kernel of 3."""
    line = eager.Line(3, low, torch.zeros(3, 4, dtype=torch.bool), torch.empty(0), torch.empty(0))
    table = torch.arange(1.0, 6.0)
    distance = low + torch.arange(4) - torch.arange(3)[:, None]
    expected = torch.where(distance.abs() < 3, (distance + 2).clamp(0, 4) + 1.0, 0.0)
    assert torch.equal(eager.toeplitz(table, line), expected)
    ds = torch.rand(2, 3, 4)
    sums = torch.stack([torch.where(distance == i, ds, 0.0).sum((1, 2)) for i in range(-2, 3)], 1)
    torch.testing.assert_close(eager.diagonals(ds, low, 3), sums)


def test_on_the_device_of_the_tests():
    qkv, *rest = inputs(SHAPES[0])
    assert neighborhood_attention(qkv, *rest).device.type == DEVICE
