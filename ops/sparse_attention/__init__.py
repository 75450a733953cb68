"""Sparse attention by predicted connectivity (Sparsifiner, arXiv 2303.13755): a low-rank estimate of the attention
chooses the keys of each query, and attention is computed over these keys only."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..precision import no_autocast, no_gradients
from . import eager, reference

__all__ = ["connectivity", "predict_mask", "sparse_attention", "sparse_mask", "unpack_mask"]

# Limits of the kernels.
MAX_HEAD_DIM = 128  # half of it in float32
MAX_TOKENS = 1024  # in predict_mask, where a program keeps 16 rows of scores in registers


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
) -> Tensor:
    """Predict the scores of each patch query for each key: S = A U, where A is softmax_K(qc kcᵀ down · heads ** -0.5)
    after topk and coef_threshold, and U is upᵀ after basis_threshold.

    q, k             (B, heads, N, D), unscaled views of a packed qkv. Token 0 is CLS; its query is left out.
    proj_q, proj_k   (c, D), with biases (c,), shared by the heads: qc = q proj_qᵀ + proj_q_bias, and likewise kc.
    down, up         (N, K) each, possibly the same tensor: a basis of K vectors over the tokens.
    topk             how many of a query's K coefficients to keep, the largest; all if None. They are not renormalised.
    coef_threshold   kept coefficients that are not above it become 0.
    basis_threshold  U = |upᵀ| where above it, else 0; if None, U = upᵀ with its sign. In phase 1 of the published
                     training, this and topk are None.
    alive            (B, N-1) bool: the patches that are not pruned. qc and kc of pruned patches are 0.

    Returns (B, heads, N-1, N) in float32 (float64 for float64), under autocast too. All tensors get gradients: through
    the kept coefficients to the whole softmax, and through |up|, with its sign, where it is above the threshold. It is
    plain PyTorch on every device, and S is the only (N-1) x N tensor that it allocates.
    """
    if torch.jit.is_scripting():
        return reference.connectivity(
            q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up, topk, coef_threshold, basis_threshold, alive
        )
    else:
        predictor = eager.Predictor(proj_q, proj_q_bias, proj_k, proj_k_bias, down, up)
        selection = eager.Selection(topk, coef_threshold, basis_threshold, alive)
        _check_predictor(q, k, predictor, selection)
        with no_autocast(q):
            return eager.connectivity(q, k, predictor, selection)


def sparse_mask(
    scores: Tensor, budget: int | None = None, threshold: float | None = None, alive: Tensor | None = None
) -> Tensor:
    """Choose the keys that each query keeps: the `budget` keys with the largest scores, or those above the threshold.

    scores     (B, heads, N-1, N), of the queries 1 … N-1. The CLS query, 0, keeps every key.
    budget     number of keys per query, from 1 to N. Of equal scores, the lowest key index comes first. Published:
               ceil(0.25 · N).
    threshold  keep the keys with scores above it. Exactly one of budget and threshold must be given.
    alive      (B, N-1) bool: the patches that are not pruned. Pruned patches are keys of CLS only, and an image's
               budget is at most its number of alive patches. The rows of pruned queries are computed like any other;
               set them to 0 for the published PRUNE_ATTN_MATRIX_ROW.

    Returns a bit mask (B, heads, N, ceil(N / 32)), int32: key j of a query is bit j % 32 of its word j // 32;
    `unpack_mask` decodes it. There is no gradient. Scores are compared in float32 or wider. A query with NaN scores
    keeps some unspecified keys, so that its output is NaN too. It is plain PyTorch on every device.
    """
    if torch.jit.is_scripting():
        return reference.sparse_mask(scores, budget, threshold, alive)
    else:
        if scores.dim() != 4 or scores.shape[2] + 1 != scores.shape[3] or not scores.dtype.is_floating_point:
            raise ValueError(
                "scores must be floating point of shape (B, heads, N-1, N), "
                f"got {scores.dtype} of shape {tuple(scores.shape)}"
            )
        _check_rule(scores.shape[3], budget, threshold)
        _check_alive(alive, scores, scores.shape[2])
        with no_gradients():
            return eager.sparse_mask(scores, budget, threshold, alive)


def predict_mask(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_q_bias: Tensor,
    proj_k: Tensor,
    proj_k_bias: Tensor,
    down: Tensor,
    up: Tensor,
    budget: int | None = None,
    threshold: float | None = None,
    topk: int | None = None,
    coef_threshold: float = 0.0,
    basis_threshold: float | None = 0.02,
    alive: Tensor | None = None,
) -> Tensor:
    """Compute sparse_mask(connectivity(…)) without materialising the scores; see both for the arguments.

    The Triton kernel keeps the scores in registers; PyTorch on a CPU computes those of a few images at a time.

    There is no gradient: for a loss on the scores, call `connectivity`. All selection is in float32 (float64 for
    float64), whatever the dtype of q and under autocast too. Scores that differ only by rounding may be selected
    differently by different backends. The kernel supports D and c up to 64, K up to 128 and N up to 1024, which covers
    all published variants; PyTorch runs for larger sizes.
    """
    if torch.jit.is_scripting():
        scores = reference.connectivity(
            q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up, topk, coef_threshold, basis_threshold, alive
        )
        return reference.sparse_mask(scores, budget, threshold, alive)
    else:
        predictor = eager.Predictor(proj_q, proj_q_bias, proj_k, proj_k_bias, down, up)
        selection = eager.Selection(topk, coef_threshold, basis_threshold, alive)
        _check_predictor(q, k, predictor, selection)
        _check_rule(q.shape[2], budget, threshold)
        return _predict(q, k, predictor, selection, budget, threshold)


def _predict(
    q: Tensor,
    k: Tensor,
    predictor: eager.Predictor,
    selection: eager.Selection,
    budget: int | None,
    threshold: float | None,
) -> Tensor:
    (_, _, N, D), c, K = q.shape, predictor.proj_q.shape[0], predictor.down.shape[1]
    limits = [("head dimension", D, 64), ("projection", c, 64), ("basis", K, 128), ("number of tokens", N, MAX_TOKENS)]
    cannot = [f"a {name} of {size}, over {most}" for name, size, most in limits if size > most]
    with no_autocast(q), no_gradients():
        if q.numel() and use_triton(q, k, *predictor, cannot=cannot):
            from . import op  # imports Triton, so not at the top of the file

            return op.mask(*(t.detach() for t in (q, k, *predictor)), budget, threshold, *selection)
        return eager.predict_mask(q, k, predictor, selection, budget, threshold)


def sparse_attention(qkv: Tensor, mask: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Attention of each query to the keys that are set in its bit mask: the softmax is over these keys only.

    qkv    (B, N, 3C): q | k | v on the last axis; head m has channels m·D to (m+1)·D of each. A view of a larger tensor
           is read in place if its last axis has stride 1, else copied.
    mask   (B, heads, N, ceil(N / 32)), int32, from `sparse_mask`. A query without keys gives 0 and gets no gradient, as
           in the published DeiT code; the published LV-ViT code gives NaN.
    scale  factor of the logits; D ** -0.5 if None.

    Returns (B, N, C), contiguous. Only qkv gets a gradient, and it is deterministic. A NaN in a query affects only its
    row; one in a key or value affects the queries that keep it and may, as 0 · NaN, affect others of its head and
    image.
    """
    if torch.jit.is_scripting():
        return reference.sparse_attention(qkv, mask, heads, scale)
    else:
        _check(qkv, mask, heads)
        C = qkv.shape[2] // 3
        if qkv.numel() == 0:
            return qkv[..., :C].contiguous()
        D = C // heads
        most = MAX_HEAD_DIM // 2 if qkv.dtype == torch.float32 else MAX_HEAD_DIM
        cannot = [f"a head dimension of {D}, over {most}"] if most < D else []
        if use_triton(qkv, mask, cannot=cannot):
            return _triton(qkv, mask, heads, D**-0.5 if scale is None else scale)
        return eager.sparse_attention(qkv, mask, heads, scale)


