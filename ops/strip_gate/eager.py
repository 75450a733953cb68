"""Fast PyTorch implementation, and the computation on the strips that it shares with the Triton kernels.

The passes over the map are `strip_means` and `gate` forward, `strip_sums` and `gate` backward: PyTorch here and Triton
in kernel.py. Between them the strips, (H + W) / (H · W) of the map's size (a quarter at 7 x 7, 1/28 at 56 x 56), are
processed by PyTorch in both implementations: a grouped convolution with eight channels per group and a GroupNorm whose
groups do not align with those of the convolution. Fusing them would only save launches.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import definition_gradients, wants_definition_gradients
from ..precision import full, no_autocast
from . import reference


def strip_gate(
    x: Tensor,
    weight: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    norm_groups: int,
    eps: float = 1e-5,
    residual: bool = False,
) -> Tensor:
    """See saccade.ops.strip_gate, which checks the arguments."""
    return StripGate.apply(x, weight, norm_weight, norm_bias, norm_groups, eps, residual)


def definition(x: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, *args, **kwargs) -> Tensor:
    """Run the reference in float32 or wider and return the dtype of x."""
    with no_autocast(x):
        params = (p.to(full(x)) for p in (weight, norm_weight, norm_bias))
        return reference.strip_gate(x.to(full(x)), *params, *args, **kwargs).to(x.dtype)


class StripGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_groups: int,
        eps: float,
        residual: bool,
    ) -> Tensor:
        ctx.rest = norm_groups, eps, residual
        with no_autocast(x):
            ctx.save_for_backward(x, weight, norm_weight, norm_bias)
            ctx.gates = Gates(*strip_means(x), weight, norm_weight, norm_bias, norm_groups, eps)
            return gate(x, *ctx.gates.a, residual)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, norm_bias = ctx.saved_tensors
        norm_groups, eps, residual = ctx.rest
        if wants_definition_gradients(dy):
            rest = dict(norm_groups=norm_groups, eps=eps, residual=residual)
            tensors = x, weight, norm_weight, norm_bias
            needed = ctx.needs_input_grad[:4]
            return *definition_gradients(partial(definition, **rest), tensors, needed, dy), None, None, None
        with no_autocast(x):
            dz_h, dz_w, *grads = ctx.gates.backward(*strip_sums(dy, x, *ctx.gates.a))
            return gate(dy, *ctx.gates.a, residual, dz_h, dz_w), *grads, None, None, None


class Gates:
    """a = sigmoid(GroupNorm(conv(z))) of both strips, with a backward pass written by hand, since a custom operator
    runs below autograd. Strips of equal length are one batch of 2B."""

    def __init__(self, z_h: Tensor, z_w: Tensor, weight: Tensor, norm_weight: Tensor, norm_bias: Tensor, *rest):
        self.params = weight, norm_weight, norm_bias
        weight, norm_weight, norm_bias = (p.to(z_h.dtype) for p in self.params)
        self.weight, self.norm_weight, (self.norm_groups, eps) = weight, norm_weight, rest
        self.z = (torch.cat((z_h, z_w)),) if z_h.shape == z_w.shape else (z_h, z_w)
        self.u = [convolve(z, weight).contiguous() for z in self.z]  # a weight's strides may be passed on
        normed = [torch.native_group_norm(u, norm_weight, norm_bias, *u.shape, self.norm_groups, eps) for u in self.u]
        self.statistics = [statistics for _, *statistics in normed]
        self.sigmoids = [n.sigmoid_() for n, *_ in normed]
        self.a = self.sigmoids[0].chunk(2) if len(self.z) == 1 else self.sigmoids

    def backward(self, da_h: Tensor, da_w: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of z_h, z_w, weight, norm_weight and norm_bias."""
        das = (torch.cat((da_h, da_w)),) if len(self.z) == 1 else (da_h, da_w)
        dzs, sums = [], []
        for z, u, a, statistics, da in zip(self.z, self.u, self.sigmoids, self.statistics, das):
            B, C, L = z.shape
            da = torch.ops.aten.sigmoid_backward(da, a)
            normed = u, *statistics, self.norm_weight, B, C, L, self.norm_groups
            if da.is_cuda:
                du, *dnorm = torch.ops.aten.native_group_norm_backward(da, *normed, [True] * 3)
            else:
                du, *dnorm = _norm_backward(da, *normed)
            dz, dweight = convolve_backward(du, z, self.weight)
            dzs.append(dz)
            sums.append((dweight, *dnorm))
        grads = sums[0] if len(sums) == 1 else [p + q for p, q in zip(*sums)]
        return *(dzs[0].chunk(2) if len(dzs) == 1 else dzs), *(g.to(p.dtype) for g, p in zip(grads, self.params))


def _norm_backward(dn: Tensor, u: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, B: int, C: int, L: int, G: int):
    """Differentiate the GroupNorm. PyTorch's own, on a CPU, loops over channels: three times slower at seven
    elements."""
    mean, rstd = mean[..., None], rstd[..., None]
    xhat = (u.view(B, G, -1) - mean).mul_(rstd)
    dxhat = (dn * weight[:, None]).view(B, G, -1)
    du = dxhat - dxhat.mean(2, keepdim=True)
    du.addcmul_(xhat, (dxhat * xhat).mean(2, keepdim=True), value=-1).mul_(rstd)
    return du.view(B, C, L), (dn * xhat.view(B, C, L)).sum((0, 2)), dn.sum((0, 2))


