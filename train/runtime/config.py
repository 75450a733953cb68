"""Configurations: Python files read by mmengine, changed from the command line, checked against what they build.

A config is a .py file of plain assignments; `with read_base():` inherits one base, and classes are imported. There is
no separate schema: a section's keys are the arguments of what it builds, and their annotations say which values are
valid. `Annotated[float, Range(0, 1)]` gives a number's range.

A config is code, which `load` runs, except for a run's config.py: it is in the form that `dump` writes, literals and
classes of saccade.train, and is read without running anything, as the folder may be another person's.
"""

import ast
import importlib
import importlib.util
import inspect
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

from mmengine.config import Config, ConfigDict

from .errors import UserError, closest


@dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`; `open_low` and `open_high` exclude these bounds themselves."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return math.isfinite(number) and above and below

    def __str__(self) -> str:
        if not math.isfinite(self.high):
            return f"more than {self.low}" if self.open_low else f"{self.low} or more"
        low = f"more than {self.low} and" if self.open_low else f"from {self.low}"
        high = f"less than {self.high}" if self.open_high else f"{self.high}"
        return f"{low} {high}" if self.open_low and self.open_high else f"{low} {'up ' * self.open_low}to {high}"


Count = Annotated[int, Range(1)]
NonNegativeInt = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open_low=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]

# Keys that exclude each other: an override of one sets the other to None.
ALTERNATIVES = {"epochs": "iterations", "iterations": "epochs"}


class Section(dict):
    """A section of a config that remembers how the command line spelled its values."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.spelled: dict[str, str] = {}


def load(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a config and apply overrides such as "optimizer.lr=1e-3"; values are Python literals, else strings.

    path: a config file, the folder of a run, or the name of a config that comes with saccade ("imagenet/biformer_s").
    A file that is called config.py is a run's and is read, all others are run. An override without a value
    ("model.drop_path_rate=") removes the key.
    `~` and variables such as $HOME in paths are expanded. Returns plain dicts, whose `type` values are classes. Raises
    UserError if the file or an override can't be read.
    """
    file = _find(Path(path))
    settings = _read_run(file) if file.name == "config.py" else _run(file, path)
    for override in overrides:
        _override(settings, override)
    return settings


def _run(file: Path, path: str | Path) -> Section:
    """Return what a config file sets, by running it; `path`: as it was asked for."""
    try:
        with (
            patch.object(ConfigDict, "update", _update),
            patch("mmengine.config.config.get_installed_path", _package_folder),
        ):
            config = Config.fromfile(str(file), format_python_code=False)
        imported: set[str] = getattr(config, "_imported_names", set())
        return Section({key: _plain(value) for key, value in config.items() if key not in imported})
    except Exception as error:  # whatever the file's own code raises
        raise UserError(f"{path} can't be read as a config: {type(error).__name__}: {error}") from error


MODULES = "SACCADE_MODULES"  # environment variable: further modules, by commas, whose classes a run's config may name
LARGEST_CONFIG = 1 << 20  # bytes of a run's config.py


def _read_run(file: Path) -> Section:
    """Return what a run's config.py sets, without running it. Raises UserError for what `dump` does not write."""
    try:
        if file.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG} bytes")
        body = ast.parse(file.read_text(encoding="utf-8")).body
        classes: dict[str, type] = {}
        settings = Section()
        for i, node in enumerate(body):
            if i == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue  # the docstring
            if isinstance(node, ast.ImportFrom) and not node.level:
                classes |= {alias.asname or alias.name: _class(node.module or "", alias.name) for alias in node.names}
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                settings[node.targets[0].id] = _plain(_literal(node.value, classes))
            else:
                raise ValueError(f"line {node.lineno} is code: {_short(node)}")
        return settings
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{file} is not in the form that a run writes, and is not run as code ({error}): where you trust it, give "
            "it another name, or the config that the run was started with"
        ) from error


def _short(node: ast.AST) -> str:
    return ast.unparse(node).splitlines()[0][:80]


def _class(module: str, name: str) -> type:
    """Return a class that a run's config imports. Raises ValueError for what is not one of saccade.train's own."""
    trusted = ("saccade.train", *filter(None, os.environ.get(MODULES, "").split(",")))
    if not any(module == one or module.startswith(f"{one}.") for one in trusted):
        raise ValueError(f"it imports {module}, which may run code; {MODULES}={module} allows it")
    try:
        cls = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ValueError(f"there is no module {module}") from error
    if not isinstance(cls, type) or cls.__module__ != module:
        raise ValueError(f"{module}.{name} is not a class of that module")
    return cls


def _literal(node: ast.expr, classes: Mapping[str, type]) -> Any:
    """Return the value of a literal, dict(key=value, …) or the name of a class. Raises ValueError for all else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(item.arg): _literal(item.value, classes) for item in node.keywords if item.arg is not None}
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError(f"line {node.lineno} is code: {_short(node)}")
        return {ast.literal_eval(k): _literal(v, classes) for k, v in zip(node.keys, node.values) if k is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        return (list if isinstance(node, ast.List) else tuple)(_literal(item, classes) for item in node.elts)
    if isinstance(node, ast.Name) and node.id in classes:
        return classes[node.id]
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"line {node.lineno} is code: {_short(node)}") from None
    if isinstance(value, str) and re.match(r"""\s*pipe:|.*://.*['"`;|&$<>\\\s]""", value, re.DOTALL):  # by webdataset
        raise ValueError(f"line {node.lineno} would run a command: {value[:80]}")
    return value


def _find(path: Path) -> Path:
    """Return the config file that a path means: itself, the config.py of a run's folder, or one of the package's."""
    if path.is_dir():
        if not (path / "config.py").is_file():
            raise UserError(
                f"there is no config in {path}: give a config file, or the folder of a run, with a config.py"
            )
        return path / "config.py"
    if not path.is_file():
        shipped = Path(__file__).parents[2] / "configs"
        if len(path.parts) == 2 and (file := shipped / path.with_suffix(".py")).is_file():
            return file
        if path.suffix != ".py":
            near = _names(path.parent) or [f"{path.parent}/{name[:-3]}" for name in _names(shipped / path.parent)]
            name = path.name if _names(path.parent) else str(path)
            raise UserError(f"there is no config file and no run {path}{closest(name, near)}")
        raise UserError(f"there is no config {path}{closest(path.name, _names(path.parent))}")
    return path


def _names(folder: Path) -> list[str]:
    """List the configs and runs in a folder."""
    configs = [file.name for file in folder.glob("*.py") if file.name != "__init__.py"]
    return configs + [file.parent.name for file in folder.glob("*/config.py")]


def _package_folder(package: str) -> str:
    """Return the folder of a package's modules; also works for saccade's own when installed in editable mode."""
    if package == __name__.partition(".")[0]:
        spec = importlib.util.find_spec(f"{package}.configs")
        assert spec is not None and spec.submodule_search_locations
        return str(Path(spec.submodule_search_locations[0]).parent)
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"there is no package {package}")
    return spec.submodule_search_locations[0]


_merge = ConfigDict.update


def _update(section: ConfigDict, *args: Any, **kwargs: Any) -> None:
    """Do what ConfigDict.update does, but refuse to merge a dict where replacing it may be intended."""
    for key, value in dict(*args, **kwargs).items():
        base = dict.get(section, key)
        kept = sorted(base.keys() - value.keys(), key=str) if isinstance(base, dict) and isinstance(value, dict) else []
        if kept:
            raise ValueError(
                f"update({key}=…) would keep {', '.join(map(str, kept))} of the base's {key}: assign SECTION.{key} = "
                f"dict(…) to replace it, or call SECTION.{key}.update(…) to change a part of it"
            )
    _merge(section, *args, **kwargs)


def _plain(value: Any) -> Any:
    """Turn mmengine's types into plain ones and expand paths."""
    if isinstance(value, dict):
        return Section({k: _plain(v) for k, v in value.items()})
    if isinstance(value, str):
        return expand_path(value)
    return type(value)(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def expand_path(text: str) -> str:
    """Expand `~` and environment variables in a text that is a path (begins with ~ or $, or has a slash)."""
    if re.match(r"~\w*(/|$)|\$\{?\w+\}?/", text) or ("/" in text and "$" in text):
        return os.path.expandvars(os.path.expanduser(text))
    return text


def _override(settings: Section, override: str) -> None:
    """Apply one key=value of the command line."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r} is not an override: write key=value or section.key=value")
    *names, key = path.split(".")
    section = settings
    for depth, name in enumerate(names):
        if section.get(name) is None:
            section[name] = Section()
        section = section[name]
        if not isinstance(section, dict):
            raise UserError(f"{path} can't be set: {'.'.join(names[: depth + 1])} is a value, not a section")
    if not text:
        if key not in section:
            raise UserError(
                f"{override} removes a key that the config does not set; for an empty string, write {path}=''"
            )
        del section[key]
        return
    try:
        section[key] = _plain(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        section[key] = expand_path(text)
    if not isinstance(section[key], (list, tuple, dict)):  # a number may be meant as a string, such as a folder
        section.spelled[key] = expand_path(text)
    other = ALTERNATIVES.get(path)
    if other in settings and section[key] is not None and other not in settings.spelled:
        settings[other] = None


def option_hint(option: str, value: str, keys: Sequence[str]) -> str:
    """Return the error for an unknown option ("--lr", "1e-3"), with the override that was probably intended."""
    name = option.lstrip("-").replace("-", "_")
    name = dict(learning_rate="lr", batch="batch_size", wd="weight_decay", resolution="img_size").get(name, name)
    meant = [key for key in keys if key == name or key.endswith(f".{name}")]
    if meant:
        return f"unknown option {option}: write {' or '.join(f'{key}={value}' for key in meant)}"
    near = closest(name, [key.rpartition(".")[2] for key in keys]).partition(", there is")[0]
    return f"unknown option {option}{near}; a key of the config is changed by key=value, without dashes"


def signature(*built: Callable, without: Sequence[str] = ()) -> dict[str, tuple[Any, bool]]:
    """Return the arguments of callables that a section can set: name -> (type hint, whether it is required).

    A class may name, in `passes_to`, callables that get its further keyword arguments.
    """
    known: dict[str, tuple[Any, bool]] = {}
    for function in (each for outer in built for each in (outer, *getattr(outer, "passes_to", ()))):
        hints = _hints(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) and name not in without:
                known.setdefault(name, (hints.get(name, Any), parameter.default is parameter.empty))
    return known


def check(
    section: str,
    settings: dict,
    *built: Callable,
    without: Sequence[str] = (),
    ranges: Mapping[str, Range] | None = None,
) -> None:
    """Check a config section against the signatures of the callables it is passed to.

    A section cannot set arguments that are positional-only or listed in `without`. ranges: of arguments whose
    annotations give none. Raises UserError, with the closest names, for an unknown or missing key, and for a value of
    the wrong type or out of range. Where a string is wanted and the command line's value was read as a number, the
    value becomes the string as it was typed.
    """
    prefix = f"{section}." if section else ""
    known = signature(*built, without=without)
    for key, value in settings.items():
        if key not in known:
            within = [f"{name}.{key}" for name, one in settings.items() if isinstance(one, dict) and key in one]
            hint = f", did you mean {' or '.join(within)}?" if within else closest(str(key), known)
            raise UserError(f"unknown key {prefix}{key}{hint}")
        hint = known[key][0]
        spelled = getattr(settings, "spelled", {}).get(key)
        if spelled is not None and not isinstance(value, str) and not _fits(value, hint) and _fits(spelled, hint):
            settings[key] = value = spelled
        if not _fits(value, hint):
            raise UserError(f"{prefix}{key} must be {describe(hint)}; got {value!r}")
        allowed = (ranges or {}).get(key)
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if allowed and _is_number(number) and number not in allowed:
                each = "numbers, each " if isinstance(value, (list, tuple)) else ""
                raise UserError(f"{prefix}{key} must be {each}{allowed}; got {value!r}")
    for key, (_, required) in known.items():
        if required and key not in settings:
            raise UserError(
                f"{prefix}{key} is missing: set it in the config or with {prefix}{key}=… on the command line"
            )


def check_finite(section: str, value: Any) -> None:
    """Raise UserError for a number in a section that is infinite or NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{section} must be a finite number; got {value}")
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(f"{section}.{key}" if section else str(key), item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_finite(section, item)


def _hints(function: Any) -> dict[str, Any]:
    try:
        target: Any = function.__init__ if inspect.isclass(function) else function
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError):  # annotations that only its own module can resolve
        return {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fits(value: Any, hint: Any) -> bool:
    """Return whether a value has the type, and is in the range, of a type hint."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in args)
    if origin is Annotated:
        ranges = [extra for extra in args[1:] if isinstance(extra, Range)]
        return _fits(value, args[0]) and all(
            number in allowed
            for allowed in ranges
            for number in (value if isinstance(value, (list, tuple)) else (value,))
            if _is_number(number)
        )
    hint = origin or hint
    if not isinstance(hint, type):
        return True
    if isinstance(value, bool) and hint is not object:
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    if issubclass(hint, (tuple, list)) or hint is Sequence:
        if not isinstance(value, (tuple, list)):
            return False
        if issubclass(hint, tuple) and args and args[-1] is not Ellipsis:
            return len(value) == len(args) and all(map(_fits, value, args))
        return not args or all(_fits(item, args[0]) for item in value)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """Describe a type hint in words: "a number, 0 or more"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        named = dict.fromkeys(describe(option) for option in args if getattr(option, "__name__", "") != "Tensor")
        return (", or " if any("," in name for name in named) else " or ").join(named)
    if origin is Literal:
        return f"{'one of ' if len(args) > 1 else ''}{', '.join(map(repr, args))}"
    if origin is Annotated:
        return ", ".join([describe(args[0]), *(str(extra) for extra in args[1:] if isinstance(extra, Range))])
    base = origin or hint
    if base is type(None):
        return "None"
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
    words |= {dict: "a section, dict(key=value, …)", type: "a class"}
    if base in words:
        return words[base]
    if isinstance(base, type) and (issubclass(base, (tuple, list)) or base is Sequence):
        if not args:
            return "a list"
        if issubclass(base, tuple) and args[-1] is not Ellipsis:
            return f"{len(args)} values ({', '.join(describe(item) for item in args)})"
        return f"a list, each item {describe(args[0])}"
    return getattr(hint, "__name__", None) or str(hint).replace("typing.", "")


def check_typed(section: str, settings: Any) -> None:
    """Check a section whose `type` is the class that it builds."""
    if not isinstance(settings, dict) or not isinstance(settings.get("type"), type):
        given = settings.get("type") if isinstance(settings, dict) else settings
        raise UserError(f"{section} needs type=… , a class that the config file imports; got {given!r}")
    arguments = settings["type"]
    own = Section({k: v for k, v in settings.items() if k != "type"})
    own.spelled = getattr(settings, "spelled", {})
    check(section, own, arguments)
    settings.update(own)


def build(settings: dict, *given: Any) -> Any:
    """Return `settings["type"](*given, **the rest)`."""
    return settings["type"](*given, **{k: v for k, v in settings.items() if k != "type"})


def dump(settings: dict) -> str:
    """Return the text of a config file from which `load` reads the same config."""
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


def flatten(text: str) -> dict[str, str]:
    """Return the dotted keys of a config's text from `dump`, with their values' source: {"optimizer.lr": "0.001"}."""

    def walk(key: str, node: ast.expr) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Call) and node.keywords:  # dict(key=value, …)
            for keyword in node.keywords:
                yield from walk(f"{key}.{keyword.arg}", keyword.value)
        else:
            yield key, ast.unparse(node)

    statements = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return {key: value for node in statements for key, value in walk(ast.unparse(node.targets[0]), node.value)}
