"""Whole runs of a segmenter on a few generated scenes: train, test, predict, resume, two processes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from saccade.train.runtime import config
from saccade.train.runtime.config import build
from saccade.train.runtime.errors import UserError
from saccade.train.tasks import segment
from saccade.train.tasks.segment import Segment
from support.forked import forked
from support.runs import SGD, assert_same_end, finish, interrupt_and_resume, records, state, train

from .conftest import ROOT

CONFIG = ROOT / "configs/scenes/upernet_biformer_t.py"
NAMES = ["background", *"0123456789"]


@pytest.fixture(scope="module")
def data(scenes):
    return scenes / "ade20k"


@pytest.fixture(scope="module")
def tiny(segmenter_arguments):
    return segmenter_arguments[1]


@pytest.fixture(scope="module")
def run(segmenter_run):
    return segmenter_run


def test_run(run):
    steps, evaluations = records(run, "train"), records(run, "val")
    for line in steps:
        assert line["loss"] == pytest.approx(line["head"] + 0.4 * line["auxiliary"], rel=1e-4)
    assert [line["images"] for line in evaluations] == [3, 3] and {"miou", "macc", "aacc"} <= evaluations[0].keys()
    assert state(run)[1]["best"]["score"] == max(line["miou"] for line in evaluations)
    assert (run / "pictures/batch.png").exists() and (run / "pictures/curves.png").exists()
    assert json.loads((run / "config.json").read_text())["label_names"] == NAMES


def test_test(run, command, tmp_path):
    """Counted picture by picture with the model itself; two processes give the very same."""
    code, out, err = command("test", run, "--out", tmp_path / "one")
    assert code == 0, err
    metrics = json.loads((tmp_path / "one/metrics.json").read_text())
    settings = config.load(run / "config.py")
    source = build(settings["data"])
    model = build(settings["task"], source).restore(run, settings["model"]).eval()
    inter, union, right, seen = np.zeros(11), np.zeros(11), 0, 0
    dataset = source.dataset("test", source.inputs(model.pretrained_cfg))
    for picture, labels, _ in (dataset[i] for i in range(4)):
        with torch.no_grad():
            found = model([picture])[0]
        inter += [float(((found == c) & (labels == c)).sum()) for c in range(11)]
        union += [float(((found == c) | (labels == c)).sum()) for c in range(11)]
        right, seen = right + int((found == labels).sum()), seen + labels.numel()
    assert metrics["miou"] == pytest.approx(100 * (inter[union > 0] / union[union > 0]).mean())
    assert metrics["aacc"] == pytest.approx(100 * right / seen) and metrics["images"] == 4
    assert 0 < metrics["images_per_s"] <= metrics["model_images_per_s"] < 1e6
    rows = (tmp_path / "one/classes.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["class", *NAMES]
    assert float(rows[1].split(",")[1]) == pytest.approx(100 * inter[0] / union[0])
    assert {"overlays.png", "worst.png"} <= {path.name for path in (tmp_path / "one/pictures").iterdir()}
    assert "worst classes" in out

    assert forked(2, "test", run, "--out", tmp_path / "two") == [0, 0]
    again = json.loads((tmp_path / "two/metrics.json").read_text())
    assert {k: again[k] for k in ("miou", "macc", "aacc", "images", "classes")} == {
        k: metrics[k] for k in ("miou", "macc", "aacc", "images", "classes")
    }


def test_arguments_of_tests(run, command, tmp_path):
    """Windows, scales and flips by the command line: other figures of the same pictures."""
    found = []
    for given in (["task.flip=True", "task.scales=(0.5, 1.0)"], ["task.crop=(32, 32)", "task.stride=(16, 16)"]):
        code, _, err = command("test", run, *given, "--out", tmp_path)
        assert code == 0, err
        found.append(json.loads((tmp_path / "metrics.json").read_text()))
    assert {metrics["images"] for metrics in found} == {4}
    assert len({metrics["aacc"] for metrics in found}) == 2


def test_predict(run, data, command, tmp_path):
    """The model's own label map, at the picture's size, and drawn."""
    picture = data / "images/test/000001.jpg"
    with Image.open(picture) as image:
        image.resize((71, 50)).save(tmp_path / "other.png")
    out = tmp_path / "out"
    code, said, err = command(
        "predict", run, picture, tmp_path / "other.png", "--json", tmp_path / "p.json", "--out", out
    )
    assert code == 0, err
    first, other = json.loads((tmp_path / "p.json").read_text())
    settings = config.load(run / "config.py")
    model = build(settings["task"], build(settings["data"])).restore(run, settings["model"]).eval()
    pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)
    with torch.no_grad():
        expected = model([pixels])[0].numpy()
    values, lengths = np.array(first["map"]["runs"]).T
    assert np.array_equal(np.repeat(values, lengths).reshape(first["map"]["size"]), expected)
    assert {found["name"]: found["share"] for found in first["classes"]} == {
        NAMES[c]: (expected == c).mean() for c in np.unique(expected)
    }
    assert other["map"]["size"] == [50, 71] and len(said.splitlines()) == 3
    assert Image.open(out / "other.png").size[0] >= 71


def test_resume_is_bit_identical(run, tiny, tmp_path, monkeypatch):
    """A run interrupted in its third step and resumed ends with the weights and log of an uninterrupted one."""
    folder, settings = tmp_path / "run", config.load(CONFIG, [*tiny, "save_every=1"])
    interrupt_and_resume(folder, settings, Segment, 3, monkeypatch)
    assert_same_end(run, folder)


@pytest.mark.exhaustive
def test_two_processes_are_as_one(tiny, start, tmp_path):
    """Losses, BatchNorm over both, evaluation of pictures that they can't share equally."""
    arguments = [*tiny, *SGD, "sync_bn=True", "task.drop_rate=0.0", "schedule.warmup_lr=0.0"]
    one = train(tmp_path / "one", config.load(CONFIG, arguments))
    finish(start(2, "--run-dir", tmp_path / "two", config=CONFIG, settings=arguments))
    for mine, theirs in zip(records(tmp_path / "two", "train"), records(one, "train"), strict=True):
        assert mine["head"] == pytest.approx(theirs["head"], rel=1e-4)
        assert mine["auxiliary"] == pytest.approx(theirs["auxiliary"], rel=1e-4)
    for mine, theirs in zip(records(tmp_path / "two", "val"), records(one, "val"), strict=True):
        assert mine["images"] == theirs["images"] == 3 and mine["aacc"] == pytest.approx(theirs["aacc"], abs=0.5)
    key = "model.decode_head.fpn_bottleneck.bn.running_mean"
    assert torch.allclose(state(tmp_path / "two")[0][key], state(one)[0][key], rtol=1e-3, atol=1e-5)


def test_fsdp_is_refused(monkeypatch):
    monkeypatch.setattr(segment, "is_sharded", lambda model: True)
    with pytest.raises(UserError, match="strategy=fsdp is not for segmentation"):
        Segment.loss(None, None, None)
