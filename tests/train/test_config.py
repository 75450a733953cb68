"""Configurations: overrides, the check against what they build, and the copy in the run folder."""

import re
from pathlib import Path

import pytest
from saccade.train import engine, probe
from saccade.train.runtime import config
from saccade.train.runtime.errors import UserError

CONFIGS = sorted(p for p in (Path(__file__).parents[2] / "configs").glob("[!_]*/*.py") if p.name != "__init__.py")
DIGITS = next(p for p in CONFIGS if p.name == "resnet18.py")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs(path):
    """Each is valid, short, has one base, and says in its header how to run it."""
    own = path.parent.name == "finetune" or path.stem == "own_folders"
    given = ["data.root=somewhere", "checkpoint=weights.pth"] if own else []
    settings = config.load(path, given)
    tool, validate = ("probe", probe.validate) if "probe" in settings else ("train", engine.validate)
    validate(settings)
    text = path.read_text()
    assert len(text.split('"""', 2)[2].strip().splitlines()) < 15  # behind the header
    assert text.count("_base_") == 1
    assert f" tools/{tool}.py configs/{path.parent.name}/{path.name}" in text  # python, or torchrun on eight
    base = path.parent.parent / "_base_" / f"{text.split('_base_.')[1].split()[0]}.py"
    assert "read_base" not in base.read_text()


def test_overrides():
    lines = [
        "optimizer.lr=5e-4",
        "model.name=vit_tiny_patch16_224",
        "ema.decay=0.9",
        "clip_grad=None",
        "optimizer.betas=(0.9, 0.95)",
    ]
    settings = config.load(DIGITS, lines)
    engine.validate(settings)
    assert settings["optimizer"] == dict(opt="adamw", lr=5e-4, weight_decay=0.05, betas=(0.9, 0.95))
    assert settings["model"]["name"] == "vit_tiny_patch16_224"
    assert settings["ema"] == dict(decay=0.9) and settings["clip_grad"] is None


def test_dump_loads_again(tmp_path):
    settings = config.load(DIGITS, ["ema.decay=0.9", "model.a=(1,)", "model.b=[1, 'x']", "model.c={'k 1': None}"])
    (tmp_path / "config.py").write_text(config.dump(settings))
    assert config.load(tmp_path / "config.py") == settings


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("epoch=3", "unknown key epoch, did you mean epochs"),
        ("optimizer.weight_decy=1", "unknown key optimizer.weight_decy, did you mean weight_decay"),
        ("optimizer.opt=adamv", "unknown optimizer.opt 'adamv', did you mean"),
        ("schedule.warmup=1", "unknown key schedule.warmup, did you mean warmup_"),
        ("schedule.sched=cosinus", "unknown schedule.sched 'cosinus', did you mean cosine"),
        ("schedule.num_epochs=3", "unknown key schedule.num_epochs"),
        ("data.img_sise=3", "unknown key data.img_sise, did you mean img_size"),
        ("task.smothing=0.1", "unknown key task.smothing, did you mean smoothing"),
        ("ema.decai=0.1", "unknown key ema.decai, did you mean decay"),
        ("epochs=ten", "epochs must be int | None, got 'ten'"),
        ("epochs=0", "epochs=0 must be 1 or more"),
        ("epochs=1.5", "epochs must be int | None, got 1.5"),
        ("iterations=5", "give one of epochs and iterations"),
        ("epochs=None", "give one of epochs and iterations"),
        ("optimizer.lr=fast", "optimizer.lr must be"),
        ("sync_bn=true", "sync_bn must be bool, got 'true'"),
        ("precision=fp8", "precision must be"),
        ("epochs.x=1", "epochs.x can't be set: epochs is a value"),
        ("epochs", "'epochs' is no override"),
        ("data=3", "data must be dict, got 3"),
        ("data.type=Digits", "data needs type="),
    ],
)
def test_mistakes(override, sentence):
    with pytest.raises(UserError) as error:
        engine.validate(config.load(DIGITS, [override]))
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["x = (", "import nosuchmodule\nx = nosuchmodule.f()", "x = 1 / 0"])
def test_unreadable_file(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match="can't be read as a config"):
        config.load(tmp_path / "c.py")


def test_missing_file_and_key(tmp_path):
    with pytest.raises(UserError, match="there is no config"):
        config.load(tmp_path / "none.py")
    (tmp_path / "c.py").write_text("epochs = 3\n")
    with pytest.raises(UserError, match=r"model is missing: set it in the config or with model=… on the command line"):
        engine.validate(config.load(tmp_path / "c.py"))


@pytest.mark.parametrize(
    "change, augment",
    [
        ("data.augment = dict(re_prob=0.0)", dict(re_prob=0.0)),  # replaces
        ("data.augment.update(re_prob=0.0)", dict(re_prob=0.0, re_mode="pixel")),  # changes a part
        ("data.update(augment=dict(re_prob=0.0, re_mode='const'))", dict(re_prob=0.0, re_mode="const")),  # either
        (
            "data.update(augment=dict(re_prob=0.0))",
            "keep re_mode of the base's augment: assign SECTION.augment =",
        ),
        ("data.update(dict(augment=dict(hflip=0.0)))", "keep re_mode, re_prob of the base's augment"),
    ],
)
def test_nested_updates_replace_or_fail(tmp_path, change, augment):
    """mmengine's update() merges a dict into the base's, where a config's author may well mean to replace it."""
    (tmp_path / "base.py").write_text("data = dict(augment=dict(re_prob=0.25, re_mode='pixel'))\n")
    child = f"from mmengine.config import read_base\n\nwith read_base():\n    from .base import *\n\n{change}\n"
    (tmp_path / "child.py").write_text(child)
    if isinstance(augment, dict):
        assert config.load(tmp_path / "child.py")["data"]["augment"] == augment
    else:
        with pytest.raises(UserError, match=re.escape(augment)):
            config.load(tmp_path / "child.py")
