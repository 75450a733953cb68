"""ImageNet's recipes: what is built, and short runs of some. test_tables.py compares them with the published ones."""

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from saccade.train import engine
from saccade.train.data import synthetic_imagenet
from saccade.train.runtime import config
from support import recipes
from support.runs import train
from support.smaller import SMALLER, smaller
from timm.data import ImageNetInfo

NAMES = recipes.names("imagenet")


def zoo() -> dict[str, float]:
    """Top-1 of each published model by its name, as docs/zoo.md has it."""
    text = (recipes.CONFIGS.parent / "docs/zoo.md").read_text()
    return {
        name: float(top1) for name, top1 in re.findall(r"^\| `(\w+)` \|(?:[^|]*\|){4} ([\d.]+) \|", text, re.MULTILINE)
    }


def test_every_published_model_has_a_recipe():
    """With the zoo's top-1; but for the DaViTs that were trained on images nobody else has."""
    models = {name: recipes.load(name)["model"] for name in NAMES}
    assert zoo().keys() - {model["name"] for model in models.values()} == {"davit_l", "davit_h", "davit_g"}
    for name, model in models.items():
        if model["name"] in zoo() and not model.keys() & {"version", "kernel_size"}:
            assert recipes.promised(name) == (pytest.approx(zoo()[model["name"]], abs=0.051),), name


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """The three original files of a thousand classes and few images."""
    wnids = ImageNetInfo().label_names()
    splits = synthetic_imagenet.make_images(wnids[::63], per_class=1, val=4, size=(80, 60))
    return synthetic_imagenet.write_tars(tmp_path_factory.mktemp("imagenet"), splits, wnids)


def run(name: str, folder: Path, data: Path, *overrides: str) -> dict:
    """Train a recipe's model, made smaller, for two epochs of two steps on small images; the evaluation at the end."""
    published = recipes.load(name)
    given = [f"data.root={data}", "data.img_size=64", "batch_size=8", "workers=0", "log_every=1", "device=cpu"]
    given += [*smaller(published["model"]["name"]), "checkpoint=None", *overrides]
    if "sizes" in published["data"]:
        given.append("data.sizes={0: 32, 1: 64}")
    schedule = published["schedule"]
    cooldown = 1 if schedule.get("cooldown_epochs") else 0
    given += ["schedule.cooldown_epochs=1"] if cooldown else []
    given += ["schedule.warmup_epochs=1"] if schedule.get("warmup_epochs") else []
    given.append(f"epochs={1 if schedule.get('warmup_prefix') else 2}")
    settings = config.load(recipes.CONFIGS / f"{name}.py", given)
    engine.validate(settings)
    train(folder, settings)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 2 * (2 + cooldown) and all(map(math.isfinite, losses))
    return lines[-1]


DRAWN = ("biformer_t", "patnet_t1", "agent_cswin_t", "halo_26t", "ela_resnet18")  # all that schedules and tasks have


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.partition("/")[2] in DRAWN else pytest.mark.exhaustive)
        for name in NAMES
        if "sparsifiner" not in name
    ],
)
def test_recipe_runs(name, imagenet, tmp_path):
    """End to end at 64 pixels: augmentation, mixing, schedule, averages, evaluation and the exported model."""
    last = run(name, tmp_path / "run", imagenet)
    assert last["kind"] == "val" and last["images"] == 4 and math.isfinite(last["loss"])
    assert json.loads((tmp_path / "run/config.json").read_text())["num_classes"] == 1000


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(f"sparsifiner_{kind}", marks=() if kind == "deit_t" else pytest.mark.exhaustive)
        for kind in ("deit_t", "deit_s", "deit_b", "lvvit_s", "lvvit_m")
    ],
)
def test_both_phases_run(name, imagenet, tmp_path):
    """The second starts from the first's predictors; the parent is a model that attends to all keys."""
    parent = timm.create_model(name, img_size=64, **SMALLER["sparsifiner"])
    torch.save(parent.state_dict(), tmp_path / "parent.pth")
    run(f"imagenet/{name}_1_predictors", tmp_path / "first", imagenet, f"checkpoint={tmp_path / 'parent.pth'}")
    weights = [f"checkpoint={tmp_path / 'first'}", f"task.teacher={tmp_path / 'parent.pth'}"]
    last = run(f"imagenet/{name}_2_sparse", tmp_path / "second", imagenet, *weights)
    assert last["images"] == 4 and math.isfinite(last["ema_loss"])
