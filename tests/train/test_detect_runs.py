"""Whole runs of a detector on a few generated scenes: train, test, predict, resume, two processes, export."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coder
from saccade.train import predict
from saccade.train.runtime import config
from saccade.train.runtime.config import build
from saccade.train.tasks.detect import Detect
from support.runs import assert_same_end, finish, interrupt_and_resume, records, state

from .conftest import ROOT

RESNET = ROOT / "configs/scenes/mask_rcnn_resnet18.py"


@pytest.fixture(scope="module")
def data(scenes):
    return scenes / "coco"


@pytest.fixture(scope="module")
def tiny(detector_arguments):
    return detector_arguments[1]


@pytest.fixture(scope="module")
def run(detector_run):
    return detector_run


def test_run(run):
    """Each loss is logged, the best is judged by the masks' AP, and the pictures are there."""
    steps, evaluations = records(run, "train"), records(run, "val")
    names = ("cls", "bbox", "mask", "rpn_cls", "rpn_bbox")
    for line in steps:
        assert line["loss"] == pytest.approx(sum(line[name] for name in names), rel=1e-3)
    assert len(steps) == 4 and [line["images"] for line in evaluations] == [3, 3]
    assert {f"{kind}_{name}" for kind in ("box", "mask") for name in ("ap", "ap50", "ap75", "ar100")} <= set(
        evaluations[0]
    )
    best = state(run)[1]["best"]
    assert best["score"] == max(line["mask_ap"] for line in evaluations)
    assert (run / "pictures/batch.png").exists() and (run / "pictures/curves.png").exists()
    assert json.loads((run / "config.json").read_text())["label_names"] == list("0123456789")


def test_test(run, command, tmp_path):
    """metrics.json, every class's row, COCO's results file, overlays, the worst pictures, precision and recall."""
    code, _, err = command("test", run, "--out", tmp_path)
    assert code == 0, err
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["images"] == 4 and metrics["split"] == "test"
    rows = (tmp_path / "classes.csv").read_text().splitlines()
    assert len(rows) == 11 and rows[0].startswith("class,images,objects,box_ap")
    found = json.loads((tmp_path / "detections.json").read_text())
    assert {entry["image_id"] for entry in found} <= {1, 2, 3, 4}
    assert all(coder.decode(entry["segmentation"]).shape == (64, 64) for entry in found[:5])
    assert set(metrics["mistakes"]) == {"missed", "false", "confused"}
    drawn = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert {"detections.png", "worst.png", "precision_recall.png"} <= drawn


def test_predict(run, data, command, tmp_path):
    """The same detections as the model's own, in the image's pixels; small images are drawn larger, with a legend."""
    picture = data / "images/test/000001.jpg"
    with Image.open(picture) as image:
        image.resize((150, 120)).save(tmp_path / "large.png")
    out = tmp_path / "out"
    code, said, err = command(
        "predict", run, picture, tmp_path / "large.png", "--threshold", 0.0, "--json", tmp_path / "p.json", "--out", out
    )
    assert code == 0, err
    first, large = json.loads((tmp_path / "p.json").read_text())
    settings = config.load(run / "config.py")
    model = build(settings["task"], build(settings["data"])).restore(run, settings["model"]).eval()
    pixels = torch.from_numpy(np.asarray(Image.open(picture).convert("RGB")).copy()).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        (expected,) = model([pixels])
    assert torch.allclose(torch.tensor([o["box"] for o in first["objects"]]), expected["boxes"])
    assert torch.allclose(torch.tensor([o["score"] for o in first["objects"]]), expected["scores"])
    for found, mask in zip(first["objects"], expected["masks"]):
        assert np.array_equal(coder.decode(found["mask"]), (mask[0] > 0.5).numpy())
    assert large["objects"][0]["mask"]["size"] == [120, 150]
    assert Image.open(out / "000001.png").width >= 480 and len(said.splitlines()) == 3


def test_nothing_found(run):
    model = predict.predictor(run, "cpu", threshold=1.0)
    record = model.predict([Image.new("RGB", (50, 40))])[0]
    assert record == dict(objects=[]) and model.describe(record) == "nothing"
    assert model.draw(Image.new("RGB", (50, 40)), record).size == (500, 400)


def test_resume_is_bit_identical(run, tiny, tmp_path, monkeypatch):
    """A run interrupted in its third step and resumed ends with the weights and log of an uninterrupted one."""
    folder, settings = tmp_path / "run", config.load(RESNET, [*tiny, "save_every=1"])
    interrupt_and_resume(folder, settings, Detect, 3, monkeypatch)
    assert_same_end(run, folder)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_two_processes(strategy, tiny, command, start, tmp_path):
    """In bf16, accumulated, with BatchNorm over both: a run whose last evaluation one process repeats."""
    arguments = [*tiny, "iterations=2", "precision=bf16", "accumulate=2", "sync_bn=True", f"strategy={strategy}"]
    finish(start(2, "--run-dir", tmp_path / "run", config=RESNET, settings=arguments))
    (there,) = records(tmp_path / "run", "val")
    code, _, err = command("test", tmp_path / "run", "--split", "val", "--out", tmp_path / "test")
    assert code == 0, err
    here = json.loads((tmp_path / "test/metrics.json").read_text())
    assert here["images"] == there["images"] == 3
    for name in ("box_ap", "mask_ap", "box_ar100"):
        assert here[name] == pytest.approx(there[name], abs=1.0), name  # bf16's rounding may differ
