"""Lists every key that a config can have: its value, default, type and one sentence on what it does."""

import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from .engine import timm_sections, train
from .runtime import config as configs

SECTIONS = ("model", "data", "task", "optimizer", "schedule", "ema")


class Key(NamedTuple):
    """A key. name: dotted. value, default: Python source. value: None if not set. default: "" if it must be set."""

    name: str
    value: str | None
    default: str
    type: str
    help: str


def key_help(built: Callable) -> dict[str, str]:
    """Return the descriptions of a callable's arguments, from docstrings of the form "name: text. name, name: text".

    For a class: its own docstring, its bases', and those of the callables in its attributes `documented_in` and
    `passes_to`, which get arguments from it.
    """
    names = configs.signature(built)
    found: dict[str, str] = {}
    others = (*getattr(built, "documented_in", ()), *getattr(built, "passes_to", ()))
    for one in [*(built.__mro__ if inspect.isclass(built) else [built]), *others]:
        for name, text in _arguments(one.__doc__ or "", names).items():
            found.setdefault(name, text)
    return found


def _arguments(text: str, names: Collection[str]) -> dict[str, str]:
    text = re.sub(r"\s+", " ", text)
    found: dict[str, str] = {}
    starts = [m for m in re.finditer(r"(?<![\w.`])(\w+(?:, \w+)*): ", text) if {*m[1].split(", ")} & {*names}]
    for start, after in zip(starts, [*starts[1:], None]):
        description = text[start.end() : after.start() if after else None].strip()
        description = re.split(r" (?:Raises|Returns) ", description)[0].strip().removesuffix(".")
        for name in start[1].split(", "):
            found.setdefault(name, description)
    return found


def _keys(section: str, settings: dict, built: Callable, without: tuple[str, ...] = ()) -> list[Key]:
    help, parameters = key_help(built), {}
    for function in (*getattr(built, "passes_to", ()), built):
        parameters |= inspect.signature(function).parameters
    prefix = f"{section}." if section else ""
    keys = []
    for name, (hint, required) in configs.signature(built, without=without).items():
        value = _code(settings[name]) if name in settings else None
        default = "" if required else _code(parameters[name].default)
        keys.append(Key(prefix + name, value, default, configs.describe(hint), help.get(name, "")))
    return keys


def _code(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}" if isinstance(value, type) else repr(value)


def list_keys(config: dict) -> list[Key]:
    """List the keys that a config can have, with their values in the given one, which must be valid.

    The engine's keys come first, then those of each section. The model's arguments differ by family, so only those
    that the config sets are listed; for the optimizer and the schedule, all that timm accepts.
    """
    keys = _keys("", config, train, SECTIONS)
    keys += [Key(f"model.{name}", _code(value), "", "", "") for name, value in config["model"].items()]
    for section in ("data", "task"):
        cls = config[section]["type"]
        keys.append(Key(f"{section}.type", _code(cls), "", "a class", (inspect.getdoc(cls) or "").split("\n")[0]))
        keys += _keys(section, config[section], cls)
    for section, (built, given, _) in timm_sections(config).items():
        names: set[str] = set()
        for function in built:
            keys += _keys(section, config.get(section) or {}, function, (*given, *names))
            names |= inspect.signature(function).parameters.keys()
    return keys
