"""Which images are seen, by whom and when, and what randomness does to them."""

import os
import pickle
import random
import signal
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from saccade.train.data import loader
from saccade.train.data.bad_images import BadImage, BadImages
from saccade.train.data.images import Images
from saccade.train.data.loader import EvaluationOrder, Seeded, TrainingOrder, batches, to_device
from saccade.train.data.slots import Slots
from saccade.train.runtime.errors import UserError


@pytest.fixture
def ranks(monkeypatch):
    """ranks(world, rank) makes this process one of many, as far as the loader sees."""

    def be(world: int, rank: int) -> None:
        monkeypatch.setattr(loader, "world_size", lambda: world)
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


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (2, 2)])
def test_parts_of_like_aspect(ranks, world, accumulate):
    """The same images a step as without aspects, dealt out sorted, the parts taking turns."""
    aspects = torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist()
    ranks(1, 0)
    plain = list(TrainingOrder(50, 12, 3, 0, 9))
    parts = []
    for rank in range(world):
        ranks(world, rank)
        own = list(TrainingOrder(50, 12, 3, 0, 9, accumulate, 1, aspects))
        parts.append([own[i : i + accumulate] for i in range(0, len(own), accumulate)])
    for step, (dealt, images) in enumerate(zip(zip(*parts), plain)):
        dealt = flat(dealt)
        turned = dealt[-step % len(dealt) :] + dealt[: -step % len(dealt)]
        assert flat(turned) == sorted(images, key=lambda key: aspects[key[1]])
    with pytest.raises(UserError, match="repeats=2 can't be combined with images of different sizes"):
        TrainingOrder(50, 12, 3, 0, 9, accumulate, 2, aspects)


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


@pytest.mark.parametrize("world, accumulate", [(1, 1), (2, 1), (4, 1), (3, 2)])
def test_repeats(ranks, world, accumulate):
    """As DeiT's sampler deals them: an epoch's images `repeats` times in a row, every world-th for a process."""
    once = flat(TrainingOrder(50, 12, 3, 0, 8))
    copies = [(epoch, index, copy) for epoch, index in once for copy in range(3)]
    steps = []
    for rank in range(world):
        ranks(world, rank)
        own = list(TrainingOrder(50, 12, 3, 0, 8, accumulate, repeats=3))
        assert own[2 * accumulate :] == list(TrainingOrder(50, 12, 3, 2, 8, accumulate, repeats=3))
        assert {len(part) for part in own} == {12 // world // accumulate}
        steps.append([flat(own[i : i + accumulate]) for i in range(0, len(own), accumulate)])
        for epoch in range(2):
            in_order = [key for key in copies if key[0] == epoch][:48]
            assert flat(steps[rank][4 * epoch : 4 * epoch + 4]) == in_order[rank::world]
    if world >= 3:  # a process sees one copy of an image
        assert all(len({index for _, index, _ in step}) == len(step) for step in steps[0])


def test_the_randomness_of_a_release_is_that_of_the_next():
    """A run resumes with another version of saccade: orders, augmentation and replacements are these."""
    first = [22, 28, 2, 11, 48, 25, 4, 5, 20, 36, 43, 33]
    assert list(TrainingOrder(50, 12, 3, 0, 1)) == [[(0, i) for i in first]]
    second = [[44, 13, 12, 24, 5, 29], [42, 34, 2, 39, 35, 11]]
    assert list(TrainingOrder(50, 12, 3, 4, 5, 2)) == [[(1, i) for i in part] for part in second]
    drawn = Seeded(Noise(), 7, replace=True).__getitems__([(1, 3), (1, 3, 2)])[0]
    assert drawn[0][0].tolist() == pytest.approx([0.9801, 0.7508, 0.2049], abs=1e-4)
    assert drawn[1][0].tolist() == pytest.approx([0.5570, 0.1103, 0.2461], abs=1e-4)
    reason = "can't be read as an image (test)"
    replaced = Seeded(Broken(3, 30), 5, replace=True).__getitems__([(0, 3), (2, 30), (2, 4)])
    assert replaced == ([(0, 7), (2, 49), (2, 4)], {"3.jpg": reason, "30.jpg": reason})
    left_out = Seeded(Broken(3, 30), 5, replace=False).__getitems__([(0, 3), (0, 4)])
    assert left_out == ([(0, 4)], {"3.jpg": reason})


def test_copies_differ():
    first, second, again = batches(Noise(), [[(0, 3, 0)], [(0, 3, 1)], [(0, 3, 0)]], 7, 0, torch.device("cpu"))
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], second[0])


