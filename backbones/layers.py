"""Layers and helpers shared by several families."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GELU, LayerNorm2d, trunc_normal_
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import Tensor, nn
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import Proxy
from torch.nn.modules import module as global_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.module_tracker import ModuleTracker

from ..ops.dispatch import is_any_size, is_exporting, is_transformed, use_definition
from ..ops.linear import linear, mlp, uses_onednn


def _tokens_at_once(x: Tensor, hidden: int) -> int:
    """Return how many of the tokens x (..., C) an MLP processes at once, 0 for all: half the time for PVT's."""
    token = hidden * x.element_size()
    if torch.is_grad_enabled() or use_definition(x) or x.device.type != "cpu":
        return 0
    return 2**22 // token if x.numel() // x.shape[-1] * token >= 2**24 else 0


@register_notrace_module
class CachedMlp(nn.Module):
    """Linear, GELU, linear: (..., C) -> same.

    Without gradients, a CPU processes a few tokens at a time, so that the hidden layer stays in its cache.
    """

    def __init__(self, dim: int, hidden: int, **dd):
        super().__init__()
        self.hidden = hidden
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
            if type(self.act) is nn.GELU and self.act.approximate == "none" and can_fuse(self.fc1, self.act, self.fc2):
                at_once = _tokens_at_once(x, self.hidden)
                if at_once:
                    return torch.cat([self._fused(piece) for piece in x.flatten(0, -2).split(at_once)]).view(x.shape)
                return self._fused(x)
        return self.fc2(self.act(self.fc1(x)))

    @torch.jit.unused
    def _fused(self, x: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and uses_onednn(x, self.fc1.weight, self.fc1.bias)
        ):
            return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        hidden = linear(x, self.fc1.weight, self.fc1.bias, gelu=True)
        return linear(hidden, self.fc2.weight, self.fc2.bias)


class MapNorm(LayerNorm2d):
    """LayerNorm over the channels of maps (B, C, H, W), channels-last in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return as_nchw(F.layer_norm(as_nhwc(x), self.normalized_shape, self.weight, self.bias, self.eps))


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution of stride 1 that keeps the size; the weight's gradient is computed tap by tap."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, _, H, W = x.shape
        K = weight.shape[2]
        k = K // 2
        dx = F.conv_transpose2d(dout, weight, padding=k, groups=len(weight)) if ctx.needs_input_grad[0] else None
        own, rows = dout.permute(0, 2, 3, 1), F.pad(x, (k, k, k, k)).permute(0, 2, 3, 1)
        zero = own.new_zeros(len(weight))  # for taps that are always outside the map
        taps = [
            (own * rows[:, i : i + H, j : j + W]).sum((0, 1, 2)) if abs(i - k) < H and abs(j - k) < W else zero
            for i in range(K)
            for j in range(K)
        ]
        dweight = torch.stack(taps, 1).view(weight.shape)
        return dx, dweight, own.sum((0, 1, 2)) if ctx.needs_input_grad[2] else None


@register_notrace_module
class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution of stride 1 that keeps the size: (B, C, H, W) -> same.

    On a CPU with maps of up to 16 cells, such as the last ones of small images, PyTorch takes much longer for the
    gradient of the weight than for that of the input; there it is computed tap by tap.
    """

    def __init__(self, dim: int, kernel: int = 3, **dd):
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            tap_by_tap = self.weight.requires_grad and _few_cells(x) and self._is_as_made()
            if tap_by_tap:
                return _Depthwise.apply(x, self.weight, self.bias)
        return self._conv_forward(x, self.weight, self.bias)

    @torch.jit.unused
    def _is_as_made(self) -> bool:
        half = self.kernel_size[0] // 2
        return (self.padding, self.dilation, self.padding_mode) == ((half, half), (1, 1), "zeros")


# Exported programs transpose tokens (B, H·W, C) instead of permuting the axes of (B, H, W, C). Beside permuted axes
# OpenVINO runs sums and norms in a layout that it then has to reorder: a fifth of the time of DaViT's first stage.


def as_nchw(x: Tensor) -> Tensor:
    """Return a map (B, H, W, C) as (B, C, H, W), in channels-last memory format."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
        if is_exporting():
            B, H, W, C = x.shape
            return x.reshape(B, H * W, C).transpose(1, 2).reshape(B, C, H, W)
    return x.permute(0, 3, 1, 2)


def as_nhwc(x: Tensor) -> Tensor:
    """Return a map (B, C, H, W) as (B, H, W, C)."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
        if is_exporting():
            B, C, H, W = x.shape
            return x.reshape(B, C, H * W).transpose(1, 2).reshape(B, H, W, C)
    return x.permute(0, 2, 3, 1)


def _few_cells(x: Tensor) -> bool:
    if not torch.is_grad_enabled() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return not use_definition(x) and x.shape[2] * x.shape[3] <= 16


def channels_last(x: Tensor) -> Tensor:
    """Return x (B, C, H, W) in channels-last memory format."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript would compile a second condition)
        if is_transformed():  # vmap does not know the format by its name
            return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def is_traced() -> bool:
    """Return whether torch.jit.trace is recording: its graph must work for other sizes, so none may be branched on."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.jit.is_tracing()


