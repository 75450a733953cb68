"""How far rounding may take an operator from its exact result, on any machine.

A budget must not depend on how the matrix library of this machine happens to round. So it is simulated: the reference
runs with every aten operation computed in float64 and then spoilt by as much as a machine may lose there, at random but
from fixed seeds. With u the unit roundoff of the operation's dtype (half its eps) and xi uniform in [-1, 1]:

- Every result y is rounded to its dtype after an error of u |y| xi.
- A sum y of n terms t, as in products of matrices and convolutions, loses sqrt(n) v (|y| + sqrt(sum t²)) xi more, where
  v is the unit roundoff of the accumulator, float32 or wider. For each addition rounds a partial sum, terms of random
  signs keep partial sums below |y| + sqrt(sum t²), and n independent roundings add up as sqrt(n) (N. J. Higham and
  T. Mary, A new approach to probabilistic rounding error analysis, 2019). This holds for any order of summation.
- A softmax sees its logits x off by v (|x| + |max x|) xi: a fused kernel computes exp(x - lse) of rounded x and lse.
- A softmax's gradient y (dy - sum y dy) has the sum off by 4 u max |dy| xi: a fused kernel computes the product of the
  output and its gradient instead, which does not cancel dy exactly where one key has all the weight.
- What the dtype represents exactly stays exact: zeros, copies, masks and sums of small integers have no error.
- Fused operations (norms, variances, softmax) are decomposed into these.

The condition of the operation, cancellation included, needs no formula: the simulated run amplifies its roundings as a
real one does. SAMPLES runs give the error's root mean square and maximum; an implementation is granted FACTOR times
these, as it may round at other places than the reference, and u |y| for where the simulation is exact.
"""

import math

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

SAMPLES = 4
FACTOR = 3
ACCUMULATOR = torch.finfo(torch.float32).eps / 2

_aten = torch.ops.aten
FUSED = {
    overload
    for packet in (
        _aten._softmax, _aten._softmax_backward_data, _aten.native_batch_norm, _aten._native_batch_norm_legit,
        _aten.native_batch_norm_backward, _aten.native_layer_norm, _aten.native_layer_norm_backward,
        _aten.native_group_norm, _aten.native_group_norm_backward, _aten.var, _aten.std, _aten.var_mean, _aten.std_mean,
        _aten.sigmoid_backward,
    )
    for overload in (getattr(packet, name) for name in packet.overloads())
    if overload in decomposition_table
}  # fmt: skip
PRODUCTS = {_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm, _aten.mv, _aten.dot}
SUMS = {
    _aten.sum, _aten.mean, _aten.cumsum, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten.index_add,
    _aten.index_add_, _aten.scatter_add, _aten.scatter_add_, _aten.embedding_dense_backward, _aten.unfold_backward,
    _aten.avg_pool2d, _aten.avg_pool2d_backward, _aten._adaptive_avg_pool2d, _aten._adaptive_avg_pool2d_backward,
    _aten.upsample_bilinear2d, _aten.upsample_bilinear2d_backward, _aten.im2col, _aten.col2im,
}  # fmt: skip


def _is_float(x) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _widen(tree):
    """Return the tree with floating-point tensors and dtypes replaced by float64 copies and float64."""

    def widen(x):
        if _is_float(x):
            return x.to(torch.float64, copy=True)
        return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x

    return tree_map(widen, tree)


