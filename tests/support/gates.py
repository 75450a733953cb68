"""Tests that gaussian_gate and spatial_gate share: f(x, weight, *affines of norms, *running statistics, training)."""

import importlib
import math
from typing import ClassVar
from unittest import mock

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from .budget import assert_close
from .ops import (
    accepts_empty,
    autocast_changes_nothing,
    check,
    compiles,
    exports,
    flops,
    forced,
    gradients_are_right,
    keeps_memory_format,
    peak_bytes,
    rand,
    reads_any_gradient,
    refuses_second_derivative,
    repeats,
    scripts,
)

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
FORMS = pytest.mark.parametrize("name", ["torch", "triton"], ids=["eager", "triton"])


class _Launches(TorchDispatchMode):
    """Count what an operator launches on a GPU: PyTorch's operations, except views and allocations, and kernels."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "saccade":  # its implementation, operation by operation
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not views and "empty" not in func._schema.name and func.namespace == "aten"
        return func(*args, **(kwargs or {}))

    def launch(self, kernel, grid):
        self.count += 1
        return lambda *args, **options: None


def launches(f, kernel, *args) -> tuple[int, int]:
    """Return how many operations and kernels of the module `kernel` f(*args) launches forward and backward. The kernels
    do not run, so that results are what was in memory."""
    args = [a.detach().requires_grad_() for a in args]
    with mock.patch.object(kernel, "launch", lambda *given: counted.launch(*given)), _Launches() as counted:
        y = f(*args)
        dy, forward, counted.count = torch.empty_like(y), counted.count, 0
        torch.autograd.grad(y, args, dy)
    return forward, counted.count


class Gate:
    """The contract; a subclass names the operator and makes its inputs."""

    operator = None  # the public function, as a staticmethod
    reference = None  # its definition, as a staticmethod
    SHAPE = (3, 24, 5, 7)
    MACS = 0  # by the convolution's definition, on a map (2, 8, 4, 3)
    LAUNCHES = 0, 0  # forward and backward in training, without running statistics
    MEMORY: ClassVar[dict] = {}  # the form's name: shape, and the bounds of forward and of both passes, in maps

    @staticmethod
    def inputs(shape, dtype=torch.float32, layout=torch.contiguous_format):
        """Return x, the weight and the norms' affine parameters."""
        raise NotImplementedError

    @staticmethod
    def statistics(C, dtype=torch.float32):
        """Return the norms' running means and variances."""
        raise NotImplementedError

    def form(self, name):
        return forced(self.operator, name)

    def run(self, f, training):
        """Return f as a function of x and the parameters; in evaluation mode, the statistics have their dtype."""

        def g(x, weight, *norms):
            running = self.statistics(x.shape[1], weight.dtype)
            return f(x, weight, *norms, *([None] * len(running) if training else running), training)

        return g

    @FORMS
    def test_running_statistics_are_those_of_batch_norm(self, name):
        x, *params = self.inputs(self.SHAPE)
        ours, exact = (self.statistics(24) for _ in range(2))
        for momentum in (0.1, 0.5):
            self.form(name)(x, *params, *ours, True, momentum)
            self.reference(x, *params, *exact, True, momentum)
        assert_close(ours, exact)

    @FORMS
    @LAYOUTS
    def test_memory_format_is_kept(self, name, layout):
        x, *params = self.inputs(self.SHAPE, layout=layout)
        keeps_memory_format(lambda x: self.run(self.form(name), True)(x, *params), x)

    @FORMS
    @LAYOUTS
    def test_reads_a_view_of_a_bigger_map(self, name, layout):
        _, *params = self.inputs((1, 24, 1, 1))

        def of_view(f):
            return lambda big: self.run(f, True)(big[:, 8:, 1:, ::2], *(p.to(big.dtype) for p in params))

        big = rand((3, 32, 6, 13)).contiguous(memory_format=layout)
        check(of_view(self.form(name)), of_view(self.reference), big)

    @FORMS
    def test_gradient_of_another_memory_format(self, name):
        x, *params = self.inputs(self.SHAPE)

        def of_x(f, training=True):
            return lambda x: self.run(f, training)(x, *(p.to(x.dtype) for p in params))

        reads_any_gradient(of_x(self.form(name)), of_x(self.reference), x)
        expanded = (lambda x, f=f: of_x(f, False)(x).sum() for f in (self.form(name), self.reference))
        check(*expanded, x)

    @FORMS
    def test_parameters_of_another_type(self, name):
        x, *params = self.inputs(self.SHAPE)
        args = [x.half().requires_grad_(), *(p.requires_grad_() for p in params)]
        out = self.form(name)(*args, *self.statistics(24))
        exact = self.form("torch")(x, *params, *self.statistics(24))
        torch.testing.assert_close(out.float(), exact, rtol=2e-3, atol=2e-3)  # x rounded to float16
        out.sum().backward()
        assert [a.grad.dtype for a in args] == [torch.float16, *[torch.float32] * len(params)]

    @FORMS
    @MODES
    @pytest.mark.parametrize("B, H, W", [(0, 6, 5), (2, 0, 5), (2, 6, 0)])
    def test_nothing_in_nothing_out(self, B, H, W, training, name):
        x, weight, *norms = self.inputs((B, 8, H, W))
        f = self.form(name)
        accepts_empty(lambda x, w: f(x, w, *norms, *self.statistics(8), training), x.shape, x, weight)

    @FORMS
    @LAYOUTS
    def test_runs_are_equal_to_the_bit(self, name, layout):
        repeats(self.run(self.form(name), True), *self.inputs(self.SHAPE, layout=layout))

    @pytest.mark.parametrize("f", ["eager", "reference"])
    @MODES
    def test_gradcheck(self, f, training):
        f = self.reference if f == "reference" else self.form("torch")
        gradients_are_right(self.run(f, training), *self.inputs((3, 2, 2, 3), torch.float64))

    def test_second_derivative_is_refused(self):
        refuses_second_derivative(self.run(self.form("triton"), True), *self.inputs((2, 4, 3, 2)))

    @pytest.mark.parametrize(
        "training, dynamic", [(False, False), (True, False), pytest.param(False, True, marks=pytest.mark.exhaustive)]
    )
    @FORMS
    def test_compiles_in_one_graph(self, name, training, dynamic):
        x, *params = self.inputs((3, 8, 4, 3))
        running = [None if training else t for t in self.statistics(8)]
        others = ((x[:2], *params),) if dynamic else ()
        compiles(
            lambda x, *params: self.operator(x, *params, *running, training),
            x, *params, name=name, dynamic=dynamic, others=others,
        )  # fmt: skip

    @FORMS
    def test_exports(self, name):
        x, *params = self.inputs((3, 8, 4, 3))
        running = self.statistics(8)
        called = f"{self.operator.__name__}_fwd"
        exports(lambda x: self.operator(x, *params, *running), (x,), (x[:2],), name, called)

    def test_scripts(self):
        scripts(self.operator, self.form("torch"), *self.inputs(self.SHAPE), *self.statistics(24))

    @MODES
    def test_meta_tensors_have_shapes(self, training):
        args = [t.to("meta").requires_grad_() for t in self.inputs(self.SHAPE)]
        out = self.operator(*args, *(t.to("meta") for t in self.statistics(24)), training)
        assert out.shape == args[0].shape
        out.sum().backward()
        assert args[1].grad.shape == args[1].shape

    @FORMS
    @MODES
    def test_autocast_changes_nothing(self, name, training):
        autocast_changes_nothing(self.run(self.form(name), training), *self.inputs(self.SHAPE))

    def test_flops_are_those_of_the_convolution(self):
        counts = flops(self.run(self.form("triton"), True), *self.inputs((2, 8, 4, 3)))
        assert counts == (2 * self.MACS, 4 * self.MACS)

    def test_little_is_launched(self):
        f, kernel = self.form("triton"), importlib.import_module(f"{self.operator.__module__}.kernel")
        none = [None] * len(self.statistics(24))
        args = self.inputs(self.SHAPE)
        assert launches(lambda *args: f(*args, *none, True), kernel, *args) == self.LAUNCHES

    @LAYOUTS
    @FORMS
    def test_memory(self, name, layout):
        shape, forward, both = self.MEMORY[name]
        f, unit = self.run(self.form(name), True), math.prod(shape) * 4
        args, dy = self.inputs(shape, layout=layout), rand(shape).contiguous(memory_format=layout)
        assert peak_bytes(lambda: f(*args)) < forward * unit
        args = [t.requires_grad_() for t in args]
        assert peak_bytes(lambda: torch.autograd.grad(f(*args), args, dy)) < both * unit
