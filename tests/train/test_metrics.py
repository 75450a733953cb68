"""Metrics against their plain definitions."""

import csv
import io
import json

import pytest
import torch
from saccade.train.metrics import confusion as tables
from saccade.train.metrics import speed
from saccade.train.metrics.calibration import Calibration
from saccade.train.metrics.real import Accepted, Real, read_labels
from saccade.train.metrics.topk import TopK
from saccade.train.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("classes", [3, 5, 12])
def test_counts(classes):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(101, classes, generator=g), torch.randint(classes, (101,), generator=g)
    counts = TopK(classes, CPU)
    for part in (slice(0, 64), slice(64, 101)):
        counts.update(logits[part], labels[part])
    metrics, confusion = counts.result()
    order = logits.argsort(1, descending=True)
    assert metrics["top1"] == pytest.approx(100 * (order[:, 0] == labels).float().mean().item())
    assert metrics["top5"] == pytest.approx(100 * (order[:, :5] == labels[:, None]).any(1).float().mean().item())
    assert metrics["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item())
    assert metrics["images"] == 101 == confusion.sum()
    for true in range(classes):
        for said in range(classes):
            assert confusion[true, said] == ((labels == true) & (order[:, 0] == said)).sum()


def test_not_finite():
    counts = TopK(3, CPU)
    counts.update(torch.full((2, 3), float("nan")), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(UserError) as error:
        counts.result()
    message = "the model's outputs are not finite numbers: evaluate with precision=fp32 or train it again"
    assert str(error.value) == message


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 100.0])
def test_calibration_is_the_definition(scale):
    """Image by image, bin by bin: bin m of 15 holds confidences in ((m-1)/15, m/15]."""
    g = torch.Generator().manual_seed(1)
    logits, labels = scale * torch.randn(203, 7, generator=g), torch.randint(7, (203,), generator=g)
    counts = Calibration(CPU)
    for part in (slice(0, 100), slice(100, 101), slice(101, 203)):
        counts.update(logits[part], labels[part])
    error, rows = counts.result()

    expected, expected_rows = 0.0, []
    for m in range(1, 16):
        confidences, right = [], []
        for row, label in zip(logits.double().tolist(), labels.tolist()):
            p = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
            if (m - 1) / 15 < max(p) <= m / 15:
                confidences.append(max(p))
                right.append(p.index(max(p)) == label)
        if confidences:
            n = len(confidences)
            expected += abs(sum(right) - sum(confidences)) / 203
            expected_rows.append((m, n, 100 * sum(right) / n, 100 * sum(confidences) / n))
    assert error == pytest.approx(100 * expected, abs=1e-9)
    assert len(rows) == len(expected_rows) > 0
    for row, (m, images, right, confidence) in zip(rows, expected_rows):
        assert (row["low"], row["high"], row["images"]) == (100 * (m - 1) / 15, 100 * m / 15, images)
        assert (row["top1"], row["confidence"]) == pytest.approx((right, confidence))
        assert isinstance(row["images"], int)


def test_calibration_of_certain_answers():
    """Confidence 1 is of the last bin; always wrong is an error of 100, always right of 0."""
    for right, error in ((1, 100.0), (0, 0.0)):
        counts = Calibration(CPU)
        counts.update(torch.tensor([[1000.0, 0.0]] * 4), torch.full((4,), right))
        found, rows = counts.result()
        assert found == error and [row["low"] for row in rows] == [100 * 14 / 15] and rows[0]["images"] == 4


def test_counts_are_exact_and_on_the_device():
    """Float32 counts 2**24 images at most."""
    counts = TopK(2, torch.device("meta"))
    assert all(t.is_meta for t in (counts.confusion, counts.top5, counts.loss))
    exact = (torch.int64, torch.int64, torch.float64)
    assert (counts.confusion.dtype, counts.top5.dtype, counts.loss.dtype) == exact
    for other in (Calibration(torch.device("meta")).sums, Real(torch.device("meta")).counts):
        assert other.is_meta and other.dtype in (torch.int64, torch.float64)


def test_calibration_of_no_images():
    error, rows = Calibration(CPU).result()
    assert error != error and rows == []  # NaN
    metrics, counts = TopK(3, CPU).result()
    assert str(metrics) == "{'top1': nan, 'top5': nan, 'loss': nan, 'images': 0}" and counts.sum() == 0


def test_per_class_and_confused():
    confusion = torch.tensor([[8, 2, 0, 0], [0, 5, 0, 0], [3, 1, 0, 1], [0, 0, 0, 0]])
    rows = tables.per_class(confusion, list("abcd"))
    assert rows[0] == {"class": "a", "images": 10, "right": 8, "top1": 80.0, "taken_for": "b", "times": 2}
    assert rows[1] == {"class": "b", "images": 5, "right": 5, "top1": 100.0, "taken_for": None, "times": 0}
    assert rows[2] == {"class": "c", "images": 5, "right": 0, "top1": 0.0, "taken_for": "a", "times": 3}
    assert rows[3] == {"class": "d", "images": 0, "right": 0, "top1": None, "taken_for": None, "times": 0}
    pairs = [dict(true="c", predicted="a", images=3), dict(true="a", predicted="b", images=2)]
    assert tables.confused(confusion, list("abcd"), 2) == pairs
    assert len(tables.confused(confusion, list("abcd"))) == 4
    header = "  worst classes  images    top1  most often taken for"
    line = "  c                   5    0.00  a (3 of 5)"
    assert tables.worst(rows, 1) == [header, line]
    assert tables.worst(rows) == [header, line, "  a                  10   80.00  b (2 of 10)"]
    long = [rows[0] | {"class": "a name of seventeen"}]
    assert tables.worst(long)[1] == "  a name of seventeen      10   80.00  b (2 of 10)"
    assert len(tables.worst(long * 9)) == 6 and tables.worst(rows[1:2]) == []
    assert tables.as_csv(rows[:1]) == "class,images,right,top1,taken_for,times\na,10,8,80.0,b,2\n"
    many = torch.arange(36).view(6, 6)  # 30 pairs
    assert [pair["images"] for pair in tables.confused(many, list("abcdef"))] == [i for i in range(34, 0, -1) if i % 7][
        :20
    ]
    read = list(csv.DictReader(io.StringIO(tables.as_csv(rows))))
    assert [row["class"] for row in read] == list("abcd") and read[2]["top1"] == "0.0" and read[3]["top1"] == ""


