"""ADE20K's recipes: what is built, and short runs of some. test_tables.py compares them with the published ones."""

import json
import math

import pytest
from saccade.train import engine
from saccade.train.data import scenes
from saccade.train.runtime import config
from support import recipes
from support.runs import train
from support.smaller import smaller


def test_maps_are_normalised_as_published():
    """The backbones of UPerNet and BiFormer's of Semantic FPN normalise their maps; Agent-PVT's do not."""
    for name, normalised in (
        ("upernet_davit_t_160k", True),
        ("fpn_biformer_s_80k", True),
        ("fpn_agent_pvt_t_40k", False),
    ):
        parameters = dict(recipes.model(f"ade20k/{name}").named_parameters())
        assert any("out_norms" in key for key in parameters) == normalised, name


@pytest.fixture(scope="module")
def ade(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "out"
    scenes.write(folder, ("ade20k",), dict(train=4, val=2, test=1), size=64)
    return folder / "ade20k"


@pytest.mark.parametrize(
    "name",
    [
        "upernet_biformer_s_160k",
        "fpn_agent_pvt_t_40k",
        pytest.param("fpn_biformer_s_80k", marks=pytest.mark.exhaustive),
        pytest.param("upernet_davit_t_160k", marks=pytest.mark.exhaustive),
        pytest.param("upernet_agent_swin_t_160k", marks=pytest.mark.exhaustive),
    ],
)
def test_recipe_runs(name, ade, tmp_path):
    """Two steps and an evaluation of a smaller model; UPerNet in bfloat16 as the recipe has it."""
    given = [f"data.root={ade}", "data.crop=64", "data.scale=(128,64)", "task.channels=16", "iterations=2"]
    given += ["batch_size=4", "workers=0", "log_every=1", "eval_every=2", "device=cpu", "schedule.warmup_epochs=0"]
    given += ["precision=fp32"] if name.startswith("fpn") else []  # bfloat16 takes the CPU long at 256 channels
    given += smaller(recipes.load(f"ade20k/{name}")["model"]["name"], dense_agents=(4,) * 4)
    settings = config.load(recipes.CONFIGS / f"ade20k/{name}.py", given)
    engine.validate(settings)
    train(tmp_path, settings)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["train", "train", "val"]
    assert all(math.isfinite(line["loss"]) for line in lines[:2])
    assert ("auxiliary" in lines[0]) == name.startswith("upernet")
    assert lines[2]["images"] == 2 and 0 <= lines[2]["miou"] <= 100
