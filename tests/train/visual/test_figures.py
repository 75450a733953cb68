"""The figures of a run show what they say."""

import json

import numpy as np
import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from matplotlib import pyplot as plt
from saccade.train.visual import attention, boxes, confusion, curves


def test_curves(tmp_path):
    records = [dict(kind="train", step=i, epoch=i / 10, loss=2 / (i + 1), top1=float(i), lr=1e-3) for i in range(20)]
    records += [dict(kind="val", step=10 * i, epoch=i, loss=1.0, top1=50.0 + i, ema_top1=60.0) for i in range(2)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in records))
    assert plt.imread(curves.plot_curves(log, tmp_path / "curves.png")).shape[1] > 1000
    log.write_text("")
    assert curves.plot_curves(log, tmp_path / "none.png") is None


@pytest.mark.parametrize("classes", [2, 10, 40])
def test_confusion(tmp_path, classes):
    counts = torch.eye(classes, dtype=torch.int64) * 9
    counts[0, 1] = 3
    file = confusion.plot_confusion(counts, [f"class {i}" for i in range(classes)], tmp_path / "confusion.png")
    assert plt.imread(file).ndim == 3


def test_a_map_is_bright_where_it_is_large():
    image = np.full((8, 12, 3), 200, np.uint8)
    values = np.zeros((2, 3), np.float32)
    values[1, 2] = 0.2
    drawn = attention.draw_map(image, values, (0, 0, 0.5, 1 / 3)).astype(int)
    assert drawn.shape == (224, 336, 3) and drawn.dtype == int
    assert drawn[130:, 240:].sum(2).min() > 600 > 500 > drawn[:100, 240:].sum(2).max()  # the cell, and another
    frame = np.array([0, 0xD5, 0xFF])
    assert (drawn[0, :100] == frame).all() and (drawn[111, :100] == frame).all()
    assert (drawn[20:90, 20:90] != frame).any()
    image[6:, 9:11] = 0  # within one tile
    assert attention.contrast_point(image, 4) == (7, 10.5)


def test_attended(tmp_path):
    images = [(torch.randn(3, 40, 36), i % 3) for i in range(5)]
    small = dict(dims=(32, 64, 64, 64), depths=(1,) * 4)
    model = timm.create_model("biformer_t", num_classes=3, n_win=4, topks=(1, 2, 3, -2), **small)
    assert attention.plot_attention(model, images, ["a", "b", "c"], tmp_path / "attended.png").stat().st_size > 20_000
    small = dict(dim=48, heads=3, depth=6, reduce_n=4, coef_topk=2)
    model = timm.create_model("sparsifiner_deit_t", num_classes=3, img_size=64, **small)
    images = [(torch.randn(3, 64, 64), i % 3) for i in range(5)]
    chosen = attention.choose_layers(model.attention_maps(images[0][0][None]))
    assert [record.name for record in chosen] == [f"blocks.{i}.attn:tokens" for i in (0, 2, 3, 5)]
    assert attention.plot_attention(model, images, ["a", "b", "c"], tmp_path / "kept.png").stat().st_size > 20_000
    other = timm.create_model("test_resnet", num_classes=3)
    assert attention.plot_attention(other, images, ["a", "b", "c"], tmp_path / "none.png") is None


NAMES = ["$5_$10", "$10\\$20", "_^x$", "caf\udce9", "猫", "cat\x1b[31m\nname", "a" * 300, "\U0001f431"]


@pytest.mark.filterwarnings("error")
def test_any_class_name_is_drawn(tmp_path):
    """Mathematics, bytes that are no text, letters without a font, control characters: no warning, no exception."""
    counts = torch.eye(len(NAMES), dtype=torch.int64) + 1
    assert confusion.plot_confusion(counts, NAMES, tmp_path / "confusion.png").exists()
    precision = dict(box=np.random.default_rng(0).random((10, 101, len(NAMES))))
    assert boxes.plot_precision_recall(precision, NAMES, tmp_path / "pr.png").exists()


def test_curves_of_undefined_metrics(tmp_path):
    """A metric that an evaluation could not compute is null in log.jsonl, and a gap in the curve."""
    records = [dict(kind="train", step=1, epoch=1, loss=1.0, lr=1e-3)]
    records += [dict(kind="val", step=i, epoch=i, loss=None, box_ap=value) for i, value in ((1, None), (2, 3.0))]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert curves.plot_curves(tmp_path / "log.jsonl", tmp_path / "curves.png", ("box_ap",)).exists()
