"""Halo attention: the reference against loops and the published values, the other forms against it, the contract."""

import functools
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import halo_attention
from saccade.ops.halo_attention import eager, op, reference
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
    forced,
    gradients_are_right,
    grid,
    keeps_memory_format,
    peak_bytes,
    rand,
    reads_any_gradient,
    refuses,
    refuses_second_derivative,
    registers,
    repeats,
)
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)

#          B, H, W, heads, D, Dv, block, halo, stride
SHAPES = [
    (2, 4, 8, 2, 16, 16, 4, 1, 1),
    (1, 7, 5, 1, 24, 40, 4, 2, 1),  # block divides neither side; head dimensions that are no powers of two
    (1, 8, 4, 2, 4, 2, 4, 3, 2),  # strided; a halo over half a block; tiny heads
    (1, 5, 3, 1, 16, 16, 2, 3, 1),  # a halo wider than a block: windows of windows away
    (1, 3, 6, 1, 8, 8, 3, 0, 1),  # no halo
    (1, 7, 9, 1, 16, 16, 5, 1, 5),  # one query a block, and blocks that reach over the edge
]
LARGE = (1, 9, 12, 1, 16, 16, 10, 3, 1)  # more than one own tile a block, window rows over 16 wide
LAYOUTS = [torch.contiguous_format, torch.channels_last]
plain, triton = forced(halo_attention, "torch"), forced(halo_attention, "triton")


