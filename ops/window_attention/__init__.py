"""Window attention (Swin, DaViT, stripes of CSwin): every token attends to the tokens of its window."""

import torch
from torch import Tensor

from ..dispatch import is_compiled, use_definition, use_triton
from . import eager, reference

__all__ = ["window_attention"]

MAX_HEAD_DIM = {2: 256, 4: 128}  # by element size in bytes: with more, the kernels' tiles do not fit in registers
MAX_TOKENS = 2**20  # per window, for kernel.divide


def window_attention(
    qkv: Tensor,
    heads: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q · k + bias) v within each window (Swin, arXiv 2103.14030; DaViT, 2204.03645; CSwin,
    2107.00652).

    qkv     (B, H, W, 3, C): q | k | v on axis 3, like the unflattened output of a Linear; head m has channels m·D to
            (m+1)·D of each. A view of some channels of a larger map is read in place if its last axis has stride 1.
    window  (h, w) in tokens: squares, stripes such as (H, 1) or (7, W), the whole map (H, W), or larger. The map is
            padded at the bottom and right to multiples of the window, without allocating a padded map.
    shift   (s_h, s_w), less than (h, w): the cyclic shift of Swin. The padded map is rolled by (-s_h, -s_w), and tokens
            that only the roll brings together from opposite edges do not attend to each other (their logits are -inf;
            published code adds -100).
    bias    (heads, 2h-1, 2w-1), added to the logits: [m, dy + h - 1, dx + w - 1] for query - key = (dy, dx).
    pad     (3, C): q | k | v of the padding tokens, zeros if None. Where published code pads the input of the
            projection with zeros, it is the bias of the projection. Padding tokens are keys like any other.
    scale   factor of the logits; D ** -0.5 if None.

    Returns (B, H, W, C), contiguous, in the dtype of qkv, under autocast too; sums are in float32 (float64 for
    float64). qkv, bias and pad get gradients, and these are deterministic. A NaN in a query affects only that query;
    one in a key or value affects the queries of its window.
    """
    if torch.jit.is_scripting():
        return reference.window_attention(qkv, heads, window, shift, bias, pad, scale)
    else:
        _check(qkv, heads, window, shift, bias, pad)
        if qkv.numel() == 0:  # an empty result that depends on every input, for autograd
            return _nothing(qkv, bias, pad)
        cannot, D = [], qkv.shape[4] // heads
        if MAX_HEAD_DIM.get(qkv.element_size(), D) < D:
            cannot.append(f"a head dimension of {D}, over {MAX_HEAD_DIM[qkv.element_size()]}, in {qkv.dtype}")
        if window[0] * window[1] > MAX_TOKENS:
            cannot.append(f"windows of {window[0] * window[1]} tokens, over {MAX_TOKENS}")
        if _kernels(cannot, qkv, bias, pad):
            return _triton(qkv, heads, window, shift, bias, pad, D**-0.5 if scale is None else scale)
        if qkv.device.type != "cpu" or (use_definition(qkv) and not is_compiled()):
            return eager.definition(qkv, bias, pad, heads, window, shift, scale).contiguous()
        return eager.window_attention(qkv, heads, window, shift, bias, pad, scale)


def _nothing(qkv: Tensor, *params: Tensor | None) -> Tensor:
    return qkv.sum(3) + sum(t.sum().to(qkv.dtype) for t in params if t is not None)


def _kernels(cannot: list[str], *given: Tensor | None) -> bool:
    return use_triton(*(t for t in given if t is not None), cannot=cannot)


def _triton(qkv, heads, window, shift, bias, pad, scale) -> Tensor:
    from . import op  # imports Triton, so not at the top of the file

    if bias is not None:
        bias = bias.float()
    if pad is not None:
        pad = pad.to(qkv.dtype)
    return op.fwd(qkv, bias, pad, heads, list(window), list(shift), scale)[0]


def _check(
    qkv: Tensor, heads: int, window: tuple[int, int], shift: tuple[int, int], bias: Tensor | None, pad: Tensor | None
) -> None:
    if qkv.dim() != 5 or qkv.shape[3] != 3 or not qkv.dtype.is_floating_point:
        raise ValueError(
            f"qkv must be floating point of shape (B, H, W, 3, C), got {qkv.dtype} of shape {tuple(qkv.shape)}"
        )
    C, (h, w), (s_h, s_w) = qkv.shape[4], window, shift
    if heads < 1 or C % heads:
        raise ValueError(f"heads must divide the C = {C} channels of qkv, got {heads}")
    if qkv.shape[1:3].numel() and (h < 1 or w < 1):
        raise ValueError(f"window must be at least 1 x 1, got {h} x {w}")
    if qkv.numel() and not (0 <= s_h < h and 0 <= s_w < w):
        raise ValueError(f"shift must be from 0 to below the window of {h} x {w}, got {s_h}, {s_w}")
    shapes = dict(bias=(bias, (heads, 2 * h - 1, 2 * w - 1)), pad=(pad, (3, C)))
    for name, (t, shape) in shapes.items():
        if t is None:
            continue
        if t.shape != shape or not t.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point of shape {shape}, got {t.dtype} of shape {tuple(t.shape)}")
        if t.device != qkv.device:
            raise ValueError(f"{name} must be on {qkv.device} as qkv is, got {t.device}")
