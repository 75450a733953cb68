"""Fast PyTorch implementation for CPUs.

Windows are gathered from the map token by token, which includes roll and padding, a few at a time, so that they and
their logits stay in cache. Batched products read the heads without permuted copies, and one gather writes the output.
No map is padded, rolled or permuted, and no logits are kept: the backward pass recomputes those of a few windows.
Windows with the same seams are processed together, so that they share one mask.

The tokens of windows are stored as (T, N, windows, C), with T = 3 for q, k and v and 1 for the output, so that windows
and heads are one axis of a batched product, with stride D.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from ..dispatch import definition_gradients, is_compiled, wants_definition_gradients
from ..precision import full, no_autocast
from . import reference

# Bytes per chunk of windows, of their q, k and v or of their logits if these are larger. 1 to 8 MB are equally fast.
CHUNK_BYTES = 2 << 20


def window_attention(
    qkv: Tensor,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """See saccade.ops.window_attention, which checks the arguments. On a CPU."""
    if is_compiled():
        return plain(qkv, bias, pad, heads, window, shift, scale)
    return WindowAttention.apply(qkv, heads, window, shift, bias, pad, scale)


def definition(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Run the reference and return the dtype of qkv."""
    with no_autocast(qkv):
        bias, pad = (None if t is None else t.to(qkv.dtype) for t in (bias, pad))
        return reference.window_attention(qkv, heads, window, shift, bias, pad, scale)


class WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        heads: int,
        window: tuple[int, int],
        shift: tuple[int, int],
        bias: Tensor | None,
        pad: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        ctx.save_for_backward(qkv, bias, pad)
        ctx.rest = heads, window, shift, scale
        return forward(qkv, bias, pad, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        needed = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
        if wants_definition_gradients(dout):
            heads, window, shift, scale = ctx.rest
            f = partial(definition, heads=heads, window=window, shift=shift, scale=scale)
            dqkv, *params = definition_gradients(f, ctx.saved_tensors, needed, dout)
        else:
            dqkv, *params = backward(dout, *ctx.saved_tensors, *ctx.rest, *needed[1:])
        return dqkv, None, None, None, *params, None


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
) -> Tensor:
    with no_autocast(qkv):
        scale = (qkv.shape[4] // heads) ** -0.5 if scale is None else scale
        run = windows(qkv.shape, full(qkv), heads, tuple(window), tuple(shift), CHUNK_BYTES)
        out = qkv.new_empty(*qkv.shape[:3], 1, qkv.shape[4])
        masks, read, o = run.masks(bias), run.reader(qkv, pad), run.buffer(1)
        p, y = run.pairs(), run.tokens()
        for images in run.images:
            for kind, part in run.parts:
                q, k, v = run.heads_of(read(images, part))
                P, Y = p[: len(q)], y[: len(q)]
                run.probabilities(q, k, masks[kind], scale, P)
                torch.bmm(P.mT, v, out=Y)
                run.heads_of(o[:, :, part])[0].copy_(Y)
            run.store(o, out[images])
    return out.squeeze(3)


def backward(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
    needs_bias: bool,
    needs_pad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of qkv, bias and pad."""
    with no_autocast(qkv):
        scale = (qkv.shape[4] // heads) ** -0.5 if scale is None else scale
        run = windows(qkv.shape, full(qkv), heads, tuple(window), tuple(shift), CHUNK_BYTES)
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
        dpad = torch.zeros_like(pad, dtype=run.dtype) if needs_pad else None
        dlogits = 0  # summed over windows; keys by queries
        masks, read, read_dout = run.masks(bias), run.reader(qkv, pad), run.reader(dout.unsqueeze(3))
        dx, p, ds, y = run.buffer(3), run.pairs(), run.pairs(), run.tokens()
        for images in run.images:
            for kind, part in run.parts:
                (do,), (q, k, v) = run.heads_of(read_dout(images, part)), run.heads_of(read(images, part))
                P, S, Y = p[: len(q)], ds[: len(q)], y[: len(q)]
                run.probabilities(q, k, masks[kind], scale, P)
                dq, dk, dv = run.heads_of(dx[:, :, part])
                dv.copy_(torch.bmm(P, do, out=Y))
                torch.bmm(v, do.mT, out=S).mul_(P)
                S.addcmul_(P, S.sum(1, keepdim=True), value=-1)
                dq.copy_(torch.baddbmm(Y, S.mT, k, beta=0, alpha=scale, out=Y))
                dk.copy_(torch.baddbmm(Y, S, q, beta=0, alpha=scale, out=Y))
                if needs_bias:
                    dlogits = dlogits + S.unflatten(0, (-1, run.heads)).sum(0)
            run.store(dx, dqkv[images])
            if dpad is not None and run.outside is not None:
                dpad += dx[:, run.outside.T].sum(1)
    dbias = diagonals(dlogits.mT, run.window).to(bias.dtype) if needs_bias else None
    return dqkv, dbias, None if dpad is None else dpad.to(pad.dtype)


# One node in the graphs of torch.compile, whose own form of the definition takes more than twice the time.


@custom_op("saccade::window_attention_plain", mutates_args=())
def plain(
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
) -> Tensor:
    return forward(qkv, bias, pad, heads, window, shift, scale)


@plain.register_fake
def _(qkv, *rest):
    B, H, W, _, C = qkv.shape
    return qkv.new_empty(B, H, W, C)


@custom_op("saccade::window_attention_plain_bwd", mutates_args=())
def plain_bwd(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    pad: Tensor | None,
    heads: int,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = backward(dout, qkv, bias, pad, heads, window, shift, scale, bias is not None, pad is not None)
    dqkv, dbias, dpad = (qkv.new_empty(0) if grad is None else grad for grad in grads)
    return dqkv, dbias, dpad


@plain_bwd.register_fake
def _(dout, qkv, bias, pad, *rest):
    return tuple(qkv.new_empty(0) if t is None else t.new_empty(t.shape) for t in (qkv, bias, pad))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def _backward(ctx, dout):
    grads = plain_bwd(dout, *ctx.saved_tensors, *ctx.rest)
    return *(None if t is None else grad for t, grad in zip(ctx.saved_tensors, grads)), *[None] * 4


plain.register_autograd(_backward, setup_context=_save)


def diagonals(ds: Tensor, window: tuple[int, int]) -> Tensor:
    """Sum (heads, N, N), queries by keys, over all pairs with the same relative position: (heads, 2h-1, 2w-1)."""
    h, w = window
    ds = sum_diagonals(ds.reshape(-1, h, w, h, w).transpose(2, 3))  # (heads, h, h, 2w-1)
    return sum_diagonals(ds.permute(0, 3, 1, 2)).mT


def sum_diagonals(x: Tensor) -> Tensor:
    """Sum the diagonals of (..., n, n) to (..., 2n-1): entry d + n - 1 is the sum of x[i, j] over i - j = d."""
    n = x.shape[-1]
    x = F.pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]  # rows of 2n, read as rows of 2n-1: shifted
    return x.unflatten(-1, (n, 2 * n - 1)).sum(-2)


@functools.lru_cache(maxsize=32)
def windows(shape: torch.Size, dtype: torch.dtype, heads: int, window, shift, chunk_bytes: int) -> "Windows":
    """Return a cached `Windows`. The cache fits a model with four stages and two shifts at four image sizes. Each takes
    24 bytes per token of a few images, and a millisecond to compute."""
    return Windows(shape, dtype, heads, window, shift, chunk_bytes)


class Windows:
    """The indices of the tokens of each window, for a few images. Windows are ordered by the seams that divide them
    (kind 0: none, 1: vertical, 2: horizontal, 3: both) and within a kind by image."""

    def __init__(
        self,
        shape: torch.Size,
        dtype: torch.dtype,
        heads: int,
        window: tuple[int, int],
        shift: tuple[int, int],
        chunk_bytes: int,
    ):
        B, H, W, _, C = shape
        (h, w), (s_h, s_w) = self.window, self.shift = window, shift
        self.heads, self.C, self.dtype = heads, C, dtype
        R, S = -(-H // h), -(-W // w)
        y, x = ((torch.arange(n) + s) % n for n, s in ((R * h, s_h), (S * w, s_w)))
        y, x = (t.view(R, h, S, w).transpose(1, 2).reshape(-1, h * w) for t in torch.meshgrid(y, x, indexing="ij"))
        n = max(1, chunk_bytes // (H * W * 3 * C * dtype.itemsize))
        n = next(m for m in range(min(n, B), 0, -1) if B % m == 0)
        self.images = [slice(b, b + n) for b in range(0, B, n)]

        kinds = torch.zeros(R, S, dtype=torch.int64)
        kinds[-1] += 2 * (s_h > 0)
        kinds[:, -1] += int(s_w > 0)
        kinds = kinds.flatten()
        most = max(1, chunk_bytes // (h * w * max(3 * C, heads * h * w) * dtype.itemsize))  # windows at a time
        order, self.parts, start = [], [], 0
        for kind in range(4):
            which = (kinds == kind).nonzero()  # (windows of this kind, 1)
            end = start + n * len(which)
            self.parts += [(kind, slice(i, min(i + most, end))) for i in range(start, end, most)]
            order += [which.T.expand(n, -1).flatten()] if len(which) else []
            start = end
        self.most = max(part.stop - part.start for _, part in self.parts)
        order = torch.cat(order)
        image = torch.cat([torch.arange(n).repeat_interleave(n_k) for n_k in kinds.bincount().tolist()])
        self.b, self.y, self.x = image.unsqueeze(1), y[order], x[order]  # per token, (windows, N)
        outside = (self.y >= H) | (self.x >= W)
        self.place = torch.empty(n, H, W, dtype=torch.int64)  # index of each pixel in the windows' tokens
        i = outside.logical_not().T.flatten().nonzero().squeeze(1)  # in the order of tokens, (N, windows)
        self.place.view(-1)[((self.b * H + self.y) * W + self.x).T.flatten()[i]] = i
        self.outside = None
        if len(i) < outside.numel():
            self.outside, self.y, self.x = outside, self.y.clamp(max=H - 1), self.x.clamp(max=W - 1)

    def masks(self, bias: Tensor | None) -> list[Tensor | None]:
        """Return the additive mask of each kind of window, (1 or heads, N, N), keys by queries."""
        (h, w), (s_h, s_w) = self.window, self.shift
        mask = None if bias is None else reference.gathered(bias.to(self.dtype), self.window).mT
        if not (s_h or s_w):
            return [mask]
        i = torch.arange(h * w)
        below, right = i // w >= h - s_h, i % w >= w - s_w  # below the horizontal seam, right of the vertical one
        crossed = below[:, None] != below, right[:, None] != right

        def hidden(pairs: Tensor) -> Tensor:
            base = torch.zeros(1, *pairs.shape, dtype=self.dtype) if mask is None else mask
            return base.masked_fill(pairs, float("-inf"))

        kinds = {kind for kind, _ in self.parts}
        pairs = None, crossed[1], crossed[0], crossed[0] | crossed[1]
        return [mask if kind == 0 or kind not in kinds else hidden(pairs[kind]) for kind in range(4)]

    def pairs(self) -> Tensor:
        """Allocate the logits of the largest chunk of windows, keys by queries."""
        N = self.y.shape[1]
        return torch.empty(self.most * self.heads, N, N, dtype=self.dtype)

    def tokens(self) -> Tensor:
        """Allocate one of q, k and v for the largest chunk of windows."""
        return torch.empty(self.most * self.heads, self.y.shape[1], self.C // self.heads, dtype=self.dtype)

    def buffer(self, T: int) -> Tensor:
        """Allocate the tokens of all windows of a few images, (T, N, windows, C)."""
        return torch.empty(T, *self.y.T.shape, self.C, dtype=self.dtype)

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split (T, N, windows, C) into T views (windows · heads, N, D)."""
        return x.unflatten(3, (self.heads, -1)).flatten(2, 3).transpose(1, 2).unbind(0)

    def probabilities(self, q: Tensor, k: Tensor, mask: Tensor | None, scale: float, out: Tensor) -> None:
        """Write the probabilities to out, keys by queries: the softmax then processes whole rows of queries at once,
        and the backward pass transposes one product less."""
        if mask is None:
            torch.baddbmm(out, k, q.mT, beta=0, alpha=scale, out=out)
        else:
            out.unflatten(0, (-1, self.heads)).copy_(mask)
            out.baddbmm_(k, q.mT, alpha=scale)
        torch.softmax(out, 1, out=out)

    def reader(self, x: Tensor, pad: Tensor | None = None) -> Callable[[slice, slice], Tensor]:
        """Return a function that gathers windows of some images, (T, N, windows, C), from a map (B, H, W, T, C). Its
        result is valid until the next call."""
        T, C = x.shape[3:]
        if x.stride(4) != 1 or any(s % C for s, size in zip(x.stride(), x.shape[:4]) if size > 1):
            x = x.contiguous()
        b, h, w, t = (s // C for s in x.stride()[:4])
        rows = (torch.arange(T) * t).view(T, 1, 1) + (self.b * b + self.y * h + self.x * w).T  # (T, N, windows)
        buffer = torch.empty(T * self.y.shape[1] * self.most, C, dtype=self.dtype)

        def read(images: slice, part: slice) -> Tensor:
            z = x[images]
            last = sum((size - 1) * stride for size, stride in zip(z.shape[:4], z.stride()))
            z, which = z.as_strided((last // C + 1, C), (C, 1)), rows[:, :, part]
            into = buffer[: which.numel()]
            if x.dtype == self.dtype:
                torch.index_select(z, 0, which.flatten(), out=into)
            else:
                into.copy_(z.index_select(0, which.flatten()))
            into = into.view(*which.shape, C)
            if self.outside is not None:
                into[:, self.outside[part].T] = 0 if pad is None else pad.to(into.dtype).unsqueeze(1)
            return into

        return read

    def store(self, x: Tensor, out: Tensor) -> None:
        """Scatter the windows of a few images, (T, N, windows, C), to contiguous maps out (images, H, W, T, C)."""
        T, C = len(x), self.C
        row = self.place.unsqueeze(3) + torch.arange(T) * self.y.numel()  # (images, H, W, T)
        x, out = x.flatten(0, 2), out.view(-1, C)
        if x.dtype == out.dtype:
            torch.index_select(x, 0, row.flatten(), out=out)
        else:
            out.copy_(x.index_select(0, row.flatten()))
