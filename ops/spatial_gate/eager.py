"""Fast PyTorch implementation, and the computation on (C,) vectors that it shares with the Triton kernels.

PyTorch's batch_norm is fast. The gain over the reference is that the convolution is a product with one row, and that
the backward pass recomputes the gated map instead of keeping it.
"""

import torch
from torch import Tensor

from ..dispatch import definition_gradients, wants_definition_gradients
from ..gaussian_gate.eager import inner_last
from ..gaussian_gate.reference import SIXTH
from ..precision import copy_back, full, no_autocast
from . import reference


def spatial_gate(x: Tensor, *args) -> tuple[Tensor, ...]:
    """See saccade.ops.spatial_gate, which checks the arguments and updates the running statistics."""
    out = SpatialGate.apply(x, *args)
    return (out,) if isinstance(out, Tensor) else out


def definition(x: Tensor, *args, **kwargs) -> Tensor:
    """Run the reference in float32 or wider and return the dtype of x. It updates the running statistics."""
    with no_autocast(x):
        given = args[:5]
        wide = [None if t is None else t.to(full(x)) for t in given]
        y = reference.spatial_gate(x.to(full(x)), *wide, *args[5:], **kwargs).to(x.dtype)
        if args[5]:  # training
            copy_back(wide[3:], given[3:])
        return y


class SpatialGate(torch.autograd.Function):
    """(x, the three parameters, the two running statistics, training, eps) -> y and, in training, mean and variance."""

    @staticmethod
    def forward(ctx, x: Tensor, *args):
        *tensors, ctx.training, ctx.eps = args
        with no_autocast(x):
            wide = x.to(full(x))
            weight, *norm = (None if t is None else t.to(wide.dtype) for t in tensors)
            g = torch.nn.functional.hardsigmoid(product(wide, weight))
            y, mean, rstd = torch.native_batch_norm(gated(wide, g), *norm, ctx.training, 0.0, ctx.eps)
            ctx.save_for_backward(x, *tensors, g, mean, rstd)
            if not ctx.training:
                return y.to(x.dtype)
            batch = mean.clone(), rstd.pow(-2) - ctx.eps
            ctx.mark_non_differentiable(*batch)
            return y.to(x.dtype), *batch

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        x, *tensors, g, mean, rstd = ctx.saved_tensors
        if wants_definition_gradients(dy):

            def f(*args: Tensor) -> Tensor:
                return definition(*args, *tensors[3:], ctx.training, eps=ctx.eps)

            return *definition_gradients(f, (x, *tensors[:3]), ctx.needs_input_grad[:4], dy), *[None] * 4
        with no_autocast(x):
            wide, dy = x.to(g.dtype), dy.to(g.dtype)
            weight, norm_weight, _, *running = (None if t is None else t.to(g.dtype) for t in tensors)
            z = gated(wide, g)
            dz, *dnorm = torch.ops.aten.native_batch_norm_backward(
                dy, z, norm_weight, *running, mean, rstd, ctx.training, ctx.eps, [True] * 3
            )
            dg = product(torch.mul(dz, wide, out=z), torch.ones_like(weight))
            ds = torch.where((g > 0) & (g < 1) | g.isnan(), dg * SIXTH, 0.0)
            d, t, gate, through, share = inner_last(dz, z, g, ds, weight)
            d.mul_(gate).add_(torch.mul(through, share, out=t))
            grads = zip((shares(wide, ds), *dnorm), tensors)
            return dz.to(x.dtype), *(d.to(p.dtype) for d, p in grads), *[None] * 4


class Norm:
    """BatchNorm of the gated map z as gain · z + shift, and linear and constant, with which linear · z + constant is
    its gradient through the statistics. The backward pass is written by hand, since a custom operator runs below
    autograd. All tensors are (C,)."""

    def __init__(self, mean: Tensor, var: Tensor, n: int, *args):
        _, *norm, _, _, self.training, self.eps = args
        self.dtypes, self.n = [p.dtype for p in norm], n
        full = torch.promote_types(norm[0].dtype, torch.float32)
        weight, bias, self.mean, self.var = (t.to(full) for t in (*norm, mean, var))
        self.rstd = (self.var + self.eps).rsqrt()
        self.gain = weight * self.rstd
        self.shift = bias - self.gain * self.mean

    def backward(self, dbias: Tensor, dyz: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Take the sums of dy and dy · z over each channel."""
        dweight = self.rstd * (dyz - self.mean * dbias)
        linear = constant = torch.zeros_like(dbias)
        if self.training:
            linear = -self.gain * self.rstd * dweight / self.n
            constant = -self.gain * dbias / self.n - linear * self.mean
        return [d.to(dtype) for d, dtype in zip((dweight, dbias), self.dtypes)], linear, constant


def gated(x: Tensor, g: Tensor) -> Tensor:
    """x · g, inner_last as x does."""
    z = torch.empty_like(x)
    to, of, by = inner_last(z, x, g)
    torch.mul(of, by, out=to)
    return z


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Return Σ_c weight_c · x_c, (B, 1, H, W)."""
    (p,) = inner_last(x)
    if p is x:
        return (weight @ x.flatten(2)).view(x.shape[0], 1, *x.shape[2:])
    return (p @ weight).unsqueeze(1)


def shares(x: Tensor, g: Tensor) -> Tensor:
    """Return the sum of g · x over each channel, (C,)."""
    (p,) = inner_last(x)
    if p is x:
        return (x.flatten(2) @ g.flatten(1).unsqueeze(2)).sum((0, 2))
    return (g.flatten(1).unsqueeze(1) @ p.flatten(1, 2)).sum((0, 1))
