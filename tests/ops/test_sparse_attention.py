"""Sparse attention: the reference against loops and the published values, the other forms against it, the contract."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import backend, connectivity, predict_mask, sparse_attention, sparse_mask, unpack_mask
from saccade.ops.sparse_attention import eager, kernel, op, reference
from support import parity
from support.budget import assert_close
from support.ops import (
    COMPILED,
    DEVICE,
    DTYPES,
    FULL,
    agree,
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
    refuses,
    refuses_second_derivative,
    registers,
    repeats,
)
from torch.utils.flop_counter import FlopCounterMode

torch.set_num_threads(1)

plain, triton = forced(sparse_attention, "torch"), forced(sparse_attention, "triton")
plain_mask, triton_mask = forced(predict_mask, "torch"), forced(predict_mask, "triton")
FORMS = pytest.mark.parametrize("f", [reference, eager], ids=["reference", "eager"])


def inputs(B, N, heads, D, keep=0.3, dtype=torch.float32):
    """qkv and a random mask with a dense CLS row."""
    M = rand((B, heads, N, N), seed=7) < torch.distributions.Normal(0, 1).icdf(torch.tensor(keep)).item()
    M[:, :, 0] = True
    return rand((B, N, 3 * heads * D), dtype), reference.pack(M), heads


def predictor(B, N, heads, D, K, c=4, dtype=torch.float32):
    """q and k as views of a packed qkv, and the parameters."""
    q, k, _ = rand((B, N, 3 * heads * D), dtype, 10).unflatten(-1, (3, heads, D)).permute(2, 0, 3, 1, 4)
    shapes = (c, D), (c,), (c, D), (c,), (N, K), (N, K)
    return q, k, *(rand(shape, dtype, 11 + i) / D**0.5 for i, shape in enumerate(shapes))


def patches(B, N):
    """Every image with a number of its own of patches alive."""
    return rand((B, N - 1), seed=3) < torch.linspace(0.2, -0.4, B, device=DEVICE)[:, None]


# The definition, and the published model.


def loops(qkv, M, heads, scale):
    """Image by image, head by head, query by query."""
    B, N, C3 = qkv.shape
    D = C3 // 3 // heads
    out = qkv.new_zeros(B, N, C3 // 3)
    for b in range(B):
        for h in range(heads):
            q, k, v = (qkv[b, :, i * C3 // 3 + h * D : i * C3 // 3 + (h + 1) * D] for i in range(3))
            for n in range(N):
                kept = [j for j in range(N) if M[b, h, n, j]]
                weights = [math.exp(scale * (q[n] @ k[j]).item()) for j in kept]
                for w, j in zip(weights, kept):
                    out[b, n, h * D : (h + 1) * D] += w / sum(weights) * v[j]
    return out


def test_attention_is_the_definition():
    qkv, mask, heads = inputs(2, 35, 2, 4, 0.1, torch.float64)
    mask[1, 1, 6] = 0
    assert_close(reference.sparse_attention(qkv, mask, heads, 0.3), loops(qkv, reference.unpack(mask, 35), heads, 0.3))


@pytest.mark.parametrize(
    "topk, coef, threshold, pruned", [(3, 0.0, 0.1, False), (None, 0.2, 0.3, True), (None, 0.0, None, True)]
)
def test_predictor_is_the_definition(topk, coef, threshold, pruned):
    B, N, heads, K = 2, 9, 3, 5
    q, k, W_q, b_q, W_k, b_k, P, U = predictor(B, N, heads, 4, K, dtype=torch.float64)
    alive = patches(B, N) if pruned else torch.ones(B, N - 1, dtype=torch.bool, device=DEVICE)
    expected = torch.zeros(B, heads, N - 1, N, dtype=torch.float64)
    for b in range(B):
        on = [True, *alive[b].tolist()]
        for h in range(heads):
            kc = [W_k @ k[b, h, j] + b_k if on[j] else b_k * 0 for j in range(N)]
            Kd = sum(torch.outer(kc[j], P[j]) for j in range(N))
            for n in range(1, N):
                e = (W_q @ q[b, h, n] + b_q if on[n] else b_q * 0) @ Kd / heads**0.5
                a = e.exp() / e.exp().sum()
                best = sorted(range(K), key=lambda i: (-a[i].item(), i))[: topk or K]
                for i in best:
                    for j in range(N):
                        u = U[j, i] if threshold is None else U[j, i].abs() * (U[j, i].abs() > threshold)
                        expected[b, h, n - 1, j] += a[i] * (a[i] > coef) * u
    for f in (reference.connectivity, connectivity):
        S = f(q, k, W_q, b_q, W_k, b_k, P, U, topk, coef, threshold, alive if pruned else None)
        assert_close(S, expected.to(S))


def chosen(scores, budget, threshold, alive):
    """Row by row; ties go to the lowest index."""
    B, heads, _, N = scores.shape
    M = torch.zeros(B, heads, N, N, dtype=torch.bool)
    M[:, :, 0] = True
    for b in range(B):
        on = [True, *(alive[b].tolist() if alive is not None else [True] * (N - 1))]
        most = N if budget is None else min(budget, sum(on[1:])) if alive is not None else budget
        for h in range(heads):
            for n in range(N - 1):
                row = scores[b, h, n].tolist()
                keys = [j for j in range(N) if on[j] and (threshold is None or row[j] > threshold)]
                for j in sorted(keys, key=lambda j: (-row[j], j))[:most]:
                    M[b, h, n + 1, j] = True
    return M


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("budget, threshold", [(1, None), (5, None), (37, None), (None, 0.5), (None, 0.0)])
@pytest.mark.parametrize("ties", [False, True])
def test_mask_is_the_definition(budget, threshold, ties, pruned):
    scores = rand((3, 2, 36, 37), torch.float64)
    scores = (scores.abs() * 2).round() if ties else scores
    alive = patches(3, 37) if pruned else None
    expected = chosen(scores, budget, threshold, alive)
    for f in (reference.sparse_mask, sparse_mask):
        mask = f(scores.requires_grad_(), budget, threshold, alive)
        assert (mask.shape, mask.dtype, mask.requires_grad) == ((3, 2, 37, 2), torch.int32, False)
        assert torch.equal(unpack_mask(mask, 37).cpu(), expected)


@pytest.mark.parametrize("name", ["op_attention", "op_attention_lv"])
@FORMS
def test_published_attention(name, f):
    fixture = parity.load("sparsifiner", name)
    state = {key: value.requires_grad_() for key, value in parity.weights(fixture).items()}
    x, want = parity.image(fixture).requires_grad_(), fixture["outputs"]
    p = {key.removeprefix("mask_predictor."): value for key, value in state.items()}
    params = [p[key] for key in ("proj_c_q.weight", "proj_c_q.bias", "proj_c_k.weight", "proj_c_k.bias")]
    params += [p["proj_n"], p["proj_back_n"]]
    qkv = F.linear(x, p["qkv.weight"], p.get("qkv.bias"))
    q, k, _ = qkv.unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    if f is reference:
        mask = reference.sparse_mask(reference.connectivity(q, k, *params, topk=4), 13)
    else:
        mask = plain_mask(q, k, *params, budget=13, topk=4)
    out = F.linear(f.sparse_attention(qkv, mask, 3), p["proj.weight"], p["proj.bias"])
    parity.assert_equal("attn_mask", unpack_mask(mask, 50).double(), want["attn_mask"])
    parity.assert_equal("out", out, want["out"])
    (out * parity.seeded(1, out.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["grad_x"])
    assert set(fixture["grads"]) == set(state)
    for key, expected in fixture["grads"].items():
        if expected is None:
            assert state[key].grad is None
        else:
            assert abs(state[key].grad.norm().item() - expected) <= 1e-9 * expected, key


@pytest.mark.parametrize("name", ["op_mask_predictor", "op_mask_predictor_train", "op_mask_predictor_recon"])
@FORMS
def test_published_predictor(name, f):
    fixture = parity.load("sparsifiner", name)
    p = {key: value.requires_grad_() for key, value in parity.weights(fixture).items()}
    x, want = parity.image(fixture).requires_grad_(), fixture["outputs"]
    params = [p[key] for key in ("proj_c_q.weight", "proj_c_q.bias", "proj_c_k.weight", "proj_c_k.bias")]
    rule = dict(topk=4, basis_threshold=0.02) if "recon" not in name else dict(topk=None, basis_threshold=None)
    down, up = p["proj_n"], p["proj_back_n"]
    if f is eager:
        given = eager.Predictor(*params, down, up), eager.Selection(rule["topk"], 0.0, rule["basis_threshold"], None)
        S, A = eager.connectivity(*x, *given), eager.coefficients(*x, *given)
    else:
        S, A = f.connectivity(*x, *params, down, up, **rule), f.coefficients(*x, *params, down, rule["topk"])
    parity.assert_equal("approx_attn", S, want["approx_attn"])
    parity.assert_equal("basis_coef", A, want["basis_coef"])
    for mask in (f.sparse_mask(S.detach(), 13, None, None), plain_mask(*x, *params, down, up, budget=13, **rule)):
        parity.assert_equal("attn_mask", unpack_mask(mask, 50).double(), want["attn_mask"])
    (S * parity.seeded(1, S.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["grad_x"])
    assert set(fixture["grads"]) == set(p)
    for key, expected in fixture["grads"].items():
        assert abs(p[key].grad.norm().item() - expected) <= 1e-9 * expected, key


# The fast PyTorch form.


@pytest.mark.parametrize("N, heads, D, scale", [(70, 3, 5, None), (32, 1, 8, 0.7), (1, 2, 4, None)])
def test_eager_attention(N, heads, D, scale):
    qkv, mask, _ = inputs(2, N, heads, D, 0.1, torch.float64)
    mask[0, 0, N // 2] = 0
    agree(plain, reference.sparse_attention, qkv, mask, heads, scale)


@pytest.mark.parametrize("rule", [dict(topk=2), dict(coef_threshold=0.2), dict(basis_threshold=None)], ids=str)
@pytest.mark.parametrize("pruned", [False, True])
def test_eager_connectivity(rule, pruned):
    rule = rule | dict(alive=patches(2, 40) if pruned else None)
    args = predictor(2, 40, 3, 8, 6, dtype=torch.float64)
    agree(functools.partial(connectivity, **rule), functools.partial(reference.connectivity, **rule), *args)


@pytest.mark.parametrize("n, count", [(197, 50), (40, 1), (33, 33), (300, 299)])
def test_eager_splits_every_row(n, count):
    """Smooth, heavy-tailed, tied, constant and NaN rows, with and without a look at the values."""
    x = rand((60, n))
    x[10:20] = x[10:20].exp().square()
    x[20:30] = x[20:30].round()
    x[30:40] = 0.25
    x[40:50].mul_(1e-42)
    padded = F.pad(x, (0, -n % 32), value=-math.inf)
    expected = F.pad(reference.largest(x, count), (0, -n % 32))
    assert torch.equal(eager.largest(padded, n, count), expected)
    assert torch.equal(eager._split(padded, count), expected)
    padded[::7, 1] = math.nan
    clean = [i for i in range(60) if i % 7]
    for keep in (eager.largest(padded, n, count), eager._split(padded, count)):
        assert torch.equal(keep[clean], expected[clean])
        assert keep[::7, :n].any(1).all()


def test_mask_in_pieces(monkeypatch):
    """Images do not depend on their neighbours in the batch, nor on the pieces that the batch is cut into."""
    args, alive = predictor(5, 40, 2, 8, 6), patches(5, 40)
    for rule in (dict(budget=9, topk=2), dict(budget=9, alive=alive), dict(threshold=0.1)):
        whole = plain_mask(*args, **rule)
        monkeypatch.setattr(eager, "CHUNK_BYTES", 1)
        assert torch.equal(plain_mask(*args, **rule), whole)
        monkeypatch.undo()
        for b in range(5):
            one = {key: value[b : b + 1] if key == "alive" else value for key, value in rule.items()}
            assert torch.equal(plain_mask(args[0][b : b + 1], args[1][b : b + 1], *args[2:], **one), whole[b : b + 1])


def test_scores_in_half_precision_are_in_full():
    args = predictor(2, 40, 2, 8, 6, dtype=torch.float16)
    S = connectivity(*args, topk=2)
    assert S.dtype == torch.float32
    exact = connectivity(*(t.double() for t in args), topk=2)
    assert_close(S, exact.float())


# The kernels.


@grid(shape=[(2, 37, 2, 16, 0.3), (1, 70, 1, 5, 0.05), (1, 1, 2, 40, 0.5)], dtype=DTYPES)
def test_triton_attention(shape, dtype):
    qkv, mask, heads = inputs(*shape, dtype)
    mask[0, -1, 1:2] = 0  # a query without keys
    check(triton, reference.sparse_attention, qkv, mask, heads)
    out = triton(qkv, mask, heads, 0.3)
    check(triton, reference.sparse_attention, qkv, mask, heads, 0.3)
    assert not out[0, 1:2, -shape[3] :].any()


def test_tiles_without_keys_are_skipped():
    """Each query keeps keys of one tile only; and all that lies in the others is NaN."""
    B, N, heads, D = 1, 100, 1, 8
    qkv = rand((B, N, 3 * heads * D))
    M = torch.zeros(B, heads, N, N, dtype=torch.bool, device=DEVICE)
    M[..., 64:90] = True
    mask = reference.pack(M)
    expected = plain(qkv, mask, heads)
    qkv[:, :64, D:] = math.nan
    assert_close(triton(qkv, mask, heads), expected)
    grad = evaluate(triton, (qkv, mask, heads))[1]
    assert not grad[:, 64:].isnan().any()
    assert not grad[:, :64, D:].any()


def mask_agrees(mask, args, N, rule, tolerance):
    """Bits differ from the exact ones only where a score is the budget-th largest, or the threshold, but for rounding.
    Ties at the limit are not rounding: there both have the lowest."""
    args = [t.double() for t in args]
    names = ("topk", "coef_threshold", "basis_threshold", "alive")
    S = reference.connectivity(*args, **{key: rule[key] for key in names if key in rule})
    M = unpack_mask(mask, N)
    choice = {key: rule.get(key) for key in ("budget", "threshold", "alive")}
    exact = unpack_mask(reference.sparse_mask(S, **choice), N)
    assert M[:, :, 0].all()
    if rule.get("budget"):
        assert torch.equal(M.sum(-1), exact.sum(-1))
        limit = S.masked_fill(~exact[:, :, 1:], math.inf).amin(-1, keepdim=True)
    else:
        limit = rule["threshold"]
    wrong = (exact != M)[:, :, 1:]
    assert not (wrong & ((S - limit).abs() > tolerance)).any()
    assert wrong.double().mean() < 0.01


MASKED = [
    ((2, 37, 2, 16, 6), dict(budget=10, topk=3)),
    ((1, 19, 3, 5, 17), dict(budget=1, topk=17, coef_threshold=0.05)),
    ((1, 33, 1, 8, 5), dict(threshold=0.05, coef_threshold=0.15)),
    ((1, 33, 1, 8, 5), dict(budget=33)),
    ((2, 20, 1, 8, 5), dict(budget=6, basis_threshold=None)),  # scores of both signs
    ((3, 34, 1, 8, 5), dict(budget=16, topk=2, alive=True)),
    ((3, 34, 1, 8, 5), dict(threshold=0.1, alive=True)),
]


@grid(case=MASKED, dtype=DTYPES)
def test_triton_mask(case, dtype):
    shape, rule = case
    args = predictor(*shape, dtype=dtype)
    rule = rule | dict(alive=patches(*shape[:2])) if "alive" in rule else rule
    for f in (triton_mask, plain_mask):
        mask_agrees(f(*args, **rule), args, shape[1], rule, 1e-5)


def test_triton_mask_takes_the_first_of_equal_scores():
    """Equal coefficients and a basis of few values: of all ties the first."""
    q, k, *params, down, up = predictor(1, 33, 1, 8, 4)
    up = (up.abs() * 4).round()
    args = q * 0, k, params[0], params[1] * 0, *params[2:], down, up
    for rule in (dict(budget=7), dict(budget=20, topk=2), dict(budget=25, basis_threshold=None)):
        assert torch.equal(triton_mask(*args, **rule), plain_mask(*args, **rule))
        assert torch.equal(
            plain_mask(*args, **rule),
            reference.sparse_mask(
                reference.connectivity(*args, rule.get("topk"), 0.0, rule.get("basis_threshold", 0.02)), rule["budget"]
            ),
        )


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_a_query_that_is_nan_stays_in_its_row(f):
    qkv, mask, heads = inputs(2, 33, 2, 16)
    clean = evaluate(f, (qkv, mask, heads))
    qkv[0, 5, :16] = math.nan  # of head 0
    out, grad = evaluate(f, (qkv, mask, heads))
    assert out[0, 5, :16].isnan().all()
    out[0, 5, :16] = clean[0][0, 5, :16]
    assert_close(out, clean[0])
    assert_close(grad[1], clean[1][1])
    assert_close(grad[0, :, 16:32], clean[1][0, :, 16:32])  # the other head
    if f is triton:
        unseen = ~unpack_mask(mask, 33)[0, 0, 5]
        assert_close(grad[0, unseen, 32:48], clean[1][0, unseen, 32:48])


@pytest.mark.parametrize("f", [plain_mask, triton_mask], ids=["eager", "triton"])
@pytest.mark.parametrize("rule", [dict(budget=5, topk=2), dict(threshold=0.1)], ids=str)
def test_a_score_that_is_nan_hides_nothing(f, rule):
    q, *rest = predictor(1, 16, 2, 8, 5)
    clean = f(q, *rest, **rule)
    q = q.clone()
    q[0, 1, 7, 2] = math.nan
    mask = f(q, *rest, **rule)
    assert mask[0, 1, 7].any()
    mask[0, 1, 7] = clean[0, 1, 7]
    assert torch.equal(mask, clean)


def test_reads_views():
    qkv, mask, heads = inputs(1, 37, 2, 16)
    big = rand((1, 40, 110))

    def of(f):
        return lambda big: f(big[:, 1:-2, 5:101], mask, heads)

    check(of(triton), of(reference.sparse_attention), big)
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)  # last stride not 1: copied
    assert torch.equal(triton(turned, mask, heads), triton(qkv, mask, heads))
    wide = F.pad(mask, (0, 3))[..., :2]
    assert torch.equal(triton(qkv, wide, heads), triton(qkv, mask, heads))
    assert torch.equal(plain(qkv, wide, heads), plain(qkv, mask, heads))
    q, k, *rest = predictor(1, 16, 1, 8, 5)
    expected = triton_mask(q, k, *rest, budget=4)
    for t in (q.contiguous(), q.mT.contiguous().mT, rand((1, 1, 21, 9), seed=1)[:, :, 3:19, 1:]):
        t.copy_(q)
        assert torch.equal(triton_mask(t, k, *(p.t().contiguous().t() for p in rest), budget=4), expected)


def test_offsets_beyond_31_bits(tmp_path):
    """Two images 2**31 elements apart, and tokens 2**30."""
    qkv, mask, heads = inputs(1, 3, 1, 16, 0.9, torch.float16)
    size = 2**32 + 1024
    big = far_apart(tmp_path, size)
    apart = big.as_strided(qkv.shape, (size, 2**31 - 64, 1))
    apart.copy_(qkv)
    out, lse = kernel.fwd(qkv, mask, heads, 0.25)
    assert torch.equal(kernel.fwd(apart, mask, heads, 0.25)[0], out)
    grads = [kernel.bwd(out, x, mask, out, lse, heads, 0.25) for x in (qkv, apart)]
    dout = big[64:].as_strided(out.shape, (size, 2**31 - 64, 1))
    dout.copy_(out)
    grads.append(kernel.bwd(dout, qkv, mask, out, lse, heads, 0.25))
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    q, k, *rest = predictor(1, 3, 1, 8, 2, dtype=torch.float16)
    far = big.as_strided(q.shape, (size, size, 2**31 - 64, 1))
    far.copy_(q)
    expected = triton_mask(q, k, *rest, budget=2)
    assert torch.equal(triton_mask(far, k, *rest, budget=2), expected)
    far.copy_(k)
    assert torch.equal(triton_mask(q, far, *rest, budget=2), expected)


# The contract.


def test_runs_are_equal_to_the_bit():
    repeats(triton, *inputs(1, 37, 1, 16))
    args = predictor(1, 16, 1, 8, 5)
    assert torch.equal(triton_mask(*args, budget=4), triton_mask(*args, budget=4))


@FULL
def test_registration(full):
    qkv, mask, heads = inputs(1, 34, 1, 16)
    wide = rand((1, 37, 62))[:, 1:-2, 5:53]
    for x in (qkv.clone().requires_grad_(), wide):
        registers(op.fwd, (x, mask, heads, 0.25), full)
    out, lse = op.fwd(qkv, mask, heads, 0.25)
    registers(op.bwd, (rand(out.mT.shape).mT, wide, mask, out, lse, heads, 0.25), full)
    args = predictor(1, 16, 1, 8, 5)
    registers(op.mask, (*args, 4, None, 2, 0.0, 0.02, patches(1, 16)), full)
    registers(op.mask, (*args, None, 0.1, None, 0.1, None, None), full)


def test_gradients():
    qkv, mask, heads = inputs(1, 5, 2, 2, 0.4, torch.float64)
    mask[0, 1, 3] = 0
    for f in (reference.sparse_attention, plain):
        gradients_are_right(lambda x, f=f: f(x, mask, heads, 0.6), qkv)
    args = predictor(1, 4, 2, 2, 3, 2, torch.float64)
    for rule in (dict(topk=2, alive=patches(1, 4)), dict(basis_threshold=None)):
        gradients_are_right(functools.partial(connectivity, **rule), *args)
    refuses_second_derivative(triton, *inputs(1, 16, 1, 8))


def model(qkv, *params):
    """As a layer does: predict, and attend."""
    q, k, _ = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    return sparse_attention(qkv, predict_mask(q, k, *params, budget=5, topk=3), 2)


def training(qkv, *params):
    """As a layer does when a loss is on its scores."""
    q, k, _ = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    alive = qkv[:, 1:, 0] > -0.5
    S = connectivity(q, k, *params, topk=3, alive=alive)
    return sparse_attention(qkv, sparse_mask(S, 5, alive=alive), 2), S


def layer(B):
    return rand((B, 18, 48), seed=B), *(t.contiguous() for t in predictor(1, 18, 2, 8, 5)[2:])


@COMPILED
def test_compiles(name, dynamic):
    def f(*args):
        out = model(*args)
        return (out, *training(*args)) if name == "torch" else (out, connectivity_of(*args))

    def connectivity_of(qkv, *params):
        q, k, _ = qkv.unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return connectivity(q, k, *params)

    compiles(f, *layer(2), name=name, dynamic=dynamic, others=(layer(3),) if dynamic else ())


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports(name):
    exports(model, layer(2), layer(3), name, "sparse_attention_fwd", "sparse_attention_mask")


def test_scripts():
    args, alive = predictor(2, 20, 2, 8, 5), patches(2, 20)
    S = connectivity(*args, topk=2, alive=alive)
    assert_close(torch.jit.script(connectivity)(*args, topk=2, alive=alive), S)
    expected = sparse_mask(S, 5, alive=alive)
    assert torch.equal(torch.jit.script(sparse_mask)(S, 5, alive=alive), expected)
    assert torch.equal(torch.jit.script(predict_mask)(*args, budget=5, topk=2, alive=alive), expected)
    qkv, mask, heads = inputs(2, 37, 2, 16)
    assert_close(torch.jit.script(sparse_attention)(qkv, mask, heads), plain(qkv, mask, heads))
    assert torch.equal(torch.jit.script(unpack_mask)(mask, 37), unpack_mask(mask, 37))


def test_meta_tensors_have_shapes():
    args = [t.to("meta") for t in predictor(2, 40, 3, 8, 5)]
    S = connectivity(*args, topk=2)
    assert S.shape == (2, 3, 39, 40)
    mask = sparse_mask(S, 10)
    assert mask.shape == predict_mask(*args, budget=10).shape == (2, 3, 40, 2)
    assert sparse_attention(torch.empty(2, 40, 72, device="meta"), mask, 3).shape == (2, 40, 24)


def test_autocast():
    """The attention is in autocast's type, as PyTorch's own; the scores and the choice are as without."""
    qkv, mask, heads = inputs(1, 20, 1, 8)
    for f in (plain, triton):
        with torch.autocast(DEVICE, torch.float16):
            out = f(qkv.requires_grad_(), mask, heads)
        assert out.dtype == torch.float16
        assert_close(out, f(qkv.half(), mask, heads))
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        assert grad.dtype == torch.float32
    args = predictor(1, 16, 1, 8, 5)
    with torch.autocast(DEVICE, torch.bfloat16):
        under = connectivity(*args, topk=2)
    assert torch.equal(under, connectivity(*args, topk=2))
    for f in (plain_mask, triton_mask):
        with torch.autocast(DEVICE, torch.bfloat16):
            under = f(*args, budget=5)
        assert torch.equal(under, f(*args, budget=5))


def test_flops():
    B, N, heads, D = 2, 37, 2, 16
    args = inputs(B, N, heads, D)
    args[0].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = triton(*args)
    assert forward.get_total_flops() == 4 * B * N * N * heads * D
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 10 * B * N * N * heads * D
    with FlopCounterMode(display=False) as mask:
        triton_mask(*predictor(1, 20, 2, 8, 5), budget=4, topk=3)
    assert mask.get_total_flops() == 2 * 2 * (2 * 20 * 8 * 5 + 2 * 4 * 8 * 5 + 20 * 20 * 3)


@pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])
def test_nothing_in_nothing_out(f):
    out = f(torch.zeros(0, 37, 96, device=DEVICE, requires_grad=True), inputs(2, 37, 2, 16)[1][:0], 2)
    assert out.shape == (0, 37, 32)
    out.sum().backward()
    q, k, *params = (t.detach().requires_grad_() for t in predictor(2, 20, 2, 8, 5))
    S = connectivity(q[:0], k[:0], *params, topk=2)
    assert S.shape == (0, 2, 19, 20)
    S.sum().backward()
    assert not params[0].grad.any()
    assert sparse_mask(S, 4).shape == (0, 2, 20, 1)
    for name in ("torch", "triton"):
        with backend(name):
            assert predict_mask(q[:0], k[:0], *params, budget=4).shape == (0, 2, 20, 1)
    alone = predictor(1, 1, 2, 8, 5)  # CLS alone
    for f in (plain_mask, triton_mask):
        assert (f(*alone, budget=1) == 1).all()


NAMES = ("q", "k", "proj_q", "proj_q_bias", "proj_k", "proj_k_bias", "down", "up")
BAD_PREDICTOR = {
    "rank": (dict(q=rand((2, 20, 8))), r"q must be .* \(B, heads, N, D\), got torch.float32 of shape \(2, 20, 8\)"),
    "integers": (dict(q=torch.ones(2, 2, 20, 8).int()), "q must be floating point .* got torch.int32"),
    "k": (dict(k=rand((2, 2, 19, 8))), r"k must be as q is, .* got torch.float32 of \(2, 2, 19, 8\)"),
    "k dtype": (dict(k=rand((2, 2, 20, 8)).half()), "k must be as q is, .* got torch.float16"),
    "proj_q": (dict(proj_q=rand((4, 9))), r"proj_q must be \(c, 8\) .* got \(4, 9\)"),
    "proj_k": (dict(proj_k=rand((5, 8))), r"proj_k must be \(4, 8\), got \(5, 8\)"),
    "bias": (dict(proj_q_bias=rand((3,))), r"proj_q_bias must be \(4,\), got \(3,\)"),
    "tokens": (dict(down=rand((19, 5))), r"down must be \(20, K\) for the N = 20 tokens of q, got \(19, 5\)"),
    "up": (dict(up=rand((5, 20))), r"up must be \(20, 5\), got \(5, 20\)"),
    "up type": (dict(up=torch.ones(20, 5).int()), "up must be floating point, got torch.int32"),
    "device": (dict(down=torch.ones(20, 5, device="meta")), "down must be on .* as q is, got meta"),
    "topk": (dict(topk=6), "topk must be None or from 1 to K = 5, got 6"),
    "no topk": (dict(topk=0), "topk must be .* got 0"),
    "alive": (dict(alive=torch.ones(2, 20).bool()), r"alive must be bool of shape \(2, 19\), got .* \(2, 20\)"),
    "alive type": (dict(alive=torch.ones(2, 19)), "alive must be bool of shape .* got torch.float32"),
    "alive device": (dict(alive=torch.ones(2, 19, device="meta").bool()), "alive must be on .* got meta"),
}


@pytest.mark.parametrize("case", BAD_PREDICTOR)
def test_bad_predictor(case):
    change, message = BAD_PREDICTOR[case]
    args = dict(zip(NAMES, predictor(2, 20, 2, 8, 5))) | change
    refuses(connectivity, message, **args)
    refuses(predict_mask, message, budget=3, **args)


def test_bad_rule_mask_and_size():
    S = rand((2, 2, 19, 20))
    for change, message in (
        (dict(), "one of budget and threshold must be given, got budget None and threshold None"),
        (dict(budget=3, threshold=0.1), "one of budget and threshold must be given, got budget 3"),
        (dict(budget=21), "budget must be from 1 to N = 20 keys, got 21"),
        (dict(budget=0), "budget must be from 1 to .* got 0"),
    ):
        refuses(sparse_mask, message, S, **change)
        refuses(predict_mask, message, *predictor(2, 20, 2, 8, 5), **change)
    refuses(sparse_mask, r"scores must be .* \(B, heads, N-1, N\), got .* \(2, 2, 20, 20\)", rand((2, 2, 20, 20)), 3)
    refuses(sparse_mask, r"alive must be bool of shape \(2, 19\)", S, 3, alive=torch.ones(1, 19).bool())
    qkv, mask, heads = inputs(2, 37, 2, 16)
    for args, message in (
        ((qkv[0], mask, heads), r"qkv must be .*\(B, N, 3C\), got torch.float32 of shape \(37, 96\)"),
        ((qkv[..., :-1], mask, heads), r"qkv must be .* \(2, 37, 95\)"),
        ((qkv.int(), mask, heads), "qkv must be floating point .* got torch.int32"),
        ((qkv, mask, 3), "heads must divide the C = 32 channels of qkv, got 3"),
        ((qkv, mask, 0), "heads must divide .* got 0"),
        ((qkv, mask.long(), heads), "mask must be int32 of shape .* got torch.int64"),
        ((qkv, mask[..., :1], heads), r"mask must be int32 of shape \(2, 2, 37, 2\), got .* \(2, 2, 37, 1\)"),
        ((qkv, mask.to("meta"), heads), "mask must be on .* as qkv is, got meta"),
    ):
        refuses(sparse_attention, message, *args)
    for D, dtype, most in ((130, torch.float16, 128), (66, torch.float32, 64)):
        message = f"a head dimension of {D}, over {most}"
        refuses(triton, message, *inputs(1, 2, 1, D, dtype=dtype), error=RuntimeError)
    refuses(triton_mask, "a basis of 200, over 128", *predictor(1, 2, 1, 8, 200), budget=1, error=RuntimeError)


# Memory, in units of the scores (B, heads, N, N) in float32. The published form holds eight of them at once.


def test_memory_of_the_pytorch_form():
    B, N, heads, D = 8, 197, 6, 64
    args, unit = predictor(B, N, heads, D, 32, 32), B * heads * N * N * 4
    chunks = eager.CHUNK_BYTES / unit
    # The coefficients and their like are 1 / 6 each. The scores, and another tensor of comparisons, are in chunks.
    assert peak_bytes(lambda: plain_mask(*args, budget=50, topk=8)) < (1 + 3 * chunks) * unit
    mask = plain_mask(*args, budget=50, topk=8)
    qkv = rand((B, N, 3 * heads * D)).requires_grad_()  # a unit, nearly: q, k, v and their gradients
    assert peak_bytes(lambda: plain(qkv.detach(), mask, heads)) < 2 * unit  # the additive mask, but no scores
    assert peak_bytes(lambda: plain(qkv, mask, heads).sum().backward()) < 4 * unit  # a gradient, twice


def test_memory_of_the_kernels():
    B, N, heads, D = 1, 70, 1, 16
    qkv, mask, _ = inputs(B, N, heads, D)
    qkv.requires_grad_()
    row = B * N * heads * 4  # a float for each query; the scores would be 70
    assert peak_bytes(lambda: triton(qkv.detach(), mask, heads)) <= (D + 1) * row + 4096
    # Kept: out, its gradient, log-sum-exp, delta; dqkv.
    assert peak_bytes(lambda: triton(qkv, mask, heads).sum().backward()) <= (2 * D + 3 * D + 8) * row + 4096
    args = predictor(B, N, heads, D, 5)
    assert (
        peak_bytes(lambda: triton_mask(*args, budget=9)) <= 3 * row + 4 * (B * heads * (D + 1) * 5 + 3 * N * 5) + 4096
    )
