"""The recipes in configs/coco: their facts, sizes of what they build, and that each kind runs."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saccade.train import engine
from saccade.train.data import scenes
from saccade.train.runtime import config
from support.runs import train
from timm.scheduler import create_scheduler_v2

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "configs/coco").glob("*.py") if path.stem != "__init__")
# Published box and mask AP (masks: Mask and Cascade Mask R-CNN), and millions of parameters where they are published.
PUBLISHED = dict(
    mask_rcnn_biformer_s_1x=(47.8, 43.2, None),
    mask_rcnn_biformer_b_1x=(48.6, 43.7, None),
    retinanet_biformer_s_1x=(45.9, None, None),
    retinanet_biformer_b_1x=(47.1, None, None),
    mask_rcnn_davit_t_1x=(45.0, 41.1, 47.8),
    mask_rcnn_davit_t_3x=(47.4, 42.9, 47.8),
    mask_rcnn_davit_s_1x=(47.7, 42.9, 69.2),
    mask_rcnn_davit_s_3x=(49.5, 44.3, 69.2),
    mask_rcnn_davit_b_1x=(48.2, 43.3, 107.3),
    mask_rcnn_davit_b_3x=(49.9, 44.6, 107.3),
    retinanet_davit_t_1x=(44.0, None, 38.5),
    retinanet_davit_t_3x=(46.5, None, 38.5),
    retinanet_davit_s_1x=(46.0, None, 59.9),
    retinanet_davit_s_3x=(48.2, None, 59.9),
    retinanet_davit_b_1x=(46.7, None, 98.5),
    retinanet_davit_b_3x=(48.7, None, 98.5),
    mask_rcnn_agent_swin_t_1x=(44.6, 40.7, 48),
    mask_rcnn_agent_swin_t_3x=(47.3, 42.7, 48),
    mask_rcnn_agent_swin_s_1x=(47.2, 42.7, 69),
    mask_rcnn_agent_swin_s_3x=(48.9, 43.8, 69),
    cascade_mask_rcnn_agent_swin_t_1x=(49.2, 42.7, 86),
    cascade_mask_rcnn_agent_swin_t_3x=(51.4, 44.5, 86),
    cascade_mask_rcnn_agent_swin_s_3x=(52.6, 45.5, 107),
    cascade_mask_rcnn_agent_swin_b_3x=(52.6, 45.3, 145),
    mask_rcnn_agent_pvt_t_1x=(41.4, 38.7, 31),
    mask_rcnn_agent_pvt_s_1x=(44.5, 41.2, 40),
    mask_rcnn_agent_pvt_m_1x=(45.9, 42.0, 56),
    mask_rcnn_agent_pvt_l_1x=(46.9, 42.8, 68),
    retinanet_agent_pvt_t_1x=(40.3, None, 21),
    retinanet_agent_pvt_s_1x=(44.1, None, 30),
    retinanet_agent_pvt_m_1x=(45.8, None, 46),
    retinanet_agent_pvt_l_1x=(46.8, None, 58),
    mask_rcnn_patnet_s_1x=(None, None, None),
    mask_rcnn_patnet_m_1x=(None, None, None),
    mask_rcnn_patnet_l_1x=(None, None, None),
    faster_rcnn_ela_resnet50_1x=(None, None, None),
)
# Of each detector and backbone one: 1x and 3x are of the same size.
SIZED = list({path.stem[:-3]: path for path in RECIPES if PUBLISHED[path.stem][2]}.values())


def test_every_published_row_has_a_recipe():
    assert {path.stem for path in RECIPES} == set(PUBLISHED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    """Its header gives the published AP and the command; batch, lengths and learning rate are the papers'."""
    settings, text = config.load(path), path.read_text()
    engine.validate(settings)
    box, mask, _ = PUBLISHED[path.stem]
    said = re.search(r"box AP ([\d.]+)(?:, mask AP ([\d.]+))? expected", text)
    expected = None if box is None else (str(box), None if mask is None else str(mask))
    assert (said.groups() if said else None) == expected
    assert f"torchrun --nproc_per_node=8 tools/train.py configs/coco/{path.name}" in text
    detector, _, schedule = re.fullmatch(
        r"(retinanet|faster_rcnn|mask_rcnn|cascade_mask_rcnn)_(\w+)_([13]x)", path.stem
    ).groups()
    assert settings["task"].get("detector", "mask_rcnn") == detector and settings["batch_size"] == 16
    name, rate = settings["model"]["name"], settings["optimizer"]["lr"]
    assert f"_{name}_" in path.stem
    large = name in ("patnet_s",) or (detector == "mask_rcnn" and name.startswith("agent_pvt"))
    assert rate == (0.02 if name.startswith("ela") else 2e-4 if large else 1e-4)
    decay = 0.05 if name.startswith(("davit", "agent_swin")) or detector + name[:-1] == "mask_rcnnbiformer_" else 1e-4
    assert settings["optimizer"]["weight_decay"] == decay
    assert ("crop" in settings["data"]) == name.startswith(("davit", "agent_swin"))
    assert settings["task"].get("norm_eval", False) == name.startswith("biformer")

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], rate)
    given = dict(num_epochs=settings["iterations"], step_on_epochs=False, updates_per_epoch=1)
    scheduler, length = create_scheduler_v2(optimizer, **settings["schedule"], **given)
    drops = (197910, 241890, 263880) if schedule == "3x" else (58640, 80630, 87960)
    assert length == drops[2] == (36 if schedule == "3x" else 12) * 7330
    for step, factor in {0: 1e-3, 250: 0.5005, 500: 1, drops[0] - 2: 1, drops[0]: 0.1, drops[1]: 0.01}.items():
        scheduler.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * factor, rel=1e-3), step


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem[:-3])
def test_parameters(path):
    """As many as published, of 80 classes: to 0.3 %, or to the million that they are rounded to."""
    settings, published = config.load(path), PUBLISHED[path.stem][2]
    with torch.device("meta"):
        job = config.build(settings["task"], SimpleNamespace(class_names=[str(i) for i in range(80)]))
        count = sum(p.numel() for p in job.model(**settings["model"]).parameters()) / 1e6
    assert count == pytest.approx(published, rel=0.003, abs=1 if isinstance(published, int) else 0)


