"""Which images are seen, by whom and when, and what randomness does to them."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from saccade.train.data import loader
from saccade.train.data.loader import EvaluationOrder, Seeded, TrainingOrder, batches, to_device
from saccade.train.errors import UserError


@pytest.fixture
def ranks(monkeypatch):
    """ranks(world, rank) makes this process one of many, as far as the loader sees."""

    def be(world: int, rank: int) -> None:
        monkeypatch.setattr(loader, "world", lambda: world)
        monkeypatch.setattr(loader, "rank", lambda: rank)

    return be


def flat(lists) -> list:
    return list(chain.from_iterable(lists))


class Noise(torch.utils.data.Dataset):
    """Each image is what the three generators say."""

    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int):
        if index == 49:
            raise UserError("image 49 is broken")
        return torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))], dtype=torch.float64), index


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (4, 1), (2, 2), (1, 3)])
def test_processes_share_each_batch(ranks, world, accumulate):
    ranks(1, 0)
    whole = list(TrainingOrder(50, 12, 3, 0, 9))
    parts = []
    for rank in range(world):
        ranks(world, rank)
        own = list(TrainingOrder(50, 12, 3, 0, 9, accumulate))
        assert len(own) == 9 * accumulate == len(TrainingOrder(50, 12, 3, 0, 9, accumulate))
        parts.append([flat(own[i : i + accumulate]) for i in range(0, len(own), accumulate)])
    assert [flat(step) for step in zip(*parts)] == whole


def test_epochs():
    steps = list(TrainingOrder(50, 12, 0, 0, 8))
    for epoch in range(2):
        seen = flat(steps[4 * epoch : 4 * epoch + 4])
        assert {e for e, _ in seen} == {epoch}
        assert len({i for _, i in seen}) == 48
    assert [i for _, i in steps[0]] != [i for _, i in steps[4]]
    assert steps != list(TrainingOrder(50, 12, 1, 0, 8))


def test_starts_anywhere():
    whole = list(TrainingOrder(50, 12, 0, 0, 12))
    for start in range(12):
        assert list(TrainingOrder(50, 12, 0, start, 12)) == whole[start:]


def test_impossible_batches(ranks):
    with pytest.raises(UserError, match="batch_size=64 is more than the 50 training images"):
        TrainingOrder(50, 64, 0, 0, 1)
    ranks(3, 0)
    with pytest.raises(UserError, match="batch_size=32 must be a multiple of 3"):
        TrainingOrder(50, 32, 0, 0, 1)


@pytest.mark.parametrize("images", [1, 7, 50])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_counts_each_image_once(ranks, images, world):
    seen = []
    for rank in range(world):
        ranks(world, rank)
        order = EvaluationOrder(images, 4)
        seen += flat(order)
        assert len(list(order)) == len(order)
    assert sorted(seen) == [(0, i) for i in range(images)]


def test_augmentation_depends_on_the_image_alone():
    """Not on the number of workers, on the batch it comes in, or on what was drawn before."""
    order = [[(0, 3), (0, 4)], [(1, 3), (0, 5)]]
    alone = Seeded(Noise(), 7).__getitems__([(1, 3)])[0][0]
    torch.manual_seed(1)
    for workers in (0, 2):
        first, second = batches(Noise(), order, 7, workers, torch.device("cpu"))
        assert torch.equal(second[0][0], alone)
        assert not torch.equal(first[0][0], alone)  # another epoch
        assert len(torch.cat([first[0], second[0]]).unique()) == 12


def test_generators_are_left_alone():
    def draw() -> tuple:
        return random.random(), np.random.rand(), float(torch.rand(()))

    def seed() -> None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = draw()
    seed()
    list(batches(Noise(), [[(0, 1)]], 0, 0, torch.device("cpu")))
    assert draw() == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence(workers):
    (batch,) = batches(Noise(), [[(0, 48), (0, 49)]], 0, workers, torch.device("cpu"))
    with pytest.raises(UserError, match=r"^image 49 is broken$"):
        to_device(batch, torch.device("cpu"))


def test_to_device_keeps_structure():
    batch = {"images": torch.ones(2), "targets": [{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(0, 4)}]}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["targets"][1]["boxes"].shape == (0, 4)
