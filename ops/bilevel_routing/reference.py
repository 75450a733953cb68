"""Reference implementation of bi-level routing attention (BiFormer, arXiv 2303.08810, equations 4 to 7).

With P regions of t tokens, region p's queries Q_p (t, D) of one head attend to the keys of the K regions idx[p]:

    K_p = concat(K[r] for r in idx[p]),  V_p likewise   (K·t, D)
    O_p = softmax(scale · Q_p K_pᵀ) V_p                 (t, D)

It materialises the gathered K_p and V_p and the logits; the other implementations avoid that.
"""

import torch
from torch import Tensor


def bilevel_routing_attention(
    qkv: Tensor, idx: Tensor, heads: int, regions: tuple[int, int], scale: float
) -> Tensor:  # (B, H, W, 3C), (B, P, K) -> (B, H, W, C)
    B, H, W, C3 = qkv.shape
    Rh, Rw = regions
    h, w, P, D = H // Rh, W // Rw, Rh * Rw, C3 // 3 // heads
    x = qkv.reshape(B, Rh, h, Rw, w, 3, heads, D).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = x.reshape(3, B, P, heads, h * w, D)
    image = torch.arange(B, device=idx.device)[:, None, None]
    k, v = (z[image, idx.long()].transpose(2, 3).flatten(3, 4) for z in (k, v))  # (B, P, heads, K·t, D)
    out = (scale * q @ k.mT).softmax(-1) @ v
    return out.reshape(B, Rh, Rw, heads, h, w, D).permute(0, 1, 4, 2, 5, 3, 6).reshape(B, H, W, C3 // 3)
