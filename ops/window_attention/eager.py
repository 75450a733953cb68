"""The plain-PyTorch form for speed: what runs on a CPU where Triton does not.

Windows are gathered from the map token by token, roll and padding included, a few at a time, so that they stay in a
cache; PyTorch's flash attention for CPUs takes them from there; one gather brings its output back. No padded, rolled or
permuted copies of a map, and no logits: for the backward, the map, the output and a log-sum-exp a query are kept. Where
the bias has a gradient, the backward has the logits of a few windows after all, for their sums. Windows with the same
seams come together, so that a mask is one window's, however many there are.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..precision import full, no_autocast
from . import reference

# Of a few windows' q, k and v, or their logits if these are more, in bytes. 1 to 8 MB are alike on most maps.
CHUNK_BYTES = 2 << 20

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    return WindowAttention.apply(qkv, heads, window, shift, bias, pad, scale)


class WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        qkv: Tensor,
        heads: int,
        window: tuple[int, int],
        shift: tuple[int, int],
        bias: Tensor | None,
        pad: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        with no_autocast(qkv):
            run = windows(qkv.shape, qkv.dtype, heads, tuple(window), tuple(shift), CHUNK_BYTES)
            out = qkv.new_empty(*qkv.shape[:3], 1, qkv.shape[4])
            masks, lse, read, o = run.masks(bias, full(qkv)), [], run.reader(qkv, pad), run.buffer(out)
            for images in run.images:
                for kind, part in run.parts:
                    q, k, v = _heads(read(images, part), heads)
                    y, l = _flash(q, k, v, attn_mask=_like(q, masks[kind]), scale=scale)
                    _heads(o[part], heads)[0].copy_(y)
                    lse.append(l)
                run.store(o, out[images])
        ctx.save_for_backward(qkv, bias, pad, out, *lse)
        ctx.rest = heads, window, shift, scale, run
        return out.squeeze(3)

    @staticmethod
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, pad, out, *lse = ctx.saved_tensors
        heads, window, shift, scale, run = ctx.rest
        if torch.is_grad_enabled():  # somebody wants a second derivative: that of the definition
            args = [t for i, t in ((0, qkv), (4, bias), (5, pad)) if ctx.needs_input_grad[i]]
            y = reference.window_attention(qkv, heads, window, shift, bias, pad, scale)
            grads = iter(torch.autograd.grad(y, args, dout, create_graph=True))
            return tuple(next(grads) if needed else None for needed in ctx.needs_input_grad)
        with no_autocast(qkv):
            scale = (qkv.shape[4] // heads) ** -0.5 if scale is None else scale
            dqkv = torch.empty(qkv.shape, dtype=qkv.dtype)
            masks, lse, backward = run.masks(bias, full(qkv)), iter(lse), None
            if ctx.needs_input_grad[4]:
                backward = Backward(run.most, heads, window[0] * window[1], qkv.shape[4] // heads, full(qkv))
            dpad = torch.zeros_like(pad, dtype=full(qkv)) if ctx.needs_input_grad[5] else None
            read, read_out, read_dout = run.reader(qkv, pad), run.reader(out), run.reader(dout.unsqueeze(3))
            dx = run.buffer(dqkv)
            for images in run.images:
                for kind, part in run.parts:
                    (do,), (q, k, v) = _heads(read_dout(images, part), heads), _heads(read(images, part), heads)
                    if backward is not None:
                        grads = backward(do, q, k, v, next(lse), masks[kind], scale)
                    else:
                        (o,), mask = _heads(read_out(images, part), heads), _like(q, masks[kind])
                        grads = _flash_backward(do, q, k, v, o, next(lse), 0.0, False, attn_mask=mask, scale=scale)
                    for into, grad in zip(_heads(dx[part], heads), grads):
                        into.copy_(grad)
                run.store(dx, dqkv[images])
                if dpad is not None and run.outside is not None:
                    dpad += dx[run.outside].sum(0, dtype=dpad.dtype)
        dbias = None if backward is None else diagonals(backward.to_logits, window).to(bias.dtype)
        return dqkv, None, None, None, dbias, None if dpad is None else dpad.to(pad.dtype), None


def _heads(x: Tensor, heads: int) -> tuple[Tensor, ...]:  # (windows, N, T, C) -> T of (windows, heads, N, D)
    return x.unflatten(3, (heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _like(q: Tensor, mask: Tensor | None) -> Tensor | None:  # (1 or heads, N, N) -> (windows, heads, N, N)
    return None if mask is None else mask.expand(*q.shape[:2], -1, -1)


class Backward:
    """Gradients to q, k and v of some windows, and to their logits, in memory made once: fresh pages cost as much
    as what is computed in them."""

    def __init__(self, windows: int, heads: int, N: int, D: int, dtype: torch.dtype):
        self.tokens = torch.empty(7, windows, heads, N, D, dtype=dtype)
        self.pairs = torch.empty(2, windows, heads, N, N, dtype=dtype)
        self.to_logits = torch.zeros(heads, N, N, dtype=dtype)  # summed over all windows

    def __call__(self, do, q, k, v, lse, mask, scale: float) -> Tensor:
        n = len(q)
        for into, x in zip(self.tokens, (do, q, k, v)):
            into[:n].copy_(x)
        do, q, k, v, dq, dk, dv = (x[:n].flatten(0, 1) for x in self.tokens)
        p, ds = self.pairs[:, :n].flatten(1, 2)
        torch.sub(mask, lse.unsqueeze(3), out=p.unflatten(0, lse.shape[:2]))
        p.baddbmm_(q, k.mT, alpha=scale).exp_()
        torch.bmm(do, v.mT, out=ds).mul_(p)
        ds.addcmul_(p, ds.sum(2, keepdim=True), value=-1)
        torch.baddbmm(dq, ds, k, beta=0, alpha=scale, out=dq)
        torch.baddbmm(dk, ds.mT, q, beta=0, alpha=scale, out=dk)
        torch.bmm(p.mT, do, out=dv)
        self.to_logits += ds.unflatten(0, lse.shape[:2]).sum(0)
        return self.tokens[4:, :n]


def diagonals(ds: Tensor, window: tuple[int, int]) -> Tensor:
    """(heads, N, N), queries by keys, summed over the pairs at each distance: (heads, 2h-1, 2w-1)."""
    h, w = window
    ds = skewed(ds.reshape(-1, h, w, h, w).transpose(2, 3))  # (heads, h, h, 2w-1)
    return skewed(ds.permute(0, 3, 1, 2)).mT


def skewed(x: Tensor) -> Tensor:
    """(..., n, n) -> (..., 2n-1): entry d + n - 1 is the sum of x[i, j] over i - j = d."""
    n = x.shape[-1]
    x = F.pad(x.flip(-1), (0, n)).flatten(-2)[..., : n * (2 * n - 1)]  # rows of 2n, read as rows of 2n-1: each shifts
    return x.unflatten(-1, (n, 2 * n - 1)).sum(-2)


@functools.lru_cache(maxsize=32)
def windows(shape: torch.Size, dtype: torch.dtype, heads: int, window, shift, chunk_bytes: int) -> "Windows":
    """As many as the blocks of a model with four stages and two shifts want, at four sizes: 24 bytes a token of a few
    images each, and a millisecond to make."""
    return Windows(shape, dtype, heads, window, shift, chunk_bytes)


class Windows:
    """Which tokens of a few images make which windows: by the seams that run through these, 0 none, 1 from top to
    bottom, 2 from left to right, 3 both; in each kind image by image."""

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
        self.b, self.y, self.x = image.unsqueeze(1), y[order], x[order]  # of each token, (n · windows, N)
        outside = (self.y >= H) | (self.x >= W)
        self.place = torch.empty(n, H, W, dtype=torch.int64)  # of each pixel among the windows' tokens
        i = outside.logical_not().flatten().nonzero().squeeze(1)
        self.place.view(-1)[((self.b * H + self.y) * W + self.x).flatten()[i]] = i
        self.outside = None
        if len(i) < outside.numel():
            self.outside, self.y, self.x = outside, self.y.clamp(max=H - 1), self.x.clamp(max=W - 1)

    def masks(self, bias: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
        """What each kind of window adds to its logits, (1 or heads, N, N)."""
        (h, w), (s_h, s_w) = self.window, self.shift
        mask = None if bias is None else reference.gathered(bias.to(dtype), self.window)
        if not (s_h or s_w):
            return [mask]
        i = torch.arange(h * w)
        below, right = i // w >= h - s_h, i % w >= w - s_w  # of the seams
        crossed = below[:, None] != below, right[:, None] != right

        def hidden(pairs: Tensor) -> Tensor:
            base = torch.zeros(1, *pairs.shape, dtype=dtype) if mask is None else mask
            return base.masked_fill(pairs, float("-inf"))

        kinds = {kind for kind, _ in self.parts}
        pairs = None, crossed[1], crossed[0], crossed[0] | crossed[1]
        return [mask if kind == 0 or kind not in kinds else hidden(pairs[kind]) for kind in range(4)]

    def buffer(self, like: Tensor) -> Tensor:
        """The windows of a few images, (windows, N, T, C), for a map of T and C."""
        return like.new_empty(*self.y.shape, *like.shape[3:])

    def reader(self, x: Tensor, pad: Tensor | None = None) -> Callable[[slice, slice], Tensor]:
        """Of a map (B, H, W, T, C): windows of some images, (windows, N, T, C), valid until the next are read."""
        T, C = x.shape[3:]
        if x.stride(4) != 1 or any(s % C for s in x.stride()[:3]) or (T > 1 and x.stride(3) % C):
            x = x.contiguous()
        b, h, w, t = x.stride()[:4]
        whole = T == 1 or (t == C and all(s % (T * C) == 0 for s in (b, h, w)))
        unit = T * C if whole else C
        rows = self.b * (b // unit) + self.y * (h // unit) + self.x * (w // unit)
        if not whole:
            rows = rows.unsqueeze(2) + torch.arange(T) * (t // unit)
        buffer = torch.empty(self.most, self.y.shape[1], T, C, dtype=x.dtype)

        def read(images: slice, part: slice) -> Tensor:
            z = x[images]
            last = sum((size - 1) * stride for size, stride in zip(z.shape[:4], z.stride()))
            z = z.as_strided((last // unit + 1, unit), (unit, 1))
            into = buffer[: part.stop - part.start]
            torch.index_select(z, 0, rows[part].flatten(), out=into.view(-1, unit))
            if self.outside is not None:
                into[self.outside[part]] = 0 if pad is None else pad.to(into.dtype)
            return into

        return read

    def store(self, x: Tensor, out: Tensor) -> None:
        """The windows of a few images, (windows, N, T, C), into their contiguous maps."""
        torch.index_select(x.flatten(0, 1).flatten(1), 0, self.place.flatten(), out=out.flatten(0, 2).flatten(1))
