"""The recipes in configs/imagenet: what they build, and that their headers say what is published."""

import re
from pathlib import Path

import pytest
import timm
import torch
from saccade import backbones  # noqa: F401  (registers)
from saccade.train import config, engine
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
