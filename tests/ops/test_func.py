"""Every operator under torch.func's transforms, forward-mode derivatives, second derivatives and batched gradients."""

import pytest
import torch
from saccade.ops import backend
from support.calls import OPERATORS, Call, build
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, vmap

operators = pytest.mark.parametrize("name", OPERATORS)
SMOOTH = [name for name in OPERATORS if name not in ("connectivity", "dfa3d", "ms_deform_attn", "subspace_gate")]


def loss(call: Call, params: dict[str, Tensor], *inputs: Tensor) -> Tensor:
    return functional_call(call, params, inputs).square().sum()


def parameters(call: Call) -> dict[str, Tensor]:
    return {key: p.detach() for key, p in call.named_parameters()}


@operators
def test_grad_equals_backward(name):
    call = build(name).to_dtype(torch.float64)
    inputs, params = call.inputs(2), parameters(call)
    of_params = grad(lambda p: loss(call, p, *inputs))(params) if params else {}
    of_inputs = grad(lambda x: loss(call, params, *x))(inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    call(*leaves).square().sum().backward()
    torch.testing.assert_close(of_inputs, tuple(x.grad for x in leaves))
    for key, p in call.named_parameters():
        torch.testing.assert_close(of_params[key], torch.zeros_like(p) if p.grad is None else p.grad)


@operators
def test_vmap_and_per_sample_gradients(name):
    call = build(name).to_dtype(torch.float64)
    inputs, params = call.inputs(3), parameters(call)
    singles = [tuple(x[i : i + 1] for x in inputs) for i in range(3)]
    with torch.no_grad():
        ours = vmap(call)(*(x.unsqueeze(1) for x in inputs))
        torch.testing.assert_close(ours, torch.stack([call(*single) for single in singles]))
    if not params:
        return
    per_sample = vmap(grad(lambda p, *x: loss(call, p, *(t[None] for t in x))), (None, *[0] * len(inputs)))
    ours = per_sample(params, *inputs)
    for i, single in enumerate(singles):
        torch.testing.assert_close({k: g[i] for k, g in ours.items()}, grad(lambda p: loss(call, p, *single))(params))  # noqa: B023


@operators
def test_forward_mode_equals_reverse_mode(name):
    call = build(name).to_dtype(torch.float64)
    inputs, tangents = call.inputs(2), call.inputs(2, seed=1)
    with forward_ad.dual_level():
        out = call(*(forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents)))
        y, forward = forward_ad.unpack_dual(out)
    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(call(*leaves), leaves, torch.ones_like(y))
    torch.testing.assert_close(forward.sum(), sum((g * t).sum() for g, t in zip(grads, tangents)))


@operators
def test_second_derivative(name):
    """The gradient of a gradient, through the form for speed, equals that of the definition."""
    call = build(name).to_dtype(torch.float64)
    inputs, weights = call.inputs(2), call.inputs(2, seed=1)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with backend("torch"):
        grads = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        ours = torch.autograd.grad(sum((g * w).sum() for g, w in zip(grads, weights)), leaves)

    def product(*x: Tensor) -> Tensor:
        of = grad(lambda *z: call(*z).square().sum(), tuple(range(len(x))))(*x)
        return sum((g * w).sum() for g, w in zip(of, weights))

    torch.testing.assert_close(ours, grad(product, tuple(range(len(inputs))))(*inputs))


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivative_is_right(name):
    """Against finite differences, where no kink is near."""
    call = build(name).to_dtype(torch.float64)
    with backend("torch"):
        leaves = [x.requires_grad_() for x in call.inputs(1)]
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@operators
def test_batched_gradients(name):
    """A backward under vmap (is_grads_batched=True, jacobian(vectorize=True))."""
    call = build(name).to_dtype(torch.float64)
    leaves = [x.requires_grad_() for x in call.inputs(2)]
    y = call(*leaves)
    dy = torch.stack([torch.ones_like(y), torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)])
    batched = torch.autograd.grad(y, leaves, dy, retain_graph=True, is_grads_batched=True)
    for i in range(2):
        torch.testing.assert_close(
            [g[i] for g in batched], list(torch.autograd.grad(y, leaves, dy[i], retain_graph=True))
        )


@operators
def test_without_values(name):
    """On the meta device and with fake tensors: shapes alone."""
    call = build(name)
    shape = call(*call.inputs(2)).shape
    assert call.to("meta")(*(x.to("meta") for x in call.inputs(2))).shape == shape


def test_kernels_refuse_transforms_by_name():
    call = build("channel_attention")
    with backend("triton"), pytest.raises(RuntimeError, match=r"cannot run:.*transforms of torch\.func"):
        vmap(call)(call.inputs(2)[0].unsqueeze(1))
