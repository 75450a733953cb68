"""What the operators' registrations with PyTorch say alike."""

import torch
from torch.library import CustomOpDef


def no_second_derivative(name: str, *backwards: CustomOpDef) -> None:
    """To differentiate these, the backward operators of `name` in Triton, is an error that says what to do."""

    def refuse(ctx, *_):
        raise RuntimeError(f"{name} has no second derivative in Triton: use saccade.ops.backend('torch') for it")

    for backward in backwards:
        backward.register_autograd(refuse)


def autocast_as_attention(qualified: str, fwd: CustomOpDef) -> None:
    """Under autocast this operator, of that name, runs in autocast's type whatever it is given, as PyTorch's own."""

    def rule(device: str):
        def run(qkv, *args):
            with torch.autocast(device, enabled=False):
                return fwd(qkv.to(torch.get_autocast_dtype(device)), *args)

        return run

    for device in ("cuda", "cpu"):
        torch.library.impl(qualified, f"Autocast{device.upper()}", rule(device))
