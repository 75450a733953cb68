"""Shared device functions of the attention kernels: the arithmetic on one tile of logits.

Logits are in base 2 (scale and bias times LOG2E), since GPUs have exp2. This file imports Triton, so only kernel.py
files may import it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
IEEE = tl.constexpr("ieee")
# Initial value of a running maximum. It is finite so that a row whose keys are all masked so far has p = 0, not NaN
# from inf - inf.
FLOOR = tl.constexpr(-1e38)


def precision(x: Tensor) -> str:
    """Return the input precision of products of matrices like x: tf32 for float32 where PyTorch's own may use it."""
    if x.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@triton.jit
def softmax_step(s, v, m, l, acc, PRECISION: tl.constexpr = IEEE):
    """Do an online softmax step with logits s (M, N), masked ones -inf, and values v (N, D). It updates the running
    maximum m (M), sum l (M) and weighted sum acc (M, D), all fp32. At the end the output is acc / l and the base-2
    log-sum-exp is m + log2(l)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return m_new, l, acc


@triton.jit
def gradient(s, dp, seen):
    """Return the softmax's probabilities and the gradient of its logits, 0 where not seen, of logits less their
    log-sum-exp s and of gradients of the probabilities less their row's sum dp.

    Both are masked before and not after: a choice between a result and 0 is put behind its conversion to 16 bits by
    the compiler, which then unpacks and packs each pair. Nothing that is not seen can overflow, or be 0 · inf."""
    p = tl.exp2(tl.where(seen, s, float("-inf")))
    return p, p * tl.where(seen, dp, 0.0)


@triton.jit
def once(x):
    """Compute x once and share it between threads. Without this sum over an axis of size one, the compiler lets every
    thread repeat the divisions and loads for the eight or more elements of x that its part of a tile needs."""
    return tl.sum(x[:, None], 1)
