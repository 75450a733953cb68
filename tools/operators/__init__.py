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
    elements: tuple[int, int]  # of the dtype, read or written at least: forward, backward
    flops: tuple[int, int]  # of its matrix products and the like: forward, backward
    library: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # the best calls that others offer
