"""How maps lie in memory, and what kernels are told of it."""

import pytest
import torch
from saccade.ops.maps import ALIGNED, CHANNELS, COLUMNS, flattened, layout


def last(x):
    return x.contiguous(memory_format=torch.channels_last)


LAYOUTS = [
    (torch.ones(2, 16, 3, 8), COLUMNS + ALIGNED),
    (torch.ones(2, 16, 3, 7), COLUMNS),
    (torch.ones(2, 8, 4, 16)[..., :12], COLUMNS),  # 12 columns of 16
    (torch.ones(2, 8, 4, 20)[..., :16], COLUMNS),  # rows begin anywhere
    (last(torch.ones(2, 16, 3, 7)), CHANNELS + ALIGNED),
    (last(torch.ones(2, 12, 3, 8)), CHANNELS),
    (last(torch.ones(2, 24, 3, 5))[:, :16], CHANNELS + ALIGNED),
    (torch.ones(2, 8, 8, 8).transpose(2, 3), 0),
    (torch.ones(1, 1, 1, 1).expand(2, 8, 8, 8), 0),
]


@pytest.mark.parametrize("x, expected", LAYOUTS)
def test_layout(x, expected):
    assert layout(x) == expected


def test_dense_maps_are_flattened_together():
    x = torch.arange(2 * 8 * 3 * 5.0).view(2, 8, 3, 5)
    (a, b), flat = flattened(x, last(x))
    assert flat
    assert torch.equal(a, x.reshape(2, 8, 1, 15))
    assert torch.equal(b, x.reshape(2, 8, 1, 15))
    assert (a.data_ptr(), layout(a), layout(b)) == (x.data_ptr(), COLUMNS, CHANNELS + ALIGNED)


def test_views_with_gaps_are_not_flattened():
    x = torch.ones(2, 8, 3, 5)
    (a, b), flat = flattened(x, torch.ones(2, 8, 3, 6)[..., :5])
    assert not flat
    assert a is x
    assert b.stride() == (144, 18, 6, 1)
