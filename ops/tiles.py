"""What Triton kernels of attention share, whatever tokens they walk: the arithmetic on one tile of logits.

Logits are in base 2 (scale and bias times LOG2E), since a GPU has exp2. Imports Triton: for kernel.py files alone.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# A finite floor for a running maximum instead of -inf: a row whose keys are all still hidden stays at p = 0 and not at
# inf - inf.
FLOOR = tl.constexpr(-1e38)


@triton.jit
def softmax_step(s, v, m, l, acc):
    """Online softmax over one tile: logits s (M, N), hidden ones -inf, values v (N, D), into the running maximum m (M),
    sum l (M) and weighted sum acc (M, D), in fp32. The result is acc / l; the base-2 log-sum-exp is m + log2(l)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return m_new, l, acc


@triton.jit
def once(x):
    """x, computed by one thread and shared. Without this sum over an axis of one, the compiler has every thread do all
    the divisions and loads behind the eight or more lanes of x that its part of a tile of logits needs."""
    return tl.sum(x[:, None], 1)
