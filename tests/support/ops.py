"""What the operators' tests share: a kernel against its reference, and Triton on a machine without a GPU."""

import functools
import os

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter computes bfloat16 wrongly: a GPU alone can test it.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def interpret() -> None:
    """Have Triton's interpreter run the kernels where there is no GPU. To be called before any kernel is imported."""
    if DEVICE == "cuda" or hasattr(interpret, "done"):
        return
    interpret.done = True
    os.environ["TRITON_INTERPRET"] = "1"
    from saccade.ops import dispatch
    from triton.runtime import interpreter, jit

    dispatch._interpreted = True  # if imported before, it has read the environment already
    patch, interpreted = interpreter._patch_lang_tensor, functools.cache(interpreter.InterpretedFunction)

    def patched(tensor, scope):
        patch(tensor, scope)
        # Triton 3.6 takes int() of a one-element array, which NumPy 2.4 refuses (triton-lang/triton#9171).
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    # tl.max and its like are no interpreted functions if something (timm, say) has imported Triton before.
    jit.JITFunction.__call__ = lambda self, *args, **kwargs: interpreted(self.fn)(*args, **kwargs)


def rand(shape, dtype=torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, dtype)


def evaluate(f, args, seed: int = 1234) -> list[Tensor]:
    """The outputs of f(*args), then the gradient of each floating-point tensor in args, all in float64."""
    args = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    outs = f(*args)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    dtype = next(x.dtype for x in args if isinstance(x, Tensor) and x.requires_grad)
    # Drawn in float16, so that every dtype is given the same.
    seeds = [rand(y.shape, torch.float16, seed + i).to(dtype) for i, y in enumerate(outs)]
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    return [y.detach().double() for y in (*outs, *torch.autograd.grad(outs, leaves, seeds))]


def check(op, reference, *args) -> None:
    """op must agree with reference in its outputs and in all gradients.

    Measured against reference in float64, op may err by twice what reference errs in the dtype of args: in the root
    mean square. The largest error of few numbers is a matter of luck: it may be four times the other's. Half a unit in
    the last place is granted on top, for where reference happens to be exact.
    """
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    eps = torch.finfo(next(x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point())).eps / 2
    measures = [("root mean square", 2, lambda x: x.square().mean().sqrt()), ("largest", 4, lambda x: x.abs().max())]
    results = zip(evaluate(reference, doubled), evaluate(reference, args), evaluate(op, args), strict=True)
    for i, (exact, plain, ours) in enumerate(results):
        assert ours.shape == exact.shape, f"result {i}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
        for name, times, size in measures if exact.numel() else []:
            error, allowed = size(ours - exact), times * size(plain - exact) + eps * size(exact)
            assert error <= allowed, (
                f"result {i} (outputs, then gradients): {name} error {error:.3g} over {allowed:.3g}"
            )
