"""Helpers of the operators' tests: kernels against references, the contract of every operator, Triton's interpreter."""

import contextlib
import functools
import itertools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from . import budget
from .budget import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


# Dynamic sizes take minutes in some; a dynamic batch is also in every test of export.
COMPILED = pytest.mark.parametrize(
    "name, dynamic",
    [(name, False) for name in ("torch", "triton")]
    + [pytest.param(name, True, marks=pytest.mark.exhaustive) for name in ("torch", "triton")],
)


# Of opcheck: the rest, on arguments without gradients, is traced by the tests of compile too.
FULL = pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["", "full"])


def interpret() -> None:
    """Run kernels by Triton's interpreter where there is no GPU. Call it before any kernel is imported."""
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
    # tl.max and the like are not interpreted if something (timm, for example) imported Triton before.
    jit.JITFunction.__call__ = lambda self, *args, **kwargs: interpreted(self.fn)(*args, **kwargs)
    _interpret_bfloat16(interpreter)


def _interpret_bfloat16(interpreter) -> None:
    """Give Triton's interpreter a bfloat16: it keeps the bits as uint16, truncates where a GPU rounds to nearest even,
    and multiplies matrices of the raw integers."""
    import ml_dtypes
    import triton.language as tl

    numpy_dtype, builder = interpreter._get_np_dtype, interpreter.InterpreterBuilder
    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def is_bfloat16(*dtypes) -> bool:
        return any(dtype.scalar == tl.bfloat16 for dtype in dtypes)

    def get_np_dtype(dtype):
        return np.dtype(ml_dtypes.bfloat16) if is_bfloat16(dtype) else numpy_dtype(dtype)

    def by_astype(self, src, dtype):
        return interpreter.TensorHandle(src.data.astype(get_np_dtype(dtype)), dtype.scalar)

    def create_fp_to_fp(self, src, dtype, rounding_mode):
        if is_bfloat16(src.dtype, dtype) and "RTNE" in str(rounding_mode):
            return by_astype(self, src, dtype)
        return fp_to_fp(self, src, dtype, rounding_mode)

    def create_dot(self, a, b, *args):
        wide = [by_astype(self, x, tl.float32) if is_bfloat16(x.dtype) else x for x in (a, b)]
        return dot(self, *wide, *args)

    interpreter._get_np_dtype = get_np_dtype
    builder.cast_impl = lambda self, src, dtype: (by_astype if is_bfloat16(src.dtype, dtype) else cast)(
        self, src, dtype
    )
    builder.create_fp_to_fp, builder.create_dot = create_fp_to_fp, create_dot


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
    # Drawn in float16, so that every dtype gets the same values.
    seeds = [rand(y.shape, torch.float16, seed + i).to(dtype) for i, y in enumerate(outs)]
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    with mode:
        grads = torch.autograd.grad(outs, leaves, seeds)
    return [y.detach().double() for y in (*outs, *grads)]


def check(op, reference, *args) -> None:
    """Check outputs and all gradients of op against reference in float64, within the budget of `support.budget`.

    In float64 the reference is no more exact than the op: there the tolerance is 1e-10, and nothing is simulated.
    """
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    dtype = next(x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point())
    if dtype == torch.float64:
        for got, want in zip(evaluate(op, args), evaluate(reference, args), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        return
    budget.assert_within(
        evaluate(op, args),
        exact=evaluate(reference, doubled),
        samples=budget.simulate(lambda mode: evaluate(reference, args, mode=mode)),
        plain=evaluate(reference, args),
        u=torch.finfo(dtype).eps / 2,
    )


def grid(indirect=False, also=(), **axes):
    """Parametrize a test over all combinations of the named values.

    Combinations that differ from the first values on more than one axis are exhaustive, apart from those listed in
    `also`: every value runs in make test.
    """
    values = []
    for picked in itertools.product(*(enumerate(axis) for axis in axes.values())):
        combination = tuple(value for _, value in picked)
        quick = sum(i > 0 for i, _ in picked) <= 1 or combination in also
        name = "-".join(str(getattr(value, "__name__", value)) for value in combination)
        values.append(pytest.param(*combination, marks=() if quick else pytest.mark.exhaustive, id=name))
    return pytest.mark.parametrize(", ".join(axes), values, indirect=indirect)


def far_apart(folder: Path, size: int) -> Tensor:
    """Return `size` float16 elements, few of which are ever touched: a sparse file, or GPU memory."""
    if DEVICE == "cpu":
        return torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=torch.float16)
    if torch.cuda.mem_get_info()[0] < 2.5 * size:
        pytest.skip(f"needs {2.5 * size / 2**30:.0f} GB on the GPU")
    return torch.empty(size, dtype=torch.float16, device=DEVICE)


def reads_any_gradient(f, reference, *args) -> None:
    """Check backward passes for output gradients that are transposed, channels-last, or expanded (all strides 0)."""

    def then(f, g):
        return lambda *args: g(f(*args))

    transforms = [lambda y: y.mT.contiguous(), lambda y: y.sum()]
    transforms += [lambda y: y.contiguous(memory_format=torch.channels_last)] * (f(*args).ndim == 4)
    for transform in transforms:
        check(then(f, transform), then(reference, transform), *args)


