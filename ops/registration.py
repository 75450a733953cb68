"""Shared parts of the operators' registrations with PyTorch."""

import torch
from torch.library import CustomOpDef


def no_second_derivative(name: str, *backwards: CustomOpDef) -> None:
    """Make differentiating the backward operators of `name` an error that names the alternative."""

    def refuse(ctx, *_):
        raise RuntimeError(f"{name} has no second derivative in Triton: use saccade.ops.backend('torch')")

    for backward in backwards:
        backward.register_autograd(refuse)


def autocast_as_attention(qualified: str, fwd: CustomOpDef) -> None:
    """Make the operator run in autocast's dtype under autocast, whatever its inputs, like PyTorch's own attention."""

    def rule(device: str):
        def run(qkv, *args):
            with torch.autocast(device, enabled=False):
                return fwd(qkv.to(torch.get_autocast_dtype(device)), *args)

        return run

    for device in ("cuda", "cpu"):
        torch.library.impl(qualified, f"Autocast{device.upper()}", rule(device))
