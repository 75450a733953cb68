"""COCO's recipes: what is built, and short runs of some. test_tables.py compares them with the published ones."""

import json
import math

import pytest
from saccade.train import engine
from saccade.train.data import scenes
from saccade.train.runtime import config
from support import recipes
from support.runs import train
from support.smaller import smaller


def test_cascades_are_the_published_ones():
    """A box for each class, in all three stages, and 2,000 proposals in training."""
    net = recipes.model("coco/cascade_mask_rcnn_agent_swin_t_1x")
    boxes = [layer for name, layer in net.named_modules() if name.endswith(".fc_reg")]
    assert [layer.out_features for layer in boxes] == [4 * 80] * 3
    assert net.rpn_head.of_cascade and 2 * net.rpn_head.proposals == 2000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "new"
    scenes.write(out, formats=("coco",), counts=dict(train=4, val=2, test=1), size=96)
    return out / "coco"


@pytest.mark.parametrize(
    "name",
    [
        "cascade_mask_rcnn_agent_swin_t_1x",
        "faster_rcnn_ela_resnet50_1x",
        pytest.param("mask_rcnn_biformer_s_1x", marks=pytest.mark.exhaustive),
        pytest.param("mask_rcnn_patnet_s_1x", marks=pytest.mark.exhaustive),
        pytest.param("retinanet_agent_pvt_t_1x", marks=pytest.mark.exhaustive),
        pytest.param("retinanet_davit_t_1x", marks=pytest.mark.exhaustive),
    ],
)
def test_recipe_runs(name, data, tmp_path):
    """Two steps with its own augmentation at smaller sizes, an evaluation and the model's file, in bf16."""
    published = recipes.load(f"coco/{name}")
    given = [f"data.root={data}", "data.long=128", "task.test_size=(96, 128)", "iterations=2", "eval_every=2"]
    given += ["data.train=('annotations/instances_train.json', 'images/train')", "batch_size=2", "log_every=1"]
    given += ["data.val=('annotations/instances_val.json', 'images/val')", "workers=0", "device=cpu"]
    given += ["task.channels=16", "task.hidden=32", "task.rois=16", "task.proposals=30", "schedule.warmup_epochs=1"]
    given += smaller(published["model"]["name"], dense_agents=(9,) * 4)
    if "crop" in published["data"]:
        given += ["data.short=(64, 96)", "data.crop.short=(80, 90)", "data.crop.side=(60, 80)"]
    else:
        given += ["data.short=96"]
    settings = config.load(recipes.CONFIGS / f"coco/{name}.py", given)
    engine.validate(settings)
    train(tmp_path / "run", settings)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "train", "val"]
    assert all(math.isfinite(line["loss"]) for line in lines[:2])
    assert lines[2]["images"] == 2 and 0 <= lines[2]["box_ap"] <= 100
    assert (tmp_path / "run/model.safetensors").exists()
