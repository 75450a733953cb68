"""Which of an operator's two forms runs: its Triton kernels, or plain PyTorch."""

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("triton", "torch", "auto")
HAVE_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


def _interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python (TRITON_INTERPRET=1, as the tests do)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


# Plain globals, which torch.compile and torch.export guard on or fold; a context variable they could not.
_backend = _checked(os.environ.get("SACCADE_BACKEND", "auto"), "SACCADE_BACKEND")
_interpreted = _interpreting()


class backend:
    """`with backend("torch"):` forces one form of every operator, in the whole process, until the block ends.

    "triton" runs the kernels or raises, saying all that they cannot take; "torch" never runs them; "auto", the default
    unless the environment says otherwise in SACCADE_BACKEND, runs them where they can be.
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
    """Whether the kernels are to run on these tensors; `cannot` is what the operator itself knows that they can't take.

    Only under backend("triton") does Triton's interpreter count as a place where kernels run: it is a thousand times
    slower than PyTorch, and only to be had by asking.
    """
    if _backend == "torch":
        return False
    reasons = list(cannot)
    if not HAVE_TRITON:
        reasons.append("Triton is not installed")
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