def _triton(qkv: Tensor, mask: Tensor, heads: int, scale: float) -> Tensor:
    from . import op  # imports Triton, so not at the top of the file

    return op.fwd(qkv, mask, heads, scale)[0]


def unpack_mask(mask: Tensor, N: int) -> Tensor:
    """Decode a bit mask (…, ceil(N / 32)) into bool (…, N)."""
    return reference.unpack(mask, N)


def _check_predictor(q: Tensor, k: Tensor, predictor: eager.Predictor, selection: eager.Selection) -> None:
    proj_q, down, topk = predictor.proj_q, predictor.down, selection.topk
    if q.dim() != 4 or q.shape[2] < 1 or not q.dtype.is_floating_point:
        raise ValueError(f"q must be floating point of shape (B, heads, N, D), got {q.dtype} of shape {tuple(q.shape)}")
    if k.shape != q.shape or k.dtype != q.dtype:
        raise ValueError(f"k must be as q is, {q.dtype} of shape {tuple(q.shape)}, got {k.dtype} of {tuple(k.shape)}")
    _, _, N, D = q.shape
    if proj_q.dim() != 2 or proj_q.shape[1] != D:
        raise ValueError(f"proj_q must be (c, {D}) for the head dimension of q, got {tuple(proj_q.shape)}")
    c = proj_q.shape[0]
    if down.dim() != 2 or down.shape[0] != N or down.shape[1] < 1:
        raise ValueError(f"down must be ({N}, K) for the N = {N} tokens of q, got {tuple(down.shape)}")
    K = down.shape[1]
    shapes = dict(proj_q_bias=(c,), proj_k=(c, D), proj_k_bias=(c,), up=(N, K))
    named = predictor._asdict() | dict(k=k)
    for name, shape in shapes.items():
        if named[name].shape != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(named[name].shape)}")
    for name, p in named.items():
        if not p.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {p.dtype}")
        if p.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {p.device}")
    if topk is not None and not 1 <= topk <= K:
        raise ValueError(f"topk must be None or from 1 to K = {K}, got {topk}")
    _check_alive(selection.alive, q, N - 1)