SMALLER = {
    "agent_pvt": dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4, dense_agents=(9,) * 4),
    "agent_swin": dict(
        dims=(32,) * 4,
        depths=(1,) * 4,
        heads=(2,) * 4,
        agents=(4,) * 4,
        dense_agents=(9,) * 4,
        agent_blocks=(1, 1, 0, 0),
    ),
    "biformer": dict(dims=(32, 64, 64, 64), depths=(1,) * 4, n_win=2, topks=(1, 2, 4, -2)),
    "davit": dict(dims=(32, 32, 64, 64), depths=(1,) * 4),
    "ela_resnet": dict(layers=(1,) * 4, channels=(32,) * 4),
    "patnet": dict(dims=(8, 16, 16, 32), depths=(1,) * 4, attn_heads=2),
}
RUNS = ["retinanet_davit_t_1x", "mask_rcnn_biformer_s_1x", "cascade_mask_rcnn_agent_swin_t_1x"]
RUNS += ["faster_rcnn_ela_resnet50_1x", "retinanet_agent_pvt_t_1x", "mask_rcnn_patnet_s_1x"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "new"
    scenes.write(out, formats=("coco",), counts=dict(train=4, val=2, test=1), size=96)
    return out / "coco"


@pytest.mark.parametrize("name", RUNS)
def test_recipe_runs(name, data, tmp_path):
    """Two steps with its own augmentation at smaller sizes, an evaluation and the model's file, in bf16."""
    path = ROOT / f"configs/coco/{name}.py"
    model = config.load(path)["model"]["name"]
    smaller = next(kwargs for prefix, kwargs in SMALLER.items() if model.startswith(prefix))
    given = [f"model.{key}={value!r}" for key, value in smaller.items()]
    given += [f"data.root={data}", "data.long=128", "task.test_size=(96, 128)", "iterations=2", "eval_every=2"]
    given += ["data.train=('annotations/instances_train.json', 'images/train')", "batch_size=2", "log_every=1"]
    given += ["data.val=('annotations/instances_val.json', 'images/val')", "workers=0", "device=cpu"]
    given += ["task.channels=16", "task.hidden=32", "task.rois=16", "task.proposals=30"]
    if "crop" in config.load(path)["data"]:
        given += ["data.short=(64, 96)", "data.crop.short=(80, 90)", "data.crop.side=(60, 80)"]
    else:
        given += ["data.short=96"]
    settings = config.load(path, given)
    engine.validate(settings)
    train(tmp_path / "run", settings)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "train", "val"]
    assert all(math.isfinite(line["loss"]) for line in lines[:2])
    assert lines[2]["images"] == 2 and 0 <= lines[2]["box_ap"] <= 100
    assert (tmp_path / "run/model.safetensors").exists()
