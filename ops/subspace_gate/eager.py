"""The plain-PyTorch form for speed, and what it shares with the Triton form: the arithmetic on everything but the map.

The operator has its own BatchNorms, since what stands between the passes over the map depends on them. The first is an
affine map of each channel, folded with the convolution into z = scale · x + shift: in training its statistics are those
of x, mapped, so no map is made to take them of. The second acts on the one-channel maps of the subspaces, 1 / G of x,
as the softmax does: both are PyTorch's in either form.

The functions that touch the map, and take all subspaces at once, are `moments`, `scores` and `gate` forward,
`gate_gradient` and `unpooled` backward: here they are PyTorch, in kernel.py they are Triton.
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
    """The definition, computed in float32 at least, in the type of x. It updates the running statistics."""
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
    """What lies between the passes over the map, forward and backward: by hand, since an operator's implementation runs
    below autograd. `moments` are mean and variance of each channel: of x in training, else the running ones."""

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
        """softmax(relu(norm(s))) of the scores (B, g, H, W), which lack point_bias: training cancels it."""
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
        """In training, mean and biased variance of what each norm was given."""
        if not self.training:
            return []
        mean, var = self.weight * self.mean + self.bias, self.weight.square() * self.var
        return [mean, var, self.point_mean + self.point_bias, self.point_var]

    def attention_backward(self, dattention: Tensor, attention: Tensor) -> tuple[Tensor, ...]:
        """Gradients to the scores, and to point_bias, point_norm_weight and point_norm_bias."""
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
        """From the sums of `unpooled`, and of it · x, over each channel: gradients to weight, bias, norm_weight,
        norm_bias and point_weight; and what x gets through its moments, constant + linear · x."""
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
    """Mean and biased variance of each channel; var_mean over the same axes takes ten times as long on a CPU."""
    if x.is_meta or isinstance(x, FakeTensor):
        return torch.var_mean(x, (0, 2, 3), correction=0)[::-1]
    return torch.batch_norm_update_stats(x, None, None, 0.0)


def scores(x: Tensor, middle: Middle) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Σ_c point_weight_c · maxpool3(relu(scale_c · x + shift_c)) over each subspace, (B, g, H, W); and what was pooled,
    along W, and then along H. Slice by slice this vectorises; PyTorch's max_pool2d, which also makes 64-bit indices,
    takes eighteen times as long on a contiguous map, and twice as long on a channels-last one."""
    one, g = torch.ones_like(middle.scale), middle.point_bias.shape[0]
    p, _, _ = torch.native_batch_norm(x, middle.scale, middle.shift, torch.zeros_like(one), one, False, 0.0, 0.0)
    q = _pool(p.relu_(), 3)
    r = _pool(q, 2)
    return (r * channels(middle.point_weight)).unflatten(1, (g, -1)).sum(2), p, q, r


def _pool(p: Tensor, dim: int) -> Tensor:
    """The maximum of each element and its two neighbours along dim."""
    n, q = p.shape[dim] - 1, p.clone()
    for to, of in ((1, 0), (0, 1)):
        part = q.narrow(dim, to, n)
        torch.maximum(part, p.narrow(dim, of, n), out=part)
    return q


def _unpool(d: Tensor, p: Tensor, q: Tensor, dim: int) -> Tensor:
    """The gradient of _pool: to the first of the largest. Masks are ones and zeros in the type of the map: a product
    with a boolean one takes twice as long."""
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
    """The gradient ds of the scores, carried through the pool and the ReLU, without point_weight. (B, C, H, W)"""
    g = ds.shape[1]
    q5, r5 = (m.unflatten(1, (g, -1)) for m in (q, r))
    d = _unpool(ds.unsqueeze(2).expand_as(q5), q5, r5, 3).flatten(1, 2)
    return _unpool(d, p, q, 3).mul_(p > 0)


def gate(x: Tensor, attention: Tensor) -> Tensor:
    """x · (1 + attention)."""
    y = torch.empty_like(x)  # no view, which autograd would not let anybody change in place
    x5, y5 = (t.unflatten(1, (attention.shape[1], -1)) for t in (x, y))
    torch.addcmul(x5, x5, attention.unsqueeze(2), out=y5)
    return y


def gate_gradient(dy: Tensor, x: Tensor, attention: Tensor) -> Tensor:
    """Of the gate to attention, (B, g, H, W)."""
    return (dy * x).unflatten(1, (attention.shape[1], -1)).sum(2)
