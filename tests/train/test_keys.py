"""Every key of a config is listed with its value, default, type and meaning."""

import json
from pathlib import Path

import pytest
from saccade.train import engine
from saccade.train.keys import key_help, list_keys
from saccade.train.runtime import config

ROOT = Path(__file__).parents[2]


GROUPS = ["digits", "finetune", "scenes", "imagenet", "coco", "ade20k", "nuscenes"]


@pytest.mark.parametrize("group", GROUPS)
def test_every_key_is_described(group):
    """Of the engine, and of the data and the tasks of a group's configs."""
    seen = set()
    for file in sorted((ROOT / "configs" / group).glob("*.py")):
        if file.stem == "__init__":
            continue
        settings = config.load(file)
        classes = [settings[section].get("type") for section in ("data", "task") if section in settings]
        for cls in classes:
            if isinstance(cls, type) and cls not in seen:
                seen.add(cls)
                assert not [key for key in config.signature(cls) if not key_help(cls).get(key)], cls
    assert seen


def test_keys_of_a_config():
    settings = config.load("coco/mask_rcnn_biformer_s_1x", ["data.root=/data"])
    keys = {key.name: key for key in list_keys(settings)}
    listed = set(engine.known_keys(settings)) - {"model.pretrained", "model.drop_rate"}
    assert listed <= set(keys)
    own = [key for key in keys.values() if "." not in key.name]
    assert not [key.name for key in own if not key.help]
    assert keys["precision"].type == "one of 'fp32', 'bf16', 'fp16'" and keys["precision"].default == "'fp32'"
    assert keys["batch_size"].default == "" and keys["batch_size"].value == str(settings["batch_size"])
    assert keys["optimizer.lr"].value == str(settings["optimizer"]["lr"])
    assert keys["accumulate"].help == "forward and backward passes per step, 1 or more"
    assert keys["task.channels"].help == "of the pyramid and of the heads' convolutions"


def test_help_of_a_docstring():
    def f(one=1, two=2, three=3, plain=4):
        """Do it.

        one, two: both
        numbers; see also three: not a list. three: the third. plain is described elsewhere: yes.
        Raises ValueError for none.
        """

    assert key_help(f)["one"] == key_help(f)["two"] == "both numbers; see also"
    assert key_help(f)["three"] == "not a list"


def test_print_config(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("train", "digits/biformer_t", "optimizer.lr=0.25", "--print-config", "--json")
    assert (code, err) == (0, "")
    row = next(row for row in json.loads(out) if row["name"] == "optimizer.lr")
    assert (row["value"], row["default"]) == ("0.25", "None")
    code, out, _ = command("train", "digits/biformer_t", "--print-config")
    assert code == 0 and "grad_checkpointing" in out and "recompute activations" in out
    code, _, err = command("train", "digits/biformer_t", "optimizer.lr=-1", "--print-config")
    assert code == 2 and "optimizer.lr must be" in err
    assert not list(tmp_path.iterdir())
