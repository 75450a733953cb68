"""Fast PyTorch implementation, used where the Triton kernels cannot run (mainly on CPUs).

The biases are (heads, a, N) tensors, shared by the batch. A few images are processed at a time, so that no tensor of
B·heads·a·N elements is allocated and the working set stays in cache. The backward pass recomputes the probabilities.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ..dispatch import definition_gradients, is_compiled, is_exporting, wants_definition_gradients
from ..precision import no_autocast
from . import reference
from .tables import Factors, whole

CHUNK_BYTES = 3 << 20  # of queries per chunk of images: the fastest measured between 1 and 10 MB
# With fewer agents than this, logits are stored agents by tokens whichever axis the softmax runs over: one row of 3136
# tokens makes faster products and sums than 3136 rows of nine agents, twice as fast as PyTorch's flash attention.
FLASH_AGENTS = 32


class Inputs(NamedTuple):
    """The arguments of saccade.ops.agent_attention but the scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    agents: Tensor
    key_bias: Factors
    query_bias: Factors
    heads: int
    token_bias: tuple[Tensor, Tensor] | None
    dwc_weight: Tensor | None
    dwc_bias: Tensor | None


def agent_attention(inputs: Inputs, scale: float) -> Tensor:
    """See saccade.ops.agent_attention, which checks the arguments. With dwc_weight, both maps must have one size."""
    q, k, v, agents, key_bias, query_bias, heads, token_bias, dwc_weight, dwc_bias = inputs
    b1, b2 = whole(key_bias), whole(query_bias)
    if token_bias is not None:
        b1, b2 = (torch.cat((t.unsqueeze(2).to(b.dtype), b), 2) for t, b in zip(token_bias, (b1, b2)))
    size = query_bias[1].shape[2], query_bias[2].shape[2]
    dwc = (None if p is None else p.to(q.dtype) for p in (dwc_weight, dwc_bias))
    form = _exported if is_exporting() else plain if is_compiled() else AgentAttention.apply
    return form(q, k, v, agents, b1.to(q.dtype), b2.to(q.dtype), *dwc, heads, size, scale)


def _exported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    b1: Tensor,
    b2: Tensor,
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    heads: int,
    size: tuple[int, int],
    scale: float,
) -> Tensor:
    """Compute both softmaxes by PyTorch's attention, which runtimes fuse."""
    qs, ks, vs, agent = (_heads(x, heads) for x in (q, k, v, agents))
    va = F.scaled_dot_product_attention(agent, ks, vs, b1, scale=scale)
    out = F.scaled_dot_product_attention(qs, agent, va, b2.mT, scale=scale).transpose(1, 2).flatten(2)
    if dwc_weight is None:
        return out
    conv = reference.convolve(_map(v, size), dwc_weight, dwc_bias).flatten(2).transpose(1, 2)
    return out + F.pad(conv, (0, 0, out.shape[1] - conv.shape[1], 0))


