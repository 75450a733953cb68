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
    given = ["data.root=somewhere", "checkpoint=weights.pth", "model.name=resnet18"] if own else []
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
        ("lr=1e-3", "unknown key lr, did you mean optimizer.lr"),
        ("optimizer.weight_decy=1", "unknown key optimizer.weight_decy, did you mean weight_decay"),
        ("optimizer.opt=adamv", "unknown optimizer.opt 'adamv', did you mean"),
        ("schedule.warmup=1", "unknown key schedule.warmup, did you mean warmup_"),
        ("schedule.sched=cosinus", "unknown schedule.sched 'cosinus', did you mean cosine"),
        ("schedule.num_epochs=3", "unknown key schedule.num_epochs"),
        ("data.img_sise=3", "unknown key data.img_sise, did you mean img_size"),
        ("task.smothing=0.1", "unknown key task.smothing, did you mean smoothing"),
        ("ema.decai=0.1", "unknown key ema.decai, did you mean decay"),
        ("epochs=ten", "epochs must be a whole number, 1 or more, or None; got 'ten'"),
        ("epochs=1.5", "epochs must be a whole number, 1 or more, or None; got 1.5"),
        ("epochs=None", "give one of epochs and iterations"),
        ("optimizer.lr=fast", "optimizer.lr must be a number or None; got 'fast'"),
        ("sync_bn=true", "sync_bn must be True or False; got 'true'"),
        ("precision=fp8", "precision must be one of 'fp32', 'bf16', 'fp16'; got 'fp8'"),
        ("optimizer.betas=(0.9,)", "optimizer.betas must be 2 values (a number, a number); got (0.9,)"),
        ("trackers=(1, 2)", "trackers must be a list, each item text; got (1, 2)"),
        (
            "trackers=('tensorbord',)",
            "unknown tracker 'tensorbord' in trackers=('tensorbord',), did you mean tensorboard",
        ),
        (
            "model.drop_path_rate=",
            "removes a key that the config does not set; for an empty string, write model.drop_path_rate=''",
        ),
        ("epochs.x=1", "epochs.x can't be set: epochs is a value"),
        ("epochs", "'epochs' is not an override"),
        ("data=3", "data must be a section, dict(key=value, …); got 3"),
        ("data.type=Digits", "data needs type=… , a class that the config file imports; got 'Digits'"),
    ],
)
def test_mistakes(override, sentence):
    with pytest.raises(UserError) as error:
        engine.validate(config.load(DIGITS, [override]))
    assert sentence in str(error.value) and "\n" not in str(error.value)


# Of each key, values that are out of its range.
OUT_OF_RANGE = {
    "batch_size": (0, -8),
    "epochs": (0, -1),
    "iterations": (0,),
    "accumulate": (0, -2),
    "repeats": (0,),
    "clip_grad": (0, -1.0),
    "workers": (-1,),
    "seed": (-1, 2**32),
    "log_every": (0,),
    "save_every": (0,),
    "eval_every": (0, -3),
    "model.drop_rate": (-0.1, 1),
    "model.drop_path_rate": (1.0,),
    "optimizer.lr": (0, -1e-3),
    "optimizer.weight_decay": (-0.1,),
    "optimizer.betas": ((0.9, 1.0), (-0.1, 0.9)),
    "optimizer.eps": (-1e-8,),
    "optimizer.layer_decay": (0, 1.1),
    "schedule.warmup_epochs": (-1,),
    "schedule.warmup_lr": (-1.0,),
    "schedule.min_lr": (-1e-5,),
    "schedule.cooldown_epochs": (-1,),
    "schedule.cycle_decay": (0, 2.0),
    "schedule.cycle_limit": (0,),
    "ema.decay": (-0.1, 1.1),
    "data.img_size": (0, -16),
    "data.shift": (-1.0,),
    "task.smoothing": (-0.1, 1.5, 1),
    "task.mixup": (-1,),
    "task.cutmix": (-0.5,),
    "task.mix_prob": (1.5,),
    "task.switch_prob": (-0.5,),
}


