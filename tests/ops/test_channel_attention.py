"""Channel attention: the reference against loops and the published values, the other forms against it, and the
contract."""

import math

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import channel_attention
from saccade.ops.channel_attention import eager, kernel, op, reference
from support import parity
from support.budget import assert_close
from support.operators import Operator
from support.ops import DTYPES, FULL, agree, check, far_apart, forced, grid, peak_bytes, rand, refuses, registers

torch.set_num_threads(1)

triton, plain = forced(channel_attention, "triton"), forced(channel_attention, "torch")
FORMS = pytest.mark.parametrize("f", [plain, triton], ids=["eager", "triton"])

#          shape of qkv, heads
SHAPES = [
    ((2, 35, 96), 1),
    ((3, 5, 7, 48), 2),  # heads of 8, a map
    ((2, 4, 5, 36), 4),  # heads of 3
    ((1, 1, 3), 1),  # one token, one channel
    ((1, 600, 48), 1),  # two stretches
    ((2, 3, 2, 60), 5),  # more heads than images, fewer tokens than channels
    ((1, 2, 33, 216), 1),  # 72 channels, more than tokens
]


def loops(qkv, heads, scale=None):
    """Head by head, channel by channel."""
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = C // heads
    scale = 1 / math.sqrt(D) if scale is None else scale
    out = torch.empty(B, N, C, dtype=qkv.dtype)
    for b in range(B):
        for h in range(heads):
            q, k, v = (qkv[b, :, i * C + h * D :][:, :D] for i in range(3))
            for i in range(D):
                p = torch.stack([(scale * k[:, i] * v[:, j]).sum() for j in range(D)]).exp()
                out[b, :, h * D + i] = sum(p[j] / p.sum() * q[:, j] for j in range(D))
    return out


@pytest.mark.parametrize("scale", [None, 0.1])
@pytest.mark.parametrize("shape, heads", [((2, 5, 18), 2), ((1, 3, 15), 5), ((1, 4, 12), 1)], ids=str)
def test_reference_is_the_definition(shape, heads, scale):
    qkv = rand(shape, torch.float64)
    assert_close(reference.channel_attention(qkv, heads, scale), loops(qkv, heads, scale))


def attention(f, x, state, prefix="", heads=2):
    qkv = F.linear(x, state[prefix + "qkv.weight"], state[prefix + "qkv.bias"])
    return F.linear(f(qkv, heads), state[prefix + "proj.weight"], state[prefix + "proj.bias"])


