"""The recipes in configs/imagenet: what they build, that their headers say what is published, and that they run."""

import json
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from saccade import backbones  # noqa: F401  (registers)
from saccade.train import engine
from saccade.train.data import made_imagenet as standin
from saccade.train.runtime import config
from support.runs import train
from timm.data import ImageNetInfo
from timm.scheduler import create_scheduler_v2

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "configs/imagenet").glob("*.py") if path.stem != "__init__")


def published() -> dict[str, float]:
    """Top-1 of each model by its name, as docs/zoo.md has it."""
    rows = re.findall(r"^\| `(\w+)` \|(?:[^|]*\|){4} ([\d.]+) \|", (ROOT / "docs/zoo.md").read_text(), re.MULTILINE)
    return {name: float(top1) for name, top1 in rows}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    """The model is built with the recipe's arguments; the top-1 to expect is the published one."""
    settings = config.load(path)
    engine.validate(settings)
    text = path.read_text()
    assert f"torchrun --nproc_per_node=8 tools/train.py configs/imagenet/{path.name}" in text
    arguments = dict(settings["model"])
    name, size = arguments.pop("name"), settings["data"].get("img_size")
    if size:
        arguments["img_size"] = size
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    assert model.num_classes == 1000
    said = re.search(r"([\d.]+) % top-1 expected", text)
    if said and not size:
        assert float(said[1]) == pytest.approx(published()[name], abs=0.05)
    assert bool(said) or name.startswith(("sparsifiner", "ela_resnet"))


def test_every_published_model_has_a_recipe():
    """But for the DaViTs that were trained on pictures nobody else has, and a second layout of the same BiFormer."""
    recipes = {config.load(path)["model"]["name"] for path in RECIPES}
    assert set(published()) - recipes == {"davit_l", "davit_h", "davit_g", "biformer_stl_nchw"}


@pytest.mark.parametrize(
    ("name", "epoch", "rate"),
    [
        ("biformer_s", 5, 1e-3 * (1 + 0.99 * (torch.pi * 5 / 300) ** 2 / -4)),  # 1024 images: 5e-4 * 1024 / 512
        ("biformer_s", 299.99, 1e-5),
        ("agent_deit_t", 10, 2.002e-3),  # half-way from 4e-6 to 4e-3
        ("agent_pvt_l", 305, 1e-5),  # the cool-down
        ("patnet_t0", 0, 1e-6),
        ("sparsifiner_deit_s_2_sparse", 45, 2e-6),
    ],
)
def test_learning_rates(name, epoch, rate):
    settings = config.load(ROOT / f"configs/imagenet/{name}.py")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], settings["optimizer"]["lr"])
    given = dict(num_epochs=settings["epochs"], step_on_epochs=False, updates_per_epoch=100)
    scheduler, epochs = create_scheduler_v2(optimizer, **settings["schedule"], **given)
    assert epochs == settings["epochs"] + settings["schedule"].get("cooldown_epochs", 0)
    scheduler.step_update(round(100 * epoch))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=2e-3)


# Fewer and narrower blocks of the same kinds, by the beginning of a model's name.
SMALLER = {
    "agent_cswin": dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4, agent_blocks=(1, 1, 0, 0)),
    "agent_deit": dict(dim=32, depth=2, heads=2, agents=9, agent_blocks=1),
    "agent_pvt": dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4),
    "agent_swin": dict(dims=(32,) * 4, depths=(1,) * 4, heads=(2,) * 4, agents=(4,) * 4, agent_blocks=(1, 1, 0, 0)),
    "biformer": dict(dims=(32, 64, 64, 64), depths=(1,) * 4, n_win=2, topks=(1, 2, 4, -2)),
    "davit": dict(dims=(32, 32, 64, 64), depths=(1,) * 4),
    "ela_resnet": dict(layers=(1,) * 4, channels=(32,) * 4),
    "halo_h": dict(dims=(16, 24, 32, 48), widths=(16,) * 4, heads=(2,) * 4, blocks=("A",) * 4),
    "halo_regnetz": dict(dims=(16, 32, 32, 48), blocks=("C", "C", "CA", "A")),
    "halo_": dict(dims=(16, 24, 32, 48), widths=(16,) * 4, heads=(2,) * 4, blocks=("C", "C", "CA", "A")),
    "patnet": dict(dims=(8, 16, 16, 32), depths=(1,) * 4, attn_heads=2),
    "sparsifiner": dict(dim=32, depth=4, heads=2, reduce_n=2, coef_topk=3),
}


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory):
    """The three original files of a thousand classes and few images."""
    wnids = ImageNetInfo().label_names()
    splits = standin.images(wnids[::63], per_class=1, val=4, size=(80, 60))
    return standin.tars(tmp_path_factory.mktemp("imagenet"), splits, wnids)


def run(path: Path, folder: Path, data: Path, *overrides: str) -> dict:
    """Train a recipe's model, made smaller, for two epochs of two steps on small images; the evaluation at the end."""
    name = config.load(path)["model"]["name"]
    smaller = next((kwargs for prefix, kwargs in SMALLER.items() if name.startswith(prefix)), {})
    given = [f"data.root={data}", "data.img_size=64", "epochs=2", "batch_size=8", "workers=0", "log_every=1"]
    given += [f"model.{key}={value!r}" for key, value in smaller.items()]
    if "sizes" in config.load(path)["data"]:
        given.append("data.sizes={0: 32, 1: 64}")
    if "cooldown_epochs" in config.load(path)["schedule"]:
        given.append("schedule.cooldown_epochs=1")
    settings = config.load(path, [*given, "device=cpu", "checkpoint=None", *overrides])
    engine.validate(settings)
    train(folder, settings)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    cooldown = settings["schedule"].get("cooldown_epochs", 0)
    assert len(losses) == 2 * (2 + cooldown) and all(map(math.isfinite, losses))
    return lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in RECIPES if "sparsifiner" not in p.stem], ids=lambda path: path.stem)
def test_recipe_runs(path, imagenet, tmp_path):
    """End to end at 64 pixels: augmentation, mixing, schedule, averages, evaluation and the exported model."""
    last = run(path, tmp_path / "run", imagenet)
    assert last["kind"] == "val" and last["images"] == 4 and math.isfinite(last["loss"])
    assert json.loads((tmp_path / "run/config.json").read_text())["num_classes"] == 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparsifiner_deit_s", "sparsifiner_lvvit_s", "sparsifiner_lvvit_m"])
def test_both_phases_run(name, imagenet, tmp_path):
    """The second goes on from the first's predictors; the parent is a model that attends to all keys."""
    parent = timm.create_model(name, img_size=64, **SMALLER["sparsifiner"])
    torch.save(parent.state_dict(), tmp_path / "parent.pth")
    weights = f"checkpoint={tmp_path / 'parent.pth'}"
    first, second = (ROOT / f"configs/imagenet/{name}_{phase}.py" for phase in ("1_predictors", "2_sparse"))
    run(first, tmp_path / "first", imagenet, weights)
    last = run(
        second,
        tmp_path / "second",
        imagenet,
        f"checkpoint={tmp_path / 'first'}",
        f"task.teacher={tmp_path / 'parent.pth'}",
    )
    assert last["images"] == 4 and math.isfinite(last["ema_loss"])