def _lengths(func, args, outs: list[Tensor]) -> list[int] | None:
    """Return the number of terms in the sums that make each output, or None for an operation that sums nothing."""
    packet = func.overloadpacket
    if packet in PRODUCTS:
        return [[x for x in args if isinstance(x, Tensor)][-1].shape[-2 if packet not in (_aten.mv, _aten.dot) else -1]]
    if packet is _aten.convolution:
        return [args[1][0].numel() + 1]
    if packet is _aten.convolution_backward:
        dy, _, weight = args[:3]
        of_weight = dy.numel() // max(1, dy.shape[1])
        return [weight.numel() // max(1, weight.shape[1]), of_weight, of_weight]
    if packet in SUMS:
        terms = max(x.numel() for x in tree_leaves(args) if isinstance(x, Tensor))
        return [max(2, terms // max(1, y.numel())) for y in outs]
    return None


class Rounding(TorchDispatchMode):
    """Compute every operation in float64 and spoil the result as the module's docstring says."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def noise(self, like: Tensor) -> Tensor:
        """Return float64 numbers uniform in [-1, 1]."""
        return (2 * torch.rand(like.shape, generator=self.generator, dtype=torch.float64) - 1).to(like.device)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in FUSED:
            if func is _aten._softmax.default:
                args = (self.logits(args[0], args[1]), *args[1:])
            with self:
                result = decomposition_table[func](*args, **kwargs)
            return self.softmax_gradient(result, *args[:3]) if func is _aten._softmax_backward_data.default else result
        inputs = None if func.is_view else _widen((args, kwargs))
        result = func(*args, **kwargs)
        outs = [y for y in (result if isinstance(result, tuple | list) else [result]) if isinstance(y, Tensor)]
        if func.is_view or not any(map(_is_float, outs)) or not any(map(_is_float, tree_leaves(args))):
            return result
        with torch.no_grad():
            self.spoil(func, args, inputs, outs)
        return result

    def logits(self, x: Tensor, dim: int) -> Tensor:
        """Return the logits that the softmax of a fused kernel sees."""
        size = x.double().abs().nan_to_num(0, 0, 0)
        error = ACCUMULATOR * (size + x.double().amax(dim, keepdim=True).abs().nan_to_num(0, 0, 0)) * self.noise(x)
        return (x.double() + error).to(x.dtype) if x.shape[dim] > 1 else x

    def softmax_gradient(self, dx: Tensor, dy: Tensor, y: Tensor, dim: int) -> Tensor:
        """Return dx, the gradient computed from dy and the softmax's output y, as a fused kernel may compute it."""
        largest = dy.double().abs().amax(dim, keepdim=True).nan_to_num(0, 0, 0) if dy.numel() else dy.double()
        error = 4 * torch.finfo(dy.dtype).eps / 2 * largest * self.noise(largest)
        return (dx.double() - y.double() * error).to(dx.dtype)

    def spoil(self, func, args, inputs, outs: list[Tensor]) -> None:
        """Overwrite outs, which func computed in the dtypes of args, by rounded results of the same in float64."""
        lengths = _lengths(func, args, outs)
        squares = None
        if lengths is not None:
            squares = func(*tree_map(lambda x: x.square() if _is_float(x) else x, inputs[0]), **inputs[1])
            squares = list(squares) if isinstance(squares, tuple | list) else [squares]
        exacts = func(*inputs[0], **inputs[1])
        exacts = exacts if isinstance(exacts, tuple | list) else [exacts]
        exacts = [y for y in exacts if isinstance(y, Tensor)]
        for i, (out, exact) in enumerate(zip(outs, exacts, strict=True)):
            if not _is_float(out):
                continue
            error = torch.finfo(out.dtype).eps / 2 * exact.abs()
            if lengths is not None:
                n = lengths[i]
                spread = squares[i].sqrt() / (math.sqrt(n) if func.overloadpacket is _aten.mean else 1)
                error = error + min(ACCUMULATOR, torch.finfo(out.dtype).eps / 2) * math.sqrt(n) * (exact.abs() + spread)
            rounded = exact.to(out.dtype)
            out.copy_(torch.where(rounded == exact, rounded, (exact + error * self.noise(exact)).to(out.dtype)))


def simulate(run) -> list[list[Tensor]]:
    """Return the results of run(mode) on SAMPLES machines that round at random wherever the mode is entered."""
    return [run(Rounding(seed)) for seed in range(SAMPLES)]


MEASURES = {"root mean square": lambda x: x.square().mean().sqrt(), "largest": lambda x: x.abs().max()}


def assert_within(ours: list[Tensor], exact: list[Tensor], samples: list[list[Tensor]], plain: list[Tensor], u: float):
    """Check results in float64 against the exact ones: errors at most the budget, or twice (at the largest element:
    four times) what the reference errs in the same dtype, where that is more. u: the unit roundoff of the results."""
    for i, (got, want, base, *simulated) in enumerate(zip(ours, exact, plain, *samples, strict=True)):
        assert got.shape == want.shape, f"result {i}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
        if not want.numel():
            continue
        errors = torch.stack([sample - want for sample in simulated])
        for (name, size), times in zip(MEASURES.items(), (2, 4)):
            error, floor = size(got - want), u * size(want)
            allowed = max(FACTOR * size(errors), times * size(base - want)) + floor
            assert error <= allowed, (
                f"result {i} (outputs, then gradients): {name} error {error:.3g}, budget {allowed:.3g}"
            )


# Two runs of one arithmetic may sum in another order: a few sums of up to a hundred terms, at 20 units of their largest
# each. In half precision only the last rounding differs, as sums are in float32; float64 is compared as PyTorch does.
UNITS = {torch.float32: 256, torch.float16: 4, torch.bfloat16: 4}


def assert_close(ours, exact) -> None:
    """Check that tensors, or lists of them, have equal shapes, dtypes and values, but for the order of sums."""
    ours, exact = ([x] if isinstance(x, Tensor) else list(x) for x in (ours, exact))
    for got, want in zip(ours, exact, strict=True):
        if want.dtype not in UNITS or not want.numel():
            torch.testing.assert_close(got, want)
        else:
            scale = want.detach().abs().nan_to_num(0, 0, 0).max().item()
            atol = UNITS[want.dtype] * torch.finfo(want.dtype).eps / 2 * scale
            torch.testing.assert_close(got, want, rtol=0, atol=atol)
