"""Checkpoints: one safetensors file holds the whole state of training, and survives what happens to files.

The tensors are named ("model.…", "ema.…", "optimizer.state.PARAMETER.KEY"); step, best metric, config and the like are
JSON in the file's metadata, beside a SHA-256 over all of it that is verified on reading. Nothing is pickled. A file is
written under a temporary name in its own folder, flushed to the disk and renamed, so that what has its final name is
whole. A run keeps `last`, the `previous` one, and the `best`.
"""

import hashlib
import json
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
    """A file that can't be read as a checkpoint; the message says which and why."""


class Foreign(Unreadable):
    """A whole safetensors file that is no checkpoint of a training run."""


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; the block's end makes it `path`, durably, or leaves `path` untouched.

    Raises UserError (exit code 74 for a full disk, 2 for a missing permission), the temporary file removed.
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
    """safetensors wraps the system's error into its own text: "… Os { code: 28, kind: StorageFull, message: … }"."""
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
    """Write a small file as a checkpoint is written: whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def digest(tensors: dict[str, Tensor], meta: str) -> str:
    """SHA-256 over names, dtypes, shapes, bytes and metadata of contiguous CPU tensors."""
    sha = hashlib.sha256(meta.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def save(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], best: bool) -> None:
    """Write `last`, keep the one before as `previous`, and where `best`, keep the new one under that name too.

    tensors: of any device and layout. meta: what JSON can say. Raises UserError, earlier files untouched.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(meta, sort_keys=True)
    with atomic_write(folder / LAST) as temporary:
        save_file(tensors, temporary, {"saccade": text, "sha256": digest(tensors, text)})
        if best:
            _link(temporary, folder / BEST)
        if (folder / LAST).exists():
            _link(folder / LAST, folder / PREVIOUS)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint file and verify it.

    Raises Unreadable for a file that is not whole, Foreign for a whole safetensors file that `save` did not write.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path} can't be read ({error})") from error
    if "saccade" not in metadata:
        raise Foreign(f"{path} is no checkpoint of a training run")
    if digest(tensors, metadata["saccade"]) != metadata.get("sha256"):
        raise Unreadable(f"{path} is damaged (contents and checksum disagree)")
    return tensors, json.loads(metadata["saccade"])


def _link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where the file system has no hard links."""
    with atomic_write(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """The newest whole checkpoint of a run: tensors, metadata, and what was wrong with newer files.

    None where nothing was saved yet. Raises UserError where files are there but none is whole.
    """
    complaints = []
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            try:
                return *read(folder / name), complaints
            except Unreadable as error:
                complaints.append(str(error))
    if complaints:
        raise UserError(f"no checkpoint is whole ({'; '.join(complaints)}): start again with --overwrite")
    return None


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state by name: the tensors, and what JSON can say (its groups' settings, plain numbers)."""
    names = _parameter_names(optimizer, model)
    state = optimizer.state_dict()
    kept = {f"state.{names[i]}.{key}": v for i, entries in state["state"].items() for key, v in entries.items()}
    for i, group in enumerate(state["param_groups"]):
        kept |= {f"group.{i}.{key}": v for key, v in group.items() if key not in ("params", "param_names")}
    tensors = {name: value for name, value in kept.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in kept.items() if name not in tensors}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` returned. Raises KeyError where the model has not the same parameters."""
    names = _parameter_names(optimizer, model)
    index, parameters = {name: i for i, name in enumerate(names)}, dict(model.named_parameters())
    state = optimizer.state_dict()
    state["state"] = {}
    for full, value in {**tensors, **plain}.items():
        kind, _, rest = full.partition(".")
        name, _, key = rest.rpartition(".")
        if kind == "group":
            state["param_groups"][int(name)][key] = tuple(value) if isinstance(value, list) else value
        else:
            if isinstance(value, Tensor) and value.shape == parameters[name].shape:
                value = shard_tensor(value, parameters[name])
            state["state"].setdefault(index[name], {})[key] = value
    optimizer.load_state_dict(state)
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():  # laid out as the parameter again: other strides round differently
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def label_names(folder: Path) -> list[str]:
    """The classes of a finished run's model. Raises UserError where its config.json does not name them."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["label_names"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder / 'config.json'} does not name the model's classes ({error}): train the run again"
        ) from error