def block(f, x, state):
    """The published block around the operator, of maps (B, C, H, W)."""

    def position(x, i):
        return x + F.conv2d(x, state[f"cpe.{i}.proj.weight"], state[f"cpe.{i}.proj.bias"], padding=1, groups=64)

    def norm(x, i):
        return F.layer_norm(x.permute(0, 2, 3, 1), (64,), state[f"norm{i}.weight"], state[f"norm{i}.bias"])

    x = position(x, 0)
    x = position(x + attention(f, norm(x, 1), state, "attn.").permute(0, 3, 1, 2), 1)
    if "norm2.weight" not in state:
        return x
    hidden = F.gelu(F.linear(norm(x, 2), state["mlp.fc1.weight"], state["mlp.fc1.bias"]))
    return x + F.linear(hidden, state["mlp.fc2.weight"], state["mlp.fc2.bias"]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("f", [reference.channel_attention, plain], ids=["reference", "eager"])
@pytest.mark.parametrize("name", ["channel_attention", "channel_block_noffn", "channel_block_10x13"])
def test_published_values(name, f):
    fixture = parity.load("davit", name)
    state = {key: value.requires_grad_() for key, value in parity.weights(fixture).items()}
    x = parity.image(fixture).requires_grad_()
    y = (attention if name == "channel_attention" else block)(f, x, state)
    parity.assert_equal("y", y, fixture["outputs"]["y"])
    (y * parity.seeded(1, y.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, fixture["outputs"]["grad_x"])
    assert set(state) == set(fixture["grads"])
    for key, expected in fixture["grads"].items():
        assert abs(state[key].grad.norm().item() - expected) <= 1e-9 * expected, key


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("shape, heads", SHAPES, ids=str)
def test_eager_matches_reference(shape, heads, scale):
    agree(plain, reference.channel_attention, rand(shape, torch.float64), heads, scale)


@grid(case=SHAPES, dtype=DTYPES)
def test_triton_matches_reference(case, dtype):
    shape, heads = case
    check(triton, reference.channel_attention, rand(shape, dtype) / shape[1] ** 0.25, heads)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_eager_errs_no_more_than_reference(dtype):
    check(plain, reference.channel_attention, rand(SHAPES[1][0], dtype), 2, 0.1)


@FORMS
def test_reads_views_where_they_lie(f):
    def cut(big):
        return big[:, 1:5, 2:-1:2, 3:51]

    def turned(big):
        return big.permute(0, 3, 2, 1)

    for view in (cut, turned):
        check(
            lambda big, view=view: f(view(big), 2),
            lambda big, view=view: reference.channel_attention(view(big), 2),
            rand((2, 6, 9, 54) if view is cut else (2, 24, 3, 4)),
        )


class TestChannelAttention(Operator):
    operator, reference = staticmethod(channel_attention), staticmethod(reference.channel_attention)
    EXPORTED = "channel_attention"
    SCRIPTED = {"map": (rand((2, 3, 4, 24)), 2), "tokens": (rand((2, 9, 24)), 2)}
    EMPTY = {str(s): ((*s[:-1], 4), rand(s), 2) for s in [(0, 5, 12), (2, 0, 12), (2, 0, 3, 12), (2, 3, 0, 12)]}
    REPEATED = {"two stretches": (rand((1, 600, 48)), 1)}
    SMOOTH = {
        "two heads": (rand((2, 3, 12), torch.float64), 2),
        "a map": (rand((1, 3, 3, 18), torch.float64), 3),
    }
    BAD = {
        "rank": (
            dict(qkv=rand((5, 12)), heads=1),
            r"qkv must be .*\(B, N, 3C\) or \(B, H, W, 3C\), got torch.float32 of shape \(5, 12\)",
        ),
        "thirds": (dict(qkv=rand((2, 5, 13)), heads=1), r"qkv must be .*got torch.float32 of shape \(2, 5, 13\)"),
        "integers": (
            dict(qkv=torch.ones(2, 5, 12, dtype=torch.int64), heads=1),
            "qkv must be floating point .* got torch.int64",
        ),
        "heads": (dict(qkv=rand((2, 5, 12)), heads=3), "heads must divide the C = 4 channels of qkv, got 3"),
        "no heads": (dict(qkv=rand((2, 5, 12)), heads=0), "heads must divide .* got 0"),
    }
    COUNTED = ((rand((2, 3, 4, 48)), 2), 2 * 2 * 2 * 12 * 16 * 8)  # of the products

    def inputs(self, batch=2, dtype=torch.float32):
        return rand((batch, 3, 4, 24), dtype), 2


def test_offsets_beyond_31_bits(tmp_path):
    """Rows of the map 2**30 elements apart."""
    qkv = rand((1, 4, 3, 48), torch.float16)
    size = 3 * 2**30 + 1024
    big = far_apart(tmp_path, size)
    apart = big.as_strided(qkv.shape, (size, 2**30, 48, 1))
    apart.copy_(qkv)
    out, a = kernel.fwd(qkv, 1, 0.25)
    assert all(map(torch.equal, (out, a), kernel.fwd(apart, 1, 0.25)))
    assert torch.equal(kernel.bwd(qkv[..., :16], qkv, a, 1, 0.25), kernel.bwd(apart[..., :16], apart, a, 1, 0.25))


@FORMS
def test_gradients_too_large_for_half_precision_in_between(f):
    """dA is a sum over tokens: here 40 · 40 · 150, beyond float16, while the gradients are not."""
    qkv = torch.cat((40 + rand((1, 150, 16)), rand((1, 150, 32), seed=1) / 30), 2).half()
    dout = (40 + rand((1, 150, 16), seed=2)).half()
    (ours,) = torch.autograd.grad(f(qkv.requires_grad_(), 1), qkv, dout)
    wide = qkv.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.channel_attention(wide, 1), wide, dout.double())
    torch.testing.assert_close(ours.double(), exact, rtol=1e-2, atol=1e-2 * exact.std().item())  # 20 units


@FORMS
def test_sharp_softmax_does_not_overflow(f):
    qkv = 1000 * rand((1, 40, 48))
    out = f(qkv, 1)
    assert out.isfinite().all()
    torch.testing.assert_close(
        out.double(), reference.channel_attention(qkv.double(), 1), rtol=1e-4, atol=1e-1
    )  # of numbers around 1000


@FORMS
def test_nan_in_a_query_stays_in_its_token_and_head(f):
    qkv = rand((2, 9, 48))
    clean = f(qkv, 2)
    qkv[1, 4, 3] = math.nan
    out = f(qkv, 2)
    assert out[1, 4, :8].isnan().all()
    out[1, 4, :8] = clean[1, 4, :8]
    assert torch.equal(out, clean)


@FORMS
def test_nan_in_a_key_stays_in_its_image_and_head(f):
    qkv = rand((2, 9, 48))
    clean = f(qkv, 2)
    qkv[1, 4, 16] = math.nan
    out = f(qkv, 2)
    assert out[1, :, 0].isnan().all()
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, :, 8:], clean[1, :, 8:])


