"""Bi-level routing attention: the reference against loops, the other forms against the reference, and the contract."""

import itertools
import math

import pytest
import torch
from saccade.ops import backend, bilevel_routing_attention, region_routing
from saccade.ops.bilevel_routing import eager, kernel, op, reference
from support.budget import assert_close
from support.ops import (
    COMPILED,
    DEVICE,
    DTYPES,
    FULL,
    check,
    compiles,
    evaluate,
    exports,
    far_apart,
    gradients_are_right,
    grid,
    rand,
    refuses,
    refuses_second_derivative,
    registers,
    repeats,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)

FORMS = ["gather", "dense"]
#         B, regions, region, K, heads, D
SHAPES = [
    (2, (2, 3), (3, 5), 2, 2, 32),
    (1, (3, 3), (2, 2), 4, 1, 24),  # a head dimension that is no power of two
    (1, (1, 3), (7, 5), 1, 1, 64),  # more than one tile a region; K = 1
    (1, (2, 2), (1, 3), 4, 2, 16),  # K = P
    (1, (1, 1), (3, 3), 1, 1, 16),  # one region
    (1, (5, 3), (1, 1), 3, 1, 16),  # of one token
    (1, (5, 8), (1, 2), 6, 1, 16),  # more regions than there are bits in a word
]


@pytest.fixture
def form(request, monkeypatch):
    """Forces one form of the kernels, whatever the shape."""
    monkeypatch.setattr(kernel, "is_dense", lambda t, K, P: request.param == "dense")


