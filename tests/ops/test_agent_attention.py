"""Agent attention: the reference against loops and published values, the other forms against it, and the contract."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import agent_attention, pool_agents, resize_agent_bias
from saccade.ops.agent_attention import eager, kernel, op, reference, tables
from support import parity
from support.budget import assert_close
from support.ops import (
    COMPILED,
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
triton, plain = forced(agent_attention, "triton"), forced(agent_attention, "torch")
FORMS = pytest.mark.parametrize("f", [plain, triton], ids=["torch", "triton"])

#          B, map of queries, map of keys, heads, D, agents, side of the block, class token, convolution
SHAPES = {
    "tiles": (2, (5, 7), (5, 7), 2, 8, 9, 7, False, True),
    "token": (2, (4, 6), (4, 6), 2, 24, 4, 3, True, True),
    "bare": (2, (3, 3), (2, 2), 2, 8, 1, 2, False, False),  # keys from a smaller map
    "reduced": (1, (4, 4), (2, 2), 1, 8, 4, 7, False, True),  # which the values of the convolution are resized to
    "many agents": (1, (4, 5), (4, 5), 1, 8, 70, 7, True, True),  # more than one tile of them
    "long": (1, (9, 15), (9, 15), 1, 8, 3, 7, False, True),  # more than one tile of tokens
}


def inputs(shape, dtype=torch.float32) -> list:
    """q, k and v from one packed tensor where they can be; then agents and parameters, the last two those given."""
    B, (h, w), (kh, kw), heads, D, a, S, token, conv = shape
    C, T = heads * D, int(token)
    sizes = [(B, T + h * w, C), (B, T + kh * kw, C), (B, T + kh * kw, C), (B, a, C)]
    for y, x in ((kh, kw), (h, w)):
        sizes += [(heads, a, S, S), (heads, a, y), (heads, a, x)]
    sizes += [(heads, a)] * 2 * token + [(C, 1, 3, 3), (C,)] * conv
    return [rand(size, dtype, i) for i, size in enumerate(sizes)]


def flat(f, shape, scale=None):
    """f as a function of tensors alone."""
    _, _, _, heads, _, _, _, token, conv = shape

    def run(q, k, v, agents, *rest):
        tokens, dwc = rest[6:8] if token else None, rest[-2:] if conv else (None, None)
        return f(q, k, v, agents, tuple(rest[:3]), tuple(rest[3:6]), heads, tokens, *dwc, scale)

    return run


def loops(q, k, v, agents, key_bias, query_bias, heads, token_bias, dwc_weight, dwc_bias, scale):
    """Image by image, head by head, token by token."""

    def bias(factors, token, j, m, n):
        block, rows, columns = (x[j, m] for x in factors)
        if token is not None:
            if n == 0:
                return token[j, m]
            n -= 1
        y, x = divmod(n, len(columns))
        S = len(block)
        sy, sx = (max(0.0, (i + 0.5) * S / len(of) - 0.5) for i, of in ((y, rows), (x, columns)))
        (y0, fy), (x0, fx) = ((int(s), s - int(s)) for s in (sy, sx))
        y1, x1 = min(y0 + 1, S - 1), min(x0 + 1, S - 1)
        top = (1 - fx) * block[y0, x0] + fx * block[y0, x1]
        bottom = (1 - fx) * block[y1, x0] + fx * block[y1, x1]
        return (1 - fy) * top + fy * bottom + rows[y] + columns[x]

    (B, N, C), M, a, T = q.shape, k.shape[1], agents.shape[1], int(token_bias is not None)
    key_token, query_token = token_bias or (None, None)
    D = C // heads
    out = torch.zeros_like(q)
    for b in range(B):
        for j in range(heads):
            own = slice(j * D, (j + 1) * D)
            Q, K, V, A = (x[b, :, own] for x in (q, k, v, agents))
            s1 = torch.tensor(
                [[scale * A[m] @ K[n] + bias(key_bias, key_token, j, m, n) for n in range(M)] for m in range(a)]
            )
            s2 = torch.tensor(
                [[scale * A[m] @ Q[n] + bias(query_bias, query_token, j, m, n) for m in range(a)] for n in range(N)]
            )
            out[b, :, own] = s2.double().softmax(1) @ (s1.double().softmax(1) @ V)
    if dwc_weight is not None:
        h, w = query_bias[1].shape[2], query_bias[2].shape[2]
        for y in range(h):
            for x in range(w):
                out[:, T + y * w + x] += dwc_bias
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        if 0 <= y + dy < h and 0 <= x + dx < w:
                            out[:, T + y * w + x] += dwc_weight[:, 0, dy + 1, dx + 1] * v[:, T + (y + dy) * w + x + dx]
    return out


@pytest.mark.parametrize("name", ["tiles", "token", "bare"])
def test_reference_is_the_definition(name):
    args = inputs(SHAPES[name], torch.float64)
    expected = flat(loops, SHAPES[name], 0.7)(*args)
    assert_close(flat(reference.agent_attention, SHAPES[name], 0.7)(*args), expected)


@pytest.mark.parametrize("name", SHAPES)
def test_torch_matches_reference(name):
    shape = SHAPES[name]
    agree(flat(plain, shape), flat(reference.agent_attention, shape), *inputs(shape, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_errs_no_more_than_reference(dtype):
    shape = SHAPES["tiles"]
    check(flat(plain, shape), flat(reference.agent_attention, shape), *inputs(shape, dtype))


def test_flash_and_chunks_change_nothing(monkeypatch):
    shape = SHAPES["bare"]
    args = inputs(shape, torch.float64)
    monkeypatch.setattr(eager, "FLASH_AGENTS", 1)
    monkeypatch.setattr(eager, "CHUNK_BYTES", 1)
    agree(flat(plain, shape), flat(reference.agent_attention, shape), *args)


# The published modules, made of linear layers around the operator.


def biases(state):
    """(block, rows, columns) of B1 and of B2; the published tables of B2 have the agents last."""
    an, na, ah, aw, ha, wa = (state[f"attn.{name}_bias"] for name in ("an", "na", "ah", "aw", "ha", "wa"))
    return (an, ah[0, ..., 0], aw[0, :, :, 0]), (na, ha[0, :, :, 0].mT, wa[0, :, 0].mT)


def linear(state, name, x):
    return F.linear(x, state[f"attn.{name}.weight"], state[f"attn.{name}.bias"])


def module(f, state, x, heads, size, grid, T=0, sr=1):
    """Swin, PVT and DeiT: (B, T + h·w, C) -> out, and what lies before the output projection, and the agents."""
    C = x.shape[2]
    if "attn.qkv.weight" in state:
        q, k, v = linear(state, "qkv", x).chunk(3, -1)
    else:
        y = x
        if sr > 1:
            y = x.mT.unflatten(2, size)
            y = F.conv2d(y, state["attn.sr.weight"], state["attn.sr.bias"], stride=sr).flatten(2).mT
            y = F.layer_norm(y, (C,), state["attn.norm.weight"], state["attn.norm.bias"])
        q, (k, v) = linear(state, "q", x), linear(state, "kv", y).chunk(2, -1)
    agents = pool_agents(q[:, T:].unflatten(1, size), grid)
    key_bias, query_bias = biases(state)
    keys = size[0] // sr, size[1] // sr
    if (len(key_bias[1][0, 0]), len(key_bias[2][0, 0])) != keys or key_bias[0].shape[1] != grid[0] * grid[1]:
        key_bias, query_bias = (resize_agent_bias(b, s, grid) for b, s in ((key_bias, keys), (query_bias, size)))
    token = (state["attn.ac_bias"][0, :, :, 0], state["attn.ca_bias"][0, :, 0]) if T else None
    out = f(q, k, v, agents, key_bias, query_bias, heads, token, state["attn.dwc.weight"], state["attn.dwc.bias"])
    return linear(state, "proj", out), out, agents


def striped(f, state, x, heads, size, grid, split):
    """CSwin: q, k and v stacked (3, B, h·w, C), in vertical stripes of that width."""
    h, w = size
    s = x.unflatten(2, (h, w // split, split)).permute(0, 1, 3, 2, 4, 5).flatten(1, 2).flatten(2, 3)
    q, k, v = s
    agents = pool_agents(q.unflatten(1, (h, split)), grid)
    conv = state["attn.get_v.weight"], state["attn.get_v.bias"]
    out = f(q, k, v, agents, *biases(state), heads, None, *conv)
    out = out.unflatten(0, (-1, w // split)).unflatten(2, (h, split)).transpose(1, 2).flatten(1, 3)
    return out, None, agents


MODULES = {
    "module_swin_d64_h2_w8_a4": functools.partial(module, heads=2, size=(8, 8), grid=(2, 2)),
    "module_swin_d96_h3_w14_a9": functools.partial(module, heads=3, size=(14, 14), grid=(3, 3)),
    "module_pvt_d64_h1_hw16_a9": functools.partial(module, heads=1, size=(16, 16), grid=(3, 3)),
    "module_pvt_d64_h2_hw16_a16_sr2": functools.partial(module, heads=2, size=(16, 16), grid=(4, 4), sr=2),
    "module_deit_d64_h4_w7_a9": functools.partial(module, heads=4, size=(7, 7), grid=(3, 3), T=1),
    "module_cswin_d32_h2_r8_full_a16": functools.partial(striped, heads=2, size=(8, 8), grid=(4, 4), split=8),
    "module_cswin_d32_h2_r8_vert4_a4": functools.partial(striped, heads=2, size=(8, 8), grid=(2, 2), split=4),
    "module_downstream_swin_d64_h2_10x13_a5x6": functools.partial(module, heads=2, size=(10, 13), grid=(5, 6)),
    "module_downstream_pvt_d64_h2_9x12_a6x8": functools.partial(module, heads=2, size=(9, 12), grid=(6, 8)),
}


def assert_gradients(state, expected):
    assert set(state) == set(expected)
    for key, norm in expected.items():
        assert abs(state[key].grad.norm().item() - norm) <= 1e-9 * norm, key


PLAIN = pytest.mark.parametrize("f", [reference.agent_attention, plain], ids=["reference", "torch"])


@PLAIN
@pytest.mark.parametrize("name", MODULES)
def test_published_modules(name, f):
    fixture = parity.load("agent", name)
    state = {key: value.requires_grad_() for key, value in parity.weights(fixture).items()}
    x = parity.image(fixture).requires_grad_()
    out, before, agents = MODULES[name](f, state, x)
    expected = fixture["outputs"]
    parity.assert_equal("out", out, expected["out"])
    pooled = agents.mT.reshape(expected["pooled_q"]["shape"])
    parity.assert_equal("pooled_q", pooled, expected["pooled_q"])
    if before is not None:
        parity.assert_equal("before_proj", before, expected["before_proj"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, expected["grad_x"])
    assert_gradients(state, fixture["grads"])


@PLAIN
@pytest.mark.parametrize("name, heads, side, p", [("d32_h2_n64_a16", 2, 8, 4), ("d96_h3_n196_a9", 3, 14, 3)])
def test_published_operator_with_sharp_softmaxes(name, heads, side, p, f):
    fixture = parity.load("agent", f"op_sharp_{name}")
    state = {key: value.requires_grad_() for key, value in parity.weights(fixture).items()}
    x = parity.image(fixture).requires_grad_()
    q, k, v = 3 * x[0], 3 * x[1], x[2]
    agents = pool_agents(q.unflatten(1, (side, side)), (p, p))
    conv = state["attn.get_v.weight"], state["attn.get_v.bias"]
    out = f(q, k, v, agents, *biases(state), heads, None, *conv)
    parity.assert_equal("out", out, fixture["outputs"]["out"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    for i, of in enumerate("qkv"):
        parity.assert_equal(f"grad_{of}", x.grad[i], fixture["outputs"][f"grad_{of}"])
    assert_gradients(state, fixture["grads"])


@grid(name=SHAPES, dtype=[torch.float32, torch.float16])
def test_triton_matches_reference(name, dtype):
    shape = SHAPES[name]
    check(flat(triton, shape), flat(reference.agent_attention, shape), *inputs(shape, dtype))


@FORMS
def test_reads_views_of_packed_projections(f):
    shape = SHAPES["tiles"]
    rest = [x.half() for x in inputs(shape)[3:]]

    def of_views(f):
        return lambda qkv, *rest: flat(f, shape)(*qkv[:, 1:-1].chunk(3, -1), *rest)

    check(of_views(f), of_views(reference.agent_attention), rand((2, 37, 48), torch.float16), *rest)


@FORMS
def test_reads_other_layouts(f):
    shape = SHAPES["bare"]
    q, k, v, agents, *rest = inputs(shape)
    strange = (q.mT.contiguous().mT, k.transpose(0, 1).contiguous().transpose(0, 1), v, agents.mT.contiguous().mT)
    exact = evaluate(flat(f, shape), (q, k, v, agents, *rest))
    for ours, expected in zip(evaluate(flat(f, shape), (*strange, *rest)), exact, strict=True):
        assert_close(ours.float(), expected.float())


def test_gradient_of_another_memory_format():
    shape = SHAPES["bare"]
    q, *rest = inputs(shape)

    def of_q(f):
        return lambda q: flat(f, shape)(q, *(t.to(q.dtype) for t in rest))

    reads_any_gradient(of_q(triton), of_q(reference.agent_attention), q)


def test_offsets_beyond_31_bits(tmp_path):
    """Tokens 2**28 elements apart."""
    shape = (1, (3, 3), (3, 3), 1, 8, 2, 2, False, True)
    q, k, v, *rest = inputs(shape, torch.float16)
    size = 9 * 2**28
    big = far_apart(tmp_path, size)
    q2, k2, v2 = (big.as_strided(x.shape, (size, 2**28, 1), 8 * i).copy_(x) for i, x in enumerate((q, k, v)))
    heads, scale, tables = 1, 0.3, kernel_tables(shape, rest)
    near, far = (kernel.fwd(*xs, rest[0], *tables, *rest[-2:], heads, scale) for xs in ((q, k, v), (q2, k2, v2)))
    assert all(map(torch.equal, near, far))
    dout, saved = rand(q.shape, torch.float16, 7), near[1:]
    dout2 = big.as_strided(q.shape, (size, 2**28, 1), 24).copy_(dout)
    near = kernel.bwd(dout, q, k, v, rest[0], *tables, *rest[-2:], *saved, heads, scale)
    far = kernel.bwd(dout2, q2, k2, v2, rest[0], *tables, *rest[-2:], *saved, heads, scale)
    assert all(map(torch.equal, near, far))


def kernel_tables(shape, rest):
    """What the kernels are given of the biases in inputs(shape)[3:]."""
    tokens = rest[7:9] if shape[7] else (None, None)
    return tables.for_kernels(tuple(rest[1:4]), tokens[0]), tables.for_kernels(tuple(rest[4:7]), tokens[1])


@FORMS
def test_nan_in_a_query_stays_in_its_row(f):
    shape = SHAPES["token"]
    q, *rest = inputs(shape)
    clean = flat(f, shape)(q, *rest)
    q[1, 5, 30] = math.nan
    out = flat(f, shape)(q, *rest)
    assert out[1, 5].isnan().any()
    out[1, 5] = clean[1, 5]
    assert torch.equal(out, clean)


BAD = {
    "rank": (dict(q=rand((8, 5))), r"q must be .*\(B, N, C\), got torch.float32 of shape \(8, 5\)"),
    "integers": (dict(q=torch.ones(2, 35, 16, dtype=torch.int64)), "q must be floating point .* got torch.int64"),
    "heads": (dict(heads=3), "heads must divide the C = 16 channels of q, got 3"),
    "keys": (dict(k=rand((2, 35, 8))), r"k must be \(2, tokens, 16\) to match q, got \(2, 35, 8\)"),
    "batch": (dict(agents=rand((1, 9, 16))), r"agents must be \(2, tokens, 16\) to match q, got \(1, 9, 16\)"),
    "dtype": (dict(v=rand((2, 35, 16), torch.float16)), "v must be torch.float32 as q is, got torch.float16"),
    "values": (dict(v=rand((2, 34, 16))), r"v must be \(2, 35, 16\) as k is, got \(2, 34, 16\)"),
    "no agent": (dict(agents=rand((2, 0, 16))), "agents must have at least one token, got none"),
    "factors": (
        dict(key_bias=(rand((2, 9, 7, 7)), rand((2, 9, 5)), rand((9, 7)))),
        r"key_bias must be block \(2, 9, S, S\), rows \(2, 9, h\) and columns \(2, 9, w\), got .* \(9, 7\)",
    ),
    "two factors": (dict(query_bias=(rand((2, 9, 7, 7)), rand((2, 9, 5)))), "query_bias must be three .* tensors"),
    "map": (
        dict(query_bias=(rand((2, 9, 7, 7)), rand((2, 9, 5)), rand((2, 9, 6)))),
        "query_bias must fit the 35 tokens of q, got a bias for a map of 5 x 6",
    ),
    "token": (
        dict(token_bias=(rand((2, 9)), rand((2, 9)))),
        "key_bias must fit the 35 tokens of k, the first a class token, got a bias for a map of 5 x 7",
    ),
    "dwc_weight": (dict(dwc_weight=rand((16, 3, 3))), r"dwc_weight must be \(16, 1, 3, 3\), got \(16, 3, 3\)"),
    "dwc_bias": (dict(dwc_bias=rand((8,))), r"dwc_bias must be \(16,\), got \(8,\)"),
    "bias alone": (dict(dwc_weight=None), "dwc_bias must be None if dwc_weight is None"),
    "device": (dict(dwc_bias=torch.ones(16, device="meta")), "dwc_bias must be on .* as q is, got meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_in_one_sentence(case):
    q, k, v, agents, *rest = inputs(SHAPES["tiles"])
    good = dict(q=q, k=k, v=v, agents=agents, key_bias=tuple(rest[:3]), query_bias=tuple(rest[3:6]), heads=2)
    change, message = BAD[case]
    refuses(agent_attention, message, **good | dict(dwc_weight=rest[-2], dwc_bias=rest[-1]) | change)


def test_bad_helpers_input_is_named_in_one_sentence():
    refuses(pool_agents, r"q must be .*\(B, h, w, C\), got .* \(2, 9, 4\)", rand((2, 9, 4)), (2, 2))
    refuses(pool_agents, "grid must be at least 1 x 1, got 0 x 2", rand((2, 3, 3, 4)), (0, 2))
    factors = rand((1, 3, 7, 7)), rand((1, 3, 5)), rand((1, 3, 5))
    refuses(resize_agent_bias, "factors must have a square number of agents, got 3", factors, (5, 5), (2, 2))
    refuses(resize_agent_bias, r"size and grid must be .* got \(0, 5\)", [x[:, :1] for x in factors], (0, 5), (2, 2))


def test_a_head_too_wide_for_the_kernels():
    shape = (1, (2, 2), (2, 2), 1, 65, 1, 1, False, False)
    message = "cannot run: a head dimension of 65, over 64"
    refuses(flat(triton, shape), message, *inputs(shape), error=RuntimeError)


@FORMS
@pytest.mark.parametrize("B, h, w", [(0, 3, 2), (2, 0, 3), (2, 3, 0)])
def test_nothing_in_nothing_out(B, h, w, f):
    shape = (B, (h, w), (h, w), 2, 8, 4, 7, False, True)
    accepts_empty(flat(f, shape), (B, h * w, 16), *inputs(shape))


def test_runs_are_equal_to_the_bit():
    repeats(flat(triton, SHAPES["bare"]), *inputs(SHAPES["bare"]))


@FULL
def test_registration(full):
    shape = (1, (2, 2), (2, 2), 1, 8, 2, 2, True, True)
    q, k, v, *rest = inputs(shape)
    given = *(x for table in kernel_tables(shape, rest) for x in table), *rest[-2:]
    registers(op.fwd, (q.clone().requires_grad_(), k, v, rest[0], *given, 1, 0.3), full)
    registers(op.fwd, (q.mT.contiguous().mT, k, v, rest[0], *given, 1, 0.3), full)
    _, *saved = op.fwd(q, k, v, rest[0], *given, 1, 0.3)
    registers(op.bwd, (rand(q.shape, seed=7).mT.contiguous().mT, q, k, v, rest[0], *given, *saved, 1, 0.3), full)
    q, k, v, *rest = inputs(SHAPES["bare"])
    given = *(x for table in kernel_tables(SHAPES["bare"], rest) for x in table), None, None
    registers(op.fwd, (q, k, v, rest[0], *given, 2, 0.3), full)


@FULL
def test_registration_of_the_plain_form(full):
    for dwc in ((rand((8, 1, 3, 3)), rand((8,))), (None, None)):
        q, k, v, agents = rand((2, 6, 8)), rand((2, 6, 8), seed=1), rand((2, 6, 24))[..., 16:], rand((2, 4, 8), seed=2)
        given = k, v, agents, rand((2, 4, 6)), rand((2, 4, 6), seed=3), *dwc, 2, [2, 3], 0.3
        registers(eager.plain, (q.clone().requires_grad_(), *given), full)
        registers(eager.plain_bwd, (rand(q.shape, seed=7), q, *given), full)


@PLAIN
def test_gradcheck(f):
    shape = (1, (2, 3), (2, 3), 2, 2, 2, 2, True, True)
    gradients_are_right(flat(f, shape), *inputs(shape, torch.float64))


def test_no_second_derivative_in_triton():
    refuses_second_derivative(flat(triton, SHAPES["bare"]), *inputs(SHAPES["bare"]))


def whole_core(shape, grid, size):
    """Pool, resized biases and attention, from one packed tensor and the parameters."""
    heads = shape[3]

    def run(qkv, *rest):
        q, k, v = qkv.chunk(3, -1)
        key_bias, query_bias = (resize_agent_bias(tuple(rest[i : i + 3]), size, grid) for i in (0, 3))
        return agent_attention(
            q, k, v, pool_agents(q.unflatten(1, size), grid), key_bias, query_bias, heads, None, *rest[-2:]
        )

    return run


def rest_of(shape):
    return inputs(shape)[4:]


CORE = (2, (3, 4), (3, 4), 2, 8, 4, 7, False, True), (1, 2), (3, 4)


@COMPILED
def test_compiles_in_one_graph(name, dynamic):
    rest, qkv = rest_of(CORE[0]), rand((2, 12, 48))
    others = ((rand((3, 12, 48), seed=5), *rest),) if dynamic else ()
    if dynamic:  # the batch: with every size of every table a symbol, minutes
        torch._dynamo.mark_dynamic(qkv, 0)
    compiles(whole_core(*CORE), qkv, *rest, name=name, dynamic=None, others=others)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports(name):
    rest = rest_of(CORE[0])
    given = (rand((2, 12, 48)), *rest), (rand((3, 12, 48), seed=5), *rest)
    exports(whole_core(*CORE), *given, name, "agent_attention_fwd")


def test_scripts():
    shape = SHAPES["token"]
    script = torch.jit.script(agent_attention)
    assert_close(flat(script, shape)(*inputs(shape)), flat(plain, shape)(*inputs(shape)))
    q = rand((2, 5, 7, 3))
    assert_close(torch.jit.script(pool_agents)(q, (2, 3)), pool_agents(q, (2, 3)))
    factors = rand((1, 4, 7, 7)), rand((1, 4, 5)), rand((1, 4, 6))
    script = torch.jit.script(resize_agent_bias)
    for ours, expected in zip(script(factors, (3, 4), (5, 1)), resize_agent_bias(factors, (3, 4), (5, 1)), strict=True):
        assert_close(ours, expected)


def test_meta_tensors_have_shapes():
    shape = SHAPES["tiles"]
    args = [x.to("meta") for x in inputs(shape)]
    assert flat(agent_attention, shape)(*args).shape == args[0].shape
    assert pool_agents(torch.empty(2, 5, 7, 3, device="meta"), (2, 2)).shape == (2, 4, 3)


@FORMS
def test_autocast_changes_nothing(f):
    autocast_changes_nothing(flat(f, SHAPES["bare"]), *inputs(SHAPES["bare"]))


def test_parameters_of_another_type():
    shape = SHAPES["token"]
    args = inputs(shape)
    half = [x.half().requires_grad_() for x in args[:4]] + [x.requires_grad_() for x in args[4:]]
    for f in (plain, triton):
        out = flat(f, shape)(*half)
        assert out.dtype == torch.float16
        torch.testing.assert_close(out.float(), flat(plain, shape)(*args), rtol=1e-2, atol=1e-2)  # inputs in float16
        grads = torch.autograd.grad(out.sum(), half)
        assert [g.dtype for g in grads] == [x.dtype for x in half]


def test_flops():
    shape = SHAPES["reduced"][:-1] + (False,)
    (B, (h, w), (kh, kw), heads, D, a, *_), args = shape, inputs(shape)
    args[0].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = flat(triton, shape)(*args)
    count = torch.ops.saccade.agent_attention_fwd.default
    assert forward.get_flop_counts()["Global"][count.overloadpacket] == 4 * B * a * (h * w + kh * kw) * heads * D
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert 2 * sum(backward.get_flop_counts()["Global"].values()) == 5 * 4 * B * a * (h * w + kh * kw) * heads * D


@pytest.mark.parametrize("grid", [(3, 3), (4, 2), (7, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("size", [(8, 8), (7, 14), (5, 3)], ids=str)
def test_pool_is_adaptive_average_pooling(size, grid):
    def pool(q):
        return F.adaptive_avg_pool2d(q[..., 2:5].permute(0, 3, 1, 2), grid).flatten(2).mT

    agree(lambda q: pool_agents(q[..., 2:5], grid), pool, rand((2, *size, 6), torch.float64))


@pytest.mark.parametrize("size, grid", [((9, 5), (2, 5)), ((4, 6), (3, 3)), ((14, 21), (4, 1))], ids=str)
def test_resized_factors_make_the_resized_bias(size, grid):
    """Map first, then agents, of the whole bias: the order in which it was published."""
    factors = rand((2, 9, 7, 7), torch.float64), rand((2, 9, 4), torch.float64, 1), rand((2, 9, 6), torch.float64, 2)

    def published(block, rows, columns):
        table = rows[..., None] + columns[:, :, None]
        whole = sum(F.interpolate(x, size=size, mode="bilinear") for x in (block, table))  # (heads, 9, h, w)
        whole = whole.flatten(2).mT.unflatten(2, (3, 3))  # (heads, h·w, 3, 3)
        return F.interpolate(whole, size=grid, mode="bilinear").flatten(2).mT

    agree(lambda *fs: tables.whole(resize_agent_bias(fs, size, grid)), published, *factors)
    agree(lambda *fs: reference.bias(resize_agent_bias(fs, size, grid)), published, *factors)


def test_native_sizes_change_no_bit():
    factors = rand((2, 9, 7, 7)), rand((2, 9, 7)), rand((2, 9, 12))
    for ours, given in zip(resize_agent_bias(factors, (7, 12), (3, 3)), factors, strict=True):
        assert torch.equal(ours, given)


def test_eager_holds_little(monkeypatch):
    """With 100 agents the logits of a softmax are three maps, more in each of their forms, and so is a bias repeated
    for each image."""
    monkeypatch.setattr(eager, "CHUNK_BYTES", 1 << 18)  # so that a chunk, an image, is small beside this map
    shape = (12, (28, 28), (28, 28), 2, 32, 100, 7, False, True)
    args = [t.requires_grad_() for t in inputs(shape)]
    size = args[0].nbytes

    def forward():
        return flat(plain, shape)(*args)

    with torch.no_grad():
        assert peak_bytes(forward) < 2.4 * size  # the output, both biases of one image, and a chunk

    def both():
        out = forward()
        torch.autograd.grad(out, args, out)

    assert peak_bytes(both) < 8 * size  # the output, three gradients, biases and a chunk


def test_kernels_hold_little():
    """Beyond output and gradients, numbers for each agent and query, and a bias' gradient, a few images at a time."""
    shape = (4, (8, 8), (8, 8), 1, 64, 16, 3, False, False)  # the logits of either softmax are a quarter of a map
    args = [t.requires_grad_() for t in inputs(shape)]
    size = args[0].nbytes

    def forward():
        return flat(triton, shape)(*args)

    with torch.no_grad():
        assert peak_bytes(forward) < 1.7 * size

    def both():
        out = forward()
        torch.autograd.grad(out, args, out)

    assert peak_bytes(both) < 6.2 * size
