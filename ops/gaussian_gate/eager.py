"""Fast PyTorch implementation.

The gate and both norms are one affine map of each channel of each image, y = scale · x + shift, because the statistics
of x · g follow from those of x: its mean is the mean of g μ over the images, its variance the variance of g μ plus the
mean of g² σ² (n - 1) / n. So there are two passes forward, `moments` and `affine`, and two backward: `sums` of dy and
dy · x, and again `affine`, dx = scale · dy + linear · x + constant. kernel.py has the same passes.
"""

import torch
from torch import Tensor

from ..dispatch import definition_gradients, wants_definition_gradients
from ..precision import copy_back, full, no_autocast
from . import reference


def gaussian_gate(x: Tensor, *args) -> tuple[Tensor, ...]:
    """See saccade.ops.gaussian_gate, which checks the arguments and updates the running statistics."""
    out = GaussianGate.apply(x, *args)
    return (out,) if isinstance(out, Tensor) else out


def definition(x: Tensor, *args, **kwargs) -> Tensor:
    """Run the reference in float32 or wider and return the dtype of x. It updates the running statistics."""
    with no_autocast(x):
        given = args[:9]
        wide = [None if t is None else t.to(full(x)) for t in given]
        y = reference.gaussian_gate(x.to(full(x)), *wide, *args[9:], **kwargs).to(x.dtype)
        if args[9]:  # training
            copy_back(wide[5:], given[5:])
        return y


class GaussianGate(torch.autograd.Function):
    """(x, the five parameters, the four running statistics, training, eps) -> y and, in training, `Gate.batch`."""

    @staticmethod
    def forward(ctx, x: Tensor, *args):
        *tensors, training, eps = args
        with no_autocast(x):
            wide, y = x.to(full(x)), torch.empty_like(x, dtype=full(x))
            ctx.gate = Gate(*moments(wide, y), x.shape[2] * x.shape[3], *args)
            ctx.save_for_backward(x, *tensors)
            ctx.training, ctx.eps = training, eps
            batch = ctx.gate.batch()
            ctx.mark_non_differentiable(*batch)
            y = affine(wide, ctx.gate.scale, ctx.gate.shift, out=y).to(x.dtype)
            return (y, *batch) if batch else y

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        x, *args = ctx.saved_tensors
        if wants_definition_gradients(dy):

            def f(*tensors: Tensor) -> Tensor:
                return definition(*tensors, *args[5:], ctx.training, eps=ctx.eps)

            return *definition_gradients(f, (x, *args[:5]), ctx.needs_input_grad[:6], dy), *[None] * 6
        with no_autocast(x):
            wide, dy = x.to(full(x)), dy.to(full(x))
            dx = torch.empty_like(wide)
            grads, linear, constant = ctx.gate.backward(*sums(dy, wide, dx))
            affine(dy, ctx.gate.scale, constant, wide, linear, out=dx)
            return dx.to(x.dtype), *grads, *[None] * 6