def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format):
    B, H, W, heads, D, Dv, block, halo, stride = shape
    rows = 2 * (block + 2 * halo) - 1
    q = rand((B, heads * D, -(-H // stride), -(-W // stride)), dtype)
    kv = rand((B, heads * (D + Dv), H, W), dtype, 1)
    tables = (rand((rows, D), dtype, seed) / D**0.5 for seed in (2, 3))
    return *(z.contiguous(memory_format=layout) for z in (q, kv)), *tables, heads, block, halo, stride


def loops(q, kv, height_rel, width_rel, heads, block, halo, stride, scale, scale_pos):
    """Query by query, head by head, cell by cell."""
    (B, C, HQ, WQ), (_, _, H, W) = q.shape, kv.shape
    D, a, t = C // heads, block + 2 * halo, block // stride
    Dv = kv.shape[1] // heads - D
    out = torch.empty(B, heads * Dv, HQ, WQ, dtype=q.dtype)
    for b, m, Y, X in itertools.product(range(B), range(heads), range(HQ), range(WQ)):
        query, logits, values = q[b, m * D : (m + 1) * D, Y, X], [], []
        for i, j in itertools.product(range(a), repeat=2):
            r, s = Y // t * block - halo + i, X // t * block - halo + j
            cell = torch.zeros(D + Dv, dtype=q.dtype)
            if 0 <= r < H and 0 <= s < W:
                cell = kv[b, m * (D + Dv) : (m + 1) * (D + Dv), r, s]
            position = query @ (height_rel[i - Y % t + a - 1] + width_rel[j - X % t + a - 1])
            logits.append(scale * (query @ cell[:D]) + position * (scale if scale_pos else 1))
            values.append(cell[D:])
        out[b, m * Dv : (m + 1) * Dv, Y, X] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("scale_pos", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 4, 5, 2, 3, 2, 2, 1, 1), (1, 3, 2, 1, 2, 1, 2, 3, 2), (2, 2, 4, 1, 2, 3, 2, 0, 1)], ids=str
)
def test_reference_is_the_definition(shape, scale_pos):
    args = [z.cpu() if torch.is_tensor(z) else z for z in (*inputs(shape, torch.float64), 0.7, scale_pos)]
    assert_close(reference.halo_attention(*args), loops(*args))


class Published(torch.nn.Module):
    """The module of the fixtures: two projections, the operator, and for `avg_down` or an odd block a pool."""

    def __init__(
        self, state, f, block_size, halo_size, num_heads=8, stride=1, avg_down=False, scale_pos_embed=False, **_
    ):
        super().__init__()
        self.pool = stride > 1 and (avg_down or block_size % stride > 0)
        self.stride = 1 if self.pool else stride
        self.state, self.f, self.rest = state, f, (num_heads, block_size, halo_size, self.stride, None, scale_pos_embed)

    def forward(self, x, layout):
        q = F.conv2d(x, self.state["q.weight"], self.state.get("q.bias"), self.stride)
        kv = F.conv2d(x, self.state["kv.weight"], self.state.get("kv.bias"))
        tables = self.state["pos_embed.height_rel"], self.state["pos_embed.width_rel"]
        out = self.f(*(z.contiguous(memory_format=layout) for z in (q, kv)), *tables, *self.rest)
        return F.avg_pool2d(out, 2) if self.pool else out


@pytest.mark.parametrize("f", [reference.halo_attention, plain], ids=["reference", "eager"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "name", ["b8_h3", "b8_h3_rv2p5", "b8_h3_s2", "b8_h3_scalepos", "b8_h2_dh16", "b8_h2_s2_avgdown", "b7_h2_s2"]
)
def test_published_values(name, layout, f):
    fixture = parity.load("halonet", f"attn_{name}")
    state = {key: value.requires_grad_() for key, value in parity.weights(fixture).items()}
    options = dict(re.findall(r"(\w+)=([\w.]+)", fixture["note"].partition(";")[0]))
    options = {key: value == "True" if value in ("True", "False") else float(value) for key, value in options.items()}
    model = Published(state, f, **{key: int(value) for key, value in options.items()})
    x = parity.image(fixture).requires_grad_()
    out = model(x, layout)
    parity.assert_equal("out", out, fixture["outputs"]["out"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, fixture["outputs"]["grad_x"])
    assert set(state) == set(fixture["grads"])
    for key, expected in fixture["grads"].items():
        assert abs(state[key].grad.norm().item() - expected) <= 1e-9 * expected, key


@pytest.mark.parametrize("chunk", [1, 9000, 4 << 20])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
def test_eager_matches_reference(shape, layout, chunk, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK_BYTES", chunk)
    agree(plain, reference.halo_attention, *inputs(shape, torch.float64, layout), 0.3, True)


@grid(shape=SHAPES, dtype=DTYPES)
def test_triton_matches_reference(shape, dtype):
    check(triton, reference.halo_attention, *inputs(shape, dtype))


@pytest.mark.parametrize("layout", [LAYOUTS[1], pytest.param(LAYOUTS[0], marks=pytest.mark.exhaustive)], ids=str)
def test_triton_with_several_tiles_a_block(layout):
    check(triton, reference.halo_attention, *inputs(LARGE, torch.float32, layout))


@pytest.mark.parametrize("scale_pos", [False, True])
def test_scales_are_parameters(scale_pos):
    check(triton, reference.halo_attention, *inputs(SHAPES[2]), 0.4, scale_pos)


@grid(shape=SHAPES[:3], dtype=DTYPES)
def test_eager_errs_no_more_than_reference(shape, dtype):
    check(plain, reference.halo_attention, *inputs(shape, dtype))


def test_a_map_that_blocks_do_not_divide_is_one_with_zeros_below_and_to_the_right():
    q, kv, *rest = inputs(SHAPES[1], torch.float64)
    padded = reference.halo_attention(F.pad(q, (0, 3, 0, 1)), F.pad(kv, (0, 3, 0, 1)), *rest)
    assert_close(plain(q, kv, *rest), padded[:, :, :7, :5])


@grid(shape=SHAPES[:2], layout=LAYOUTS, f=[triton, plain])
def test_memory_format_is_kept(f, shape, layout):
    q, kv, *rest = inputs(shape, layout=layout)
    keeps_memory_format(lambda q, kv: f(q, kv, *rest), q, kv)


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reads_views_of_bigger_maps(f, layout):
    q, kv, *rest = inputs(SHAPES[0])

    def of_views(f):
        return lambda q, kv: f(q[:, 3:-1, 1:, ::2], kv[:, 2:, :-1, 1:], *rest)

    shapes = (2, q.shape[1] + 4, 5, 16), (2, kv.shape[1] + 2, 5, 9)
    big = (rand(shape, seed=i).contiguous(memory_format=layout) for i, shape in enumerate(shapes))
    check(of_views(f), of_views(reference.halo_attention), *big)


def test_gradient_of_another_memory_format():
    q, *rest = inputs(SHAPES[2])

    def of_q(f):
        return lambda q: f(q, *(t.to(q.dtype) if torch.is_tensor(t) else t for t in rest))

    reads_any_gradient(of_q(triton), of_q(reference.halo_attention), q)


def test_offsets_beyond_31_bits(tmp_path):
    """Rows of both maps 2**30 elements apart."""
    q, kv, *rest = inputs((1, 4, 4, 1, 16, 16, 4, 1, 1), torch.float16)
    size = 3 * 2**30 + 4096
    big = far_apart(tmp_path, 2 * size).split(size)
    far = [z.as_strided(x.shape, (size, 4, 2**30, 1), i * size).copy_(x) for i, (z, x) in enumerate(zip(big, (q, kv)))]
    rows, columns = reference.position_logits(q, *rest[:5][:2], *rest[2:])
    scalars = *rest[2:], 0.25
    near_out, far_out = op.fwd(q, kv, rows, columns, *scalars), op.fwd(*far, rows, columns, *scalars)
    assert all(map(torch.equal, near_out, far_out))
    dout = rand(q.shape, torch.float16, 7)
    near_grads = op.bwd(dout, q, kv, rows, columns, *near_out, *scalars)
    far_grads = op.bwd(dout, *far, rows, columns, *near_out, *scalars)
    assert all(map(torch.equal, near_grads, far_grads))


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_nan_in_a_query_stays_in_its_row(f):
    q, *rest = inputs(SHAPES[0])
    clean, spoilt = evaluate(f, (q, *rest)), q.clone()
    spoilt[1, 3, 2, 5] = math.nan
    out, dq, *_ = evaluate(f, (spoilt, *rest))
    assert out[1, :16, 2, 5].isnan().all()
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[1, :16, 2, 5] = True
    assert_close(out[~hit], clean[0][~hit])
    assert_close(dq[~hit], clean[1][~hit])
    assert dq[1, :16, 2, 5].isnan().all()


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_nan_in_a_key_reaches_the_windows_that_see_it(f):
    q, kv, *rest = inputs((1, 4, 12, 1, 16, 16, 4, 1, 1))
    kv = kv.clone()
    kv[0, 2, 1, 4] = math.nan  # the first column of the second block: the first block's halo
    out = f(q, kv, *rest)
    assert out[..., :8].isnan().all()
    assert not out[..., 8:].isnan().any()


def test_nan_in_a_query_reaches_only_the_keys_that_it_sees():
    q, kv, *rest = inputs((1, 4, 8, 1, 16, 16, 4, 1, 1))
    q = q.clone()
    q[0, 0, 1, 1] = math.nan
    dkv = evaluate(triton, (q, kv, *rest))[2]
    assert dkv[..., :5].isnan().all()
    assert not dkv[..., 5:].isnan().any()


GOOD = dict(zip(("q", "kv", "height_rel", "width_rel", "heads", "block", "halo", "stride"), inputs(SHAPES[0])))
BAD = {
    "rank": (dict(q=rand((32, 4, 8))), r"q must be .*\(B, heads·D, H, W\), got torch.float32 of shape \(32, 4, 8\)"),
    "integers": (dict(kv=torch.ones(2, 64, 4, 8, dtype=torch.int64)), "kv must be floating point .* got torch.int64"),
    "block": (dict(block=0), "block must be at least 1 and halo at least 0, got 0 and 1"),
    "halo": (dict(halo=-1), "block must be .* got 4 and -1"),
    "stride": (dict(stride=3), "stride must divide block = 4, got 3: use queries at full resolution and pool"),
    "heads": (dict(heads=3), "heads must divide the 32 channels of q, got 3"),
    "no heads": (dict(heads=0), "heads must divide .* got 0"),
    "kv channels": (dict(kv=rand((2, 65, 4, 8))), r"kv must have 2·\(16 \+ Dv\) channels, got 65"),
    "no values": (dict(kv=rand((2, 32, 4, 8))), "kv must have .* got 32"),
    "table": (
        dict(height_rel=rand((12, 16))),
        r"height_rel must be .* \(11, 16\) for windows of 6 pixels, .* \(12, 16\)",
    ),
    "table width": (dict(width_rel=rand((11, 8))), r"width_rel must be .* got torch.float32 of shape \(11, 8\)"),
    "map": (dict(q=rand((2, 32, 4, 7))), r"q must be \(2, 32, 4, 8\) for the 4 x 8 map of kv and stride 1, got"),
    "strided map": (dict(stride=2), r"q must be \(2, 32, 2, 4\) for the 4 x 8 map of kv and stride 2, got"),
    "batch": (dict(q=rand((1, 32, 4, 8))), r"q must be \(2, 32, 4, 8\) .* got \(1, 32, 4, 8\)"),
    "dtype": (dict(kv=rand((2, 64, 4, 8), torch.float16)), "kv must be torch.float32 as q is, got torch.float16"),
    "device": (dict(width_rel=torch.ones(11, 16, device="meta")), "width_rel must be on .* as q is, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    change, message = BAD[case]
    refuses(halo_attention, message, **GOOD | change)


def test_what_the_kernels_cannot_take():
    refuses(triton, "a window of 34 pixels", *inputs((1, 2, 2, 1, 16, 16, 2, 16, 1)), error=RuntimeError)
    refuses(triton, "a head dimension over 256", *inputs((1, 2, 2, 1, 16, 257, 2, 0, 1)), error=RuntimeError)


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
@pytest.mark.parametrize("B, H, W", [(0, 6, 5), (2, 0, 5), (2, 6, 0)])
def test_nothing_in_nothing_out(B, H, W, f):
    accepts_empty(f, (B, 12, -(-H // 2), -(-W // 2)), *inputs((B, H, W, 2, 4, 6, 4, 1, 2)))


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_runs_are_equal_to_the_bit(f):
    repeats(f, *inputs(SHAPES[4]))


@FULL
def test_registration(full):
    shape = (1, 2, 3, 1, 16, 16, 2, 1, 1)
    q, kv, *tables, heads, block, halo, stride = inputs(shape)
    for a, b in ((q, kv), (q.contiguous(memory_format=torch.channels_last), kv.mT.contiguous().mT)):
        rows, columns = reference.position_logits(a, *tables, heads, block, halo, stride)
        rest = heads, block, halo, stride, 0.3
        leaves = [z.detach().requires_grad_() for z in (a, b, rows, columns)]
        registers(op.fwd, (*leaves, *rest), full)
        out, lse = op.fwd(a, b, rows, columns, *rest)
        registers(op.bwd, (rand(out.shape).mT.contiguous().mT, a, b, rows, columns, out, lse, *rest), full)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@FULL
def test_registration_of_the_plain_form(layout, full):
    q, kv, *rest = inputs((1, 3, 5, 2, 3, 2, 2, 1, 2), layout=layout)
    leaves = [z.requires_grad_() for z in (q, kv, *rest[:2])]
    rest = *rest[2:], 0.3, True
    registers(eager.plain, (*leaves, *rest), full)
    registers(eager.plain_bwd, (rand((1, 4, 2, 3)), *(z.detach() for z in leaves), *rest), full)


def test_gradients():
    shape = (1, 3, 4, 1, 2, 1, 2, 1, 2)
    gradients_are_right(lambda *z: plain(*z, 1, 2, 1, 2), *inputs(shape, torch.float64)[:4])
    gradients_are_right(
        lambda *z: reference.halo_attention(*z, 1, 2, 1, 2), *inputs(shape, torch.float64)[:4], twice=False
    )


def test_second_derivative_is_refused_on_triton():
    refuses_second_derivative(triton, *inputs((1, 2, 2, 1, 16, 16, 2, 1, 1)))


def test_tables_of_another_type():
    q, kv, *tables = inputs(SHAPES[0])[:4]
    rest = inputs(SHAPES[0])[4:]
    for f in (plain, triton):
        leaves = [z.requires_grad_() for z in (q.half(), kv.half(), *(z.clone() for z in tables))]
        out = f(*leaves, *rest)
        torch.testing.assert_close(out.float(), plain(q, kv, *tables, *rest), rtol=1e-2, atol=1e-2)  # inputs in float16
        out.sum().backward()
        assert [z.grad.dtype for z in leaves] == [torch.float16] * 2 + [torch.float32] * 2


SMALL = (2, 3, 4, 1, 16, 16, 2, 1, 1)
run = functools.partial(halo_attention, heads=1, block=2, halo=1)


@COMPILED
def test_compiles_in_one_graph(name, dynamic):
    args = inputs(SMALL)[:4]
    others = ((args[0][:1], args[1][:1], *args[2:]),) if dynamic else ()
    compiles(lambda *z: run(*z), *args, name=name, dynamic=dynamic, others=others)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports(name):
    args = inputs(SMALL)[:4]
    others = inputs((3, *SMALL[1:]))[:4]
    exports(run, args, others, name, "halo_attention_fwd", batched=(0, 1))


def test_scripts():
    scripted = torch.jit.script(halo_attention)
    for layout in LAYOUTS:
        args = inputs(SHAPES[2], layout=layout)
        assert_close(scripted(*args), plain(*args))


def test_meta_tensors_have_shapes():
    args = [z.to("meta").requires_grad_() if torch.is_tensor(z) else z for z in inputs(SHAPES[1])]
    out = halo_attention(*args)
    assert out.shape == (1, 40, 7, 5)
    out.sum().backward()


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_autocast(f):
    args = [z.double() if torch.is_tensor(z) and f is plain else z for z in inputs(SMALL)]
    if f is plain:
        autocast_changes_nothing(f, *args)  # in float64, as PyTorch's own products
    with torch.autocast(DEVICE, torch.float16):
        out = f(*inputs(SMALL))
    assert out.dtype == torch.float16
    assert_close(out, f(*(z.half() if torch.is_tensor(z) else z for z in inputs(SMALL))))


def test_flops_are_those_of_the_windows():
    B, H, W, heads, D, Dv, block, halo, stride = SHAPES[0]
    q, kv, *tables = (z.requires_grad_() for z in inputs(SHAPES[0])[:4])
    a = block + 2 * halo
    rows, columns = reference.position_logits(q.detach(), *(z.detach() for z in tables), heads, block, halo, stride)
    with FlopCounterMode(display=False) as forward:
        out, _ = op.fwd(q, kv, rows, columns, heads, block, halo, stride, 1.0)
    assert forward.get_total_flops() == 2 * B * H * W * heads * a**2 * (D + Dv)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * B * H * W * heads * a**2 * (3 * D + 2 * Dv)


def test_logits_and_windows_are_not_in_memory():
    """A map of 64 x 64 with 4 heads of 16 channels: its logits alone are 12 maps of q for each image, its windows 6."""
    q, kv, *rest = inputs((2, 64, 64, 4, 16, 16, 8, 3, 1))
    size = q.numel() * q.element_size()
    args = [z.requires_grad_() for z in (q, kv, *rest[:2])]
    with torch.no_grad():
        assert peak_bytes(lambda: plain(q, kv, *rest)) < 1.3 * size + 3 * eager.CHUNK_BYTES
    step = lambda: torch.autograd.grad(plain(*args, *rest[2:]).sum(), args)  # noqa: E731
    assert peak_bytes(step) < 6 * size + 5 * eager.CHUNK_BYTES


def test_kernels_hold_position_logits_by_row_and_column_alone():
    """Of a query: 2a position logits and their gradients, for a² = 36 logits; and nothing of a window's size."""
    q, kv, *rest = inputs((1, 8, 8, 1, 16, 16, 4, 1, 1))
    args = [z.requires_grad_() for z in (q, kv, *rest[:2])]
    size = q.numel() * q.element_size()
    assert peak_bytes(lambda: torch.autograd.grad(triton(*args, *rest[2:]).sum(), args)) < 12 * size


@pytest.mark.parametrize("shape", [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("scale_pos", [False, True])
def test_form_of_saved_graphs(shape, scale_pos):
    tensors = [*inputs(shape, torch.float64), 0.3, scale_pos]
    ours = eager.gathered(*tensors[:4], eager.Settings(*tensors[4:]))
    torch.testing.assert_close(ours, reference.halo_attention(*tensors), rtol=1e-11, atol=1e-11)