def _heads(x: Tensor, heads: int) -> Tensor:  # (B, N, C) -> (B, heads, N, D)
    return x.unflatten(2, (heads, x.shape[2] // heads)).transpose(1, 2)


def _map(x: Tensor, size: Sequence[int]) -> Tensor:  # (B, [1 +] h·w, C) -> (B, C, h, w), channels last
    return x[:, x.shape[1] - size[0] * size[1] :].transpose(1, 2).unflatten(2, size)


def _chunks(q: Tensor) -> list[slice]:
    step = max(1, CHUNK_BYTES // (q.shape[1] * q.shape[2] * q.element_size()))
    return [slice(i, i + step) for i in range(0, q.shape[0], step)]


def _probabilities(agents: Tensor, x: Tensor, bias: Tensor, dim: int) -> Tensor:
    return torch.softmax((agents @ x.mT).add_(bias), dim)  # (B, heads, a, N)


class AgentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        agents: Tensor,
        b1: Tensor,
        b2: Tensor,
        dwc_weight: Tensor | None,
        dwc_bias: Tensor | None,
        heads: int,
        size: tuple[int, int],
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, agents, b1, b2, dwc_weight, dwc_bias)
        ctx.rest = heads, size, scale
        return forward(q, k, v, agents, b1, b2, dwc_weight, dwc_bias, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if wants_definition_gradients(dout):
            f = partial(_definition, rest=ctx.rest)
            return *definition_gradients(f, ctx.saved_tensors, ctx.needs_input_grad[:8], dout), None, None, None
        return *backward(dout, *ctx.saved_tensors, *ctx.rest), None, None, None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    b1: Tensor,
    b2: Tensor,
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    heads: int,
    size: Sequence[int],
    scale: float,
) -> Tensor:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    b1, b2 = b1.detach(), b2.detach()  # for masks with a gradient PyTorch's attention has a form of twice the time
    explicit = q.dtype == torch.bfloat16  # in which PyTorch's attention is as fast at best
    flash = agents.shape[1] >= FLASH_AGENTS and not explicit
    mask = b2.mT.contiguous() if flash else b2
    for chunk in _chunks(q):
        qs, ks, vs, agent = (_heads(x[chunk], heads) for x in (q, k, v, agents))
        if explicit:
            va = _probabilities(scale * agent, ks, b1, -1) @ vs
        else:
            va = F.scaled_dot_product_attention(agent, ks, vs, b1.expand(len(qs), -1, -1, -1), scale=scale)
        if flash:
            o = F.scaled_dot_product_attention(qs, agent, va, mask.expand(len(qs), -1, -1, -1), scale=scale)
        else:
            o = _probabilities(scale * agent, qs, mask, -2).mT @ va
        _heads(out[chunk], heads).copy_(o)
        if dwc_weight is not None:
            _map(out[chunk], size).add_(reference.convolve(_map(v[chunk], size), dwc_weight, dwc_bias))
    return out


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    b1: Tensor,
    b2: Tensor,
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    heads: int,
    size: Sequence[int],
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of all tensors but dout."""
    C = q.shape[2]
    with no_autocast(dout):
        dq, dk, dv, dagents = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, agents))
        db1, db2 = torch.zeros_like(b1), torch.zeros_like(b2)
        dwc = [None if p is None else torch.zeros_like(p) for p in (dwc_weight, dwc_bias)]
        for chunk in _chunks(q):
            qs, ks, vs, dos = (_heads(x[chunk], heads).contiguous() for x in (q, k, v, dout))
            agent = scale * _heads(agents[chunk], heads)
            p1 = _probabilities(agent, ks, b1, -1)
            p2 = _probabilities(agent, qs, b2, -2)
            va, dva = p1 @ vs, p2 @ dos
            ds = va @ dos.mT
            ds.sub_((p2 * ds).sum(-2, keepdim=True)).mul_(p2)
            db2 += ds.sum(0)
            _heads(dq[chunk], heads).copy_(ds.mT @ agent)
            dagent = ds @ qs
            ds = torch.matmul(dva, vs.mT).sub_((dva * va).sum(-1, keepdim=True)).mul_(p1)
            db1 += ds.sum(0)
            _heads(dk[chunk], heads).copy_(ds.mT @ agent)
            _heads(dv[chunk], heads).copy_(p1.mT @ dva)
            _heads(dagents[chunk], heads).copy_((dagent + ds @ ks).mul_(scale))
            if dwc_weight is not None:
                dx, *grads = torch.ops.aten.convolution_backward(
                    _map(dout[chunk], size), _map(v[chunk], size), dwc_weight, None if dwc_bias is None else [C],
                    [1, 1], [1, 1], [1, 1], False, [0, 0], C, [True, True, dwc_bias is not None],
                )  # fmt: skip
                _map(dv[chunk], size).add_(dx)
                for total, grad in zip(dwc, grads):
                    if total is not None:
                        total += grad
    return dq, dk, dv, dagents, db1, db2, *dwc


# One node in the graphs of torch.compile on a CPU: its loop over the images would fix their number in the graph.


@custom_op("saccade::agent_attention_plain", mutates_args=())
def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    b1: Tensor,
    b2: Tensor,
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    heads: int,
    size: Sequence[int],
    scale: float,
) -> Tensor:
    return forward(q, k, v, agents, b1, b2, dwc_weight, dwc_bias, heads, size, scale)


@plain.register_fake
def _(q, *rest):
    return q.new_empty(q.shape)


@custom_op("saccade::agent_attention_plain_bwd", mutates_args=())
def plain_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    b1: Tensor,
    b2: Tensor,
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    heads: int,
    size: Sequence[int],
    scale: float,
) -> list[Tensor]:
    grads = backward(dout, q, k, v, agents, b1, b2, dwc_weight, dwc_bias, heads, size, scale)
    return [grad for grad in grads if grad is not None]


@plain_bwd.register_fake
def _(dout, *inputs):
    return [t.new_empty(t.shape) for t in inputs[:8] if t is not None]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:8])
    ctx.rest = inputs[8:]


def _backward(ctx, dout):
    grads = iter(plain_bwd(dout, *ctx.saved_tensors, *ctx.rest))
    return *(None if t is None else next(grads) for t in ctx.saved_tensors), None, None, None


plain.register_autograd(_backward, setup_context=_save)


def _definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    b1: Tensor,
    b2: Tensor,
    dwc_weight: Tensor | None,
    dwc_bias: Tensor | None,
    rest: tuple[int, tuple[int, int], float],
) -> Tensor:
    heads, size, scale = rest
    with no_autocast(q):
        out = reference.attend(q, k, v, agents, b1, b2, heads, scale)
        if dwc_weight is None:
            return out
        conv = reference.convolve(_map(v, size), dwc_weight, dwc_bias).flatten(2).transpose(1, 2)
        return out + F.pad(conv, (0, 0, out.shape[1] - conv.shape[1], 0))
