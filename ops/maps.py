"""How maps (B, C, H, W) lie in memory, as their kernels are compiled for it.

The compiler moves 16 bytes at a time where it knows that addresses and sizes are multiples of 8 elements. Specializing
on the strides would tell it, but would also compile a kernel again for every image size of another divisibility. So
kernels do not specialize on strides and sizes, and get a LAYOUT instead: two or three forms in all.

This file imports Triton, so only kernel.py files may import it.
"""

import triton
import triton.language as tl
from torch import Tensor

# LAYOUT is the sum of these; 0 is any strides.
CHANNELS, COLUMNS = 1, 2  # this axis has stride 1
ALIGNED = 4  # the size of that axis and the other strides are multiples of 8


def layout(x: Tensor) -> int:
    """Return the LAYOUT of a map (B, C, H, W)."""
    b, c, h, w = x.stride()
    if c == 1 and w != 1:
        inner, multiples = CHANNELS, (x.shape[1], b, h, w)
    elif w == 1:
        inner, multiples = COLUMNS, (x.shape[3], b, c, h)
    else:
        return 0
    return inner + ALIGNED * all(n % 8 == 0 for n in multiples)


def flattened(*xs: Tensor) -> tuple[list[Tensor], bool]:
    """Return maps as (B, C, 1, H · W), and True, if their positions are equally far apart, as in dense maps; else the
    maps, and False. Kernels then need no division by the number of columns."""
    flat = all(x.stride(2) == x.shape[3] * x.stride(3) for x in xs)
    return ([x.view(*x.shape[:2], 1, -1) for x in xs] if flat else list(xs)), flat


@triton.jit
def known_strides(stride_b, stride_c, stride_h, stride_w, LAYOUT: tl.constexpr):
    """Return the strides as the compiler can use them: 1, or 8 times a number."""
    if LAYOUT >= 4:
        stride_b = stride_b // 8 * 8
        stride_c = stride_c // 8 * 8
        stride_h = stride_h // 8 * 8
        stride_w = stride_w // 8 * 8
    if LAYOUT % 4 == 1:
        stride_c = 1
    if LAYOUT % 4 == 2:
        stride_w = 1
    return stride_b, stride_c, stride_h, stride_w


@triton.jit
def known_sizes(C, W, LAYOUT: tl.constexpr):
    """Return the numbers of channels and columns as the compiler can use them in masks: the inner one 8 times another
    number."""
    if LAYOUT == 5:
        C = C // 8 * 8
    if LAYOUT == 6:
        W = W // 8 * 8
    return C, W


@triton.jit
def known_positions(P, LAYOUT: tl.constexpr):
    """Return the number of positions of an image as the compiler can use it in masks."""
    return P // 8 * 8 if LAYOUT == 6 else P


@triton.jit
def positions_at(p, W, stride_h, stride_w, FLAT: tl.constexpr):
    """Return the offsets of positions p of an image, 64-bit."""
    if FLAT:
        return p.to(tl.int64) * stride_w
    else:
        return (p // W).to(tl.int64) * stride_h + (p % W).to(tl.int64) * stride_w