class Broken(Noise):
    """Of 50 images those in `broken` can't be read; `epochs` is what set_epoch was given."""

    def __init__(self, *broken: int):
        self.broken, self.epoch = broken, None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int):
        if index in self.broken:
            raise BadImage(f"{index}.jpg", "can't be read as an image (test)")
        return self.epoch, index


class Budget:
    max_bad = 2


@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_stands_in(ranks, tmp_path, workers):
    """The same one whatever the number of processes and loader workers, and wherever training starts."""
    data, cpu = Broken(3, 30), torch.device("cpu")

    def seen(world: int, start: int = 0) -> list[list[tuple]]:
        parts, names = [], set()
        for rank in range(world):
            ranks(world, rank)
            bad = BadImages(tmp_path / "bad.txt", Budget())
            found = batches(data, TrainingOrder(50, 12, 5, start, 8), 5, workers, cpu, bad)
            parts.append([list(zip(*(part.tolist() for part in batch))) for batch in found])
            names |= bad.new.keys()
        assert names == {"3.jpg", "30.jpg"} or start
        return [flat(step) for step in zip(*parts)]

    whole = seen(1)
    assert all(len(step) == 12 for step in whole) and not {3, 30} & {i for _, i in flat(whole)}
    order = list(TrainingOrder(50, 12, 5, 0, 8))
    kept = [(key, got) for key, got in zip(flat(order), flat(whole)) if key[1] not in data.broken]
    assert len(kept) == 96 - sum(key[1] in data.broken for key in flat(order))
    assert all(key == got for key, got in kept)  # what is whole is where it was, and in its epoch
    instead = [got for key, got in zip(flat(order), flat(whole)) if key[1] in data.broken]
    assert len(set(instead)) == len(instead)
    assert seen(3) == whole and seen(2, start=5) == whole[5:]


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_leaves_bad_images_out(tmp_path, workers):
    bad = BadImages(tmp_path / "bad.txt", Budget())
    loader = batches(Broken(0, 1, 2, 9), EvaluationOrder(50, 3), 0, workers, torch.device("cpu"), bad)
    for _ in range(2):
        assert torch.cat([index for _, index in loader]).tolist() == [i for i in range(50) if i not in (0, 1, 2, 9)]
        assert loader.skipped == 4
    assert list(bad.new) == ["0.jpg", "1.jpg", "2.jpg", "9.jpg"]


def test_budget(tmp_path):
    """A name counts once, also after a resume; one too many ends the run, and the file lists all."""
    file, said = tmp_path / "bad.txt", "can't be read as an image (x)"
    bad = BadImages(file, Budget())
    bad.share()
    assert not file.exists()
    for name in ("a.jpg", "a.jpg", "b\tc.jpg"):
        error = BadImage(name, said)
        bad.note({error.name: (said, 1)})
        bad.share()
    assert not bad.new and file.read_text() == f"1\ta.jpg\t{said}\n1\tb\\tc.jpg\t{said}\n"
    again = BadImages(file, Budget(), resume=True)
    again.note({"a.jpg": (said, 1), "shard.tar": ("has 97 of 100 samples", 3)})
    with pytest.raises(
        UserError, match=r"a.jpg can't be .*: repair or remove them, .* \(data.max_bad=2 is less than 5\)"
    ):
        again.share()
    assert file.read_text().splitlines()[2] == "3\tshard.tar\thas 97 of 100 samples"
    with pytest.raises(UserError, match=r"^7.jpg can't be read as an image \(test\): repair or remove it$"):
        list(batches(Broken(7), EvaluationOrder(50, 3), 0, 0, torch.device("cpu")))  # where nobody counts