def _check_alive(alive: Tensor | None, x: Tensor, patches: int) -> None:
    if alive is None:
        return
    shape = (x.shape[0], patches)
    if alive.shape != shape or alive.dtype != torch.bool:
        raise ValueError(f"alive must be bool of shape {shape}, got {alive.dtype} of shape {tuple(alive.shape)}")
    if alive.device != x.device:
        raise ValueError(f"alive must be on {x.device} as the other tensors are, got {alive.device}")


def _check_rule(N: int, budget: int | None, threshold: float | None) -> None:
    if (budget is None) == (threshold is None):
        raise ValueError(f"one of budget and threshold must be given, got budget {budget} and threshold {threshold}")
    if budget is not None and not 1 <= budget <= N:
        raise ValueError(f"budget must be from 1 to N = {N} keys, got {budget}")


def _check(qkv: Tensor, mask: Tensor, heads: int) -> None:
    if qkv.dim() != 3 or qkv.shape[2] % 3 or not qkv.dtype.is_floating_point:
        raise ValueError(f"qkv must be floating point of shape (B, N, 3C), got {qkv.dtype} of shape {tuple(qkv.shape)}")
    B, N, C3 = qkv.shape
    if heads < 1 or C3 // 3 % heads:
        raise ValueError(f"heads must divide the C = {C3 // 3} channels of qkv, got {heads}")
    if mask.shape != (B, heads, N, -(-N // 32)) or mask.dtype != torch.int32:
        raise ValueError(
            f"mask must be int32 of shape {(B, heads, N, -(-N // 32))}, got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    if mask.device != qkv.device:
        raise ValueError(f"mask must be on {qkv.device} as qkv is, got {mask.device}")
