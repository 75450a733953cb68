"""Mean IoU against mmsegmentation's definition, worked out per class and picture, and by hand."""

import json
import math

import numpy as np
import pytest
import torch
from saccade.train.metrics.segmentation import Confusion, table
from support.forked import in_processes

CPU = torch.device("cpu")


def count(maps, classes: int, **given) -> Confusion:
    counts = Confusion(classes, CPU, **given)
    for index, (labels, predicted) in enumerate(maps):
        counts.update(torch.as_tensor(labels), torch.as_tensor(predicted), index)
    return counts


def by_definition(maps, classes: int) -> dict[str, float]:
    """Histograms of intersection, prediction and label over pictures without ignored pixels; means without NaN."""
    intersect, predicted_area, label_area = np.zeros((3, classes))
    for labels, predicted in maps:
        labels, predicted = np.asarray(labels), np.asarray(predicted)
        for c in range(classes):
            for i in range(labels.shape[0]):
                for j in range(labels.shape[1]):
                    if labels[i, j] == 255:
                        continue
                    intersect[c] += labels[i, j] == predicted[i, j] == c
                    predicted_area[c] += predicted[i, j] == c
                    label_area[c] += labels[i, j] == c
    with np.errstate(invalid="ignore"):
        iou, acc = intersect / (predicted_area + label_area - intersect), intersect / label_area
    return dict(
        miou=100 * np.nanmean(iou), macc=100 * np.nanmean(acc), aacc=100 * intersect.sum() / label_area.sum(), iou=iou
    )


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_definition(seed):
    """Random maps of several sizes; class 4 is never labelled, class 5 neither labelled nor predicted."""
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(4):
        shape = rng.integers(1, 9, 2)
        labels = rng.choice([0, 1, 2, 3, 255], shape)
        noise = rng.integers(0, 5, shape)
        maps.append((labels, np.where((rng.random(shape) < 0.6) & (labels < 255), labels, noise)))
    metrics, detail = count(maps, 6).result()
    expected = by_definition(maps, 6)
    for name in ("miou", "macc", "aacc"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-12)
    assert metrics["images"] == 4
    rows = table(detail["confusion"], list("abcdef"))
    for row, iou in zip(rows, expected["iou"]):
        assert row["iou"] is None if math.isnan(iou) else row["iou"] == pytest.approx(100 * iou, rel=1e-12)
    assert rows[5]["acc"] is None and rows[4]["acc"] is None


def test_by_hand():
    """Six labelled pixels: three of class 0 (two found), two of 1 (one found), one of 2 (none); 3 is not there."""
    labels = [[0, 0, 0, 1], [1, 2, 255, 255]]
    predicted = [[0, 0, 1, 1], [0, 1, 2, 3]]
    metrics, detail = count([(labels, predicted)], 4).result()
    assert metrics["miou"] == pytest.approx(100 * (2 / 4 + 1 / 4 + 0) / 3)
    assert metrics["macc"] == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    assert metrics["aacc"] == pytest.approx(100 * 3 / 6)
    rows = table(detail["confusion"], ["a", "b", "c", "d"])
    assert [row["pixels"] for row in rows] == [3, 2, 1, 0]
    assert [row["taken_for"] for row in rows] == ["b", "a", "b", None]


def test_another_label_is_ignored():
    metrics, _ = count([([[0, 1, 1]], [[0, 1, 0]])], 2, ignored=1).result()
    assert metrics == dict(miou=100.0, macc=100.0, aacc=100.0, images=1)


def test_nothing_labelled():
    metrics, detail = count([([[255, 255]], [[0, 1]])], 2).result()
    assert str(metrics) == "{'miou': nan, 'macc': nan, 'aacc': nan, 'images': 1}" and detail["worst"] == []


def test_worst_pictures_first():
    wrong, half, right = [[1, 1]], [[0, 1]], [[0, 0]]
    counts = count([([[0, 0]], found) for found in (half, right, wrong, half)], 2, worst=3)
    assert counts.result()[1]["worst"] == [2, 0, 3]
    assert count([([[255]], [[0]]), ([[0]], [[0]])], 2, worst=3).result()[1]["worst"] == [1]  # fewer than three
    many = count([([[0] * 13], [[0] * i + [1] * (13 - i)]) for i in range(13)], 2)
    assert many.result()[1]["worst"] == list(range(12))  # of 13 the best is left out


def test_two_processes(tmp_path):
    """Counts are added, and the worst images are those of both."""
    maps = [([[0, 0]], found) for found in ([[0, 1]], [[0, 0]], [[1, 1]], [[1, 0]])]

    def run(number: int) -> int:
        torch.distributed.init_process_group("gloo")
        counts = Confusion(2, CPU, worst=3)
        for index in range(number, 4, 2):
            counts.update(*map(torch.as_tensor, maps[index]), index)
        metrics, detail = counts.result()
        (tmp_path / f"{number}.json").write_text(json.dumps([metrics, detail["confusion"].tolist(), detail["worst"]]))
        torch.distributed.destroy_process_group()
        return 0

    assert in_processes(2, run) == [0, 0]
    metrics, detail = count(maps, 2, worst=3).result()
    assert (metrics["miou"], metrics["images"], detail["worst"]) == (25.0, 4, [2, 0, 3])
    for number in range(2):
        found = json.loads((tmp_path / f"{number}.json").read_text())
        assert found == [metrics, detail["confusion"].tolist(), [2, 0, 3]]
