"""What the operators' tests share: a kernel against its reference, the contract that every operator keeps, and Triton
on a machine without a GPU."""

import contextlib
import functools
import os
import re

import pytest
import torch
from torch import Tensor

from . import budget

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


def evaluate(f, args, seed: int = 1234, mode=None) -> list[Tensor]:
    """Return the outputs of f(*args), then the gradient of each floating-point tensor in args, all in float64.

    mode: a context manager entered for the computation itself.
    """
    mode = mode or contextlib.nullcontext()
    args = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    with mode:
        outs = f(*args)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    dtype = next(x.dtype for x in args if isinstance(x, Tensor) and x.requires_grad)
    # Drawn in float16, so that every dtype is given the same.
    seeds = [rand(y.shape, torch.float16, seed + i).to(dtype) for i, y in enumerate(outs)]
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    with mode:
        grads = torch.autograd.grad(outs, leaves, seeds)
    return [y.detach().double() for y in (*outs, *grads)]


def check(op, reference, *args) -> None:
    """Check outputs and all gradients of op against reference in float64, within the budget of `support.budget`."""
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    dtype = next(x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point())
    budget.assert_within(
        evaluate(op, args),
        exact=evaluate(reference, doubled),
        samples=budget.simulate(lambda mode: evaluate(reference, args, mode=mode)),
        plain=evaluate(reference, args),
        u=torch.finfo(dtype).eps / 2,
    )


def forced(f, name: str):
    """f with one form of every operator forced: "torch" or "triton"."""
    from saccade.ops import backend

    @functools.wraps(f)
    def run(*args, **kwargs):
        with backend(name):
            return f(*args, **kwargs)

    return run


def agree(f, reference, *args) -> None:
    """In float64: outputs and all gradients of f and of reference are equal but for rounding."""
    for ours, exact in zip(evaluate(f, args), evaluate(reference, args), strict=True):
        torch.testing.assert_close(ours, exact)


def repeats(f, *args) -> None:
    """Outputs and gradients of three runs are equal to the bit."""
    first, *others = (evaluate(f, args) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


def gradients_are_right(f, *args, twice: bool = True) -> None:
    """gradcheck and, unless twice is False, gradgradcheck, on float64 args."""
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    assert torch.autograd.gradcheck(f, leaves)
    assert not twice or torch.autograd.gradgradcheck(f, leaves)


def refuses_second_derivative(f, *args) -> None:
    """The Triton form says in one sentence that it has none, and what to use."""
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    out = f(*leaves)
    first = next(x for x in leaves if isinstance(x, Tensor) and x.requires_grad)
    (grad,) = torch.autograd.grad(out.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in Triton: use"):
        grad.sum().backward()


def compiles(f, *args, name: str, dynamic: bool | None = False, others: tuple = ()) -> None:
    """In one graph, forward and backward, with one form forced; `others`: further argument lists for the same f."""
    torch.compiler.reset()
    f = forced(f, name)
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for given in (args, *others):
        for ours, exact in zip(evaluate(compiled, given), evaluate(f, given), strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


class _Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


def exports(f, args, others, name: str, operator: str, batched: tuple[int, ...] = (0,)) -> None:
    """torch.export of f on tensors args with a dynamic batch, run on `others` of another batch; with the kernels forced
    the program calls the custom operator by that name. `batched`: which of args have a batch, on axis 0."""
    model, batch = _Module(f), torch.export.Dim("batch")
    shapes = (tuple({0: batch} if i in batched else {} for i in range(len(args))),)
    run = forced(torch.export.export, name)
    program = run(model, tuple(args), dynamic_shapes=shapes)
    ours, exact = forced(program.module(), name)(*others), forced(f, name)(*others)
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = any(operator in str(node.target) for graph in graphs for node in graph.nodes)  # nested, in a no_grad too
    assert called == (name == "triton")


def autocast_changes_nothing(f, *args) -> None:
    """Under bfloat16 autocast: the same bits in output and gradients."""
    with torch.autocast(DEVICE, torch.bfloat16):
        under = evaluate(f, args)
    assert all(map(torch.equal, under, evaluate(f, args)))


def refuses(f, message: str, *args, error=ValueError, **kwargs) -> None:
    """f(*args) raises `error` with one sentence that matches message."""
    with pytest.raises(error, match=message) as caught:
        f(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value))


def peak_bytes(step) -> int:
    """The most bytes that PyTorch has allocated at once within step(): also inside custom operators."""
    from saccade.train.runtime.measure import peak_allocated

    return peak_allocated(step, torch.device(DEVICE))
