"""scaled_dot_product_attention with a second derivative, which PyTorch's lacks."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .dispatch import definition_gradients, is_transformed, use_definition, use_triton, wants_definition_gradients


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √D) v of (..., heads, N, D), for layers of a model: `attend`, or where kernels run PyTorch's own
    attention, whose backward pass is faster there and has no second derivative."""
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v)
    else:
        return F.scaled_dot_product_attention(q, k, v) if use_triton(q) else attend(q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v of (..., heads, N, D). A boolean mask selects keys, a floating-point one is added to the
    logits; the mask gets no gradient. Twice differentiable. Runs in autocast's dtype under autocast."""
    if torch.jit.is_scripting():
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    else:
        differentiates = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if is_transformed() and mask is None and (differentiates or forward_ad._current_level >= 0):
            return _definition(q, k, v, None, q.shape[-1] ** -0.5 if scale is None else scale)
        if use_definition(q) or not differentiates:  # one call: torch.jit.trace checks that a second trace has its line
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        device = q.device.type
        if torch.is_autocast_enabled(device) and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
        if mask is not None:
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -float("inf"))
            mask = mask.to(q.dtype)
        form = FlashOnCpu if q.device.type == "cpu" else Recomputed
        return form.apply(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)


def _definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    logits = q @ k.mT * scale
    if mask is None:
        return logits.softmax(-1) @ v
    hidden = (mask == -float("inf")).all(-1, keepdim=True)  # a query without keys gets 0
    return (logits + mask.masked_fill(hidden, 0.0)).softmax(-1).masked_fill(hidden, 0.0) @ v


def _second_derivative(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, mask = ctx.saved_tensors[:4]

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _definition(q, k, v, mask, ctx.scale)

    return *definition_gradients(f, (q, k, v), ctx.needs_input_grad[:3], dout), None, None


class FlashOnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if wants_definition_gradients(dout):
            return _second_derivative(ctx, dout)
        q, k, v, mask, out, lse = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *backward(dout, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=ctx.scale), None, None


class Recomputed(torch.autograd.Function):
    """For any device: the backward pass runs PyTorch's attention again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale = scale
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if wants_definition_gradients(dout):
            return _second_derivative(ctx, dout)
        *tensors, mask = ctx.saved_tensors
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in tensors)
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=ctx.scale)
        return *torch.autograd.grad(out, (q, k, v), dout), None, None
