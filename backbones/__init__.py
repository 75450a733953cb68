"""Importing this package registers every backbone with timm: `timm.create_model("biformer_s")`."""

from . import agent, biformer, davit, dfa3d, ela, halonet, nat, patnet, sparsifiner, ulsam  # noqa: F401
from .attention_maps import attention_maps
from .insertion import insert
from .nat import NeighborhoodAttention

__all__ = ["NeighborhoodAttention", "attention_maps", "insert"]
