"""Windows of DaViT-T, shifted windows with a bias as in Swin-T (Agent-Swin's B blocks), stripes of CSwin-T."""

import torch
import torch.nn.functional as F
from saccade.ops import window_attention

from . import Case


def _partition(qkv, heads, window, shift, pad):
    B, H, W, _, C = qkv.shape
    h, w = window
    R, S = -(-H // h), -(-W // w)
    x = F.pad(qkv, (0, 0, 0, 0, 0, S * w - W, 0, R * h - H))
    if pad is not None and x.shape != qkv.shape:
        inside = torch.ones(R * h, S * w, dtype=torch.bool, device=x.device)
        inside[H:], inside[:, W:] = False, False
        x = torch.where(inside[:, :, None, None], x, pad)
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.view(B, R, h, S, w, 3, C).transpose(2, 3).reshape(B * R * S, h * w, 3, heads, C // heads)
    return x.permute(2, 0, 3, 1, 4).unbind(0)


def _reverse(out, qkv, window, shift):  # (B · windows, heads, N, D)
    B, H, W, _, C = qkv.shape
    h, w = window
    R, S = -(-H // h), -(-W // w)
    out = out.transpose(1, 2).reshape(B, R, S, h, w, C).transpose(2, 3).reshape(B, R * h, S * w, C)
    return (out.roll(shift, (1, 2)) if any(shift) else out)[:, :H, :W].contiguous()


def _bias(bias, window):
    (h, w), (y, x) = window, (torch.arange(n, device=bias.device) for n in window)
    dy, dx = y[:, None] - y + h - 1, x[:, None] - x + w - 1
    return bias[:, dy[:, None, :, None], dx[None, :, None, :]].reshape(-1, h * w, h * w)


def _mask(qkv, window, shift):  # (windows, N, N): 0, and -100 across a seam
    h, w = window
    R, S = -(-qkv.shape[1] // h), -(-qkv.shape[2] // w)
    side = torch.zeros(R * h, S * w, device=qkv.device)
    side[R * h - shift[0] :] += 1
    side[:, S * w - shift[1] :] += 2
    side = side.view(R, h, S, w).transpose(1, 2).reshape(R * S, h * w)
    return -100 * (side[:, :, None] != side[:, None]).to(qkv.dtype)


def published(qkv, heads, window, shift, bias, pad):
    q, k, v = _partition(qkv, heads, window, shift, pad)
    s = q * q.shape[-1] ** -0.5 @ k.mT
    if bias is not None:
        s = s + _bias(bias, window)
    if any(shift):
        mask = _mask(qkv, window, shift)
        s = (s.view(-1, len(mask), *s.shape[1:]) + mask[:, None]).view(s.shape)
    return _reverse(s.softmax(-1) @ v, qkv, window, shift)


def sdpa(qkv, heads, window, shift, bias, pad):
    q, k, v = _partition(qkv, heads, window, shift, pad)
    mask = None if bias is None else _bias(bias, window)
    if any(shift):
        seams = _mask(qkv, window, shift)[:, None]
        mask = (seams if mask is None else seams + mask).repeat(qkv.shape[0], 1, 1, 1)
    return _reverse(F.scaled_dot_product_attention(q, k, v, mask), qkv, window, shift)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []

    def add(where, stage, C, heads, window, shift=(0, 0), bias=False, pad=False, parts=1):
        H, W = height // (4 << stage), width // (4 << stage)
        h, w = (size or side for size, side in zip(window, (H, W)))

        def args(device, dtype):
            qkv = torch.randn(batch, H, W, 3, parts * C, device=device, dtype=dtype)[..., :C].requires_grad_()
            table = torch.randn(heads, 2 * h - 1, 2 * w - 1, device=device, dtype=dtype) if bias else None
            value = torch.randn(3, C, device=device, dtype=dtype) if pad else None
            return qkv, heads, (h, w), shift, *(None if t is None else t.requires_grad_() for t in (table, value))

        size, flops = batch * H * W * C, 4 * batch * H * W * h * w * C
        result.append(
            Case(
                where=where,
                args=args,
                ours=window_attention,
                published=published,
                elements=(4 * size, 7 * size),
                flops=(flops, flops * 5 // 2),
                library={"sdpa": sdpa},
            )
        )

    for stage in range(4):
        C, heads = 96 << stage, 3 << stage
        add(f"DaViT-T stage {stage + 1}", stage, C, heads, (7, 7), pad=True)
    for stage in range(4):
        C, heads = 96 << stage, 3 << stage
        shift = (0, 0) if min(height, width) // (4 << stage) <= 7 else (3, 3)
        add(f"Swin-T stage {stage + 1}", stage, C, heads, (7, 7), shift, bias=True)
    for stage, split in enumerate((1, 2, 7)):  # one of the two branches: half of the channels
        C, heads = 32 << stage, 1 << stage
        add(f"CSwin-T stage {stage + 1}, columns", stage, C, heads, (0, split), parts=2)
        add(f"CSwin-T stage {stage + 1}, rows", stage, C, heads, (split, 0), parts=2)
    return result
