"""The plain-PyTorch form for speed, and what it shares with the Triton form: the arithmetic on everything but the map.

What the norms make of the gated map is an affine map of each channel of each image, y = scale · x + shift, for the
statistics of x · g follow from those of x: its mean is that of g μ over the images, its variance that of g μ plus the
mean of g² σ² (n - 1) / n. So forward there are two passes, `moments` and `affine`, and backward two: `sums`, of dy and
of dy · x, and `affine` again, dx = scale · dy + linear · x + constant. Here these are PyTorch, in kernel.py Triton.
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
    """The definition, computed in float32 at least, in the type of x. It updates the running statistics."""
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
    """What lies between the passes over the map, forward and backward: by hand, since an operator's implementation runs
    below autograd. All of it is (B, C) or smaller, but for the weights."""

    def __init__(self, mean: Tensor, std: Tensor, n: int, *args):
        *tensors, self.training, self.eps = args
        self.params = tensors[:5]
        weight, self.norm_weight, norm_bias, self.out_weight, out_bias, *running = (
            None if t is None else t.to(mean.dtype) for t in tensors
        )
        self.mean, self.std, self.n, self.weight = mean, std, n, weight.flatten(1)
        self.u = torch.stack((mean, std), 2).flatten(1)  # (B, 2C), as the weights lie
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
        """In training, mean and biased variance of what each norm was given."""
        if not self.training:
            return []
        return [self.centre, self.var] + ([] if self.shift is None else [self.out_mean, self.out_var])

    def backward(self, dshift: Tensor, dscale: Tensor) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """From the sums (B, C) of dy and of dy · x: gradients to the parameters; and what x gets through its moments,
        linear · x + constant."""
        B, g, mean, std = self.g.shape[0], self.g, self.mean, self.std
        dg, dmean, dstd, dout = dscale, torch.zeros_like(mean), torch.zeros_like(mean), []
        if self.shift is not None:
            dshift = dshift.sum(0)
            dgain = (dscale * g).sum(0) - dshift * self.out_mean
            dout = [dgain * self.out_rstd, dshift]
            dg = self.gain * dscale
            if self.training:
                dvar = -dgain * self.out_weight * self.out_rstd.pow(3) / B  # of twice its half
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


# PyTorch's reductions and broadcasts want the long axis innermost in the view as it is in memory: permuted so, a
# channels-last map takes a tenth of the time that it takes as (B, C, H, W).


def lying(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Views of x and of other maps with the inner axis of x last, and of vectors (C,) or (B, C) to go with them."""
    if x.stride(1) == 1 and x.stride(3) != 1:
        views = {1: lambda v: v, 2: lambda v: v[:, None, None], 4: lambda m: m.permute(0, 2, 3, 1)}
    else:
        views = {1: lambda v: v[:, None, None], 2: lambda v: v[:, :, None, None], 4: lambda m: m}
    return tuple(views[t.dim()](t) for t in (x, *others))


def total(x: Tensor) -> Tensor:
    """Over the positions, (B, C)."""
    return lying(x)[0].sum((1, 2) if x.stride(1) == 1 and x.stride(3) != 1 else (2, 3))


def moments(x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation (B, C). To centre the map first, in the memory of the output, takes a tenth
    of the time of PyTorch's std on a CPU."""
    n = x.shape[2] * x.shape[3]
    mean = total(x) / n
    p, off, centre = lying(x, scratch, mean)
    torch.sub(p, centre, out=off).square_()
    return mean, (total(scratch) / (n - 1)).sqrt()


def sums(dy: Tensor, x: Tensor, scratch: Tensor) -> tuple[Tensor, Tensor]:
    """Of dy and of dy · x, (B, C)."""
    return total(dy), total(torch.mul(dy, x, out=scratch))


def affine(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    other: Tensor | None = None,
    linear: Tensor | None = None,
    *,
    out: Tensor,
) -> Tensor:
    """scale · x + shift, and with linear · other, written into out."""
    y, p, a = lying(out, x, scale)
    torch.mul(p, a, out=y)
    if other is not None and linear is not None:
        y.addcmul_(*lying(out, other, linear)[1:])
    if shift is not None:
        y.add_(lying(out, shift)[1])
    return out