def keeps_memory_format(f, *args) -> None:
    """Check that the output and the gradients of all tensors have the memory format of the inputs."""
    leaves = [t for t in args if isinstance(t, Tensor)]
    out = f(*(t.requires_grad_() if isinstance(t, Tensor) else t for t in args))
    channels_last = args[0].is_contiguous(memory_format=torch.channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    out.sum().backward()
    for leaf in leaves:
        assert leaf.grad.stride() == leaf.stride()


def accepts_empty(f, shape, *args) -> None:
    """Check the output's shape for empty inputs, and that all gradients are zeros of the inputs' shapes."""
    leaves = [t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
    out = f(*leaves)
    assert tuple(out.shape) == tuple(shape)
    out.sum().backward()
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad.shape == leaf.shape
            assert not leaf.grad.any()


def registers(op, args, full: bool) -> None:
    """Run opcheck on an operator: schema and fake tensors; if `full` or with gradients, all of its checks."""
    light = not (full or any(t.requires_grad for t in args if isinstance(t, Tensor)))
    opcheck(op, args, **dict(test_utils=("test_schema", "test_faketensor")) if light else {})


def flops(f, *args) -> tuple[int, int]:
    """Return the FLOPs that PyTorch counts in f and in its backward pass."""
    leaves = [t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in args]
    with FlopCounterMode(display=False) as forward:
        out = f(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def scripts(operator, form, *args) -> None:
    """Check that torch.jit.script of the operator computes what the form computes."""
    assert_close(torch.jit.script(operator)(*args), form(*args))


def forced(f, name: str):
    """Return f with one form of every operator forced, "torch" or "triton"."""
    from saccade.ops import backend

    @functools.wraps(f)
    def run(*args, **kwargs):
        with backend(name):
            return f(*args, **kwargs)

    run.__name__ = name
    return run


def agree(f, reference, *args) -> None:
    """Check on float64 args that outputs and all gradients of f and reference agree up to rounding."""
    for ours, exact in zip(evaluate(f, args), evaluate(reference, args), strict=True):
        assert_close(ours, exact)


def repeats(f, *args) -> None:
    """Check that outputs and gradients of three runs are equal to the bit."""
    first, *others = (evaluate(f, args) for _ in range(3))
    for other in others:
        assert all(map(torch.equal, first, other))


def gradients_are_right(f, *args, twice: bool = True) -> None:
    """Run gradcheck and, unless twice is False, gradgradcheck, on float64 args."""
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    assert torch.autograd.gradcheck(f, leaves)
    assert not twice or torch.autograd.gradgradcheck(f, leaves)


def refuses_second_derivative(f, *args) -> None:
    """Check that the Triton form raises one sentence that names the form with a second derivative."""
    leaves = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    out = f(*leaves)
    first = next(x for x in leaves if isinstance(x, Tensor) and x.requires_grad)
    (grad,) = torch.autograd.grad(out.square().sum(), first, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative in Triton: use"):
        grad.sum().backward()


def compiles(f, *args, name: str, dynamic: bool | None = False, others: tuple = ()) -> None:
    """Check torch.compile in one graph, forward and backward, with one form forced.

    others: further arguments for the same compiled f.
    """
    torch.compiler.reset()
    f = forced(f, name)
    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    dtype = next(x.dtype for x in args if isinstance(x, Tensor) and x.is_floating_point())
    for given in (args, *others):
        for ours, exact in zip(evaluate(compiled, given), evaluate(f, given), strict=True):
            assert_close(ours.to(dtype), exact.to(dtype))


class _Module(torch.nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, *args):
        return self.f(*args)


def exports(f, args, others, name: str, *operators: str, batched: tuple[int, ...] = (0,)) -> None:
    """Check torch.export of f with a dynamic batch, traced on tensors args and run on `others` of another batch.

    operators: names of the custom operators that the program calls exactly where the kernels are forced.
    batched: which of args have a batch, on axis 0.
    """
    model, batch = _Module(f), torch.export.Dim("batch")
    shapes = (tuple({0: batch} if i in batched else {} for i in range(len(args))),)
    run = forced(torch.export.export, name)
    program = run(model, tuple(args), dynamic_shapes=shapes)
    ours, exact = forced(program.module(), name)(*others), forced(f, name)(*others)
    assert_close(ours, exact)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes]  # nested, in a no_grad too
    for operator in operators:
        assert any(operator in target for target in called) == (name == "triton")


def autocast_changes_nothing(f, *args) -> None:
    """Check that bfloat16 autocast changes no bit of output and gradients."""
    with torch.autocast(DEVICE, torch.bfloat16):
        under = evaluate(f, args)
    assert all(map(torch.equal, under, evaluate(f, args)))


def refuses(f, message: str, *args, error=ValueError, **kwargs) -> None:
    """Check that f(*args) raises `error` with one sentence that matches message."""
    with pytest.raises(error, match=message) as caught:
        f(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert re.search(message, str(caught.value))


def peak_bytes(step) -> int:
    """Return the peak bytes that PyTorch allocates within step(), also inside custom operators."""
    from saccade.train.runtime.measure import peak_allocated

    return peak_allocated(step, torch.device(DEVICE))