def routes(B: int, P: int, K: int, dtype=torch.int64, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(B, P, P, generator=g).argsort(-1)[..., :K].to(DEVICE, dtype)


def inputs(shape, dtype=torch.float32, index=torch.int64):
    B, (R, S), (h, w), K, heads, D = shape
    return rand((B, R * h, S * w, 3 * heads * D), dtype), routes(B, R * S, K, index), heads, (R, S)


def triton(qkv, idx, heads, regions, scale=None):
    with backend("triton"):
        return bilevel_routing_attention(qkv, idx, heads, regions, scale)


def plain(qkv, idx, heads, regions, scale=None):
    return reference.bilevel_routing_attention(qkv, idx, heads, regions, scale or (qkv.shape[-1] // 3) ** -0.5)


def loops(qkv, idx, heads, regions):
    """Query by query, head by head, key by key."""
    B, H, W, C3 = qkv.shape
    (R, S), C = regions, C3 // 3
    h, w, D = H // R, W // S, C3 // 3 // heads
    out = torch.empty(B, H, W, C, dtype=qkv.dtype)
    for b, y, x, m in itertools.product(range(B), range(H), range(W), range(heads)):
        q = qkv[b, y, x, m * D : (m + 1) * D]
        logits, values = [], []
        for r in idx[b, y // h * S + x // w].tolist():
            for i, j in itertools.product(range(h), range(w)):
                token = qkv[b, r // S * h + i, r % S * w + j]
                logits.append(q @ token[C + m * D : C + (m + 1) * D] * C**-0.5)
                values.append(token[2 * C + m * D : 2 * C + (m + 1) * D])
        out[b, y, x, m * D : (m + 1) * D] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@pytest.mark.parametrize("shape", [(2, (2, 3), (3, 2), 2, 2, 4), (1, (2, 1), (1, 3), 2, 1, 5)], ids=str)
def test_reference_is_the_definition(shape):
    qkv, idx, heads, regions = inputs(shape, torch.float64)
    assert_close(plain(qkv, idx, heads, regions).cpu(), loops(qkv.cpu(), idx.cpu(), heads, regions))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_matches_reference(shape):
    with backend("torch"):
        for ours, exact in zip(
            evaluate(bilevel_routing_attention, inputs(shape, torch.float64)),
            evaluate(plain, inputs(shape, torch.float64)),
            strict=True,
        ):
            assert_close(ours, exact)


@grid(indirect=["form"], also=[(SHAPES[-1], "dense", DTYPES[0])], shape=SHAPES, form=FORMS, dtype=DTYPES)
def test_triton_matches_reference(shape, form, dtype):
    check(triton, plain, *inputs(shape, dtype, torch.int32))


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_a_region_that_all_chose_and_one_that_nobody_did(form):
    qkv, _, heads, regions = inputs((1, (2, 2), (3, 3), 1, 1, 16))
    idx = torch.tensor([[[2], [2], [2], [0]]], device=DEVICE)
    check(triton, plain, qkv, idx, heads, regions)
    dqkv = evaluate(triton, (qkv, idx, heads, regions))[1]
    assert not dqkv[0, :3, 3:, 16:].any()  # region 1's dk and dv: zero, not what memory happened to hold


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_scale_is_a_parameter(form):
    check(triton, plain, *inputs(SHAPES[1]), 0.7)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_reads_a_view_of_a_bigger_map(form):
    _, idx, heads, regions = inputs(SHAPES[1])

    def of_view(f):
        return lambda big: f(big[:, 1:-2, 2:-1, 8:80], idx, heads, regions)

    check(of_view(triton), of_view(plain), rand((1, 9, 9, 96)))


def test_channels_first_memory_is_copied():
    qkv, idx, heads, regions = inputs(SHAPES[1])
    channels_first = qkv.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(triton(channels_first, idx, heads, regions), triton(qkv, idx, heads, regions))


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_offsets_beyond_31_bits(form, tmp_path):
    """Rows of the map 2**30 elements apart."""
    qkv, idx, heads, regions = inputs((1, (2, 1), (2, 2), 1, 1, 16), torch.float16)
    size = 3 * 2**30 + 1024
    big = far_apart(tmp_path, size)
    apart = big.as_strided(qkv.shape, (size, 2**30, 48, 1))
    apart.copy_(qkv)
    out = triton(apart, idx, heads, regions)
    assert torch.equal(out, triton(qkv, idx, heads, regions))
    lse = kernel.fwd(apart, idx, heads, regions, 0.25)[1]
    near, far = (kernel.bwd(out, x, idx, out, lse, heads, regions, 0.25) for x in (qkv, apart))
    assert torch.equal(near, far)


def test_division_by_a_multiplication():
    for d in (1, 2, 3, 7, 16, 21, 273, 308, 65535, 65536):
        for n in {0, 1, d - 1, d, d + 1, 2 * d - 1, 1000 * d - 1, 1000 * d, min(2**31 - 1, 2**44 // d - 1)}:
            assert n * kernel._magic(d) >> kernel.SHIFT.value == n // d or n / d >= 2**19


def test_form_by_shape():
    assert kernel.is_dense(t=4, K=16, P=49)  # stage 3 at 224²
    assert not kernel.is_dense(t=64, K=1, P=49)
    assert not kernel.is_dense(t=16, K=4, P=49)
    assert not kernel.is_dense(t=16, K=16, P=64)  # stage 3 at 512²
    assert not kernel.is_dense(t=24, K=16, P=256)


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_nan_in_one_query_stays_in_its_row(form):
    qkv, idx, heads, regions = inputs(SHAPES[1])
    clean = triton(qkv, idx, heads, regions)
    qkv = qkv.clone()
    qkv[0, 3, 2, 0] = float("nan")
    out, dqkv = evaluate(triton, (qkv, idx, heads, regions))
    assert out[0, 3, 2].isnan().all()
    out[0, 3, 2] = clean[0, 3, 2]
    assert torch.equal(out, clean.double())
    # Its keys, and they alone, have a NaN gradient: region 4's query (row-major over 3 x 3 regions of 2 x 2).
    seen = torch.zeros(9, dtype=torch.bool, device=DEVICE)
    seen[idx[0, 4]] = True
    dk = dqkv[0, ..., 24:48].reshape(3, 2, 3, 2, 24).transpose(1, 2).flatten(0, 1).isnan()
    assert torch.equal(dk.all((1, 2, 3)), seen)
    assert torch.equal(dk.any((1, 2, 3)), seen)


@pytest.mark.parametrize("wrong", [-1, 9, 2**32 + 1, -(2**40)])
@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_an_index_out_of_range_is_nan_on_triton(form, wrong):
    qkv, idx, heads, regions = inputs(SHAPES[1])
    clean = triton(qkv, idx, heads, regions)
    idx = idx.clone()
    idx[0, 4, 2] = wrong
    out, dqkv = evaluate(triton, (qkv, idx, heads, regions))
    bad = torch.zeros(6, 6, dtype=torch.bool, device=DEVICE)
    bad[2:4, 2:4] = True
    assert torch.equal(out[0].isnan().all(-1), bad)
    assert torch.equal(out[0][~bad], clean[0][~bad].double())
    assert torch.equal(dqkv[0, ..., :24].isnan().all(-1), bad)
    assert torch.equal(dqkv[0, ..., :24].isnan().any(-1), bad)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_an_index_out_of_range_raises_in_pytorch(wrong):
    qkv, idx, heads, regions = inputs(SHAPES[1])
    idx[0, 4, 2] = wrong
    with backend("torch"), pytest.raises(IndexError, match="idx must be from 0 to 8, got"):
        bilevel_routing_attention(qkv, idx, heads, regions)


BAD = {
    "rank": (dict(qkv=rand((6, 6, 96))), r"qkv must be .*\(B, H, W, 3C\), got torch.float32 of shape \(6, 6, 96\)"),
    "thirds": (dict(qkv=rand((1, 6, 6, 97))), r"qkv must be .*\(1, 6, 6, 97\)"),
    "integers": (dict(qkv=torch.ones(1, 6, 6, 96, dtype=torch.int64)), "qkv must be floating point"),
    "heads": (dict(heads=5), "heads must divide the C = 32 channels of qkv, got 5"),
    "no heads": (dict(heads=0), "heads must divide .* got 0"),
    "height": (dict(regions=(4, 3)), "regions must divide the 6 x 6 map of qkv, got 4 x 3"),
    "width": (dict(regions=(3, 4)), "regions must divide the 6 x 6 map of qkv, got 3 x 4"),
    "no regions": (dict(regions=(0, 3)), "regions must divide .* got 0 x 3"),
    "idx rank": (dict(idx=torch.zeros(9, 2, dtype=torch.int64)), r"idx must be \(1, 9, K\) .* got \(9, 2\)"),
    "idx batch": (dict(idx=torch.zeros(2, 9, 2, dtype=torch.int64)), r"idx must be \(1, 9, K\) .* got \(2, 9, 2\)"),
    "idx regions": (dict(idx=torch.zeros(1, 8, 2, dtype=torch.int64)), r"idx must be .* got \(1, 8, 2\)"),
    "no K": (dict(idx=torch.zeros(1, 9, 0, dtype=torch.int64)), r"K from 1 to 9, .* got \(1, 9, 0\)"),
    "K over P": (dict(idx=torch.zeros(1, 9, 10, dtype=torch.int64)), r"K from 1 to 9, .* got \(1, 9, 10\)"),
    "idx dtype": (dict(idx=torch.zeros(1, 9, 2)), "idx must be int32 or int64, got torch.float32"),
    "idx device": (dict(idx=torch.zeros(1, 9, 2, dtype=torch.int64, device="meta")), "idx must be on .* got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    good = dict(qkv=rand((1, 6, 6, 96)), idx=routes(1, 9, 2), heads=2, regions=(3, 3))
    change, message = BAD[case]
    refuses(bilevel_routing_attention, message, **good | change)


def test_head_dimensions_over_128_are_not_for_triton():
    args = inputs((1, (1, 2), (2, 2), 1, 1, 136))
    bilevel_routing_attention(*args)
    with pytest.raises(RuntimeError, match=r"cannot run: a head dimension of 136, over 128$"):
        triton(*args)


@pytest.mark.parametrize("name", ["torch", "triton"])
@pytest.mark.parametrize("B, H, W", [(0, 6, 6), (2, 0, 6), (2, 6, 0)])
def test_nothing_in_nothing_out(B, H, W, name):
    qkv = rand((B, H, W, 96)).requires_grad_()
    idx = region_routing(qkv, (2, 2), 3)
    assert idx.shape == (B, math.ceil(H / 2) * math.ceil(W / 2), 3)
    with backend(name):
        out = bilevel_routing_attention(qkv, idx, 2, (H // 2, W // 2))
    assert out.shape == (B, H, W, 32)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_runs_are_equal_to_the_bit(form):
    repeats(triton, *inputs(SHAPES[3]))


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operators made."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(tree):
            return {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(tree) if torch.is_tensor(x)}

        out = func(*args, **kwargs or {})
        given = storages((args, kwargs))
        self.made |= {key: storage for key, storage in storages(out).items() if key not in given}
        return out

    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.made.values())


@pytest.mark.parametrize("form", FORMS, indirect=True)
def test_neither_logits_nor_gathered_keys_are_kept(form, monkeypatch):
    class NotLaunched:  # the interpreter would copy every argument
        def __getitem__(self, grid):
            return lambda *args, **options: None

    for name in ("fwd_kernel", "dq_kernel", "dkdv_kernel"):
        monkeypatch.setattr(kernel, name, NotLaunched())
    qkv, idx, *rest = *inputs((1, (2, 2), (8, 8), 2, 2, 16)), 0.2
    tables = 20 * 4 * 64  # bits or inverse list, for 4 regions, and what it takes to make them
    with Allocations() as forward:
        out, lse = kernel.fwd(qkv, idx, *rest)
    dout = rand(out.shape)
    with Allocations() as backward:
        dqkv = kernel.bwd(dout, qkv, idx, out, lse, *rest)
    assert out.nbytes + lse.nbytes <= forward.total() <= out.nbytes + lse.nbytes + tables
    assert dqkv.nbytes + lse.nbytes <= backward.total() <= dqkv.nbytes + lse.nbytes + tables
    assert tables < qkv.nbytes // 10  # small enough for anything else to show


@FULL
def test_registration(full):
    qkv, idx, heads, regions = inputs(SHAPES[1])
    wide = rand((1, 9, 9, 96)).requires_grad_()[:, 1:-2, 2:-1, 8:80]
    for x in (qkv, qkv.clone().requires_grad_(), wide, qkv.transpose(1, 2)):
        registers(op.fwd, (x, idx, heads, *regions, 0.2), full)
    out, lse = op.fwd(qkv, idx, heads, *regions, 0.2)
    for dout in (rand(out.shape), rand(out.shape).transpose(1, 2)):
        registers(op.bwd, (dout, qkv, idx, out, lse, heads, *regions, 0.2), full)
        registers(op.bwd, (dout, wide.detach(), idx, out, lse, heads, *regions, 0.2), full)


@pytest.mark.parametrize("f", [eager.bilevel_routing_attention, plain], ids=["eager", "reference"])
@pytest.mark.parametrize("shape", [(1, (3, 3), (2, 2), 4, 2, 2), (1, (2, 2), (1, 3), 4, 2, 2)], ids=str)
def test_gradcheck(shape, f):
    gradients_are_right(f, *inputs(shape, torch.float64), 0.6, twice=False)


def test_second_derivative_is_refused_on_triton():
    refuses_second_derivative(triton, *inputs(SHAPES[1]))


def model(x):
    return bilevel_routing_attention(x, region_routing(x, (2, 2), 3), 2, (3, 3))


@COMPILED
def test_compiles_whole(name, dynamic):
    others = ((rand((3, 6, 6, 96)),),) if dynamic else ()
    compiles(model, rand((2, 6, 6, 96)), name=name, dynamic=dynamic, others=others)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports(name):
    exports(model, (rand((2, 6, 6, 96)),), (rand((3, 6, 6, 96), seed=1),), name, "bilevel_routing_fwd")


def test_scripts():
    x = rand((2, 6, 6, 96))
    idx = torch.jit.script(region_routing)(x, (2, 2), 3)
    assert torch.equal(idx, region_routing(x, (2, 2), 3))
    with backend("torch"):
        expected = bilevel_routing_attention(x, idx, 2, (3, 3))
    assert_close(torch.jit.script(bilevel_routing_attention)(x, idx, 2, (3, 3)), expected)


def test_meta_tensors_have_shapes():
    assert model(torch.empty(2, 6, 6, 96, device="meta")).shape == (2, 6, 6, 32)


def test_autocast_reaches_triton():
    qkv, *rest = inputs(SHAPES[1])
    with torch.autocast(DEVICE, torch.float16):
        out = triton(qkv.requires_grad_(), *rest)
    assert out.dtype == torch.float16
    assert torch.equal(out, triton(qkv.half(), *rest))
    out.sum().backward()
    assert qkv.grad.dtype == torch.float32


def test_flops_are_those_of_the_routed_keys():
    (B, (R, S), (h, w), K, heads, D), args = SHAPES[0], inputs(SHAPES[0])
    args[0].requires_grad_()
    N, t, C = R * h * S * w, h * w, heads * D
    with FlopCounterMode(display=False) as forward:
        out = triton(*args)
    assert forward.get_total_flops() == 2 * 2 * B * N * K * t * C
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 5 * 2 * B * N * K * t * C


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("H, W, h, w", [(6, 8, 3, 2), (7, 10, 2, 4), (3, 3, 5, 5)])
def test_routing_chooses_the_nearest_means(H, W, h, w, dtype):
    qkv = rand((2, H, W, 3 * 8), dtype)
    P = math.ceil(H / h) * math.ceil(W / w)
    K = min(3, P)
    tiles = [(slice(y, y + h), slice(x, x + w)) for y in range(0, H, h) for x in range(0, W, w)]
    means = torch.stack([qkv.double()[:, ys, xs].mean((1, 2)) for ys, xs in tiles], 1)
    expected = (means[..., :8] @ means[..., 8:16].mT).topk(K).indices
    idx = region_routing(qkv, (h, w), K)
    assert (idx.shape, idx.dtype, idx.requires_grad) == ((2, P, K), torch.int64, False)
    assert torch.equal(idx.sort(-1).values, expected.sort(-1).values)


def test_routing_under_autocast_is_that_in_float32():
    qkv = rand((4, 16, 16, 96))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(region_routing(qkv, (2, 2), 8), region_routing(qkv.double(), (2, 2), 8))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(qkv=rand((6, 6, 96))), r"qkv must be .* \(6, 6, 96\)"),
        (dict(region_size=(0, 2)), "region_size must be at least 1 x 1, got 0 x 2"),
        (dict(topk=10), "topk must be from 1 to 9, the number of 2 x 2 regions in a 6 x 6 map, got 10"),
        (dict(topk=0), "topk must be from 1 to 9, .* got 0"),
    ],
)
def test_bad_routing_is_named_in_one_sentence(change, message):
    refuses(region_routing, message, **dict(qkv=rand((1, 6, 6, 96)), region_size=(2, 2), topk=3) | change)
