"""Every operator in torch.jit.trace, torch.export and both ONNX exporters: plain aten, right at other batches."""

import io
import warnings

import pytest
import torch
from support.calls import OPERATORS, Call, build
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
BATCHES = 1, 2, 5
operators = pytest.mark.parametrize("name", OPERATORS)


def trace(call: Call, *inputs: Tensor) -> torch.jit.ScriptModule:
    """Trace, save and load."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(call, inputs, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def agree_at_other_batches(ours, call: Call) -> None:
    for batch in BATCHES:
        inputs = call.inputs(batch, seed=batch)
        with torch.no_grad():
            torch.testing.assert_close(ours(*inputs), call(*inputs), rtol=1e-4, atol=1e-5)


def own_operators(program: torch.export.ExportedProgram) -> set[str]:
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes if "saccade" in str(node.target)}


def run_onnx(model: bytes):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})[0])

    return run


@operators
@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_traces(name, gradients):
    call = build(name)
    with torch.set_grad_enabled(gradients):
        agree_at_other_batches(trace(call, *call.inputs(2)), call)


@operators
def test_a_trace_has_the_gradients(name):
    call = build(name)
    traced = torch.jit.trace(call, call.inputs(2), check_trace=False)
    inputs = [x.requires_grad_() for x in call.inputs(3)]
    leaves = inputs + [p for p in call.others if name != "sparse_attention"]
    ours, exact = (torch.autograd.grad(f(*inputs).square().sum(), leaves) for f in (traced, call))
    torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-4)


@operators
def test_exports_plain_aten_for_any_batch(name):
    call, batch = build(name), torch.export.Dim("batch", min=1, max=64)
    inputs = call.inputs(2)
    program = torch.export.export(call, inputs, dynamic_shapes=(tuple({0: batch} for _ in inputs),))
    assert own_operators(program) == set()
    agree_at_other_batches(program.module(), call)


@operators
def test_legacy_onnx(name):
    call, file = build(name).eval(), io.BytesIO()
    inputs = call.inputs(2)
    names = [f"x{i}" for i in range(len(inputs))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            call, inputs, file, dynamo=False, opset_version=17, input_names=names, output_names=["y"],
            dynamic_axes={n: {0: "batch"} for n in [*names, "y"]},
        )  # fmt: skip
    agree_at_other_batches(run_onnx(file.getvalue()), call)


@operators
@pytest.mark.exhaustive
def test_onnx(name):
    pytest.importorskip("onnxscript")
    call, batch = build(name).eval(), torch.export.Dim("batch", min=1, max=64)
    inputs, file = call.inputs(2), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        shapes = (tuple({0: batch} for _ in inputs),)
        torch.onnx.export(call, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False).save(file)
    agree_at_other_batches(run_onnx(file.getvalue()), call)
