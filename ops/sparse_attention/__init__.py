"""Sparse attention by predicted connectivity (Sparsifiner, arXiv 2303.13755): a low-rank estimate of the attention
chooses the keys of each query, and the attention proper sees no others."""

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..precision import no_autocast
from . import eager, reference

__all__ = ["connectivity", "predict_mask", "sparse_attention", "sparse_mask", "unpack_mask"]

# Of the kernels.
MAX_HEAD_DIM = 128  # half of that in float32
MAX_TOKENS = 1024  # of predict_mask: 16 rows of scores lie in the registers of a program


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
    """Scores of each patch query for each key: S = A U, with A from softmax_K(qc kcᵀ down · heads ** -0.5), U from upᵀ.

    q, k             (B, heads, N, D), views of a packed qkv, unscaled. Token 0 is CLS, whose query is left out.
    proj_q, proj_k   (c, D), with biases (c,): qc = q proj_qᵀ + proj_q_bias, kc alike; the heads share them.
    down, up         (N, K) each, possibly the same tensor: K coefficients of a basis over the tokens.
    topk             keep so many, the largest, of a query's K coefficients; all if None. They are not normalised again.
    coef_threshold   of those kept, the ones that are not above it become 0.
    basis_threshold  U = |upᵀ| where above it, else 0; if None, U = upᵀ with its sign. Phase 1 of the published training
                     wants None here and for topk.
    alive            (B, N-1) bool, the patches that are not pruned: qc and kc of the others are 0.

    Returns (B, heads, N-1, N). Computed in float32 (float64 for float64), and returned in it, under autocast too.
    Gradients go to every tensor: through the kept coefficients into the whole softmax, through |up| with its sign where
    it is above the threshold. Plain PyTorch on every device, and the only (N-1) x N tensor that it makes is S.
    """
    if torch.jit.is_scripting():
        return reference.connectivity(
            q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up, topk, coef_threshold, basis_threshold, alive
        )
    else:
        tensors = q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up
        _check_predictor(*tensors, topk, alive)
        with no_autocast(q):
            return eager.connectivity(*tensors, topk, coef_threshold, basis_threshold, alive)


def sparse_mask(
    scores: Tensor, budget: int | None = None, threshold: float | None = None, alive: Tensor | None = None
) -> Tensor:
    """Which keys each query keeps, in bits: the `budget` of largest score, or those of a score above the threshold.

    scores     (B, heads, N-1, N), of the queries 1 … N-1. The CLS query, 0, keeps every key.
    budget     keys a query, from 1 to N. Of equal scores the lowest key index comes first. Published: ceil(0.25 · N).
    threshold  instead of a budget: one of the two must be given.
    alive      (B, N-1) bool: patches that are not pruned. The others are no query's key but for CLS, and the budget is
               at most the number of those that an image has itself, whatever its neighbours have. Their own rows are
               as any; to blank them (the published PRUNE_ATTN_MATRIX_ROW), set them to 0.

    Returns (B, heads, N, ceil(N / 32)), int32: key j of a query is bit j % 32 of its word j // 32; `unpack_mask` reads
    it. No gradient. Scores are compared in float32 at least. A query whose scores are NaN keeps some keys, unspecified
    which, so that its output is NaN too. Plain PyTorch on every device.
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
        with torch.no_grad():
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
    """sparse_mask(connectivity(…)), which see for the arguments, without the scores: the Triton kernel has them in
    registers, PyTorch on a CPU those of a few images at a time.

    No gradient: where a loss is on the scores, ask for them. All selection is in float32 (float64 for float64) whatever
    the type of q, under autocast too. A score that rounding alone tells from its neighbour may fall on either side of
    the budget, in one form or in another. The kernel takes D and c up to 64, K up to 128 and N up to 1024, as in all
    published variants. PyTorch takes the rest.
    """
    if torch.jit.is_scripting():
        scores = reference.connectivity(
            q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up, topk, coef_threshold, basis_threshold, alive
        )
        return reference.sparse_mask(scores, budget, threshold, alive)
    else:
        tensors = q, k, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up
        _check_predictor(*tensors, topk, alive)
        _check_rule(q.shape[2], budget, threshold)
        return _predict(*tensors, budget, threshold, topk, coef_threshold, basis_threshold, alive)


def _predict(*args) -> Tensor:
    tensors, rest = args[:8], args[8:]
    (_, _, N, D), c, K = tensors[0].shape, tensors[2].shape[0], tensors[6].shape[1]
    limits = [("head dimension", D, 64), ("projection", c, 64), ("basis", K, 128), ("number of tokens", N, MAX_TOKENS)]
    cannot = [f"a {name} of {size}, over {most}" for name, size, most in limits if size > most]
    with no_autocast(tensors[0]), torch.no_grad():
        if tensors[0].numel() and use_triton(*tensors, cannot=cannot):
            from . import op  # and with it Triton: only now

            return op.mask(*(t.detach() for t in tensors), *rest)
        return eager.predict_mask(*tensors, *rest)


def sparse_attention(qkv: Tensor, mask: Tensor, heads: int, scale: float | None = None) -> Tensor:
    """Attention of each query to the keys that its mask has a bit for: the softmax is over these alone.

    qkv    (B, N, 3C): q | k | v on the last axis; head m owns channels m·D to (m+1)·D of each. A view of something
           bigger is read where it lies if its last axis has stride 1; if not, it is copied.
    mask   (B, heads, N, ceil(N / 32)), int32, as `sparse_mask` makes it. A query without a key gives 0, and gets no
           gradient: the published code's DeiT form; its LV-ViT form gives NaN there.
    scale  of the logits; D ** -0.5 if None.

    Returns (B, N, C), contiguous. The gradient goes to qkv only, and is the same in every run. A NaN among the queries
    stays in its row; among the keys and values it reaches the queries that keep it and, as 0 · NaN, may reach others of
    its head and image.
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
    from . import op  # and with it Triton: only now

    return op.fwd(qkv, mask, heads, scale)[0]


def unpack_mask(mask: Tensor, N: int) -> Tensor:
    """The bits of a mask (…, ceil(N / 32)) as bool (…, N): to look at, or to count."""
    return reference.unpack(mask, N)


def _check_predictor(
    q: Tensor,
    k: Tensor,
    proj_q: Tensor,
    proj_q_bias: Tensor,
    proj_k: Tensor,
    proj_k_bias: Tensor,
    down: Tensor,
    up: Tensor,
    topk: int | None,
    alive: Tensor | None,
) -> None:
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
    named = dict(proj_q=proj_q, proj_q_bias=proj_q_bias, proj_k=proj_k, proj_k_bias=proj_k_bias, down=down, up=up, k=k)
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
    _check_alive(alive, q, N - 1)


def _check_alive(alive: Tensor | None, x: Tensor, patches: int) -> None:
    if alive is None:
        return
    shape = (x.shape[0], patches)
    if alive.shape != shape or alive.dtype != torch.bool:
        raise ValueError(f"alive must be bool of shape {shape}, got {alive.dtype} of shape {tuple(alive.shape)}")
    if alive.device != x.device:
        raise ValueError(f"alive must be on {x.device} as the rest is, got {alive.device}")


def _check_rule(N: int, budget: int | None, threshold: float | None) -> None:
    if (budget is None) == (threshold is None):
        raise ValueError(f"either budget or threshold must be given, got budget {budget} and threshold {threshold}")
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
