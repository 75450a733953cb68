"""Multi-scale deformable attention in 2D, and in 3D by depth-weighted sampling (DFA3D, arXiv 2307.12972)."""

import torch
from torch import Tensor

from ..dispatch import use_definition, use_triton
from ..precision import no_autocast
from . import eager, reference

__all__ = ["dfa3d", "ms_deform_attn"]

MAX_WIDTH, MAX_BINS = 256, 512  # channels per head and depth bins that the kernels support


def dfa3d(
    value: Tensor,
    depth: Tensor,
    shapes: list[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    return_depth_score: bool = False,
) -> Tensor:
    """3D deformable attention: the weighted sum of samples of value ⊗ depth at points (x, y, z).

    The outer product is never materialised.

    value      (B, S, heads, C): the features of all levels, concatenated, each row-major: S = Σ H·W.
    depth      (B, S, heads or 1, D): a distribution over D depth bins for every cell, per head or shared by all heads.
               It does not have to sum to 1.
    shapes     (H, W) of every level; the published (H, W, D) are accepted too. A tensor of either is also accepted, but
               it synchronises with the GPU and does not work in compiled or exported graphs.
    locations  (B, Q, heads, L, P, 3): (x, y, z) of P points per level, each from 0 to 1 over the whole width, height
               and depth range; cell i is at (i + 0.5) / size. Sampling is trilinear, with zeros outside the map and the
               depth range. A point a whole cell outside, or with a NaN coordinate, contributes 0 and gets no gradient.
    weights    (B, Q, heads, L, P): attention weights of the points, usually a softmax over L · P.
    return_depth_score
               whether to return (output, score), where score (B, Q, heads, L, P, 4) is the depth interpolated at z in
               the four cells around (x, y), clockwise from the upper left. It is computed in plain PyTorch and
               differentiable; not supported under torch.jit.script.

    Returns (B, Q, heads · C) in the dtype of value. The tensors may differ in floating-point dtype; coordinates and
    sums are in float32 (float64 if value or locations are), under autocast too. All four tensors get gradients, and
    these are deterministic; at a cell's centre a location gets the right-hand derivative. A NaN in value or depth
    affects the queries that sample it; one in locations or weights affects only its query.
    """
    if torch.jit.is_scripting():
        if return_depth_score:
            raise RuntimeError("return_depth_score is not supported under torch.jit.script")
        return reference.dfa3d(value, depth, shapes, locations, weights)
    else:
        shapes = _sizes(shapes, 3, depth)
        _check(value, shapes, locations, weights, 3)
        _check_depth(value, depth)
        out = _run(value, depth, shapes, locations, weights)
        if not return_depth_score:
            return out
        with no_autocast(value):
            return out, reference.depth_score(depth, shapes, locations)  # type: ignore[return-value]


def ms_deform_attn(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159): `dfa3d` without depth.

    value      (B, S, heads, C)
    shapes     (H, W) of every level, or a tensor of them
    locations  (B, Q, heads, L, P, 2): (x, y)
    weights    (B, Q, heads, L, P)

    Returns (B, Q, heads · C). Everything else is as in `dfa3d`.
    """
    if torch.jit.is_scripting():
        return reference.dfa3d(value, None, shapes, locations, weights)
    else:
        shapes = _sizes(shapes, 2)
        _check(value, shapes, locations, weights, 2)
        return _run(value, None, shapes, locations, weights)


def _run(value: Tensor, depth: Tensor | None, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    tensors = [t for t in (value, depth, locations, weights) if t is not None]
    B, Q, M, _, _ = weights.shape
    if value.numel() == 0 or weights.numel() == 0:  # an empty result that depends on every input, for autograd
        return value.new_zeros(B, Q, M * value.shape[3]) + sum(t.flatten()[:0].sum().to(value.dtype) for t in tensors)
    cannot = []
    if value.shape[3] > MAX_WIDTH:
        cannot.append(f"heads of {value.shape[3]} channels, over {MAX_WIDTH}")
    if depth is not None and depth.shape[3] > MAX_BINS:
        cannot.append(f"{depth.shape[3]} depth bins, over {MAX_BINS}")
    if use_triton(*tensors, cannot=cannot):
        return _triton(value, depth, shapes, locations, weights)
    with no_autocast(value):
        if use_definition(value):
            return reference.dfa3d(value, depth, shapes, locations, weights)
        return eager.dfa3d(value, depth, shapes, locations, weights)


def _triton(value: Tensor, depth: Tensor | None, shapes, locations: Tensor, weights: Tensor) -> Tensor:
    from . import op  # imports Triton, so not at the top of the file

    return op.fwd(value, depth, locations, weights, [n for shape in shapes for n in shape])


def _sizes(shapes, dims: int, depth: Tensor | None = None) -> list[tuple[int, int]]:
    if isinstance(shapes, Tensor):
        shapes = shapes.tolist()
    shapes = [tuple(shape) for shape in shapes]
    for shape in shapes:
        if len(shape) == 3 and depth is not None and shape[2] != depth.shape[-1]:
            raise ValueError(f"shapes must have the {depth.shape[-1]} bins of depth, got {shape}")
        if not 2 <= len(shape) <= dims or min(shape) < 0:
            raise ValueError(f"shapes must be one pair (H, W) per level, got {shape}")
    return [shape[:2] for shape in shapes]


def _check(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor, dims: int) -> None:
    for name, t, rank, axes in (
        ("value", value, 4, "(B, S, heads, C)"),
        ("locations", locations, 6, f"(B, Q, heads, L, P, {dims})"),
        ("weights", weights, 5, "(B, Q, heads, L, P)"),
    ):
        if t.dim() != rank or not t.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point of shape {axes}, got {t.dtype} of shape {tuple(t.shape)}")
        if t.device != value.device:
            raise ValueError(f"{name} must be on {value.device} as value is, got {t.device}")
    B, S, M, _ = value.shape
    cells = sum(H * W for H, W in shapes)
    if cells != S:
        raise ValueError(f"shapes must have the S = {S} cells of value, got {shapes}: {cells}")
    if weights.shape[0] != B or weights.shape[2] != M or weights.shape[3] != len(shapes):
        raise ValueError(
            f"weights must be ({B}, Q, {M}, {len(shapes)}, P) to match value and shapes, got {tuple(weights.shape)}"
        )
    if locations.shape != (*weights.shape, dims):
        raise ValueError(f"locations must be {(*weights.shape, dims)} to match weights, got {tuple(locations.shape)}")


def _check_depth(value: Tensor, depth: Tensor) -> None:
    if depth.dim() != 4 or not depth.dtype.is_floating_point:
        raise ValueError(
            "depth must be floating point of shape (B, S, heads or 1, D), "
            f"got {depth.dtype} of shape {tuple(depth.shape)}"
        )
    B, S, M, _ = value.shape
    if depth.shape[:2] != (B, S) or depth.shape[2] not in (1, M) or depth.shape[3] < 1:
        raise ValueError(f"depth must be ({B}, {S}, {M} or 1, D) to match value, got {tuple(depth.shape)}")
    if depth.device != value.device:
        raise ValueError(f"depth must be on {value.device} as value is, got {depth.device}")
