"""Compare configs with the published recipes: what a config resolves to, and tables of what it should be.

A table (tests/support/published) is a list of blocks (pattern of config names, source, {key: published value}); a later
block overrides an earlier one. Keys are those of the config, `section.key`, and the ones that `resolve` computes.
"""

import ast
import inspect
import math
import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from saccade.train import engine
from saccade.train.data.images import Source
from saccade.train.runtime import config
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

CONFIGS = Path(__file__).parents[2] / "configs"
# Keys covered by the rows "schedule", "optimizer", "no decay" and "augment", and keys that change no result.
IGNORED = {
    "optimizer.lr",
    "optimizer.opt",
    "optimizer.filter_bias_and_bn",
    "task.no_decay",
    "data.augment",
    "data.type",
}
IGNORED |= {"epochs", "iterations", "workers", "log_every", "save_every", "eval_every", "data.root", "data.max_bad"}
IGNORED |= {"checkpoint", "task.teacher"}
BUILT = {"no decay", "parameters"}
NEEDED = {"expected", "schedule", "no decay", "optimizer", "optimizer.weight_decay", "batch_size", "precision"}
NEEDED |= {"model.name"}
Table = Sequence[tuple[str, str, dict[str, Any]]]


class Differs(NamedTuple):
    """A value that differs from the published one (None: unknown), and the words of the header that say so."""

    ours: Any
    published: Any
    said: str


class NoDecay(NamedTuple):
    """The parameters without weight decay: biases and those of one dimension if set, and those whose names match."""

    one_dimensional: bool = False
    names: str | None = None

    def of(self, model: nn.Module) -> set[str]:
        return {
            name
            for name, parameter in model.named_parameters()
            if (self.one_dimensional and (parameter.ndim <= 1 or name.endswith(".bias")))
            or (self.names is not None and re.search(self.names, name))
        }


class Schedule(NamedTuple):
    """The learning rate as a function of epochs or steps, the length of the run, and how close ours must be."""

    rate: Callable[[float], float]
    length: int
    within: float = 1e-6


def cosine(
    peak: float, end: float, until: int, warmup: int = 0, start: float = 0.0, hold: int = 0, after_warmup: bool = False
) -> Schedule:
    """Linear warm-up, a cosine that starts at 0 or after the warm-up, then `hold` more at the final rate."""
    begin = warmup if after_warmup else 0

    def rate(t: float) -> float:
        if t < warmup:
            return start + (peak - start) * t / warmup
        return end + (peak - end) * (1 + math.cos(math.pi * min(1, (t - begin) / (until - begin)))) / 2

    return Schedule(rate, until + hold)


def steps(peak: float, drops: Sequence[int], length: int, warmup: int = 0, ratio: float = 0.0) -> Schedule:
    """Divided by 10 at each of `drops`; the warm-up is linear from `ratio` of the peak."""

    def rate(t: float) -> float:
        factor = 1 - (1 - ratio) * (1 - t / warmup) if t < warmup else 1
        return peak * factor * 0.1 ** sum(t >= drop for drop in drops)

    return Schedule(rate, length)


def poly(peak: float, power: float, length: int, warmup: int = 0, ratio: float = 0.0) -> Schedule:
    """MMSegmentation's: the warm-up multiplies the rate while it decays, at most 1 % from timm's."""

    def rate(t: float) -> float:
        factor = 1 - (1 - ratio) * (1 - t / warmup) if t < warmup else 1
        return peak * factor * (1 - t / length) ** power

    return Schedule(rate, length, within=0.01 if warmup else 1e-6)


def exponential(peak: float, factor: float, length: int) -> Schedule:
    """Multiplied by `factor` over the run, evenly."""
    return Schedule(lambda t: peak * factor ** (t / length), length)


def names(folder: str) -> list[str]:
    """Return the names of a folder's configs: "imagenet/biformer_s", …"""
    return sorted(f"{folder}/{path.stem}" for path in (CONFIGS / folder).glob("*.py") if path.stem != "__init__")


@lru_cache
def load(name: str) -> dict[str, Any]:
    return config.load(CONFIGS / f"{name}.py", ["data.root=anywhere"])


def header(name: str) -> str:
    """Return the docstrings of a config and of its base, each on one line."""
    source = (CONFIGS / f"{name}.py").read_text(encoding="utf-8")
    bases = re.findall(r"from \.\._base_\.(\w+) import", source)
    texts = [source, *((CONFIGS / f"_base_/{base}.py").read_text(encoding="utf-8") for base in bases)]
    return "\n".join(" ".join((ast.get_docstring(ast.parse(text)) or "").split()) for text in texts)