@pytest.mark.parametrize("key", OUT_OF_RANGE)
def test_ranges(key):
    for value in OUT_OF_RANGE[key]:
        with pytest.raises(UserError, match=f"^{re.escape(key)} must be .*; got {re.escape(repr(value))}$") as error:
            engine.validate(config.load(DIGITS, [f"{key}={value!r}"]))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "file, ranges",
    [
        ("scenes/mask_rcnn_resnet18", {"task.score_thresh": 50, "task.detections": 0, "task.test_size": (0, 96)}),
        ("scenes/mask_rcnn_resnet18", {"data.flip": 2, "data.max_bad": -1, "data.long": 0, "data.short": (96, 0)}),
        ("scenes/upernet_biformer_t", {"task.drop_rate": 1.0, "task.auxiliary": -0.4, "task.scales": (0,)}),
        ("scenes/upernet_biformer_t", {"data.crop": 0, "data.scale": (-1, 5), "data.max_bad": -1}),
        (
            "scenes/bev_dfa3d",
            {"task.min_score": 1.5, "task.depth_weight": -1.0, "data.radius": 0, "data.img_size": (0, 9)},
        ),
        ("finetune/folder", {"data.max_bad": -1, "data.img_size": 0}),
        ("digits/sparsifiner_2_predictors", {"task.reconstruction": -1.0, "task.smoothing": 1.0}),
    ],
)
def test_ranges_of_every_task(file, ranges):
    for key, value in ranges.items():
        with pytest.raises(UserError, match=f"^{re.escape(key)} must be .*; got {re.escape(repr(value))}$"):
            given = ["data.root=x"] if file.startswith("finetune") else []
            engine.validate(config.load(DIGITS.parents[1] / f"{file}.py", [*given, f"{key}={value!r}"]))


@pytest.mark.parametrize("value", ["1e999", "-1e999"])
def test_numbers_are_finite(value):
    with pytest.raises(UserError, match="must be"):
        engine.validate(config.load(DIGITS, [f"optimizer.lr={value}"]))


def test_numbers_as_text():
    """A folder called 2024 needs no quotes."""
    settings = config.load(DIGITS.parents[1] / "finetune/folder.py", ["data.root=2024", "checkpoint=007", "device=0"])
    engine.validate(settings)
    assert (settings["data"]["root"], settings["checkpoint"], settings["device"]) == ("2024", "007", "0")


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    for written, expanded in {
        "~/pets": "/home/me/pets",
        "$DATA/pets": "/data/pets",
        "/x/${DATA}/y": "/x//data/y",
        "$5": "$5",
        "~": "/home/me",
        "a~b": "a~b",
        "$NOT_SET/pets": "$NOT_SET/pets",
    }.items():
        assert config.load(DIGITS, [f"data.root={written}"])["data"]["root"] == expanded


def test_removed_keys_and_alternatives():
    settings = config.load(DIGITS, ["task.smoothing=", "iterations=2"])
    engine.validate(settings)
    assert "smoothing" not in settings["task"] and (settings["epochs"], settings["iterations"]) == (None, 2)
    assert config.load(DIGITS, ["iterations=2", "epochs=3"])["iterations"] == 2  # for validate to refuse


@pytest.mark.parametrize(
    "option, value, hint",
    [
        ("--lr", "1e-3", "write optimizer.lr=1e-3"),
        ("--learning-rate", "1", "write optimizer.lr=1"),
        ("--batch-size", "8", "write batch_size=8"),
        ("--img_size", "32", "write data.img_size=32"),
        ("--epoch", "3", "did you mean epochs"),
        ("--zzzz", "", "a key of the config is changed by key=value, without dashes"),
    ],
)
def test_options_that_are_keys(option, value, hint):
    assert hint in config.option_hint(option, value, engine.known_keys(config.load(DIGITS)))


def test_own_config_outside_the_tree(tmp_path, recwarn):
    base = (
        "from mmengine.config import read_base\nwith read_base():\n    from saccade.configs._base_.finetune import *\n"
    )
    (tmp_path / "mine.py").write_text(f"{base}model.update(name='resnet10t')\ndata.update(root='pets')\n")
    settings = config.load(tmp_path / "mine.py")
    engine.validate(settings)
    assert settings["model"]["name"] == "resnet10t" and settings["data"]["root"] == "pets"
    assert not [warning for warning in recwarn if "pkg_resources" in str(warning.message)]


def test_flatten():
    text = config.dump(config.load(DIGITS, ["optimizer.betas=(0.9, 0.99)", "ema={}"]))
    keys = config.flatten(text)
    assert keys["optimizer.betas"] == "(0.9, 0.99)" and keys["task.type"] == "Classify" and keys["ema"] == "dict()"


@pytest.mark.parametrize("text", ["x = (", "import nosuchmodule\nx = nosuchmodule.f()", "x = 1 / 0"])
def test_unreadable_file(tmp_path, text):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match="can't be read as a config"):
        config.load(tmp_path / "c.py")


def test_missing_file_and_key(tmp_path):
    with pytest.raises(UserError, match=r"there is no config \S+nome.py$"):
        config.load(tmp_path / "nome.py")
    with pytest.raises(UserError, match="there is no config in "):
        config.load(tmp_path)
    (tmp_path / "__init__.py").touch()
    with pytest.raises(UserError, match="no config file and no run") as error:
        config.load(tmp_path / "run")
    assert "__init__" not in str(error.value)
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
