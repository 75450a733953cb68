"""Tests that operators share. An operator's test file is a subclass with its cases, and its own tests."""

import inspect

import pytest
import torch
from torch import Tensor

from .ops import (
    COMPILED,
    accepts_empty,
    autocast_changes_nothing,
    compiles,
    exports,
    flops,
    forced,
    gradients_are_right,
    reads_any_gradient,
    refuses,
    refuses_second_derivative,
    repeats,
    scripts,
)

FORMS = pytest.mark.parametrize("name", ["torch", "triton"], ids=["eager", "triton"])
HALVES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


class Operator:
    """The contract of an operator whose first argument has the batch and whose last ones are no tensors."""

    operator = None  # the public function, as a staticmethod
    reference = None  # its definition, as a staticmethod
    EXPORTED = ""  # in the name of what an exported program calls where the kernels are forced
    SCRIPTED = {}  # name: arguments
    EMPTY = {}  # name: the shape of the output, and arguments
    REPEATED = {}  # name: arguments for several programs
    SMOOTH = {}  # name: arguments in float64
    BAD = {}  # name: the arguments by name that differ from `inputs`, and what the message matches
    COUNTED = ((), 0)  # arguments, and the FLOPs of the forward pass

    def pytest_generate_tests(self, metafunc):
        tables = dict(
            empty=self.EMPTY, repeated=self.REPEATED, smooth=self.SMOOTH, bad=self.BAD, scripted=self.SCRIPTED
        )
        for name, table in tables.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, [pytest.param(case, id=key) for key, case in table.items()])

    def inputs(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple:
        """Return small arguments."""
        raise NotImplementedError

    def form(self, name: str):
        return forced(self.operator, name)

    def of_tensors(self, f, args: tuple):
        """Return f as a function of the tensors among args, and these."""
        tensors = tuple(t for t in args if isinstance(t, Tensor))
        return (lambda *tensors: f(*tensors, *args[len(tensors) :])), tensors

    @pytest.mark.parametrize("form", ["eager", "reference"])
    def test_gradcheck(self, form, smooth):
        gradients_are_right(self.reference if form == "reference" else self.form("torch"), *smooth)

    def test_second_derivative_is_refused(self):
        refuses_second_derivative(self.form("triton"), *self.inputs())

    @FORMS
    def test_gradient_of_another_memory_format(self, name):
        x, *rest = self.inputs()

        def of_x(f):
            return lambda x: f(x, *(t.to(x.dtype) if isinstance(t, Tensor) else t for t in rest))

        reads_any_gradient(of_x(self.form(name)), of_x(self.reference), x)

    @FORMS
    def test_nothing_in_nothing_out(self, name, empty):
        shape, *args = empty
        accepts_empty(self.form(name), shape, *args)

    @FORMS
    def test_runs_are_equal_to_the_bit(self, name, repeated):
        repeats(self.form(name), *repeated)

    @COMPILED
    def test_compiles_in_one_graph(self, name, dynamic):
        others = (self.inputs(3),) if dynamic else ()
        compiles(self.operator, *self.inputs(), name=name, dynamic=dynamic, others=others)

    @FORMS
    def test_exports(self, name):
        f, args = self.of_tensors(self.operator, self.inputs())
        _, others = self.of_tensors(self.operator, self.inputs(3))
        exports(f, args, others, name, self.EXPORTED)

    def test_scripts(self, scripted):
        scripts(self.operator, self.form("torch"), *scripted)

    def test_meta_tensors_have_shapes(self):
        f, args = self.of_tensors(self.operator, self.inputs())
        meta = [t.to("meta").requires_grad_() for t in args]
        out = f(*meta)
        assert out.shape == f(*args).shape
        out.sum().backward()
        assert [t.grad.shape for t in meta] == [t.shape for t in args]

    @FORMS
    @HALVES
    def test_autocast_changes_nothing(self, dtype, name):
        x, *rest = self.inputs()
        autocast_changes_nothing(self.form(name), x.to(dtype), *rest)

    def test_flops(self):
        args, forward = self.COUNTED
        assert flops(self.form("triton"), *args) == (forward, 2 * forward)

    def test_bad_input_is_named_in_one_sentence(self, bad):
        change, message = bad
        names = inspect.signature(self.operator).parameters
        refuses(self.operator, message, **dict(zip(names, self.inputs())) | change)