# On a GPU, PyTorch's convolutions may use TF32 and be nondeterministic unless global flags forbid both. Matrix products
# in float64 are neither, and the strips are small. On other devices PyTorch's convolutions are used.


def convolve(z: Tensor, weight: Tensor) -> Tensor:
    """Convolve strips (B, C, L) with weight (C, M, K) in groups, zero padding K // 2, deterministically."""
    if z.is_cuda:
        return _convolve_by_products(z, weight)
    return torch.convolution(z, weight, None, *_geometry(weight))


def convolve_backward(du: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of z and weight."""
    if z.is_cuda:
        return _convolve_backward_by_products(du, z, weight)
    backward = torch.ops.aten.convolution_backward
    return backward(du, z, weight, None, *_geometry(weight), [True, True, False])[:2]


def _geometry(weight: Tensor) -> tuple:
    C, M, K = weight.shape
    return [1], [K // 2], [1], False, [0], C // M


def _windows(z: Tensor, M: int, K: int) -> Tensor:
    """Return the inputs of each output of a group, (groups, M · K, B · L)."""
    padded = F.pad(z.double(), (K // 2, K // 2))
    return padded.unfold(2, K, 1).unflatten(1, (-1, M)).permute(1, 2, 4, 0, 3).flatten(3).flatten(1, 2)


def _convolve_by_products(z: Tensor, weight: Tensor) -> Tensor:
    (B, C, L), (_, M, K) = z.shape, weight.shape
    u = weight.double().view(-1, M, M * K) @ _windows(z, M, K)  # (groups, M, B · L)
    return u.view(C, B, L).transpose(0, 1).to(z.dtype).contiguous()


def _convolve_backward_by_products(du: Tensor, z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    (B, _, L), (C, M, K) = z.shape, weight.shape
    du = du.double().transpose(0, 1).reshape(-1, M, B * L)
    dweight = (du @ _windows(z, M, K).mT).view(weight.shape).to(weight.dtype)
    taps = (weight.double().view(-1, M, M * K).mT @ du).view(C, K, B, L)
    dz = sum(F.pad(taps[:, k], (k, K - 1 - k)) for k in range(K))  # (C, B, L + K - 1)
    return dz[..., K // 2 : K // 2 + L].transpose(0, 1).to(z.dtype).contiguous(), dweight


# PyTorch's reductions and broadcasts are fast if the innermost axis of the view is innermost in memory: a permuted
# channels-last map takes a tenth of the time of its (B, C, H, W) view.


def _channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(3) != 1


def strip_means(x: Tensor) -> tuple[Tensor, Tensor]:
    if _channels_last(x):
        p = x.permute(0, 2, 3, 1)
        return p.mean(2, dtype=full(x)).mT.contiguous(), p.mean(1, dtype=full(x)).mT.contiguous()
    if x.is_contiguous() and x.dtype == full(x):  # a product with a column of 1 / W is twice as fast as a mean over W
        W = x.shape[3]
        return (x.view(-1, W) @ x.new_full((W, 1), 1 / W)).view(x.shape[:3]), x.mean(2)
    return x.mean(3, dtype=full(x)), x.mean(2, dtype=full(x))


def strip_sums(dy: Tensor, x: Tensor, a_h: Tensor, a_w: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of dy · x: over W, weighted with a_w, and over H, weighted with a_h."""
    t = dy * x if dy.dtype == a_h.dtype else dy.to(a_h.dtype) * x
    if _channels_last(t):
        p = t.permute(0, 2, 3, 1)
        da_h = (p * a_w.mT.contiguous()[:, None]).sum(2)
        return da_h.mT.contiguous(), p.mul_(a_h.mT.contiguous()[:, :, None]).sum(1).mT.contiguous()
    da_h = (t @ a_w[..., None]).squeeze(3)
    if t.shape[3] < 24:  # rows are too short for a fast product of a matrix and a vector
        return da_h, t.mul_(a_h[..., None]).sum(2)
    return da_h, (a_h[:, :, None] @ t).squeeze(2)


def gate(
    x: Tensor, a_h: Tensor, a_w: Tensor, residual: bool, dz_h: Tensor | None = None, dz_w: Tensor | None = None
) -> Tensor:
    """Return x · (a_h · a_w, or 1 + a_h · a_w); in the backward pass plus the gradient through the strips' means."""
    last = _channels_last(x)

    def rows(a: Tensor) -> Tensor:
        return a.mT.contiguous()[:, :, None] if last else a[..., None]

    def columns(a: Tensor) -> Tensor:
        return a.mT.contiguous()[:, None] if last else a[:, :, None]

    out = torch.empty_like(x, dtype=a_h.dtype)  # not a view, which autograd would not allow to be modified in place
    y = torch.mul(rows(a_h), columns(a_w), out=out.permute(0, 2, 3, 1) if last else out)  # all else in place
    if residual:
        y.add_(1)
    y.mul_(x.permute(0, 2, 3, 1) if last else x)
    if dz_h is not None and dz_w is not None:
        y.add_(rows(dz_h / x.shape[3])).add_(columns(dz_w / x.shape[2]))
    return out.to(x.dtype)
