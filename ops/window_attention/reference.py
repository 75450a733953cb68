"""Reference implementation of window attention (Swin, arXiv 2103.14030; DaViT, 2204.03645; CSwin, 2107.00652).

The map is padded at the bottom and right to multiples of the window (h, w), then rolled by (-s_h, -s_w). In each window
of N = h · w tokens, for each head:

    S_ij = scale · q_i · k_j + bias[y_i - y_j + h - 1, x_i - x_j + w - 1],  -inf if only the roll brings i, j together
    O    = softmax(S) V                                                     (N, D)

and the result is rolled back and cropped. This implementation materialises the padded, rolled and partitioned maps and
the logits; the other implementations avoid that.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(
    qkv: Tensor,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:  # (B, H, W, 3, C), (heads, 2h-1, 2w-1), (3, C) -> (B, H, W, C)
    B, H, W, _, C = qkv.shape
    (h, w), (s_h, s_w), D = window, shift, C // heads
    R, S = (H + h - 1) // h, (W + w - 1) // w  # rows and columns of windows
    x = F.pad(qkv, (0, 0, 0, 0, 0, S * w - W, 0, R * h - H))
    if pad is not None:
        inside = F.pad(torch.ones(H, W, dtype=torch.bool, device=qkv.device), (0, S * w - W, 0, R * h - H))
        x = torch.where(inside[:, :, None, None], x, pad)
    x = rolled(x, -s_h, -s_w)
    x = x.reshape(B, R, h, S, w, 3, heads, D).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = x.reshape(3, B, R * S, heads, h * w, D).unbind(0)
    logits = q @ k.transpose(-2, -1) * (D**-0.5 if scale is None else scale)
    if bias is not None:
        logits = logits + gathered(bias, window)
    mask = seams(H, W, window, shift, qkv.device)
    out = logits.masked_fill(mask[:, None], float("-inf")).softmax(-1) @ v
    out = out.reshape(B, R, S, heads, h, w, D).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, R * h, S * w, C)
    return rolled(out, s_h, s_w)[:, :H, :W]


def rolled(x: Tensor, down: int, right: int) -> Tensor:
    """Return x.roll((down, right), (1, 2)), in a form that ONNX can export for amounts that depend on the size."""
    if isinstance(down, int) and isinstance(right, int) and down == 0 and right == 0:
        return x
    return x.index_select(1, _sources(x.shape[1], down, x.device)).index_select(
        2, _sources(x.shape[2], right, x.device)
    )


def _sources(n: int, amount: int, device: torch.device) -> Tensor:
    """Return the n indices modulo n that a roll by `amount`, at most n, reads from."""
    y = torch.arange(n, device=device) - amount
    return torch.where(y < 0, y + n, torch.where(y >= n, y - n, y))  # ONNX has no remainder of a symbolic size


def gathered(bias: Tensor, window: tuple[int, int]) -> Tensor:  # (heads, 2h-1, 2w-1) -> (heads, N, N)
    h, w = window
    y, x = (torch.arange(n, device=bias.device) for n in (h, w))
    dy, dx = y[:, None] - y + h - 1, x[:, None] - x + w - 1
    return bias[:, dy[:, None, :, None], dx[None, :, None, :]].reshape(-1, h * w, h * w)


def seams(H: int, W: int, window: tuple[int, int], shift: tuple[int, int], device: torch.device) -> Tensor:
    """Return a mask (windows, N, N) of the pairs that the roll brings together from opposite edges of the padded
    map."""
    h, w = window
    R, S = (H + h - 1) // h, (W + w - 1) // w
    wrapped_y = torch.arange(R * h, device=device) >= R * h - shift[0]
    wrapped_x = torch.arange(S * w, device=device) >= S * w - shift[1]
    side = 2 * wrapped_y.int()[:, None] + wrapped_x.int()  # (R h, S w)
    side = side.reshape(R, h, S, w).transpose(1, 2).reshape(R * S, h * w)
    return side[:, :, None] != side[:, None]
