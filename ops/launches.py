"""Record the kernels that a function launches, with neither a GPU nor values.

    launches = record_model(lambda: timm.create_model("biformer_t"), lambda: [torch.randn(8, 3, 224, 224)])

Operators take their Triton implementation, as on a GPU, and every launch is recorded instead of run, on fake tensors.
This tells which kernels a model needs (saccade.ops.aot compiles them for any card) and how many are compiled for
different image sizes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import dispatch


class Pointer:
    """A tensor argument of a recorded launch, as Triton's specialization looks at it."""

    def __init__(self, x: Tensor):
        self.dtype, self.numel = x.dtype, x.numel()
        self.offset = int(x.storage_offset()) * x.element_size()  # allocations are aligned, views may not be
        self.storage = x.untyped_storage().nbytes()
        self.key = x.untyped_storage()._cdata, self.offset  # the same for a tensor that is given twice

    def data_ptr(self) -> int:
        return self.offset

    def ptr_range(self) -> int:
        return self.storage


class Launch(NamedTuple):
    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        """The operator and its kernel, such as "strip_gate.sums_kernel"."""
        return f"{self.kernel.__module__.split('.')[-2]}.{self.kernel.__name__}"

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    def arguments(self) -> dict[str, Any]:
        """Return the kernel's arguments by name: numbers, constexprs and `Pointer`s."""
        named = dict(zip(self.kernel.arg_names, self.args))
        return named | {name: value for name, value in self.kwargs.items() if name in self.kernel.arg_names}

    def specialize(self, target: GPUTarget) -> tuple[str, ASTSource, dict[str, Any]]:
        """Return what Triton would compile for this launch: the key of its cache, the source and the options."""
        backend, kwargs = make_backend(target), self.kwargs | dict(debug=False)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, rest = bind(*self.args, **kwargs)
        options, signature, constexprs, attrs = self.kernel._pack_args(backend, kwargs, bound, specialization, rest)
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        return f"{self.name} {specialization} {sorted(rest.items())}", source, options.__dict__


class _Implementations(TorchDispatchMode):
    """Call the implementations of saccade's custom operators, of which fake tensors would only infer shapes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 64  # a size that depends on the data, as the number of queries that a camera sees
        if func.namespace == "saccade":
            return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Numbers(TorchFunctionMode):
    """Compute what constructors read as numbers, such as the rates of drop path, where a fake tensor has no values."""

    READ = ("item", "tolist", "split", "unbind", "__iter__", "__getitem__")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        real = args and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor)
        if func is torch.linspace or (real and getattr(func, "__name__", "") in self.READ):
            with unset_fake_temporarily():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def record(hip: bool = False) -> Iterator[list[Launch]]:
    """Record launches of fake tensors on the CPU instead of running them; hip: with the tiles for AMD's cards."""
    launches: list[Launch] = []

    def run(kernel, *args, grid, warmup, **kwargs):
        args, values = (tuple(Pointer(x) if isinstance(x, Tensor) else x for x in z) for z in (args, kwargs.values()))
        launches.append(Launch(kernel, grid, args, dict(zip(kwargs, values))))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        stack.enter_context(mock.patch.object(dispatch, "_recording", True))
        stack.enter_context(mock.patch.object(torch.version, "hip", "recorded" if hip else None))
        stack.enter_context(_Implementations())
        yield launches


def record_model(
    create: Callable[[], nn.Module],
    inputs: Callable[[], Sequence[Tensor]],
    dtype: torch.dtype = torch.float32,
    hip: bool = False,
    backward: bool = True,
) -> list[Launch]:
    """Record what a model launches in a forward and, unless told otherwise, a backward pass.

    create and inputs make the model and its arguments on fake tensors; all floating-point ones get dtype.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            with _Numbers():
                model = create()
            with record(hip) as launches:
                outs = [x for x in tree_leaves(model(*inputs())) if isinstance(x, Tensor) and x.requires_grad]
                if backward:
                    torch.autograd.backward([x.float().sum() for x in outs])
    finally:
        torch.set_default_dtype(default)
    return launches


def compile_launch(launch: Launch, target: GPUTarget):
    """Compile the kernel of a launch for a card, as Triton would there."""
    _, source, options = launch.specialize(target)
    return triton.compile(source, target=target, options=options)
