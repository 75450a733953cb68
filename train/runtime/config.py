"""Configurations: Python files read by mmengine, changed from the command line, checked against what they build.

A config is a .py file of plain assignments; `with read_base():` inherits one base, and classes are imported. There is
no
schema beside the code: the keys a section may have are the arguments of what it builds.
"""

import ast
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from .errors import UserError, closest


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config and apply overrides such as "optimizer.lr=1e-3"; values are Python literals, else strings.

    Returns plain dicts with classes in place. Raises UserError where the file or an override can't be read.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no config {path}{closest(str(path), map(str, Path(path).parent.glob('*.py')))}")
    try:
        config = Config.fromfile(str(path), format_python_code=False)
        imported = getattr(config, "_imported_names", set())
        settings = {key: _plain(value) for key, value in config.items() if key not in imported}
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"{path} can't be read as a config: {type(error).__name__}: {error}") from error
    for override in overrides:
        _override(settings, override)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        return {k: _plain(v) for k, v in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _override(settings: dict, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r} is no override: write key=value or section.key=value")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    *sections, key = path.split(".")
    for depth, name in enumerate(sections):
        if settings.get(name) is None:
            settings[name] = {}
        settings = settings[name]
        if not isinstance(settings, dict):
            raise UserError(f"{path} can't be set: {'.'.join(sections[: depth + 1])} is a value, not a section")
    settings[key] = value


def check(section: str, settings: dict, *built: Callable, without: Sequence[str] = ()) -> None:
    """Hold a section to the arguments of the callables that will receive it.

    Arguments that are positional-only, or listed in `without`, are the engine's to give. Raises UserError, with the
    closest names, for an unknown or missing key and for a value of another type than the argument is annotated with.
    """
    where = f"{section}." if section else ""
    known: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for function in built:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in without:
                known.setdefault(name, parameter)
        hints = _hints(function) | hints
    for key, value in settings.items():
        if key not in known:
            raise UserError(f"unknown key {where}{key}{closest(key, known)}")
        if not _fits(value, hints.get(key, Any)):
            wanted = getattr(hints[key], "__name__", None) or str(hints[key]).replace("typing.", "")
            wanted = str(hints[key]) if isinstance(hints[key], types.UnionType) else wanted
            raise UserError(f"{where}{key} must be {wanted}, got {value!r} (values are Python literals)")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in settings:
            raise UserError(f"{where}{key} is missing: set it in the config or with {where}{key}=… on the command line")


def _hints(function: Callable) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function.__init__ if isinstance(function, type) else function)
    except (NameError, TypeError):  # annotations that only its own module can resolve
        return {}


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    hint = origin or hint
    if not isinstance(hint, type):
        return True
    if isinstance(value, bool) and hint is not object:
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    if issubclass(hint, (tuple, list)) or hint is Sequence:
        return isinstance(value, (tuple, list))
    return isinstance(value, hint)


def check_typed(section: str, settings: Any) -> None:
    """`check` for a section whose `type` is the class that it builds."""
    if not isinstance(settings, dict) or not isinstance(settings.get("type"), type):
        raise UserError(f"{section} needs type=… , a class that the config imports")
    check(section, {k: v for k, v in settings.items() if k != "type"}, settings["type"])


def build(settings: dict, *given: Any) -> Any:
    """`settings["type"](*given, **the rest)`."""
    return settings["type"](*given, **{k: v for k, v in settings.items() if k != "type"})


def dump(settings: dict) -> str:
    """The config as the text of a config file, which `load` reads back as it was."""
    classes: set[type] = set()

    def text(value: Any) -> str:
        if isinstance(value, type):
            classes.add(value)
            return value.__name__
        if isinstance(value, dict):
            if all(str(k).isidentifier() for k in value):
                return f"dict({', '.join(f'{k}={text(v)}' for k, v in value.items())})"
            return f"{{{', '.join(f'{k!r}: {text(v)}' for k, v in value.items())}}}"
        if isinstance(value, (list, tuple)):
            inner = ", ".join(map(text, value))
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"
        return repr(value)

    body = "".join(f"{key} = {text(value)}\n" for key, value in settings.items())
    return "".join(f"from {c.__module__} import {c.__name__}\n" for c in sorted(classes, key=str)) + "\n" + body
