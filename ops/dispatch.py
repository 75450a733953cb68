"""Choose the form of an operator: its Triton kernels, PyTorch for speed, or its definition in plain PyTorch."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

NAMES = ("triton", "torch", "auto")
HAVE_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


def _interpreting() -> bool:
    """Return whether Triton runs its kernels on the CPU, in Python (TRITON_INTERPRET=1, as the tests do)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


# Plain globals, which torch.compile and torch.export guard on or fold; a context variable they could not.
_backend = _checked(os.environ.get("SACCADE_BACKEND", "auto"), "SACCADE_BACKEND")
_interpreted = _interpreting()


class backend:
    """`with backend("torch"):` forces one form of every operator, in the whole process, until the block ends.

    "triton" runs the kernels or raises, naming everything that they cannot take; "torch" never runs them; "auto", the
    default unless the environment variable SACCADE_BACKEND says otherwise, runs them where they can run.
    """

    def __init__(self, name: str):
        self.name = _checked(name, "backend")

    def __enter__(self):
        global _backend
        self.before, _backend = _backend, self.name
        return self

    def __exit__(self, *_):
        global _backend
        _backend = self.before


def use_triton(*tensors: Tensor, cannot: Sequence[str] = ()) -> bool:
    """Return whether to run the kernels on these tensors; `cannot` lists what the operator knows they can't take.

    Triton's interpreter runs kernels under backend("triton") alone: it is a thousand times slower than PyTorch. A graph
    that is saved for other programs (torch.export, torch.jit.trace) holds kernels under backend("triton") alone too.
    """
    if _backend == "torch" or (_backend == "auto" and is_saved_graph()):
        return False
    reasons = list(cannot)
    if not HAVE_TRITON:
        reasons.append("Triton is not installed")
    if is_transformed():
        reasons.append("transforms of torch.func and forward-mode derivatives")
    for x in tensors:
        if x.device.type != "cuda" and not (_interpreted and _backend == "triton" and x.device.type == "cpu"):
            reasons.append(f"a tensor on {x.device.type}, where no kernel runs")
        elif x.dtype.is_floating_point and x.dtype not in DTYPES:
            reasons.append(f"a tensor of {x.dtype}; kernels take float32, float16 and bfloat16")
    if reasons and _backend == "triton":
        raise RuntimeError(
            f"backend 'triton' was asked for by name, but it cannot take: {'; '.join(dict.fromkeys(reasons))}"
        )
    return not reasons


def is_saved_graph() -> bool:
    """Return whether a graph is recorded that may run without saccade: by torch.export, torch.jit.trace, or by what
    calls one of them (both ONNX exporters, TensorBoard, fvcore, OpenVINO)."""
    return torch.compiler.is_exporting() or (not torch.compiler.is_compiling() and torch.jit.is_tracing())


def is_transformed() -> bool:
    """Return whether torch.func transforms (grad, vmap, jvp, functionalize) or forward-mode derivatives are active."""
    if torch.compiler.is_compiling():  # which takes transforms apart itself, and cannot read these states
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def use_definition(*tensors: Tensor) -> bool:
    """Return whether an operator must consist of out-of-place PyTorch operators alone.

    True for graphs (torch.compile, torch.export, torch.jit.trace, make_fx), which record loops over the batch as many
    times as they ran and know no autograd.Function; for transforms and forward-mode derivatives, which need every
    step's own rule; and for tensors without values (meta and fake ones).
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return True
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:  # make_fx
        return True
    return any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def definition_gradients(
    definition: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiate definition(*tensors): the gradients of the `needed` tensors, themselves differentiable.

    For the backward of an autograd.Function when a second derivative is wanted, or when it runs under a transform.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: where one tensor was computed from another, the other's gradient must not pass through it.
        inputs = [t.view_as(t) if n and t is not None else t for t, n in zip(tensors, needed)]
        y = definition(*inputs)
        leaves: list[Any] = [t for t, n in zip(inputs, needed) if n]
        grads = torch.autograd.grad(y, leaves, dy, create_graph=differentiable, allow_unused=True)
    remaining = iter(grads)
    return tuple(next(remaining) if n else None for n in needed)


def wants_definition_gradients(dy: Tensor) -> bool:
    """Return whether the backward of dy must be differentiable (create_graph=True), or runs under a transform or for
    many gradients at once (is_grads_batched=True)."""
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(dy)