def test_nothing_can_be_read():
    order = TrainingOrder(50, 12, 5, 0, 1)
    with pytest.raises(UserError, match=r"^100 images in a row can't be read, \d+\.jpg among them"):
        list(batches(Broken(*range(50)), order, 0, 0, torch.device("cpu")))


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
    alone = Seeded(Noise(), 7, replace=True).__getitems__([(1, 3)])[0][0][0]
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
    with pytest.raises(UserError, match=r"^image 49 is broken$"):
        list(batches(Noise(), [[(0, 48), (0, 49)]], 0, workers, torch.device("cpu")))


class Worker(Noise):
    """Does something else than loading in its worker."""

    def __init__(self, action):
        self.action = action

    def __getitem__(self, index: int):
        return self.action()


def test_workers_that_end():
    """One that is killed is a UserError with advice; other errors stay as they are. Ctrl-C is the main process's."""
    order, cpu = EvaluationOrder(50, 4), torch.device("cpu")
    with pytest.raises(
        UserError, match=r"^a loader process was killed \(.+\), perhaps for lack of memory: continue with"
    ):
        next(iter(batches(Worker(lambda: os.kill(os.getpid(), signal.SIGKILL)), order, 0, 1, cpu)))
    for workers in (0, 1):
        with pytest.raises(RuntimeError, match="another reason"):
            next(iter(batches(Worker(_fail), order, 0, workers, cpu)))
    with pytest.raises(ConnectionError):  # in this process, where there is no worker
        next(iter(batches(Worker(_disconnect), order, 0, 0, cpu)))
    ignored = Worker(lambda: int(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))
    assert next(iter(batches(ignored, order, 0, 1, cpu))).tolist() == [1] * 4


def _fail() -> None:
    raise RuntimeError("another reason")


def _disconnect() -> None:
    raise ConnectionError


def test_workers_are_ended_whatever_the_system_reports():
    """PyTorch's handler of SIGCHLD, which raises an error, is not called meanwhile, and there again afterwards."""
    ended = []

    class Iterator:
        def _shutdown_workers(self) -> None:
            os.kill(os.getpid(), signal.SIGCHLD)
            ended.append(True)

    def handler(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    earlier = signal.signal(signal.SIGCHLD, handler)
    try:
        loader._end_workers(Iterator())
        assert ended and signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, earlier)


def test_workers_stay_for_the_next_pass():
    """Their process is the same, and another pass begins with the first batch."""
    loader = batches(Worker(os.getpid), EvaluationOrder(8, 4), 0, 1, torch.device("cpu"))
    first, second = (torch.cat(list(loader)).tolist() for _ in range(2))
    assert len(loader) == 2 and first == second and len({*first}) == 1 and first[0] != os.getpid()


def test_sequences_stay_with_one_process(ranks):
    """In batches of one image, in order; the second sequence is the second process's."""
    sequences = [[4, 5, 6], [0, 1], [2, 3]]
    for world, rank, expected in ((1, 0, [4, 5, 6, 0, 1, 2, 3]), (2, 0, [4, 5, 6, 2, 3]), (2, 1, [0, 1])):
        ranks(world, rank)
        order = EvaluationOrder(7, 4, sequences)
        assert list(order) == [[(0, i)] for i in expected] and len(order) == len(expected)


def test_a_dataset_finishes_a_batch():
    class Finished(Noise):
        finish = staticmethod(lambda batch: (batch[0] * 0, batch[1] + 100))

    [(zeros, numbers)] = batches(Finished(), [[(0, 1), (0, 2)]], 0, 0, torch.device("cpu"))
    assert zeros.unique().tolist() == [0] and numbers.tolist() == [101, 102]


def test_a_dataset_says_what_a_batch_is():
    class Sizes(Noise):
        def __getitem__(self, index: int):
            return torch.zeros(3, index, 1), {"name": f"image {index}"}

        @staticmethod
        def collate(samples: list) -> list:
            return [list(part) for part in zip(*samples)]

    [(images, targets)] = batches(Sizes(), [[(0, 3), (0, 5)]], 0, 0, torch.device("cpu"))
    assert [image.shape[1] for image in images] == [3, 5] and targets == [{"name": "image 3"}, {"name": "image 5"}]


