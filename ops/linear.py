"""Linear layers by oneDNN, where the library that PyTorch multiplies float32 matrices with is slow.

PyTorch's CPU builds call MKL. On an AMD EPYC (Zen 5), it reaches 100 GFLOP/s on one core, the rate of AVX2, for all
products of a DaViT-T; oneDNN, which the same builds contain, uses AVX-512 there and reaches 200. So oneDNN computes
them on processors with AVX-512 that are not Intel's. In half precision PyTorch calls oneDNN itself.
"""

import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .dispatch import definition_gradients, is_saved_graph, use_definition, wants_definition_gradients

SMALLEST = 2**20  # multiply-accumulates: with less, the call takes longer than the product


def _mkl_is_slow() -> bool:
    """Return whether this is an x86 processor with AVX-512 that is not Intel's, and oneDNN can be called."""
    if platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        with Path("/proc/cpuinfo").open() as f:
            vendor = next((line for line in f if line.startswith("vendor_id")), "GenuineIntel")
    except OSError:
        return False
    return "GenuineIntel" not in vendor


_onednn = _mkl_is_slow()  # a plain global, which torch.compile can guard on


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """F.linear, then GELU (by erf) if `gelu`: (..., K), (N, K), (N,) -> (..., N). Twice differentiable.

    oneDNN computes it for float32 on the processors described above, without autocast; PyTorch everywhere else.
    """
    if torch.jit.is_scripting():
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y
    else:
        if uses_onednn(x, weight, bias):
            if torch.compiler.is_compiling():
                if gelu and torch.is_grad_enabled():
                    return F.gelu(plain(x, weight, bias, False))
                return plain(x, weight, bias, gelu)
            if torch.is_grad_enabled():
                y = Linear.apply(x, weight, bias)
                return F.gelu(y) if gelu else y
            return _product(x.flatten(0, -2), weight, bias, gelu).view(*x.shape[:-1], len(weight))
        y = F.linear(x, weight, bias)
        return F.gelu(y) if gelu else y


def uses_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `linear` of these has oneDNN compute it; of a map (B, K, H, W) too, for a convolution of 1x1."""
    if not _onednn or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return False
    if x.dim() < 2 or (bias is not None and bias.dtype != torch.float32):
        return False
    if torch.is_autocast_enabled("cpu") or is_saved_graph():
        return False
    if torch.compiler.is_compiling():  # no guard on the batch
        return True
    if x.numel() * len(weight) < SMALLEST or not torch.backends.mkldnn.enabled:
        return False
    return not use_definition(x) and _get_current_dispatch_mode() is None  # modes count or record PyTorch's operators


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, gelu: bool = False) -> Tensor:
    """Return x weightᵀ + bias of (M, K) and (N, K)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _product(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if wants_definition_gradients(dy):
            return definition_gradients(F.linear, (x, weight, bias), needed, dy)
        dy = dy.flatten(0, -2)
        dx = _product(dy, weight.mT).view(x.shape) if needed[0] else None
        dweight = _weight_gradient(dy, x.flatten(0, -2)) if needed[1] else None
        return dx, dweight, dy.sum(0) if needed[2] else None


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dyᵀ x of (M, N) and (M, K). oneDNN is up to 1.6 times faster with the longer side as the result's rows'
    length."""
    if dy.shape[1] > x.shape[1]:
        return _product(x.mT, dy.mT).mT
    return _product(dy.mT, x.mT)


# One node in the graphs of torch.compile, which would call MKL too.


@custom_op("saccade::linear", mutates_args=())
def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
    return _product(x.flatten(0, -2), weight, bias, gelu).view(*x.shape[:-1], len(weight))


@plain.register_fake
def _(x, weight, bias, gelu):
    return x.new_empty(*x.shape[:-1], len(weight))


@custom_op("saccade::linear_bwd", mutates_args=())
def plain_bwd(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dy2, x2 = dy.flatten(0, -2), x.flatten(0, -2)
    return _product(dy2, weight.mT).view(x.shape), _weight_gradient(dy2, x2).contiguous(), dy2.sum(0)


@plain_bwd.register_fake
def _(dy, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.has_bias = inputs[2] is not None
    if inputs[3]:
        raise RuntimeError("saccade::linear with GELU has no derivative: apply GELU to its output")


def _backward(ctx, dy):
    dx, dweight, dbias = plain_bwd(dy, *ctx.saved_tensors)
    return dx, dweight, dbias if ctx.has_bias else None, None


plain.register_autograd(_backward, setup_context=_save)


@custom_op("saccade::mlp", mutates_args=())
def mlp(x: Tensor, weight1: Tensor, bias1: Tensor | None, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """Two linear layers with GELU between them, for compiled inference: (..., C) -> (..., N). It takes the tokens of
    4 MB of hidden layer at a time, which stay in the cache, and its memory is not fresh pages each time."""
    tokens = x.flatten(0, -2)
    out = x.new_empty(len(tokens), len(weight2))
    at_once = max(1, 2**20 // len(weight1))
    for piece, to in zip(tokens.split(at_once), out.split(at_once)):
        to.copy_(_product(_product(piece, weight1, bias1, gelu=True), weight2, bias2))
    return out.view(*x.shape[:-1], len(weight2))


@mlp.register_fake
def _(x, weight1, bias1, weight2, bias2):
    return x.new_empty(*x.shape[:-1], len(weight2))
