"""Orders of epochs that are computed where they are needed: bijections, uniform, independent from epoch to epoch."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from saccade.train.data import permutation
from saccade.train.data.permutation import STORED, Feistel, Stored, order_method
from scipy.stats import chi2, norm

SIZES = [*range(1, 70), 99, 127, 128, 129, 1000, 4095, 4096, 4097, 10_007, 65_537, 300_000]


def everywhere(size: int, seed: int) -> np.ndarray:
    return Feistel(size, seed)(np.arange(size))


@pytest.mark.parametrize("kind", [Stored, Feistel])
def test_each_image_once(kind):
    for size in SIZES:
        assert np.array_equal(np.sort(kind(size, 7)(np.arange(size))), np.arange(size)), size


@pytest.mark.parametrize("size", [STORED + 1, 10**9, 2**40 + 3, 2**62])
def test_large(size):
    """Any positions at once, without collisions; the same alone as together."""
    order = Feistel(size, 3)
    positions = np.unique(np.random.default_rng(0).integers(0, size, 20_000))
    found = order(positions)
    assert len(np.unique(found)) == len(positions) and found.min() >= 0 and found.max() < size
    assert [int(order(positions[i : i + 1])[0]) for i in (0, 77, 5000)] == found[[0, 77, 5000]].tolist()
    counts = np.histogram(found, np.linspace(0, size, 101))[0]
    assert chi_square(counts) > 1e-4


def chi_square(counts: np.ndarray) -> float:
    """Return the probability of counts that differ at least so much from equal expected ones."""
    expected = counts.mean()
    return float(chi2.sf(((counts - expected) ** 2 / expected).sum(), counts.size - 1))


@pytest.mark.parametrize("size", [5, 16, 50])
def test_positions_are_uniform(size):
    """Over seeds, an image is at each position equally often, and so are pairs of images at the first positions."""
    orders = np.stack([everywhere(size, seed) for seed in range(1200)])
    for position in (0, size // 2, size - 1):
        assert chi_square(np.bincount(orders[:, position], minlength=size)) > 1e-4, position
    for image in (0, size - 1):
        assert chi_square(np.bincount((orders == image).argmax(1), minlength=size)) > 1e-4, image
    if size <= 16:
        pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size**2).reshape(size, size)
        assert not pairs.diagonal().any()
        assert chi_square(pairs[~np.eye(size, dtype=bool)]) > 1e-4


def test_epochs_are_independent():
    """Orders of consecutive seeds: rank correlations and fixed points are those of independent permutations."""
    size, epochs = 50_000, 40
    orders = [everywhere(size, seed) for seed in range(epochs)]
    z = np.array([np.corrcoef(a, b)[0, 1] for a, b in pairwise(orders)]) * np.sqrt(
        size - 1
    )  # Spearman's, about N(0, 1)
    assert np.abs(z).max() < norm.isf(1e-4 / len(z))
    assert abs(z.std() - 1) < 0.45
    equal = sum(int((a == b).sum()) for a, b in pairwise(orders))  # Poisson with mean epochs - 1
    assert 15 <= equal <= 68
    # Neighbours of an epoch do not stay neighbours, and an order has no trend along the epoch.
    steps = np.concatenate([np.abs(np.diff(order)) for order in orders])
    assert abs(steps.mean() / (size / 3) - 1) < 0.01
    trend = [np.corrcoef(order, np.arange(size))[0, 1] * np.sqrt(size - 1) for order in orders]
    assert np.abs(trend).max() < norm.isf(1e-4 / epochs)


def test_small_orders_are_those_of_earlier_versions():
    """So that runs of them resume to the same images."""
    seed = 12345
    expected = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
    assert permutation.permutation(1000, seed)(np.arange(1000)).tolist() == expected.tolist()
    assert order_method(STORED) == "stored" and order_method(STORED + 1) == "feistel"
    assert isinstance(permutation.permutation(STORED + 1, seed), Feistel)


def test_values_stay():
    """A run resumes to the same order with any later version."""
    assert Feistel(10**9, 1)(np.arange(4)).tolist() == [329055401, 733558927, 449480649, 575289666]
