"""Models: timm's built and loaded, and detectors, segmenters and bird's-eye views on them."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_published":  # which imports torchvision's and timm's parts: only when asked for
        from .published import load_published

        return load_published
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
