"""Attention operators for computer vision: plain PyTorch anywhere, Triton kernels on a GPU.

Importing this package imports no kernel, and not Triton: those come with the first tensor that needs them.
"""

from .bilevel_routing import bilevel_routing_attention, region_routing
from .dispatch import backend

__all__ = ["backend", "bilevel_routing_attention", "region_routing"]
