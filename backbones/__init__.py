"""Importing this package registers every backbone with timm: `timm.create_model("biformer_s")`."""

from . import agent, biformer, davit, halonet  # noqa: F401
