"""Choose the implementation of an operator: Triton kernels, fast PyTorch, or the reference in plain PyTorch."""

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


# A plain global, since torch.compile and torch.export can guard on it or fold it, unlike a context variable.
_backend = _checked(os.environ.get("SACCADE_BACKEND", "auto"), "SACCADE_BACKEND")
_interpreted = _interpreting()
_recording = False  # True while saccade.ops.launches records the kernels that CPU tensors would launch on a GPU


def _is_below_sm_80(index: int | None) -> bool:
    """Return whether this is an NVIDIA GPU older than sm_80, whose tensor cores the kernels cannot use."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(index) < (8, 0)


# A constant for torch.compile, as by torch.compiler.assume_constant_result, which would import the compiler here.
_is_below_sm_80._dynamo_marked_constant = True  # type: ignore[attr-defined]


class backend:
    """Force one backend for all operators: `with backend("torch"): ...`. It applies to the whole process.

    "triton" runs the kernels, or raises a RuntimeError that lists why it cannot; "torch" never runs them; "auto" runs
    them wherever it can. The default is "auto", or the value of the environment variable SACCADE_BACKEND.
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
    """Return whether to run the kernels on these tensors; `cannot` lists the operator's own reasons not to.

    In Triton's interpreter, kernels run only under backend("triton"), since they are a thousand times slower than
    PyTorch there. A graph that is saved for other programs (torch.export, torch.jit.trace) also contains kernels only
    under backend("triton").
    """
    if _backend == "torch" or (_backend == "auto" and is_saved_graph()):
        return False
    reasons = list(cannot)
    if not HAVE_TRITON:
        reasons.append("Triton is not installed")
    if is_transformed():
        reasons.append("transforms of torch.func and forward-mode derivatives")
    interprets = _recording or (_interpreted and _backend == "triton")
    for x in tensors:
        if x.device.type != "cuda" and not (interprets and x.device.type == "cpu"):
            reasons.append(f"a tensor on {x.device.type}, where kernels do not run")
        elif x.device.type == "cuda" and _is_below_sm_80(x.device.index):
            reasons.append("a GPU older than compute capability 8.0")
        elif x.dtype.is_floating_point and x.dtype not in DTYPES:
            reasons.append(f"a tensor of {x.dtype}; kernels take float32, float16 and bfloat16")
    if reasons and _backend == "triton":
        raise RuntimeError(f"backend 'triton' is set, but the kernels cannot run: {'; '.join(dict.fromkeys(reasons))}")
    return not reasons


def is_saved_graph() -> bool:
    """Return whether a graph is being recorded that may run without saccade: by torch.export or torch.jit.trace, or by
    anything that calls them (both ONNX exporters, TensorBoard, fvcore, OpenVINO)."""
    return is_exporting() or (not torch.compiler.is_compiling() and torch.jit.is_tracing())


def is_compiled() -> bool:
    """Return whether torch.compile is recording, not torch.export: its graphs may contain operators of saccade."""
    return torch.compiler.is_compiling() and not is_exporting()


def is_exporting() -> bool:
    """Return whether torch.export is recording. torch.compile takes torch.compiler.is_exporting() for True (2.11)."""
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def is_any_size(height: int, width: int) -> bool:
    """Return whether a graph is being recorded that must work for other sizes than these, so that neither may be
    branched on: by torch.jit.trace, or by torch.export where the size of the image is dynamic."""
    if torch.jit.is_scripting():
        return False
    else:
        return torch.jit.is_tracing() or is_dynamic(height) or is_dynamic(width)


def is_dynamic(n: int) -> bool:
    """Return whether torch.export is recording and n depends on a size that is dynamic."""
    return is_exporting() and isinstance(n, torch.SymInt)


# In a traced graph sizes are tensors, and in an exported one they may be symbols: of both, Python's min and max would
# record the result, not the choice.


def at_most(n: int, limit: int) -> int:
    """Return min(n, limit)."""
    if not torch.jit.is_scripting():
        if isinstance(n, Tensor):
            return n.clamp(max=limit)
        if is_dynamic(n):
            return torch.sym_min(n, limit)
    return min(n, limit)


def at_least_one(n: int) -> int:
    """Return max(n, 1)."""
    if not torch.jit.is_scripting():
        if isinstance(n, Tensor):
            return n.clamp(min=1)
        if is_dynamic(n):
            return torch.sym_max(n, 1)
    return max(n, 1)


def indices_of_largest(x: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` largest values of each row (..., n), largest first; of equal values, the first
    come first. It can be scripted, traced and exported."""
    if torch.jit.is_scripting():
        return x.detach().sort(stable=True, dim=-1, descending=True)[1][..., :count]
    elif is_saved_graph():  # ONNX has no stable sort, but a top-k that takes the first of equal values
        return x.detach().topk(count, -1)[1]
    else:
        return x.detach().sort(stable=True, dim=-1, descending=True)[1][..., :count]


def is_transformed() -> bool:
    """Return whether torch.func transforms (grad, vmap, jvp, functionalize) or forward-mode derivatives are active."""
    if torch.compiler.is_compiling():  # it handles transforms itself, and cannot trace the calls below
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def use_definition(*tensors: Tensor) -> bool:
    """Return whether an operator must use only out-of-place PyTorch operators.

    True while a graph is recorded (torch.compile, torch.export, torch.jit.trace, make_fx), since that would unroll
    loops over the batch and does not support our autograd.Functions; under transforms and forward-mode derivatives,
    which need a rule for every step; and for meta and fake tensors, which have no values.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
        return True
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:  # make_fx
        return True
    return any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def definition_gradients(
    definition: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor
) -> tuple[Tensor | None, ...]:
    """Return the gradients of definition(*tensors) for the `needed` tensors; they are themselves differentiable.

    Used in the backward pass of an autograd.Function for second derivatives and under transforms.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases cut the graph between the tensors: one may have been computed from another.
        inputs = [t.view_as(t) if n and t is not None else t for t, n in zip(tensors, needed)]
        y = definition(*inputs)
        leaves: list[Any] = [t for t, n in zip(inputs, needed) if n]
        grads = torch.autograd.grad(y, leaves, dy, create_graph=differentiable, allow_unused=True)
    remaining = iter(grads)
    return tuple(next(remaining) if n else None for n in needed)


def wants_definition_gradients(dy: Tensor) -> bool:
    """Return whether the backward pass of dy must be differentiable (create_graph=True), or runs under a transform or
    on batched gradients (is_grads_batched=True)."""
    return torch.is_grad_enabled() or is_transformed() or torch._C._functorch.is_legacy_batchedtensor(dy)
