"""Attention operators for computer vision: plain PyTorch anywhere, Triton kernels on a GPU.

Importing this package imports no kernel, and not Triton: those come with the first tensor that needs them.
"""

from .bilevel_routing import bilevel_routing_attention, region_routing
from .dispatch import backend
from .strip_gate import strip_gate
from .subspace_gate import subspace_gate

__all__ = ["backend", "bilevel_routing_attention", "region_routing", "strip_gate", "subspace_gate"]
