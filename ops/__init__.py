"""Attention operators for computer vision: plain PyTorch anywhere, Triton kernels on a GPU.

Importing this package imports no kernel, and not Triton: those come with the first tensor that needs them.
"""

from .agent_attention import agent_attention, pool_agents, resize_agent_bias
from .bilevel_routing import bilevel_routing_attention, region_routing
from .channel_attention import channel_attention
from .dfa3d import dfa3d, ms_deform_attn
from .dispatch import backend
from .gaussian_gate import gaussian_gate
from .halo_attention import halo_attention
from .neighborhood_attention import neighborhood_attention
from .relative_bias import relative_bias_attention
from .sparse_attention import connectivity, predict_mask, sparse_attention, sparse_mask, unpack_mask
from .spatial_gate import spatial_gate
from .strip_gate import strip_gate
from .subspace_gate import subspace_gate
from .window_attention import window_attention

__all__ = [
    "agent_attention",
    "backend",
    "bilevel_routing_attention",
    "channel_attention",
    "connectivity",
    "dfa3d",
    "gaussian_gate",
    "halo_attention",
    "ms_deform_attn",
    "neighborhood_attention",
    "pool_agents",
    "predict_mask",
    "region_routing",
    "relative_bias_attention",
    "resize_agent_bias",
    "sparse_attention",
    "sparse_mask",
    "spatial_gate",
    "strip_gate",
    "subspace_gate",
    "unpack_mask",
    "window_attention",
]
