"""Attention with iRPE's bias: the buckets, the published layer, and what window_attention's own tests do not hold."""

import math

import pytest
import torch
import torch.nn.functional as F
from saccade.ops import relative_bias_attention
from saccade.ops.relative_bias import buckets
from saccade.ops.window_attention import eager
from support import parity
from support.ops import (
    DEVICE,
    DTYPES,
    accepts_empty,
    agree,
    check,
    exports,
    forced,
    gradients_are_right,
    grid,
    rand,
    refuses,
    repeats,
    scripts,
)

torch.set_num_threads(1)

plain, triton = forced(relative_bias_attention, "torch"), forced(relative_bias_attention, "triton")


def by_pairs(H, W):  # (N, N), with Python's own arithmetic
    def bucket(i, j):
        d = round(math.hypot(i // W - j // W, i % W - j % W))
        return 40 + (d if d <= 20 else min(40, round(20 + 20 * math.log(d / 20) / math.log(8))))

    return torch.tensor([[bucket(i, j) for j in range(H * W)] for i in range(H * W)], device=DEVICE)


def loops(qkv, heads, table, scale=None):
    """The definition: all logits, a gathered bias."""
    B, H, W, _, C = qkv.shape
    q, k, v = qkv.reshape(B, H * W, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    s = q @ k.mT * ((C // heads) ** -0.5 if scale is None else scale) + table[:, by_pairs(H, W)]
    return (s.softmax(-1) @ v).transpose(1, 2).reshape(B, H, W, C)


def inputs(shape, dtype=torch.float32):
    B, H, W, heads, D = shape
    return rand((B, H, W, 3, heads * D), dtype), heads, rand((heads, 81), dtype, 1)


@pytest.mark.parametrize("H, W", [(7, 7), (3, 28), (1, 1), (1, 200)])
def test_buckets(H, W):
    wanted = by_pairs(H, W).view(H, W, H, W)
    ours = buckets(H, W, DEVICE)
    assert torch.equal(ours[:H, :W].flip(0, 1), wanted[0, 0])
    assert torch.equal(ours[H - 1 :, W - 1 :].flip(0, 1), wanted[-1, -1])


def test_published_buckets():
    ours = buckets(7, 7, DEVICE)
    y, x = torch.arange(49) // 7, torch.arange(49) % 7
    ids = ours.cpu()[y[:, None] - y + 6, x[:, None] - x + 6]
    parity.assert_equal("ids", ids, parity.load("patnet", "op_rpe_buckets_7x7")["outputs"]["ids"])


def test_published_layer():
    """PATNet's PAT_sf: a convolution of a quarter of the channels, attention among the others."""
    fixture = parity.load("patnet", "op_pat_sf")
    state = {key: value.to(DEVICE).requires_grad_() for key, value in parity.weights(fixture).items()}
    x = parity.image(fixture).to(DEVICE).requires_grad_()
    x1, x2 = x[:, :16], x[:, 16:].permute(0, 2, 3, 1)
    y1 = F.conv2d(x1, state["partial_conv3.weight"], padding=1)
    qkv = F.linear(F.layer_norm(x2, (48,), state["norm.weight"], state["norm.bias"], 1e-6), state["attn.qkv.weight"])
    y2 = plain(qkv.unflatten(-1, (3, -1)), 4, state["attn.rpe_k.lookup_table_bias"])
    y2 = F.linear(y2, state["attn.proj.weight"], state["attn.proj.bias"]).permute(0, 3, 1, 2)
    out = torch.cat((y1, y2), 1)
    parity.assert_equal("out", out.cpu(), fixture["outputs"]["out"])
    (out * parity.seeded(1, out.shape).to(DEVICE)).sum().backward()
    parity.assert_equal("grad_x", x.grad.cpu(), fixture["outputs"]["grad_x"])
    assert set(state) == set(fixture["grads"])
    for key, expected in fixture["grads"].items():
        assert abs(state[key].grad.norm().item() - expected) <= 1e-9 * expected, key


@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 5), (1, 1, 30, 1, 4), (3, 7, 6, 2, 24)], ids=str)
def test_eager_is_the_definition(shape):
    agree(plain, loops, *inputs(shape, torch.float64))


@grid(shape=[(1, 3, 2, 2, 5), (1, 2, 3, 1, 48)], dtype=DTYPES)
def test_triton_matches_reference(shape, dtype, monkeypatch):
    from saccade.ops.window_attention import kernel

    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    check(triton, loops, *inputs(shape, dtype))


def test_runs_are_equal_to_the_bit():
    repeats(triton, *inputs((1, 1, 2, 1, 4)))


def test_scale_is_a_parameter():
    agree(plain, loops, *inputs((1, 2, 3, 1, 4), torch.float64), 0.7)


def test_gradcheck():
    gradients_are_right(plain, *inputs((1, 2, 2, 1, 2), torch.float64))


def test_entries_never_read_get_no_gradient():
    qkv, heads, table = inputs((1, 3, 4, 1, 4))
    (grad,) = torch.autograd.grad(plain(qkv, heads, table.requires_grad_()).square().sum(), table)
    assert grad[:, 40:45].all()
    assert not grad[:, :40].any()
    assert not grad[:, 45:].any()
    table = table.detach()
    table[:, 3] = math.nan
    assert not plain(qkv, heads, table).isnan().any()


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_exports(name):
    (args, others) = (inputs((B, 2, 2, 1, 4)) for B in (2, 3))
    exports(
        lambda qkv, table: relative_bias_attention(qkv, 1, table), args[::2], others[::2], name, "window_attention_fwd"
    )


def test_scripts():
    scripts(relative_bias_attention, plain, *inputs((1, 3, 4, 1, 4)))


@pytest.mark.parametrize("B, H, W", [(0, 2, 2), (2, 0, 2), (2, 2, 0)])
def test_nothing_in_nothing_out(B, H, W):
    accepts_empty(plain, (B, H, W, 6), *inputs((B, H, W, 2, 3)))


def test_bad_input_is_named_in_one_sentence():
    qkv, heads, table = inputs((1, 2, 2, 2, 4))
    refuses(relative_bias_attention, r"table must be .* \(2, 81\), got .* \(2, 80\)", qkv, heads, table[:, 1:])
    refuses(relative_bias_attention, r"qkv must be .* got \(2, 2, 3, 8\)", qkv[0], heads, table)
    refuses(relative_bias_attention, "table must be on .* as qkv is, got meta", qkv, heads, table.to("meta"))
    refuses(relative_bias_attention, "heads must divide the C = 8 channels of qkv, got 3", qkv, 3, rand((3, 81)))


def test_chunks_share_the_table(monkeypatch):
    monkeypatch.setattr(eager, "CHUNK_BYTES", 1)
    agree(plain, loops, *inputs((3, 2, 3, 2, 4), torch.float64))