def test_to_device_keeps_structure():
    batch = {"images": torch.ones(2), "targets": [{"boxes": torch.zeros(1, 4)}, {"boxes": torch.zeros(0, 4), "id": 3}]}
    moved = to_device(batch, torch.device("cpu"))
    assert moved["targets"][1]["boxes"].shape == (0, 4) and moved["targets"][1]["id"] == 3
    moved = to_device(dict(a=(torch.ones(1), [torch.ones(2)])), torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1][0].is_meta and list(moved) == ["a"]


class Blocks:
    """A dataset of images whose pixels are their number, handed over in slots; `each` bytes are allowed for one."""

    def __init__(self, dtype: torch.dtype, each: int = 75):
        self.dtype, self.each, self.files = dtype, each, range(1000)

    def __len__(self) -> int:
        return 1000

    def batch_bytes(self, images: int) -> int:
        return images * (self.each * self.dtype.itemsize + 8) + 128

    def __getitem__(self, index: int) -> tuple:
        pixels = torch.full((5, 5, 3), index % 251).to(self.dtype)
        return pixels.permute(2, 0, 1), index

    collate = staticmethod(Images.collate)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("each", [75, 0])
def test_batches_in_slots(dtype, each):
    """Every batch is the order's, however slots are reused, and stays as it is when they are; too large ones too."""
    order = TrainingOrder(1000, 50, 0, 0, 40)
    expected = [[index for _, index in keys] for keys in order]
    loader = batches(Blocks(dtype, each), order, 0, 2, torch.device("cpu"))
    needed = 8192 if dtype == torch.uint8 else 16384
    assert loader.slots.size == (needed if each else 4096) and loader.slots.each == 3
    seen = list(loader)
    assert [labels.tolist() for _, labels in seen] == expected
    for (images, labels), alone in zip(seen, batches(Blocks(dtype), order, 0, 0, torch.device("cpu"))):
        assert images.shape == (50, 3, 5, 5) and images.dtype == dtype and not loader.slots.holds(images)
        assert torch.equal(images, alone[0]) and images.stride() == alone[0].stride()
        assert images.is_contiguous(memory_format=torch.channels_last) == (dtype == torch.uint8)
        assert torch.equal(images[:, 0, 0, 0].long(), labels % 251)


def test_passes_that_are_broken_off_leave_slots_in_order():
    """Batches that were loaded ahead in a pass that was not finished are not mistaken for those of the next."""
    loader = batches(Blocks(torch.uint8), EvaluationOrder(90, 10), 0, 1, torch.device("cpu"))
    for taken in (1, 4, 9):
        seen = [labels.tolist() for (_, labels), _ in zip(loader, range(taken))]
        assert seen == [list(range(i * 10, i * 10 + 10)) for i in range(taken)]


def test_slots_are_full():
    """A tensor that does not fit is made elsewhere, and sent as any other."""
    slots = Slots(1, 2, 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saccade.train.data.slots.get_worker_info", lambda: SimpleNamespace(id=0))
        slots.begin()
        first, second, third = (slots.empty(shape, dtype=torch.uint8) for shape in ((3000,), (2, 500), (500,)))
        assert [slots.holds(t) for t in (first, second, third)] == [True, True, False]
        assert second.data_ptr() - first.data_ptr() == 3008  # aligned
        sent = pickle.loads(pickle.dumps(slots.sent({"a": [second], "b": third, "c": "text"})))
        second.fill_(7)
        assert (sent["a"][0] == 7).all() and slots.holds(sent["a"][0]) and sent["c"] == "text"
        kept = slots.released(sent)
        slots.begin()
        assert slots.empty((8,), dtype=torch.uint8).data_ptr() - first.data_ptr() == 4096
        second.fill_(8)
        assert (kept["a"][0] == 7).all() and (sent["a"][0] == 8).all()
