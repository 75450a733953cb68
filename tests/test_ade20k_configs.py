"""The recipes in configs/ade20k: parameters, learning rates, weight decay, the results said, steps of each kind."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from saccade.train import engine
from saccade.train.data import scenes
from saccade.train.models.build import create_features
from saccade.train.models.segmenter import Segmenter
from saccade.train.runtime import config
from support.runs import train
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2

ROOT = Path(__file__).parents[1]
RECIPES = sorted(
    path for path in (ROOT / "configs/ade20k").glob("*.py") if path.stem not in ("__init__", "own_folders")
)

# Published: mIoU, drop path, steps, and millions of parameters where they are given.
PUBLISHED = {
    "upernet_biformer_s_160k": (49.8, 0.3, 160_000, None),
    "upernet_biformer_b_160k": (51.0, 0.4, 160_000, None),
    "fpn_biformer_s_80k": (48.9, 0.15, 80_000, None),
    "fpn_biformer_b_80k": (49.9, 0.3, 80_000, None),
    "upernet_davit_t_160k": (46.3, 0.3, 160_000, 60),
    "upernet_davit_s_160k": (48.8, 0.3, 160_000, 81),
    "upernet_davit_b_160k": (49.4, 0.3, 160_000, 121),
    "upernet_agent_swin_t_160k": (46.68, 0.3, 160_000, 61),
    "upernet_agent_swin_s_160k": (48.08, 0.3, 160_000, 81),
    "upernet_agent_swin_b_160k": (48.73, 0.5, 160_000, 121),
    "fpn_agent_pvt_t_40k": (40.18, 0.1, 40_000, 15),
    "fpn_agent_pvt_s_40k": (44.18, 0.1, 40_000, 24),
    "fpn_agent_pvt_m_40k": (44.30, 0.2, 40_000, 40),
    "fpn_agent_pvt_l_40k": (46.52, 0.1, 40_000, 52),
}


def build(settings: dict) -> Segmenter:
    model, task = dict(settings["model"]), dict(auxiliary=0.4) | settings["task"]
    given = {key: task[key] for key in ("head", "channels", "no_decay") if key in task}
    with torch.device("meta"):
        return Segmenter(create_features(**model), 150, auxiliary=task["auxiliary"] > 0, **given)


def test_every_published_row_has_a_recipe():
    assert [path.stem for path in RECIPES] == sorted(PUBLISHED)


def test_own_folders():
    settings = config.load(ROOT / "configs/ade20k/own_folders.py", ["data.root=anywhere"])
    engine.validate(settings)
    assert build(settings).head.fuse.conv.weight.shape == (256, 1024, 3, 3)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    """What the header says is what was published, and so are drop path, length, batch and size of the model."""
    miou, drop_path, steps, millions = PUBLISHED[path.stem]
    settings = config.load(path)
    engine.validate(settings)
    text = path.read_text()
    assert f"torchrun --nproc_per_node=8 tools/train.py configs/ade20k/{path.name}" in text
    assert float(re.search(r"mIoU ([\d.]+)", text)[1]) == miou
    assert settings["model"]["drop_path_rate"] == drop_path and settings["iterations"] == steps
    assert settings["batch_size"] == (32 if "biformer" in path.stem and path.stem.startswith("fpn") else 16)
    net = build(settings)
    if millions:
        count = sum(parameter.numel() for parameter in net.parameters()) / 1e6
        assert abs(count - millions) <= 0.65, count
    normed = any("out_norms" in name for name, _ in net.named_parameters())
    assert normed == ("pvt" not in path.stem)  # as the published dense backbones


@pytest.mark.parametrize(
    ("name", "step", "rate"),
    [
        # mmsegmentation: base (1 - t / T) ** power, in warm-up times 1 - (1 - t / W) (1 - ratio).
        ("upernet_biformer_s_160k", 1500, 6e-5 * (1 - 1500 / 160e3)),
        ("upernet_biformer_s_160k", 80_000, 3e-5),
        ("upernet_biformer_s_160k", 159_999, 6e-5 / 160e3),
        ("fpn_agent_pvt_s_40k", 0, 2e-4),
        ("fpn_agent_pvt_s_40k", 30_000, 2e-4 * 0.25**0.9),
        ("fpn_biformer_s_80k", 0, 2e-5),
        ("fpn_biformer_s_80k", 40_000, 1e-4),
        ("fpn_biformer_s_80k", 79_999, 2e-12),
    ],
)
def test_learning_rates(name, step, rate):
    scheduler, optimizer = schedule(name)
    scheduler.step_update(step)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-6, abs=1e-13)


def test_warm_up_differs_from_mmsegmentation_by_one_percent_at_most():
    """There the warm-up multiplies what falls already; timm's rises to the base rate."""
    scheduler, optimizer = schedule("upernet_davit_t_160k")
    for step in range(0, 1500, 100):
        scheduler.step_update(step)
        theirs = 6e-5 * (1 - step / 160e3) * (1 - (1 - step / 1500) * (1 - 1e-6))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(theirs, rel=0.01)


