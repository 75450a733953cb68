"""oneDNN's linear layers compute what PyTorch's do, with gradients of first and second order."""

import sys

import pytest
import torch
import torch.nn.functional as F
from saccade.ops.linear import linear
from torch.utils.flop_counter import FlopCounterMode

module = sys.modules["saccade.ops.linear"]
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """Use oneDNN on any processor, for products of any size."""
    monkeypatch.setattr(module, "_onednn", True)
    monkeypatch.setattr(module, "SMALLEST", 0)
    torch.manual_seed(0)


def arguments(*shape: int, out: int, bias: bool = True) -> list[torch.Tensor | None]:
    made = [torch.randn(*shape), torch.randn(out, shape[-1]), torch.randn(out) if bias else None]
    return [None if t is None else t.requires_grad_() for t in made]


@pytest.mark.parametrize("shape", [(5, 3), (2, 5, 7), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("out", [4, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_is_pytorchs_linear(shape, out, bias):
    tensors = arguments(*shape, out=out, bias=bias)
    y = linear(*tensors)
    assert "Linear" in type(y.grad_fn).__name__
    expected, dy = F.linear(*tensors), torch.randn(*shape[:-1], out)
    torch.testing.assert_close(y, expected)
    of = [t for t in tensors if t is not None]
    ours, theirs = (torch.autograd.grad(z, of, dy, create_graph=True) for z in (y, expected))
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(sum(g.square().sum() for g in first), of[:2]) for first in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(linear(*tensors, gelu=True), F.gelu(expected), rtol=1e-5, atol=1e-5)


def test_of_what_it_does_not_own():
    """Views, weights without gradients, inputs without gradients."""
    x, weight, bias = arguments(6, 4, 8, out=5)
    for view in (x.transpose(0, 1), x[:, ::2], x.detach()[:, :0]):
        torch.testing.assert_close(linear(view, weight, bias), F.linear(view, weight, bias))
    (only,) = torch.autograd.grad(linear(x, weight.detach(), bias.detach()).sum(), x)
    torch.testing.assert_close(only, weight.sum(0).expand_as(x).contiguous())
    (only,) = torch.autograd.grad(linear(x.detach(), weight, bias.detach()).sum(), weight)
    torch.testing.assert_close(only, x.sum((0, 1)).expand_as(weight).contiguous())


def test_pytorch_computes_the_rest():
    x, weight, bias = arguments(2, 5, 8, out=5)
    expected = F.linear(x, weight, bias)
    wide = [t.double() for t in (x, weight, bias)]
    assert torch.equal(linear(*wide), F.linear(*wide))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    torch._C._set_mkldnn_enabled(False)
    try:
        assert torch.equal(linear(x, weight, bias), expected)
    finally:
        torch._C._set_mkldnn_enabled(True)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias)
    assert counter.get_total_flops() == 2 * 10 * 8 * 5
    torch.testing.assert_close(torch.func.vmap(lambda x: linear(x, weight, bias))(x), expected)
    rows = torch.func.jacrev(lambda x: linear(x, weight, bias))(x[0])
    torch.testing.assert_close(rows.sum((0, 2)), 5 * weight)
    program = torch.export.export(Layer(weight, bias), (x,))
    assert "saccade" not in str(program.graph) and torch.equal(program.module()(x), expected)


class Layer(torch.nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(weight.detach()), torch.nn.Parameter(bias.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def test_registration():
    x, weight, bias = arguments(2, 5, 8, out=5)
    for given in ((x, weight, bias, False), (x.detach().mT.contiguous().mT, weight, None, False)):
        torch.library.opcheck(module.plain, given)
    torch.library.opcheck(module.plain, (x.detach(), weight.detach(), bias.detach(), True))


def test_compiles():
    tensors = arguments(3, 5, 8, out=6)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager", dynamic=True)
    y, expected = compiled(*tensors), F.linear(*tensors)
    torch.testing.assert_close(y, expected)
    ours, theirs = (torch.autograd.grad(z.square().sum(), tensors) for z in (y, expected))
    torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        y = torch.compile(lambda x: linear(x, *tensors[1:], gelu=True), fullgraph=True, backend="eager")(tensors[0])
        torch.testing.assert_close(y, F.gelu(expected), rtol=1e-5, atol=1e-5)


def test_mlp_of_compiled_inference():
    x, weight1, bias1 = (t.detach() for t in arguments(3, 700, 8, out=2048))  # two pieces of 512 tokens and a rest
    weight2, bias2 = torch.randn(8, 2048), torch.randn(8)
    given = x, weight1, bias1, weight2, bias2
    expected = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
    torch.testing.assert_close(module.mlp(*given), expected, rtol=1e-4, atol=1e-3)
    torch.library.opcheck(module.mlp, given)
    assert module.mlp(x[:, :0], *given[1:]).shape == (3, 0, 8)