def must_pad(down: int, right: int) -> bool:
    """Return whether to pad a map by this much: always in a graph that must work for other sizes too."""
    return is_any_size(down, right) or down > 0 or right > 0


def position_table(tokens: int, dim: int, **dd) -> nn.Parameter:
    return nn.Parameter(trunc_normal_(torch.empty(1, tokens, dim, **dd), std=0.02))


@register_notrace_function
def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Resize position embeddings (1, [1 +] h·w, C) from a map of size `old` to `new`; the class token's stays."""
    if not is_any_size(new[0], new[1]) and old[0] == new[0] and old[1] == new[1]:
        return table
    tokens = table.shape[1] - old[0] * old[1]
    x = table[:, tokens:].transpose(1, 2).unflatten(2, old)
    x = F.interpolate(x, new, mode=mode, align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat((table[:, :tokens], x.to(table.dtype)), 1)


# Layers that operators know how to compute from their parameters. Subclasses may compute anything else.
FUSIBLE = (nn.Linear, nn.Conv1d, nn.Conv2d, DepthwiseConv, nn.BatchNorm2d, nn.GELU, nn.ReLU, GELU)


@torch.jit.unused
def can_fuse(*layers: nn.Module, fusible: tuple[type, ...] = FUSIBLE) -> bool:
    """Return whether an operator may compute `layers` from their parameters, without calling them.

    It may not where that would differ from calling them: the class is not the plain one (a parametrization, a
    quantized, low-rank or sharded replacement), something hooks into the call (pruning, weight norm, observers,
    feature extraction, backward hooks), `forward` is overridden on the instance, a parameter is a tensor subclass, a
    convolution is dilated or does not pad with zeros, or BatchNorms have no running statistics, a cumulative momentum,
    or differ in mode, momentum or eps. fusible: the classes of layers that the operator knows.
    """
    if _has_global_hooks():
        return False
    norms = [layer for layer in layers if type(layer) is nn.BatchNorm2d]
    for norm in norms:
        if norm.running_mean is None or norm.weight is None or norm.momentum is None:
            return False
        first = norms[0]
        if (norm.training, norm.momentum, norm.eps) != (first.training, first.momentum, first.eps):
            return False
    return all(type(layer) in fusible and _is_plain(layer) for layer in layers)


def _is_plain(layer: nn.Module) -> bool:
    if "forward" in layer.__dict__ or getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    if any(step != 1 for step in getattr(layer, "dilation", ())):
        return False
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks:
        return False
    weight = getattr(layer, "weight", None)
    return not is_traceable_wrapper_subclass(weight) or isinstance(weight, FunctionalTensor)


def _has_global_hooks() -> bool:
    """Return whether there are global module hooks, other than those of a FLOP counter."""
    for registered in (
        global_hooks._global_forward_pre_hooks,
        global_hooks._global_forward_hooks,
        global_hooks._global_backward_pre_hooks,
        global_hooks._global_backward_hooks,
    ):
        for hook in registered.values():
            if not isinstance(getattr(hook, "__self__", None), ModuleTracker):
                return True
    return False


@torch.jit.unused
def project(layer: Any, x: Tensor) -> Tensor:
    """Return layer(x) of a linear layer (..., C), or a convolution of 1x1 (B, C, H, W), by ops.linear where that is
    faster and the same as calling it."""
    if isinstance(x, Proxy) or not can_fuse(layer):
        return layer(x)
    if type(layer) is nn.Linear:
        return linear(x, layer.weight, layer.bias)
    weight, (down, right) = layer.weight, layer.stride
    pointwise = weight.shape[2:] == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    if (
        not pointwise
        or not uses_onednn(x, weight, layer.bias)
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return layer(x)
    if (down, right) != (1, 1):
        x = x[:, :, ::down, ::right]
    return linear(x.permute(0, 2, 3, 1), weight.flatten(1), layer.bias).permute(0, 3, 1, 2)


class _Unused(torch.autograd.Function):
    """Return x, and in the backward pass visit parameters without giving them a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor | None, ...]:
        without = [p for p in ctx.parameters if p.grad is None]

        def clear() -> None:
            for p in without:
                p.grad = None

        # DDP writes zeros to .grad in a callback at the end of the pass, which would let an optimizer decay the
        # parameters. One queued during the callbacks runs after it.
        queue = torch.autograd.Variable._execution_engine.queue_callback
        queue(lambda: queue(clear))
        return dx, *[None] * len(ctx.parameters)


@torch.jit.unused
def mark_unused(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return x, so that under DistributedDataParallel the forward pass may leave `parameters` without a gradient.

    DDP otherwise waits for them and refuses the next step, unless made with `static_graph=True` or
    `find_unused_parameters=True`. Their `.grad` stays what it was, as in a single process.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return x
    if DistributedDataParallel._get_active_ddp_module() is None:
        return x
    return _Unused.apply(x, *(p for p in parameters if p.requires_grad))
