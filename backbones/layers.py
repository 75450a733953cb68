"""Layers that several families share."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models._features_fx import register_notrace_function, register_notrace_module
from torch import Tensor, nn


def _tokens_at_once(x: Tensor, hidden: int) -> int:
    """How many of the tokens x (..., C) an MLP takes at once, 0 for all: halves the time of PVT's first at batch 8."""
    token = hidden * x.element_size()
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return 0
    return 2**22 // token if x.numel() // x.shape[-1] * token >= 2**24 else 0


@register_notrace_module
class CachedMlp(nn.Module):
    """Linear, GELU, linear: (..., C) -> same. Without gradients a CPU takes few tokens at a time, which stay in its
    cache where they are widest. (With gradients the same, by a backward of its own, gained no time and 8 % of memory.)
    """

    def __init__(self, dim: int, hidden: int, **dd):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            at_once = _tokens_at_once(x, self.fc1.out_features)
            if at_once:
                pieces = x.flatten(0, -2).split(at_once)
                return torch.cat([self.fc2(self.act(self.fc1(piece))) for piece in pieces]).view(x.shape)
        return self.fc2(self.act(self.fc1(x)))


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution of stride 1 that keeps the size; its weight's gradient is a sum for each tap."""

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
        zero = own.new_zeros(len(weight))  # of taps that never lie on the map
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

    On a CPU and maps of up to 16 cells, the last ones of small images, PyTorch takes far longer for the gradient of its
    weight than for that of its input: there it is computed tap by tap.
    """

    def __init__(self, dim: int, kernel: int = 3, **dd):
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            tap_by_tap = self.weight.requires_grad and _few_cells(x)
            if tap_by_tap:
                return _Depthwise.apply(x, self.weight, self.bias)
        return self._conv_forward(x, self.weight, self.bias)


def _few_cells(x: Tensor) -> bool:
    if not torch.is_grad_enabled() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and x.shape[2] * x.shape[3] <= 16


def position_table(tokens: int, dim: int, **dd) -> nn.Parameter:
    return nn.Parameter(trunc_normal_(torch.empty(1, tokens, dim, **dd), std=0.02))


@register_notrace_function
def resize_positions(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """Position embeddings (1, [1 +] h·w, C) of a map of size `old` to those of size `new`; the class token's stays."""
    if old[0] == new[0] and old[1] == new[1]:
        return table
    tokens = table.shape[1] - old[0] * old[1]
    x = table[:, tokens:].transpose(1, 2).unflatten(2, old)
    x = F.interpolate(x, new, mode=mode, align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat((table[:, :tokens], x.to(table.dtype)), 1)
