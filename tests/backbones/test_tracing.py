"""Every family in torch.jit.trace, both ONNX exporters and a saved torch.export program: right at other batches, and at
other sizes where the family takes them."""

import contextlib
import io
import subprocess
import sys
import warnings

import pytest
import saccade.backbones  # noqa: F401 (registers the models)
import torch
from support.families import SMALL, build, images
from support.levels import exhaustive
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
families = pytest.mark.parametrize("name", SMALL)
# Beside another model of the same layers.
ALIKE = "dinats_t", "ela_mobilenetv2", "patnet_t1", "ulsam_mobilenet_v1_050"
kinds = pytest.mark.parametrize("name", [exhaustive(name) if name in ALIKE else name for name in SMALL])
FIXED = [name for name in SMALL if name.startswith("sparsifiner")]  # of one image size
BATCHES = 1, 2, 5
# The families that this exporter once turned into zeros, into other images' attention, or into one batch size.
LEGACY = "biformer_t", "dinat_m", "ela_mobilenetv2", "ulsam_mobilenet_v1_050"


def agrees(ours, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        expected = model(*inputs)
        torch.testing.assert_close(ours(*inputs), expected, rtol=1e-3, atol=1e-4 * max(1, expected.abs().max().item()))


@kinds
def test_traces(name):
    """Traced at an even size, saved and loaded; run at other batches and at sizes that need padding."""
    model, file = build(name).eval(), io.BytesIO()
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, images(name, 2), check_trace=False), file)
    file.seek(0)
    traced = torch.jit.load(file)
    for batch in BATCHES:
        agrees(traced, model, images(name, batch, seed=batch))
    agrees(torch.jit.freeze(traced), model, images(name, 5))
    if name in FIXED:
        with pytest.raises(torch.jit.Error, match="images must be 64 x 64, as traced, got 96 x 64"):
            traced(*images(name, 2, (96, 64)))
        return
    for size in [(96, 128)] if name.startswith("dfa3d") else [(96, 64), (75, 101)]:
        agrees(traced, model, images(name, 3, size))


@pytest.mark.parametrize("name", [n if n in LEGACY else exhaustive(n) for n in SMALL if not n.startswith("dfa3d")])
def test_legacy_onnx(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = build(name).eval(), io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, images(name, 2), file, dynamo=False, opset_version=17, input_names=["x"], output_names=["y"],
            dynamic_axes={"x": {0: "batch"}, "y": {0: "batch"}},
        )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for batch in BATCHES:
        agrees(
            lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), model, images(name, batch, seed=batch)
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("dfa3d")])
def test_onnx(name):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, file = build(name).eval(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        torch.onnx.export(model, images(name, 2), dynamo=True, dynamic_shapes=shapes, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    key = session.get_inputs()[0].name
    for batch in BATCHES:
        agrees(
            lambda x: torch.from_numpy(session.run(None, {key: x.numpy()})[0]), model, images(name, batch, seed=batch)
        )


@pytest.mark.exhaustive
@families
def test_exported_programs_need_no_saccade(name, tmp_path):
    """Loaded where saccade cannot be imported, at another batch."""
    model, inputs = build(name).eval(), images(name, 2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    assert not [node for graph in graphs for node in graph.nodes if "saccade" in str(node.target)]
    torch.export.save(program, tmp_path / "model.pt2")
    more = images(name, 5, seed=1)
    torch.save(more, tmp_path / "inputs")
    code = (
        "import sys, torch; sys.modules['saccade'] = None; folder = sys.argv[1]\n"
        "out = torch.export.load(folder + '/model.pt2').module()(*torch.load(folder + '/inputs'))\n"
        "torch.save(out.detach(), folder + '/out')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    agrees(lambda *_: torch.load(tmp_path / "out"), model, more)


@kinds
def test_func(name):
    """Functional gradients equal those of backward(), and each image's own follow from vmap."""
    model = build(name).eval().double()
    inputs = tuple(x.double() for x in images(name, 2))
    params = {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}

    def loss(p: dict[str, Tensor], *x: Tensor) -> Tensor:
        return functional_call(model, p, x).square().mean()

    ours = grad(loss)(params, *inputs)
    model(*inputs).square().mean().backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            scale = max(p.grad.abs().max().item(), 1e-6)
            torch.testing.assert_close(ours[key] / scale, p.grad / scale, rtol=1e-6, atol=1e-7)
    per_sample = vmap(lambda *x: grad(loss)(params, *(t[None] for t in x)), (0,) * len(inputs), randomness="different")(
        *inputs
    )
    for key, g in per_sample.items():
        assert g.shape == (2, *params[key].shape) and g.isfinite().all()


@pytest.mark.parametrize("name", ["biformer_t", "agent_deit_t"])  # of the families with attention to all tokens
def test_second_derivatives(name):
    """A Hessian times a vector by forward over reverse mode, and by a gradient penalty's two backward passes."""
    model = build(name).eval().double().requires_grad_(False)
    (x,), (vector,) = ([t.double() for t in images(name, 1, seed=seed)] for seed in range(2))
    _, ours = jvp(grad(lambda x: model(x).square().sum()), (x,), (vector,))
    x.requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad((first * vector).sum(), x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item())


def test_lifter_in_other_formats():
    """Channels-last weights, an empty batch, and the meta device."""
    model, inputs = build("dfa3d_bev_s").eval(), images("dfa3d_bev_s", 1)
    with torch.no_grad():
        expected = model(*inputs)
        assert model(*(x[:0] for x in inputs)).shape == (0, *expected.shape[1:])
        torch.testing.assert_close(model.to(memory_format=torch.channels_last)(*inputs), expected, rtol=1e-4, atol=1e-5)
        assert model.to("meta")(*(x.to("meta") for x in inputs)).shape == expected.shape


@pytest.mark.parametrize("name", [n if n == "biformer_t" else exhaustive(n) for n in SMALL])
def test_pytorchs_own_check_of_a_trace_passes(name):
    """As TensorBoard's add_graph makes it: traced with gradients, and again without, to the same graph and result."""
    torch.jit.trace(build(name).eval(), images(name, 1))


@pytest.mark.exhaustive
@kinds
def test_traces_in_half_precision_and_in_training(name):
    """In bfloat16 as the model is; in training mode with gradients for every parameter that the model's own has."""
    model, inputs, more = (
        build(name).eval().bfloat16(),
        *(tuple(x.bfloat16() for x in images(name, n)) for n in (2, 5)),
    )
    with torch.no_grad():
        out, expected = torch.jit.trace(model, inputs, check_trace=False)(*more), model(*more)
        exact = model.float()(*(x.float() for x in more))
    assert out.dtype == torch.bfloat16  # and as near to float32 as the model's own result, up to rounding it
    error, own = (exact - out).abs().max(), (exact - expected).abs().max()
    assert error <= 2 * own + 2**-8 * exact.abs().max()
    model = build(name).train()
    out = torch.jit.trace(model, images(name, 2), check_trace=False)(*images(name, 3))
    first = out if isinstance(out, Tensor) else out[0]
    first.square().sum().backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    assert first.isfinite().all() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    out = model(*images(name, 3))
    (out if isinstance(out, Tensor) else out[0]).square().sum().backward()
    assert reached == {key for key, p in model.named_parameters() if p.grad is not None}