class Named(torch.utils.data.Dataset):
    """Images that are their own number, with file names."""

    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return torch.tensor(float(index)), 0

    def filename(self, index):
        return self.names[index]


def test_real_labels(tmp_path):
    """Three images: two accepted labels, none, one; the second does not count."""
    (tmp_path / "real.json").write_text(json.dumps([[0], [2, 5], [], [6]]))
    files = ["ILSVRC2012_val_00000002.JPEG", "ILSVRC2012_val_00000003.JPEG", "ILSVRC2012_val_00000004_n01440764.JPEG"]
    images = Accepted(Named(files), str(tmp_path / "real.json"), 7)
    assert len(images) == 3
    accepted = torch.stack([images[i][2] for i in range(3)])
    assert [row.nonzero().flatten().tolist() for row in accepted] == [[2, 5], [], [6]]
    assert [float(images[i][0]) for i in range(3)] == [0.0, 1.0, 2.0]
    first = Accepted(Named(["ILSVRC2012_val_00000001.JPEG"]), str(tmp_path / "real.json"), 7)
    assert first[0][2].nonzero().tolist() == [[0]]
    logits = torch.zeros(3, 7)
    logits[0, 5] = logits[1, 0] = 9.0
    logits[2] = torch.arange(7, 0, -1)  # 6 comes last: not among five
    counts = Real(CPU)
    counts.update(logits[:2], accepted[:2])
    counts.update(logits[2:], accepted[2:])
    assert counts.result() == (dict(real_top1=50.0, real_top5=50.0), 2)
    logits[2, 6] = 3.5  # fifth or better, not first
    counts = Real(CPU)
    counts.update(logits, accepted)
    assert counts.result() == (dict(real_top1=50.0, real_top5=100.0), 2)
    counts = Real(CPU)
    counts.update(logits[1:2], accepted[1:2])
    assert counts.result() == ({}, 0)


def test_real_labels_of_timm():
    """Its copy has all 50,000 images; the paper counts 46,837 of them."""
    labels = read_labels("timm", 1000)
    assert len(labels) == 50_000 and sum(map(bool, labels)) == 46_837


def test_real_label_mistakes(tmp_path):
    file = tmp_path / "real.json"
    file.write_text("[[0], [9]]")
    named = Named(["ILSVRC2012_val_00000003.JPEG"])
    with pytest.raises(UserError) as error:
        Accepted(named, str(file), 9)
    assert str(error.value) == (
        f"--real {file} has class 9, but the model is tested on 9 classes: "
        "these labels are for classifiers of ImageNet's 1000 classes"
    )
    for other in (
        "ILSVRC2012_val_00000003.JPEG",
        "cat.jpg",
        "ILSVRC2012_val_00000000.JPEG",
        "ILSVRC2012_val_000000012.JPEG",
    ):
        with pytest.raises(UserError) as error:
            Accepted(Named([other]), str(file), 10)[0]
        assert str(error.value) == (
            f"--real has no labels for the image {other}: "
            "they are for ILSVRC2012_val_00000001 … ILSVRC2012_val_00000002"
        )
    with pytest.raises(UserError) as error:
        Accepted([0], str(file), 10)
    message = "--real needs the images' file names, which this data does not have: use a folder of images"
    assert str(error.value) == message
    for text in ("[[0", "3", "[3]", "{}"):
        file.write_text(text)
        with pytest.raises(
            UserError, match=r"^--real \S+ can't be read \(.+\): give real\.json, a list of .*, or timm$"
        ):
            read_labels(str(file), 10)
    with pytest.raises(UserError, match=r"can't be read .*No such file"):
        read_labels(str(tmp_path / "none.json"), 10)


def test_speed(monkeypatch):
    """The first batch is not counted if there are others; time between calls is that of loading."""
    model = torch.nn.Identity()
    for calls, expected in (
        ([(4, 10, 12), (4, 13, 14), (2, 20, 21)], (0.7, 3.0)),  # 6 images in 9 s, of them 2 s in the model
        ([(5, 10, 12)], (2.5, 2.5)),
        ([], (0.0, 0.0)),
    ):
        times = iter([time for _, *both in calls for time in both])
        monkeypatch.setattr(speed.time, "perf_counter", lambda times=times: next(times))
        measured = speed.Speed(model, CPU)
        for images, *_ in calls:
            model(torch.zeros(images, 3))
        assert measured.result() == dict(zip(("images_per_s", "model_images_per_s"), expected))
        model(torch.zeros(1))  # is no longer measured
        monkeypatch.undo()
