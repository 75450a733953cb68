"""Neighborhood attention (NAT, DiNAT, GNA): every query attends to a window around itself, shifted at the borders."""

import torch
from torch import Tensor

from ..dispatch import is_compiled, use_definition, use_triton
from . import eager

__all__ = ["neighborhood_attention"]

MAX_HEAD_DIM = 128  # of the kernels: larger tiles spill registers
MAX_SIDE = 2**15 - 1  # of maps: the kernels pack a row and a column into 32 bits


def neighborhood_attention(
    qkv: Tensor,
    heads: int,
    kernel: tuple[int, int],
    bias: Tensor | None = None,
    dilation: tuple[int, int] = (1, 1),
    stride: tuple[int, int] = (1, 1),
    scale: float | None = None,
) -> Tensor:
    """Compute softmax(scale · q · k + bias) v over kh x kw keys around each query (NAT, arXiv 2204.07143; DiNAT,
    2209.15001; with strides GNA, 2504.16922). reference.py defines the windows.

    Args:
        qkv: (B, H, W, 3, C), q | k | v on axis 3, such as the unflattened output of a Linear; head m has channels m·D
            to (m + 1)·D of each. Kernels also read strided views, if the stride of the last axis is 1.
        heads: number of heads.
        kernel: (kh, kw) keys per query. Every query has that many: windows are shifted at the borders. An even kernel
            has one more key above or left of the centre than below or right of it.
        bias: (heads, 2kh-1, 2kw-1), added to the logits: entry [m, dy + kh - 1, dx + kw - 1] at distance (dy, dx) =
            key - query, in steps of the dilation. Tables of Swin and of `window_attention` are indexed by query - key:
            flip both axes to convert.
        dilation: (dh, dw) pixels between the keys of a window. kernel · dilation must not exceed the map.
        stride: (sh, sw) neighbouring queries that share a window, at most the kernel. 1 is neighborhood attention.
        scale: of the logits; D ** -0.5 if None.

    Returns:
        (B, H, W, C), contiguous, in the dtype of qkv, also under autocast. Sums are in float32, or float64 for float64.

    Gradients flow to qkv and bias and are deterministic. NaNs reach only the queries that see them, except in exported
    graphs and in graphs compiled for a GPU without kernels, where they reach a tile of queries.

    Raises:
        ValueError: for shapes, dtypes, devices or sizes that do not match.
    """
    if torch.jit.is_scripting():
        return eager.tiled(qkv, heads, kernel, bias, dilation, stride, scale)
    else:
        _check(qkv, heads, kernel, bias, dilation, stride)
        if qkv.numel() == 0:  # with a graph to the bias
            return qkv.sum(3) + (0 if bias is None else bias.sum().to(qkv.dtype))
        if _kernels(qkv, heads, bias):
            return _triton(qkv, heads, kernel, bias, dilation, stride, scale)
        if qkv.device.type != "cpu" or (use_definition(qkv) and not is_compiled()):
            rest = heads, tuple(kernel), tuple(dilation), tuple(stride)
            return eager.definition(qkv, bias, rest, scale).contiguous()
        return eager.neighborhood_attention(qkv, heads, kernel, bias, dilation, stride, scale)


def _kernels(qkv: Tensor, heads: int, bias: Tensor | None) -> bool:
    (H, W), D, cannot = qkv.shape[1:3], qkv.shape[4] // heads, []
    if D > MAX_HEAD_DIM:
        cannot.append(f"a head dimension of {D}, over {MAX_HEAD_DIM}")
    if max(H, W) > MAX_SIDE:
        cannot.append(f"a map of {H} x {W}, over {MAX_SIDE}")
    return use_triton(*(t for t in (qkv, bias) if t is not None), cannot=cannot)


def _triton(qkv, heads, kernel, bias, dilation, stride, scale) -> Tensor:
    from . import op  # and with it Triton: only now

    bias = None if bias is None else bias.float()
    scale = (qkv.shape[4] // heads) ** -0.5 if scale is None else scale
    return op.fwd(qkv, bias, heads, list(kernel), list(dilation), list(stride), scale)[0]


def _check(
    qkv: Tensor,
    heads: int,
    kernel: tuple[int, int],
    bias: Tensor | None,
    dilation: tuple[int, int],
    stride: tuple[int, int],
) -> None:
    if qkv.dim() != 5 or qkv.shape[3] != 3 or not qkv.dtype.is_floating_point:
        raise ValueError(
            f"qkv must be floating point of shape (B, H, W, 3, C), got {qkv.dtype} of shape {tuple(qkv.shape)}"
        )
    C, pairs = qkv.shape[4], dict(kernel=kernel, dilation=dilation, stride=stride)
    if heads < 1 or C % heads:
        raise ValueError(f"heads must divide the C = {C} channels of qkv, got {heads}")
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{name} must be two numbers of at least 1, for rows and columns, got {pair}")
    if stride[0] > kernel[0] or stride[1] > kernel[1]:
        raise ValueError(
            f"stride must be at most the kernel of {kernel[0]} x {kernel[1]}, got {stride[0]}, {stride[1]}"
        )
    H, W = qkv.shape[1:3]
    if qkv.numel() and (kernel[0] * dilation[0] > H or kernel[1] * dilation[1] > W):
        raise ValueError(
            f"kernel times dilation must be at most the map of {H} x {W}, got {kernel[0]} x {kernel[1]} times "
            f"{dilation[0]}, {dilation[1]}: pad the map first"
        )
    if bias is not None:
        shape = heads, 2 * kernel[0] - 1, 2 * kernel[1] - 1
        if bias.shape != shape or not bias.dtype.is_floating_point:
            raise ValueError(
                f"bias must be floating point of shape {shape}, got {bias.dtype} of shape {tuple(bias.shape)}"
            )
        if bias.device != qkv.device:
            raise ValueError(f"bias must be on {qkv.device} as qkv is, got {bias.device}")