def promised(name: str) -> tuple[float, ...]:
    """Return the metric values that a config's header gives as expected."""
    docstring = ast.get_docstring(ast.parse((CONFIGS / f"{name}.py").read_text(encoding="utf-8")))
    paragraph = next((text for text in docstring.split("\n\n") if "expected" in text), "expected")
    return tuple(map(float, re.findall(r"\d+\.\d+", paragraph.partition("expected")[0].rpartition(": ")[2])))


def expected(name: str, table: Table) -> dict[str, Any]:
    """Return a table's rows for a config: {key: published value}."""
    rows: dict[str, Any] = {}
    for pattern, source, values in table:
        assert source
        if fnmatchcase(name.partition("/")[2], pattern):
            rows |= values
    return rows


@lru_cache
def _model(description: str, name: str) -> nn.Module:
    """Build a config's model on the meta device; configs with an equal `description` share it."""
    settings = load(name)
    classes = {"Classify": 1000, "Distill": 1000, "Detect": 80, "Segment": 150, "Lift": 10}
    data = SimpleNamespace(
        class_names=[str(i) for i in range(classes[settings["task"]["type"].__name__])],
        img_size=settings["data"].get("img_size"),
        scale=settings["data"].get("scale"),
        inputs=lambda pretrained_cfg: resolve_data_config(pretrained_cfg=pretrained_cfg),
    )
    arguments = settings["model"] | ({"backbone_pretrained": False} if "backbone" in settings["model"] else {})
    with torch.device("meta"):
        task = config.build(settings["task"], data)
        model = task.model(**arguments, checkpoint=None, new_head=True)
        if hasattr(task, "phase"):
            for key, parameter in model.named_parameters():
                parameter.requires_grad_((".predictor." in key) == (task.phase == "predictors"))
    return model


def model(name: str) -> nn.Module:
    settings = load(name)
    return _model(
        repr((settings["model"] | dict(drop_path_rate=0), settings["task"], settings["data"].get("img_size"))), name
    )


def _defaults(function: Callable) -> dict[str, Any]:
    given = (inspect.signature(each).parameters.items() for each in (function, *getattr(function, "passes_to", ())))
    return {name: p.default for parameters in given for name, p in parameters if p.default is not p.empty}


def resolve(name: str) -> dict[str, Any]:
    """Return every value of a config, set or default, by `section.key`, with values derived from them.

    "augment": the arguments of timm's training transform that are not None or 0. "test": the shorter side, the size
    and the interpolation of its test transform. "optimizer": the class, "optimizer.*" its arguments. "expected": the
    numbers in the header.
    """
    settings = load(name)
    flat = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    flat = _defaults(engine.train) | flat
    flat["ema"] = settings.get("ema")
    for section in ("model", "data", "task"):
        values = settings.get(section) or {}
        built = values.get("type")
        flat |= {f"{section}.{key}": v for key, v in (_defaults(built) if built else {}).items()}
        flat |= {f"{section}.{key}": v.__name__ if isinstance(v, type) else v for key, v in values.items()}
    given = {
        key: value for key, value in settings["optimizer"].items() if key not in ("filter_bias_and_bn", "layer_decay")
    }
    optimizer = create_optimizer_v2([nn.Parameter(torch.zeros(1))], **given)
    flat["optimizer"] = type(optimizer).__name__
    flat |= {f"optimizer.{key}": value for key, value in optimizer.defaults.items()}
    flat["optimizer.layer_decay"] = settings["optimizer"].get("layer_decay")
    flat["expected"] = promised(name)
    if settings["task"]["type"].__name__ in ("Classify", "Distill"):
        inputs = resolve_data_config(pretrained_cfg=get_pretrained_cfg(settings["model"]["name"]).to_dict())
        if settings["data"].get("img_size"):
            inputs["input_size"] = (3, *[settings["data"]["img_size"]] * 2)
        arguments = _defaults(create_transform) | inputs | settings["data"].get("augment", {})
        kinds = ("scale", "ratio", "hflip", "vflip", "color_jitter", "color_jitter_prob", "grayscale_prob")
        kinds += (
            "gaussian_blur_prob",
            "auto_augment",
            "interpolation",
            "train_crop_mode",
            "re_prob",
            "re_mode",
            "re_count",
        )
        erasing = arguments["re_prob"] > 0
        flat["augment"] = {k: arguments[k] for k in kinds if arguments[k] and (erasing or not k.startswith("re_"))}
        resize, crop = (
            next(t for t in create_transform(**inputs).transforms if isinstance(t, kind))
            for kind in (Resize, CenterCrop)
        )
        side = resize.size if isinstance(resize.size, int) else resize.size[0]
        flat["test"] = (side, crop.size[0], InterpolationMode(resize.interpolation).value)
    return flat


