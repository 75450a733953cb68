"""Importing this package registers every backbone with timm: `timm.create_model("biformer_s")`."""

from . import biformer  # noqa: F401