def schedule(name: str):
    settings = config.load(ROOT / f"configs/ade20k/{name}.py")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], settings["optimizer"]["lr"])
    given = dict(num_epochs=settings["iterations"], step_on_epochs=False, updates_per_epoch=1)
    scheduler, steps = create_scheduler_v2(optimizer, **settings["schedule"], **given)
    assert steps == settings["iterations"]
    return scheduler, optimizer


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("upernet_biformer_s_160k", r"norm"),  # not the BatchNorms of stem and heads, whose names don't say norm
        ("upernet_davit_t_160k", None),
        ("upernet_agent_swin_t_160k", r"norm|relative_bias|\.attn\.(key|query)_(block|rows|columns)"),
        ("fpn_agent_pvt_t_40k", None),
    ],
)
def test_weight_decay(name, without):
    settings = config.load(ROOT / f"configs/ade20k/{name}.py")
    net = build(settings)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    exempt = set()
    for group in create_optimizer_v2(net, **settings["optimizer"]).param_groups:
        if group["weight_decay"] == 0:
            exempt |= {names[id(parameter)] for parameter in group["params"]}
        else:
            assert group["weight_decay"] == settings["optimizer"]["weight_decay"]
    assert exempt == {name for name in names.values() if without and re.search(without, name)}
    assert bool(exempt) == bool(without)


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "out"
    scenes.write(folder, ("ade20k",), dict(train=4, val=2, test=1), size=64)
    return folder / "ade20k"


SMALLER = {
    "agent_pvt": dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4, dense_agents=(4,) * 4),
    "agent_swin": dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4, agent_blocks=(1, 1, 0, 0))
    | dict(dense_agents=(4,) * 4),
    "biformer": dict(dims=(32, 64, 64, 64), depths=(1,) * 4, topks=(1, 2, 4, -2), n_win=2),
    "davit": dict(dims=(32, 32, 64, 64), depths=(1,) * 4),
}


@pytest.mark.parametrize(
    "name",
    ["upernet_biformer_s_160k", "fpn_biformer_s_80k", "upernet_davit_t_160k", "upernet_agent_swin_t_160k"]
    + ["fpn_agent_pvt_t_40k"],
)
def test_recipe_runs(name, ade, tmp_path):
    """Two steps and an evaluation of a smaller model; UPerNet in bfloat16 as the recipe has it."""
    path = ROOT / f"configs/ade20k/{name}.py"
    smaller = next(kwargs for prefix, kwargs in SMALLER.items() if prefix in name)
    given = [f"data.root={ade}", "data.crop=64", "data.scale=(128,64)", "task.channels=16", "iterations=2"]
    given += ["batch_size=4", "workers=0", "log_every=1", "eval_every=2", "device=cpu", "schedule.warmup_epochs=0"]
    given += ["precision=fp32"] if name.startswith("fpn") else []  # bfloat16 takes the CPU long at 256 channels
    settings = config.load(path, [*given, *(f"model.{key}={value!r}" for key, value in smaller.items())])
    engine.validate(settings)
    train(tmp_path, settings)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "train", "val"]
    assert all(math.isfinite(line["loss"]) for line in lines[:2])
    assert ("auxiliary" in lines[0]) == name.startswith("upernet")
    assert lines[2]["images"] == 2 and 0 <= lines[2]["miou"] <= 100
