"""Fast PyTorch implementation, and what it shares with the Triton kernels: everything but the passes over the map.

The operator includes both BatchNorms. The first is an affine map of each channel and is folded with the convolution
into z = scale · x + shift. In training its statistics follow from those of x, so that z is not materialised. The second
acts on the one-channel maps of the subspaces, 1 / G of x, like the softmax: both implementations use PyTorch for these.

The passes over the map, for all subspaces at once, are `moments`, `scores` and `gate` forward, `gate_gradient` and
`unpooled` backward: PyTorch here and Triton in kernel.py.
"""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from ..dispatch import definition_gradients, wants_definition_gradients
from ..precision import copy_back, full, no_autocast
from . import reference


def subspace_gate(x: Tensor, *args) -> tuple[Tensor, ...]:
    """See saccade.ops.subspace_gate, which checks the arguments and updates the running statistics."""
    out = SubspaceGate.apply(x, *args)
    return (out,) if isinstance(out, Tensor) else out


def definition(x: Tensor, *args, **kwargs) -> Tensor:
    """Run the reference in float32 or wider and return the dtype of x. It updates the running statistics."""
    with no_autocast(x):
        given = args[:12]
        wide = [None if t is None else t.to(full(x)) for t in given]
        y = reference.subspace_gate(x.to(full(x)), *wide, *args[12:], **kwargs).to(x.dtype)
        if args[12]:  # training
            copy_back(wide[8:], given[8:])
        return y


class SubspaceGate(torch.autograd.Function):
    """(x, the eight parameters, the four running statistics, training, eps) -> y and, in training, `Middle.batch`."""

    @staticmethod
    def forward(ctx, x: Tensor, *args):
        *parameters, training, eps = args
        with no_autocast(x):
            wide = x.to(full(x))
            ctx.middle = Middle(moments(wide) if training else parameters[8:10], *args)
            s, *ctx.pools = scores(wide, ctx.middle)
            ctx.attention = ctx.middle.attention(s)
            ctx.save_for_backward(x, *parameters)
            ctx.training, ctx.eps = training, eps
            batch = ctx.middle.batch()
            ctx.mark_non_differentiable(*batch)
            y = gate(wide, ctx.attention).to(x.dtype)
            return (y, *batch) if training else y

    @staticmethod
    def backward(ctx, dy: Tensor, *_):
        x, *args = ctx.saved_tensors
        if wants_definition_gradients(dy):
            running = [None] * 4 if ctx.training else args[8:]

            def f(*tensors: Tensor) -> Tensor:
                return definition(*tensors, *running, ctx.training, eps=ctx.eps)

            return *definition_gradients(f, (x, *args[:8]), ctx.needs_input_grad[:9], dy), *[None] * 6
        with no_autocast(x):
            middle, attention = ctx.middle, ctx.attention
            wide, dy = x.to(attention.dtype), dy.to(attention.dtype)
            ds, *point = middle.attention_backward(gate_gradient(dy, wide, attention), attention)
            d = unpooled(ds, *ctx.pools)
            of_map, constant, linear = middle.map_backward(d.sum((0, 2, 3)), (d * wide).sum((0, 2, 3)), x)
            dx = gate(dy, attention).addcmul_(d, channels(middle.scale * middle.point_weight))
            if ctx.training:
                dx.addcmul_(wide, channels(linear)).add_(channels(constant))
            return dx.to(x.dtype), *of_map, *point, *[None] * 6


def channels(v: Tensor) -> Tensor:
    return v[:, None, None]