def given(name: str) -> set[str]:
    """Return the keys that a config or its base sets."""
    settings = load(name)
    keys = {key for key, value in settings.items() if not isinstance(value, dict)}
    for section, values in settings.items():
        if section == "ema":
            keys |= {"ema"}
        elif isinstance(values, dict):
            keys |= {f"{section}.{key}" for key in values if section != "schedule"}
    return keys - IGNORED


def compare_rates(name: str, schedule: Schedule) -> None:
    """Check the learning rate of a config's schedule against the published one over the whole run."""
    settings = load(name)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], settings["optimizer"]["lr"])
    unit = 1 if settings.get("iterations") else 100
    arguments = dict(
        num_epochs=settings.get("iterations") or settings["epochs"], step_on_epochs=False, updates_per_epoch=unit
    )
    scheduler, length = create_scheduler_v2(optimizer, **settings["schedule"], **arguments)
    assert length == schedule.length
    for t in sorted({round(schedule.length * i / 60) for i in range(60)} | {1, 2, 3, 5, 10, 250, 500, 1000, 1500}):
        if t < schedule.length:
            scheduler.step_update(t * unit)
            rate = optimizer.param_groups[0]["lr"]
            assert math.isclose(rate, schedule.rate(t), rel_tol=schedule.within, abs_tol=1e-12), (
                t,
                rate,
                schedule.rate(t),
            )


def compare(name: str, table: Table) -> None:
    """Check a config against its rows: each key set has a row, and each value is equal or marked as `Differs`."""
    engine.validate(load(name))
    data = load(name)["data"]
    if issubclass(data["type"], Source):  # checks the augmentation as a run does; the images are not here
        Source(None, data.get("sizes"), data.get("augment"), 0)
    rows, ours, text = expected(name, table), resolve(name), header(name)
    missing = given(name) - rows.keys()
    assert not missing, f"{name} sets {sorted(missing)}, on which the table of published recipes has no row"
    missing = NEEDED - rows.keys()
    assert not missing, f"the table of published recipes has no row on {sorted(missing)} of {name}"
    for key, value in rows.items():
        if isinstance(value, Differs):
            assert value.said in text, f"{name}: {key} is not {value.published}, and no header says {value.said!r}"
            assert value.ours != value.published
            value = value.ours
        if key == "schedule":
            compare_rates(name, value)
        elif key not in BUILT:
            assert key in ours or value is None, f"{name} has no {key}, on which the table has a row"
            assert ours.get(key) == value, f"{name}: {key} is {ours.get(key)!r}, published is {value!r}"


def compare_model(name: str, table: Table) -> None:
    """Check the size of a config's model, and which parameters have no weight decay, against its rows."""
    rows, net = expected(name, table), model(name)
    groups = create_optimizer_v2(net, **load(name)["optimizer"]).param_groups
    learning = {id(p) for group in groups for p in group["params"]}
    exempt = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    wanted = {key for key in rows["no decay"].of(net) if id(net.get_parameter(key)) in learning}
    assert {key for key, p in net.named_parameters() if id(p) in exempt} == wanted
    if "parameters" in rows:
        count = sum(parameter.numel() for parameter in net.parameters())
        published = rows["parameters"]  # exactly, in millions, or rounded to them
        near = 0 if published > 1e6 else 0.75 if published == int(published) else 0.003 * published
        assert abs((count if published > 1e6 else count / 1e6) - published) <= near, count


def built(folder: str, table: Table, group: str) -> list:
    """List the configs of a folder for `compare_model`: in make test the last of each group, and exact sizes.

    group: a pattern; configs in whose names it matches the same text are alike.
    """
    seen: set[str] = set()
    chosen = []
    for name in reversed(names(folder)):  # the smaller sizes come last
        text = re.match(group, name.partition("/")[2])[0]
        needed = text not in seen or expected(name, table).get("parameters", 0) > 1e6
        chosen.append(pytest.param(name, marks=() if needed else pytest.mark.exhaustive))
        seen.add(text)
    return chosen
