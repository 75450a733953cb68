"""Cases that tools/benchmark_ops.py times: one file per operator, with the name of its folder in ops/.

Each has a function

    def cases(batch: int, height: int, width: int) -> list[Case]

that lists the shapes of the operator's calls in its models on images of height x width, one per stage.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One operator at one shape, and its peers. All callables take the same arguments and return the same values."""

    where: str  # "DaViT-T stage 1"
    args: Callable[[torch.device, torch.dtype], tuple]  # random; tensors that get a gradient require one
    ours: Callable[..., Any]
    published: Callable[..., Any]  # the published arithmetic in plain PyTorch, written from the equations
    elements: tuple[int, int]  # elements that must be read or written: forward, backward
    flops: tuple[int, int]  # FLOPs of matrix products and convolutions: forward, backward
    library: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # the best calls of other libraries
