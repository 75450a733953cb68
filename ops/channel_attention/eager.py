"""Fast PyTorch implementation: a few images at a time, reading qkv and writing the result without permuted copies.

A batched matrix product takes one batch axis of any stride. A batch of images has two, images and heads, interleaved
with the tokens, so `@` copies q, k, v and the output, which takes longer than the products. A single large image has
only the axis of heads, and the copies of a few small images stay in cache.
"""

from functools import partial

import torch
from torch import Tensor
from torch.library import custom_op

from ..dispatch import definition_gradients, is_compiled, wants_definition_gradients
from ..precision import full, no_autocast
from . import reference


def channel_attention(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """See saccade.ops.channel_attention, which checks the arguments."""
    tokens = qkv.flatten(1, -2)
    out = plain(tokens, heads, scale)[0] if is_compiled() else ChannelAttention.apply(tokens, heads, scale)
    return out.unflatten(1, qkv.shape[1:-1])


class ChannelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, heads: int, scale: float) -> Tensor:
        out, a = forward(qkv, heads, scale)
        ctx.save_for_backward(qkv, a)
        ctx.heads, ctx.scale = heads, scale
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None, None]:
        (qkv, a), heads, scale = ctx.saved_tensors, ctx.heads, ctx.scale
        if wants_definition_gradients(dout):
            with no_autocast(qkv):
                f = partial(reference.channel_attention, heads=heads, scale=scale)
                return *definition_gradients(f, (qkv,), (True,), dout), None, None
        return backward(dout, qkv, a, heads, scale), None, None


def forward(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the output (B, N, C), and A (B, heads, D, D) for the backward pass."""
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    few, wide = _few(qkv), full(qkv)
    a = qkv.new_empty(B, heads, C // heads, C // heads, dtype=wide)
    out = qkv.new_empty(B, N, C)
    with no_autocast(qkv):
        for (q, k, v), (to,), a_b in zip(_parts(qkv, 3, heads, few), _parts(out, 1, heads, few), a.split(few)):
            a_b.copy_((k.to(wide).mT @ v.to(wide)).mul_(scale).softmax(3))
            to.copy_(q @ a_b.mT.to(q.dtype))
    return out, a


def backward(dout: Tensor, qkv: Tensor, a: Tensor, heads: int, scale: float) -> Tensor:
    """Return the gradient of qkv, contiguous."""
    dqkv = qkv.new_empty(qkv.shape)
    few = _few(qkv)
    parts = _parts(qkv, 3, heads, few), _parts(dqkv, 3, heads, few), _parts(dout, 1, heads, few), a.split(few)
    with no_autocast(qkv):
        for (q, k, v), (dq, dk, dv), (dout_b,), a_b in zip(*parts):
            dq.copy_(dout_b @ a_b.to(q.dtype))
            da = dout_b.to(a.dtype).mT @ q.to(a.dtype)
            ds = a_b * (da - (a_b * da).sum(3, keepdim=True)) * scale
            dk.copy_(v.to(a.dtype) @ ds.mT)
            dv.copy_(k.to(a.dtype) @ ds)
    return dqkv


# One node in the graphs of torch.compile on a CPU: its loop over the images would fix their number in the graph.


@custom_op("saccade::channel_attention_plain", mutates_args=())
def plain(qkv: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    return forward(qkv, heads, scale)


@plain.register_fake
def _(qkv, heads, scale):
    B, N, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return qkv.new_empty(B, N, C), qkv.new_empty(B, heads, C // heads, C // heads, dtype=full(qkv))


@custom_op("saccade::channel_attention_plain_bwd", mutates_args=())
def plain_bwd(dout: Tensor, qkv: Tensor, a: Tensor, heads: int, scale: float) -> Tensor:
    return backward(dout, qkv, a, heads, scale)


@plain_bwd.register_fake
def _(dout, qkv, a, heads, scale):
    return qkv.new_empty(qkv.shape)


def _save(ctx, inputs, output):
    qkv, *ctx.rest = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, output[1])


def _backward(ctx, dout, _):
    return plain_bwd(dout, *ctx.saved_tensors, *ctx.rest), None, None


plain.register_autograd(_backward, setup_context=_save)


def _few(qkv: Tensor) -> int:
    """Return how many images have 1 MB of qkv in float32; at least one."""
    return max(1, 2**18 // (qkv.shape[1] * qkv.shape[2]))


def _parts(x: Tensor, n: int, heads: int, few: int) -> list[tuple[Tensor, ...]]:
    """Split x (B, N, n·C) into chunks of a few images, each n tensors (few, heads, N, D)."""
    return [part.unbind(1) for part in x.unflatten(2, (n, heads, -1)).permute(0, 2, 3, 1, 4).split(few)]