def test_kernels_refuse_what_they_cannot_take():
    refuses(triton, "a head dimension of 129, over 128", rand((1, 2, 387)), 1, error=RuntimeError)
    refuses(triton, "float64", rand((1, 2, 12), torch.float64), 1, error=RuntimeError)


@FULL
def test_registration(full):
    big = rand((2, 4, 5, 54))
    for qkv in (big[:, 1:, ::2, 3:27].requires_grad_(), big[..., :24].transpose(1, 2)):
        registers(op.fwd, (qkv, 2, 0.25), full)
    out, a = op.fwd(qkv, 2, 0.25)
    registers(op.bwd, (rand(out.shape).transpose(1, 2).contiguous().transpose(1, 2), qkv, a, 2, 0.25), full)


@FULL
def test_registration_of_the_plain_form(full):
    for qkv in (rand((2, 7, 36)).requires_grad_(), rand((7, 3, 36)).transpose(0, 1)[:, ::2]):
        registers(eager.plain, (qkv, 2, 0.25), full)
    out, a = eager.plain(qkv, 2, 0.25)
    registers(eager.plain_bwd, (rand(out.shape), qkv, a, 2, 0.25), full)


def _memory(f, shape, heads) -> tuple[float, float]:
    """Most memory of the forward and of forward and backward, in maps (B, N, C)."""
    qkv, unit = rand(shape), shape[0] * shape[1] * shape[2] // 3 * 4
    forward = peak_bytes(lambda: f(qkv, heads))
    dout = rand((*shape[:-1], shape[-1] // 3))
    qkv.requires_grad_()
    return forward / unit, peak_bytes(lambda: torch.autograd.grad(f(qkv, heads), qkv, dout)) / unit


def test_memory():
    """Beyond the output (1 map) and the gradient (3), what is made of one image of eight. A copy of k, of q, or of the
    output across heads would be a map more."""
    forward, both = _memory(plain, (8, 1568, 288), 3)
    assert forward < 1.4
    assert both < 4.6


def test_memory_of_kernels():
    forward, both = _memory(triton, (1, 1024, 96), 2)  # stretches of 512 tokens: two D x D matrices a head, and A
    assert forward < 1.1
    assert both < 4.2
