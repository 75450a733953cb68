"""What tools/benchmark_ops.py times: one file an operator, named as its folder in ops/ is.

Each has a function

    def cases(batch: int, height: int, width: int) -> list[Case]

that lists the shapes which the operator meets in its models on images of height x width, one a stage.
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
    published: Callable[..., Any]  # the published code's form in plain PyTorch, written from the mathematics
    elements: tuple[int, int]  # of the dtype, read or written at least: forward, backward
    flops: tuple[int, int]  # of its matrix products and the like: forward, backward
    library: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # the best calls that others offer
