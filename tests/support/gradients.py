"""Compare gradients with a golden fixture where a published parameter is a part of one of ours, or has another name."""

import torch
from torch import nn


def assert_gradients(model: nn.Module, fixture: dict, ours, rtol: float = 1e-7) -> None:
    """Check the norms of gradients, as parity.assert_gradients does.

    ours: makes our state dict of a published one. Given the published keys' numbers as values, its result shows which
    element of ours belongs to which key.
    """
    want, params = fixture["grads"], dict(model.named_parameters())
    keys = [key for key, _, _ in fixture["state"]]
    norms = {}
    for key, numbers in ours({key: torch.full(shape, n) for n, (key, _, shape) in enumerate(fixture["state"])}).items():
        if key in params:
            for n in numbers.unique():
                norms[keys[int(n)]] = params[key].grad[numbers == n].norm().item()
    assert set(norms) == set(want)
    largest = max(want.values())
    for key, expected in want.items():
        assert abs(norms[key] - expected) <= rtol * max(expected, 1e-6 * largest), key