class Middle:
    """The computation between the passes over the map, forward and backward. The backward pass is written by hand,
    since a custom operator runs below autograd. `moments` are mean and variance of each channel: of x in training, else
    the running statistics."""

    def __init__(self, moments, *args):
        *params, self.training, self.eps = args
        self.dtypes = [p.dtype for p in params[:8]]
        wide = full(params[0])
        self.mean, self.var = (m.to(wide) for m in moments)
        self.weight, self.bias, self.norm_weight, self.norm_bias, self.point_weight, self.point_bias, *self.norm = (
            p.to(wide) for p in params[:8]
        )
        self.running = None if self.training else [m.to(wide) for m in params[10:12]]
        if self.training:  # the bias cancels
            self.rstd = (self.weight.square() * self.var + self.eps).rsqrt()
            self.scale = self.weight * self.norm_weight * self.rstd
            self.shift = self.norm_bias - self.scale * self.mean
        else:
            self.rstd = (self.var + self.eps).rsqrt()
            self.scale = self.weight * self.norm_weight * self.rstd
            self.shift = self.norm_bias + (self.bias - self.mean) * self.norm_weight * self.rstd

    def attention(self, s: Tensor) -> Tensor:
        """Return softmax(relu(norm(s))) of the scores s (B, g, H, W), without point_bias, which cancels in training."""
        if self.training:
            self.point_var, self.point_mean = torch.var_mean(s, (0, 2, 3), correction=0)
            centred = s - channels(self.point_mean)
        else:
            self.point_mean, self.point_var = self.running
            centred = s + channels(self.point_bias - self.point_mean)
        self.point_rstd = (self.point_var + self.eps).rsqrt()
        self.xhat = centred.mul_(channels(self.point_rstd))
        self.t = torch.addcmul(channels(self.norm[1]), self.xhat, channels(self.norm[0])).relu_()
        return self.t.flatten(2).softmax(2).view_as(s)

    def batch(self) -> list[Tensor]:
        """Return, in training, mean and biased variance of each norm's input."""
        if not self.training:
            return []
        mean, var = self.weight * self.mean + self.bias, self.weight.square() * self.var
        return [mean, var, self.point_mean + self.point_bias, self.point_var]

    def attention_backward(self, dattention: Tensor, attention: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the scores, point_bias, point_norm_weight and point_norm_bias."""
        dt = attention * (dattention - (attention * dattention).sum((2, 3), keepdim=True))
        dt = dt.masked_fill_(self.t <= 0, 0)
        dweight, dbias = (dt * self.xhat).sum((0, 2, 3)), dt.sum((0, 2, 3))
        gain = self.norm[0] * self.point_rstd
        if self.training:
            n = dt.shape[0] * dt.shape[2] * dt.shape[3]
            dt = dt - (self.xhat * channels(dweight) + channels(dbias)) / n
            dpoint_bias = torch.zeros_like(dbias)
        else:
            dpoint_bias = dbias * gain
        grads = (dpoint_bias, dweight, dbias)
        return dt * channels(gain), *(g.to(dtype) for g, dtype in zip(grads, self.dtypes[5:]))

    def map_backward(self, d: Tensor, dx: Tensor, x: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return, from the sums d of `unpooled` and dx of `unpooled` · x over each channel, the gradients of weight,
        bias, norm_weight, norm_bias and point_weight; and constant and linear, with which constant + linear · x is the
        gradient of x through its moments."""
        dpoint_weight = self.scale * dx + self.shift * d
        dscale, dnorm_bias = self.point_weight * dx, self.point_weight * d
        constant = linear = torch.zeros_like(d)
        if self.training:
            n = x.numel() // x.shape[1]
            dscale = dscale - self.mean * dnorm_bias
            dnorm_weight = dscale * self.weight * self.rstd
            drstd3 = dscale * self.norm_weight * self.rstd.pow(3)
            dweight, dbias = drstd3 * self.eps, torch.zeros_like(d)
            linear = -drstd3 * self.weight.pow(3) / n
            constant = -self.scale * dnorm_bias / n - linear * self.mean
        else:
            dnorm_weight = self.rstd * (self.weight * dscale + (self.bias - self.mean) * dnorm_bias)
            dweight, dbias = self.norm_weight * self.rstd * dscale, self.norm_weight * self.rstd * dnorm_bias
        grads = (dweight, dbias, dnorm_weight, dnorm_bias, dpoint_weight)
        return [g.to(dtype) for g, dtype in zip(grads, self.dtypes)], constant, linear


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel; var_mean over the same axes takes ten times as long on a CPU."""
    if x.is_meta or isinstance(x, FakeTensor):
        return torch.var_mean(x, (0, 2, 3), correction=0)[::-1]
    return torch.batch_norm_update_stats(x, None, None, 0.0)


def scores(x: Tensor, middle: Middle) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return Σ_c point_weight_c · maxpool3(relu(scale_c · x + shift_c)) of each subspace, (B, g, H, W); and the map
    before pooling, after pooling along W, and after pooling along H too. Pooling by slices is vectorised; PyTorch's
    max_pool2d, which also computes 64-bit indices, takes eighteen times as long on a contiguous map and twice on a
    channels-last one."""
    one, g = torch.ones_like(middle.scale), middle.point_bias.shape[0]
    p, _, _ = torch.native_batch_norm(x, middle.scale, middle.shift, torch.zeros_like(one), one, False, 0.0, 0.0)
    q = _pool(p.relu_(), 3)
    r = _pool(q, 2)
    return (r * channels(middle.point_weight)).unflatten(1, (g, -1)).sum(2), p, q, r


def _pool(p: Tensor, dim: int) -> Tensor:
    """Return the maximum of each element and its two neighbours along dim."""
    n, q = p.shape[dim] - 1, p.clone()
    for to, of in ((1, 0), (0, 1)):
        part = q.narrow(dim, to, n)
        torch.maximum(part, p.narrow(dim, of, n), out=part)
    return q


def _unpool(d: Tensor, p: Tensor, q: Tensor, dim: int) -> Tensor:
    """Return the gradient of _pool, which goes to the first maximum. Masks are ones and zeros in the dtype of the map:
    a product with a boolean mask takes twice as long."""
    n = p.shape[dim] - 1
    not_before = torch.ne(p.narrow(dim, 0, n), q.narrow(dim, 1, n), out=p.new_empty(p.narrow(dim, 0, n).shape))
    here = torch.eq(p, q, out=p.new_empty(p.shape))
    here.narrow(dim, 1, n).mul_(not_before)
    after = 1 - here.narrow(dim, 0, n)
    if n > 1:
        after.narrow(dim, 1, n - 1).mul_(not_before.narrow(dim, 0, n - 1))
    out = here.mul_(d)
    out.narrow(dim, 0, n).addcmul_(d.narrow(dim, 1, n), 1 - not_before)
    out.narrow(dim, 1, n).addcmul_(d.narrow(dim, 0, n), after)
    return out


def unpooled(ds: Tensor, p: Tensor, q: Tensor, r: Tensor) -> Tensor:
    """Backpropagate the gradient ds of the scores through the pooling and the ReLU, (B, C, H, W), without
    point_weight."""
    g = ds.shape[1]
    q5, r5 = (m.unflatten(1, (g, -1)) for m in (q, r))
    d = _unpool(ds.unsqueeze(2).expand_as(q5), q5, r5, 3).flatten(1, 2)
    return _unpool(d, p, q, 3).mul_(p > 0)


def gate(x: Tensor, attention: Tensor) -> Tensor:
    """Return x · (1 + attention)."""
    y = torch.empty_like(x)  # not a view, which autograd would not allow to be modified in place
    x5, y5 = (t.unflatten(1, (attention.shape[1], -1)) for t in (x, y))
    torch.addcmul(x5, x5, attention.unsqueeze(2), out=y5)
    return y


def gate_gradient(dy: Tensor, x: Tensor, attention: Tensor) -> Tensor:
    """Return the gradient of the attention, (B, g, H, W)."""
    return (dy * x).unflatten(1, (attention.shape[1], -1)).sum(2)
