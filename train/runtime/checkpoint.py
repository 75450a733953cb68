"""Checkpoints: one safetensors file with the whole state of training, written atomically and verified on reading.

The tensors are named ("model.…", "ema.…", "optimizer.state.PARAMETER.KEY"); step, best metric, config and the like are
JSON in the file's metadata, beside a SHA-256 over all of it that is verified on reading. Nothing is pickled. A file is
written under a temporary name in its own folder, flushed to the disk and renamed, so that a file with its final name is
complete. A run keeps `last`, the `previous` one, and the `best`.
"""

import hashlib
import inspect
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .distributed import shard_tensor
from .errors import UserError, from_os

LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"


class Unreadable(Exception):
    """A file that can't be read as a checkpoint; the message names it and the reason."""


class Foreign(Unreadable):
    """A valid safetensors file that is not a checkpoint of a training run."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write to a temporary file and atomically rename it to `path` on success.

    Yields the temporary file's path. Where the block raises, `path` is left as it was. Raises UserError (exit code 74
    for a full disk, 2 for a missing permission).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # safetensors makes its files private
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise from_os(as_os_error(error), f"saving {path}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def as_os_error(error: OSError | SafetensorError) -> OSError:
    """Return the system's error that safetensors wraps in its text: "… Os { code: 28, kind: StorageFull, … }"."""
    if isinstance(error, OSError):
        return error
    code = re.search(r"code: (\d+)|os error (\d+)", str(error))
    number = int(next(filter(None, code.groups()))) if code else 0
    return OSError(number, os.strerror(number) if number else str(error))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Undecodable bytes of file names (lone surrogates) are escaped."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as strict JSON, in which numbers that are not finite (undefined metrics) are null."""

    def plain(value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(map(plain, value)) if isinstance(value, (list, tuple)) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write a value as an indented file of strict JSON, atomically."""
    write_text(path, to_json(value, 2) + "\n")


def digest(tensors: dict[str, Tensor], meta: str) -> str:
    """Return the SHA-256 over names, dtypes, shapes, bytes and metadata of contiguous CPU tensors."""
    sha = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], best: bool, rotate: bool = True) -> None:
    """Write `last`; keep the one before it as `previous`, and where `best`, keep the new one under that name too.

    tensors: of any device and layout. meta: values that JSON has. rotate: False where `last` is of the same step, so
    that `previous` stays. Raises UserError, earlier files untouched.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(meta, sort_keys=True)
    with atomic_write(folder / LAST) as temporary:
        save_file(tensors, temporary, {"saccade": text, "sha256": digest(tensors, text)})
        if best:
            _link(temporary, folder / BEST)
        if rotate and (folder / LAST).exists():
            _link(folder / LAST, folder / PREVIOUS)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint file and verify it.

    Raises Unreadable for a damaged file, Foreign for a valid safetensors file that `save` did not write.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path} can't be read ({error})") from error
    if "saccade" not in metadata:
        raise Foreign(f"{path} is not a checkpoint of a training run")
    if digest(tensors, metadata["saccade"]) != metadata.get("sha256"):
        raise Unreadable(f"{path} is damaged (contents and checksum disagree)")
    return tensors, json.loads(metadata["saccade"])


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            sha.update(piece)
    return sha.hexdigest()


def step(path: Path) -> int:
    """Return the step of a checkpoint file from its metadata, unverified; -1 if it is missing or can't be read."""
    try:
        with safe_open(path, "pt") as file:
            return int(json.loads(file.metadata()["saccade"])["step"])
    except (SafetensorError, OSError, UnicodeDecodeError, ValueError, KeyError, TypeError):
        return -1


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no hard links."""
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Read a run's newest intact checkpoint: tensors, metadata, and a message for each newer file that is damaged.

    Returns None where nothing was saved yet. Raises UserError where there are files and all are damaged.
    """
    messages: list[str] = []
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            try:
                return *read(folder / name), messages
            except Unreadable as error:
                messages.append(str(error))
    if messages:
        raise UserError(f"every checkpoint is damaged ({'; '.join(messages)}): start again with --overwrite")
    return None


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimizer's state by parameter name: tensors, and plain values (its groups' settings among them)."""
    names = _parameter_names(optimizer, model)
    state = optimizer.state_dict()
    entries = {f"state.{names[i]}.{key}": v for i, values in state["state"].items() for key, v in values.items()}
    for i, group in enumerate(state["param_groups"]):
        entries |= {f"group.{i}.{key}": v for key, v in group.items() if key not in ("params", "param_names")}
    tensors = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in entries.items() if name not in tensors}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Load what `optimizer_state` returned; the groups' settings (lr, weight_decay, …) stay as the optimizer has them.

    Of the groups only counters such as LAMB's `step` are loaded, which are no arguments of the optimizer. Parameters
    that are no longer trained are skipped, and those newly trained begin without a state. Raises KeyError for an entry
    of a parameter that the model does not have.
    """
    names = _parameter_names(optimizer, model)
    index, parameters = {name: i for i, name in enumerate(names)}, dict(model.named_parameters())
    settings = {*inspect.signature(type(optimizer)).parameters, *optimizer.defaults, "initial_lr", "lr_scale"}
    state = optimizer.state_dict()
    state["state"] = {}
    for full, value in {**tensors, **plain}.items():
        kind, _, rest = full.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "group":
            if key not in settings and int(name) < len(state["param_groups"]):
                state["param_groups"][int(name)][key] = tuple(value) if isinstance(value, list) else value
        elif name in index or name not in parameters:
            if isinstance(value, Tensor) and value.shape == parameters[name].shape:
                value = shard_tensor(value, parameters[name])
            state["state"].setdefault(index[name], {})[key] = value
    optimizer.load_state_dict(state)
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():  # with the parameter's strides again: others round differently
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def label_names(folder: Path) -> list[str]:
    """Return the class names of a finished run's model. Raises UserError where its config.json does not have them."""
    try:
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["label_names"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("label_names must be a list of names")
        return names
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'config.json'} does not name the model's classes ({error}): train the run again"
        ) from error
