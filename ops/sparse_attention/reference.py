"""Reference implementation of sparse attention by predicted connectivity (Sparsifiner, arXiv 2303.13755).

With queries Q and keys K_ (N, D) of one head, whose first token is CLS, and a basis of K vectors over the tokens:

    E = (Q W_qᵀ + b_q) (K_ W_kᵀ + b_k)ᵀ P · heads ** -0.5      (N, K), without the row of the CLS query
    A = top-k of softmax_K(E)                                    (N-1, K), not renormalised
    U = |up|ᵀ where above a threshold, else 0                    (K, N)
    S = A U                                                      (N-1, N)
    M = a row of ones for CLS; then ones at the `budget` largest values of each row of S      (N, N)
    O = softmax(scale · Q K_ᵀ where M, else -inf) V              0 if a row of M is 0

M is stored as bits: key j of a row is bit j % 32 of its word j // 32.
"""

import torch
from torch import Tensor

from ..dispatch import indices_of_largest


def connectivity(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_q_bias: Tensor,
    proj_k: Tensor,
    proj_k_bias: Tensor,
    down: Tensor,
    up: Tensor,
    topk: int | None = None,
    coef_threshold: float = 0.0,
    basis_threshold: float | None = 0.02,
    alive: Tensor | None = None,
) -> Tensor:  # (B, heads, N, D) twice, (c, D), (c,), (c, D), (c,), (N, K) twice -> (B, heads, N-1, N)
    A = coefficients(q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, topk, coef_threshold, alive)
    return A @ basis(up, basis_threshold).to(A.dtype)


def coefficients(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_q_bias: Tensor,
    proj_k: Tensor,
    proj_k_bias: Tensor,
    down: Tensor,
    topk: int | None = None,
    coef_threshold: float = 0.0,
    alive: Tensor | None = None,
) -> Tensor:  # (B, heads, N-1, K)
    full = torch.float64 if q.dtype == torch.float64 else torch.float32
    qc = q.to(full) @ proj_q.to(full).transpose(-2, -1) + proj_q_bias.to(full)
    kc = k.to(full) @ proj_k.to(full).transpose(-2, -1) + proj_k_bias.to(full)
    if alive is not None:
        there = with_cls(alive)[:, None, :, None]
        qc, kc = qc * there, kc * there
    E = qc @ (kc.transpose(-2, -1) @ down.to(full)) * q.shape[1] ** -0.5
    A = E[:, :, 1:].softmax(-1)
    if topk is not None:
        A = A * largest(A, topk)
    return A.masked_fill(coef_threshold >= A, 0.0)


def basis(up: Tensor, threshold: float | None) -> Tensor:  # (N, K) -> (K, N)
    if threshold is None:
        return up.transpose(-2, -1)
    U = up.transpose(-2, -1).abs()
    return U.masked_fill(threshold >= U, 0.0)


def largest(x: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` largest values of each row; of equal values, the first are chosen."""
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, indices_of_largest(x, count), True)


def with_cls(alive: Tensor) -> Tensor:  # (B, N-1) -> (B, N)
    return torch.cat((torch.ones_like(alive[:, :1]), alive), 1)


def sparse_mask(
    scores: Tensor, budget: int | None = None, threshold: float | None = None, alive: Tensor | None = None
) -> Tensor:  # (B, heads, N-1, N) -> (B, heads, N, ceil(N / 32))
    scores = scores.detach()
    if alive is not None:
        scores = scores.masked_fill(~with_cls(alive)[:, None, None], -float("inf"))
    if budget is not None:
        M = largest(scores, budget)
        if alive is not None:
            own = alive.sum(1).clamp(max=budget)[:, None, None, None]
            rank = scores.sort(stable=True, dim=-1, descending=True)[1].argsort(-1)
            M = rank < own
    else:
        assert threshold is not None
        M = ~(scores <= threshold)
    cls = M.new_ones(M.shape[0], M.shape[1], 1, M.shape[3])
    return pack(torch.cat((cls, M), 2))


# Sums and remainders instead of shifts, since ONNX cannot shift signed integers and divides integers in float32. 1 <<
# 32 and not 2**32, which is a float in TorchScript.


def pack(M: Tensor) -> Tensor:  # (..., N) bool -> (..., ceil(N / 32)) int32
    M = torch.nn.functional.pad(M.long(), (0, -M.shape[-1] % 32)).unflatten(-1, (-1, 32))
    word = (M * powers(M.device)).sum(-1)
    return torch.where(word < (1 << 31), word, word - (1 << 32)).to(torch.int32)


def unpack(mask: Tensor, N: int) -> Tensor:  # (..., ceil(N / 32)) int32 -> (..., N) bool
    # Times 2 ** (31 - i), bit i is the highest of 32. The divisor is a number: Inductor divides by a tensor also in the
    # lanes past its end, which are zeros (PyTorch 2.11).
    return (mask.long().unsqueeze(-1) * powers(mask.device).flip(0) % (1 << 32) >= 1 << 31).flatten(-2)[..., :N]


def powers(device: torch.device) -> Tensor:
    """Return 2 ** arange(32), made of numbers: AOTInductor takes a power of integers for float32 (PyTorch 2.11)."""
    return torch.tensor([1 << i for i in range(32)], dtype=torch.int64, device=device)


def sparse_attention(
    qkv: Tensor, mask: Tensor, heads: int, scale: float | None = None
) -> Tensor:  # (B, N, 3C), (B, heads, N, ceil(N / 32)) -> (B, N, C)
    B, N, C3 = qkv.shape
    q, k, v = qkv.reshape(B, N, 3, heads, C3 // 3 // heads).permute(2, 0, 3, 1, 4).unbind(0)
    M = unpack(mask, N)
    L = (q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~M, -float("inf"))
    P = L.softmax(-1).masked_fill(~M.any(-1, keepdim=True), 0.0)
    return (P @ v).transpose(1, 2).reshape(B, N, C3 // 3)
