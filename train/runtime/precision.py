"""Mixed precision: the autocast of a run's forward passes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}  # and their numbers of spatial axes


def autocasting(device: torch.device, precision: str) -> Callable[[], AbstractContextManager]:
    """Return the context manager of a precision's forward passes."""
    if precision == "fp32":
        return nullcontext
    if precision == "bf16" and device.type == "cpu":
        return _autocast_cpu
    return partial(torch.autocast, device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


@contextmanager
def _autocast_cpu() -> Iterator[None]:
    """Autocast to bf16, with convolutions whose kernel outgrows its feature map in fp32.

    On processors with AVX-512, oneDNN's bf16 gradient of such a kernel (3x3 at stride 2 on a 1x1 map, say) leaves the
    elements that meet no input uninitialized instead of zero: NaN, by chance.
    """
    with torch.autocast("cpu", torch.bfloat16), _OutgrownInFloat32():
        yield


class _OutgrownInFloat32(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in CONVOLUTIONS or not _outgrows(CONVOLUTIONS[func], *args, **kwargs):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            output = func(*map(_to_float32, args), **{name: _to_float32(value) for name, value in kwargs.items()})
        return output.bfloat16()


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _outgrows(
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> bool:
    """Return whether an element of a convolution's kernel meets padding only, in every position."""
    if input.dtype == torch.float64 or padding == "valid":  # autocast leaves float64 as it is
        return False
    sizes, kernel = input.shape[-axes:], weight.shape[-axes:]
    strides, dilations = _each(stride, axes), _each(dilation, axes)
    same = [d * (k - 1) // 2 for k, d in zip(kernel, dilations)]  # in front, and behind that or one more
    pads = same if isinstance(padding, str) else _each(padding, axes)
    for n, k, s, p, d in zip(sizes, kernel, strides, pads, dilations):
        last = (n + 2 * p - d * (k - 1) - 1) // s  # position
        for offset in range(-p, d * k - p, d):  # of each element in the first position
            if min(last, (n - 1 - offset) // s) < max(0, -(offset // s)):
                return True
    return False


def _each(value: int | Sequence[int], axes: int) -> Sequence[int]:
    return [value] * axes if isinstance(value, int) else [*value] * (axes // len(value))
