"""Sparsifiner's layer between qkv and output projection: predictor, mask, and attention to the kept keys."""

import math

import torch
import torch.nn.functional as F
from saccade.ops import predict_mask, sparse_attention

from . import Case

TOPK, KEEP = 8, 0.25
#         model, heads (of 64)
MODELS = [("Sparsifiner-S", 6), ("Sparsifiner-B", 12), ("Sparsifiner-LV-ViT-S", 6)]


def _predictor(qkv, heads):
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v, math.ceil(KEEP * qkv.shape[1])


def ours(qkv, heads, *params):
    q, k, _, budget = _predictor(qkv, heads)
    return sparse_attention(qkv, predict_mask(q, k, *params, budget=budget, topk=min(TOPK, params[-1].shape[1])), heads)


def _mask(q, k, budget, proj_q, proj_q_bias, proj_k, proj_k_bias, down, up):
    heads = q.shape[1]
    qc, kc = F.linear(q, proj_q, proj_q_bias), F.linear(k, proj_k, proj_k_bias)
    A = (qc @ (kc.mT @ down) * heads**-0.5)[:, :, 1:].softmax(-1)
    values, idx = A.topk(min(TOPK, A.shape[-1]))
    A = torch.zeros_like(A).scatter(-1, idx, values)
    U = up.mT.abs()
    S = A @ torch.where(U > 0.02, U, torch.zeros_like(U))
    idx = S.clone().topk(budget)[1]
    M = torch.zeros_like(S).scatter(-1, idx, 1.0)
    return torch.cat((torch.ones_like(M[:, :, :1]), M), 2)


def published(qkv, heads, *params):
    q, k, v, budget = _predictor(qkv, heads)
    with torch.no_grad():
        M = _mask(q, k, budget, *params)
    L = q @ k.mT * q.shape[-1] ** -0.5
    L.softmax(-1)  # the dense attention, which the losses use
    P = L.clone().masked_fill(M == 0, -math.inf).softmax(-1).nan_to_num()
    return (P @ v).transpose(1, 2).flatten(2)


def library(qkv, heads, *params):
    q, k, v, budget = _predictor(qkv, heads)
    with torch.no_grad():
        M = _mask(q, k, budget, *params).bool()
    return F.scaled_dot_product_attention(q, k, v, M).transpose(1, 2).flatten(2)


def cases(batch: int, height: int, width: int) -> list[Case]:
    result = []
    for model, heads in MODELS:
        B, N, D = batch, height // 16 * (width // 16) + 1, 64
        c, K, C = D // 2, N // 6, heads * D

        def args(device, dtype, shape=(B, N, 3 * C), heads=heads, D=D, c=c, K=K):
            def parameter(*shape, std=0.1):
                return std * torch.randn(shape, device=device, dtype=dtype)

            qkv = torch.randn(shape, device=device, dtype=dtype).requires_grad_()
            params = (parameter(c, D), parameter(c), parameter(c, D), parameter(c))
            return qkv, heads, *params, parameter(shape[1], K), parameter(shape[1], K)

        size, attention = B * N * C, 4 * B * N * N * C
        predictor = 2 * B * heads * (2 * N * D * K + 2 * c * D * K + N * N * TOPK)
        result.append(
            Case(
                where=f"{model}, {N} tokens",
                args=args,
                ours=ours,
                published=published,
                elements=(4 * size, 8 * size),
                flops=(predictor + attention, attention * 5 // 2),
                library={"top-k and SDPA with a boolean mask": library},
            )
        )
    return result