class Gate:
    """The computation between the passes over the map, forward and backward; the derivation of kernel.py's is here.
    All tensors but the weights are (B, C) or smaller."""

    def __init__(self, mean: Tensor, std: Tensor, n: int, *args):
        *tensors, self.training, self.eps = args
        self.params = tensors[:5]
        weight, self.norm_weight, norm_bias, self.out_weight, out_bias, *running = (
            None if t is None else t.to(mean.dtype) for t in tensors
        )
        self.mean, self.std, self.n, self.weight = mean, std, n, weight.flatten(1)
        self.u = torch.stack((mean, std), 2).flatten(1)  # (B, 2C), in the order of the weights
        t = self.u @ self.weight.mT
        self.var, self.centre = torch.var_mean(t, 0, correction=0) if self.training else (running[1], running[0])
        self.rstd = (self.var + self.eps).rsqrt()
        self.t = (t - self.centre) * self.rstd
        gate = torch.addcmul(norm_bias, self.t, self.norm_weight)
        self.open = (gate > -3) & (gate < 3) | gate.isnan()
        self.g = torch.nn.functional.hardsigmoid(gate)
        self.scale, self.shift = self.g, None
        if self.out_weight is None:
            return
        if self.training:
            self.biased = std.square() * ((n - 1) / n)
            self.out_mean = (self.g * mean).mean(0)
            self.off = self.g * mean - self.out_mean
            self.out_var = (self.g.square() * self.biased + self.off.square()).mean(0)
        else:
            self.out_mean, self.out_var = running[2:]
        self.out_rstd = (self.out_var + self.eps).rsqrt()
        self.gain = self.out_weight * self.out_rstd
        self.scale, self.shift = self.gain * self.g, out_bias - self.gain * self.out_mean

    def batch(self) -> list[Tensor]:
        """Return, in training, mean and biased variance of each norm's input."""
        if not self.training:
            return []
        return [self.centre, self.var] + ([] if self.shift is None else [self.out_mean, self.out_var])

    def backward(self, dshift: Tensor, dscale: Tensor) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """Return, from the sums (B, C) of dy and dy · x, the gradients of the parameters; and linear and constant, with
        which linear · x + constant is the gradient of x through its moments."""
        B, g, mean, std = self.g.shape[0], self.g, self.mean, self.std
        dg, dmean, dstd, dout = dscale, torch.zeros_like(mean), torch.zeros_like(mean), []
        if self.shift is not None:
            dshift = dshift.sum(0)
            dgain = (dscale * g).sum(0) - dshift * self.out_mean
            dout = [dgain * self.out_rstd, dshift]
            dg = self.gain * dscale
            if self.training:
                dvar = -dgain * self.out_weight * self.out_rstd.pow(3) / B  # twice the gradient of the variance
                dgmean = dvar * self.off - self.gain * dshift / B
                dg = dg + dvar * g * self.biased + dgmean * mean
                dmean = dgmean * g
                dstd = dvar * g.square() * std * ((self.n - 1) / self.n)
        dn = torch.where(self.open, dg * reference.SIXTH, 0.0)
        dnorm_weight, dnorm_bias = (dn * self.t).sum(0), dn.sum(0)
        if self.training:
            dn = dn - (self.t * dnorm_weight + dnorm_bias) / B
        dt = dn * (self.norm_weight * self.rstd)
        du = (dt @ self.weight).unflatten(1, (-1, 2))
        dmean, dstd = dmean + du[..., 0], dstd + du[..., 1]
        linear = torch.where(std == 0, 0.0, dstd / std) / (self.n - 1)
        grads = [(dt.mT @ self.u).unflatten(1, (-1, 2)), dnorm_weight, dnorm_bias, *dout]
        grads = [d.to(p.dtype) for d, p in zip(grads, self.params)] + [None] * (5 - len(grads))
        return grads, linear, dmean / self.n - linear * mean


# PyTorch's reductions and broadcasts are fast if the innermost axis of the view is innermost in memory: a permuted
# channels-last map takes a tenth of the time of its (B, C, H, W) view.


def inner_last(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Return views of x and other maps with the axis last that is innermost in memory for x, and matching views of
    vectors (C,) or (B, C)."""
    if x.stride(1) == 1 and x.stride(3) != 1:
        views = {1: lambda v: v, 2: lambda v: v[:, None, None], 4: lambda m: m.permute(0, 2, 3, 1)}
    else:
        views = {1: lambda v: v[:, None, None], 2: lambda v: v[:, :, None, None], 4: lambda m: m}
    return tuple(views[t.dim()](t) for t in (x, *others))


def sum_positions(x: Tensor) -> Tensor:
    """Sum over the positions, to (B, C)."""
    return inner_last(x)[0].sum((1, 2) if x.stride(1) == 1 and x.stride(3) != 1 else (2, 3))


def moments(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation, (B, C). Centring the map first, in the memory of the output, takes a
    tenth of the time of PyTorch's std on a CPU."""
    n = x.shape[2] * x.shape[3]
    mean = sum_positions(x) / n
    p, off, centre = inner_last(x, scratch, mean)
    torch.sub(p, centre, out=off).square_()
    return mean, (sum_positions(scratch) / (n - 1)).sqrt()


def sums(dy: Tensor, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of dy and dy · x, (B, C)."""
    return sum_positions(dy), sum_positions(torch.mul(dy, x, out=scratch))


def affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    other: Tensor | None = None,
    linear: Tensor | None = None,
    *,
    out: Tensor,
) -> Tensor:
    """Write scale · x + shift, or scale · x + linear · other + shift, into out."""
    y, p, a = inner_last(out, x, scale)
    torch.mul(p, a, out=y)
    if other is not None and linear is not None:
        y.addcmul_(*inner_last(out, other, linear)[1:])
    if shift is not None:
        y.add_(inner_last(out, shift)[1])
    return out
