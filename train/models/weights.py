"""Reading weight files, whichever program wrote them. No other module opens one."""

import argparse
import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from ..runtime.checkpoint import Foreign
from ..runtime.checkpoint import read as read_checkpoint
from ..runtime.errors import UserError, first_line

# What torch's weights-only reader may build besides tensors and plain values: the arguments in timm's checkpoints, and
# the scores in OpenMMLab's `meta`, which are NumPy scalars (module names of NumPy 1 and 2). Building them runs no code.
HARMLESS: list[Any] = [argparse.Namespace, np.dtype]
HARMLESS += [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType")]
HARMLESS += [
    (type(np.float64(0)).__reduce__(np.float64(0))[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")
]
# The keys under which programs store the weights in a checkpoint; averaged weights come first.
CONTAINERS = (
    "state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema", "teacher",
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "params", "module",
)  # fmt: skip


class SeveralSets(ValueError):
    """A file has several sets of weights, under names that do not say which is meant."""


@dataclass
class Weights:
    """The content of a weight file or run folder. Whatever takes the path takes this too, without reading it again."""

    file: Path
    tensors: dict[str, Tensor]  # the best weights, if the file is a run's checkpoint
    class_names: list[str] | None  # in label order, where the file names them
    container: str | None = None  # the key of a PyTorch file under which the tensors are

    def __fspath__(self) -> str:
        return str(self.file)

    __str__ = __fspath__


def read_weights(file: str | Path | Weights) -> Weights:
    """Read a weight file, or the weights in a run folder. Raises UserError, with the reason, if that is impossible.

    PyTorch's files are read by its weights-only reader, so that no code in them runs.
    """
    if isinstance(file, Weights):
        return file
    path = Path(file) / "model.safetensors" if Path(file).is_dir() else Path(file)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: give a file of weights or the folder of a finished run")
    try:
        if path.suffix == ".safetensors":
            tensors, names, container = _read_safetensors(path), class_names_of_run(path), None
        else:
            with torch.serialization.safe_globals(HARMLESS):
                content = torch.load(path, map_location="cpu", weights_only=True)
            (tensors, container), names = _unwrap(content), _class_names(content)
    except SeveralSets as error:
        raise UserError(f"checkpoint {path} {error}") from error
    except Exception as error:  # zip, pickle and tensor readers each have their own
        raise UserError(f"checkpoint {path} {why_unreadable(path, error)}") from error
    if not tensors:
        raise UserError(f"checkpoint {path} has no weights: a file must hold a state_dict")
    return Weights(Path(file), tensors, names, container)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors, meta = read_checkpoint(path)
    except Foreign:
        return clean_state_dict(load_file(path))
    kind = meta["best"]["weights"] + "." if meta["best"] else "model."
    return {key.removeprefix(kind): value for key, value in tensors.items() if key.startswith(kind)}


def _unwrap(content: Any) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a checkpoint, without the prefixes that training adds, and the key of the innermost dict
    that they are taken from."""
    container = None
    while isinstance(content, dict):
        inner = next((name for name in CONTAINERS if _has_tensors(content.get(name))), None)
        if inner is None and not any(isinstance(value, Tensor) for value in content.values()):
            named = [str(name) for name, value in content.items() if _is_state_dict(value)]
            if len(named) > 1:
                raise SeveralSets(f"has several sets of weights, {', '.join(named)}: save one of them to another file")
            inner = next(iter(named), None)
        if inner is None:
            break
        content, container = content[inner], inner
    if not isinstance(content, dict):
        return {}, None
    tensors = clean_state_dict({key: value for key, value in content.items() if isinstance(value, Tensor)})
    tensors.pop("n_averaged", None)  # the count in the state_dict of PyTorch's AveragedModel
    # OpenMMLab's EMAHook keeps a second copy under flattened names; the averaged weights have the plain ones.
    second = {f"ema_{key.replace('.', '_')}" for key in tensors}
    return {key: value for key, value in tensors.items() if key not in second}, container


def _has_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(x, Tensor) or _has_tensors(x) for x in value.values())


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(tensor, Tensor) for tensor in value.values())
    )


def _class_names(content: Any) -> list[str] | None:
    """Return the class names in the `meta` of an OpenMMLab file; None if there are none."""
    meta = content.get("meta") if isinstance(content, dict) else None
    if not isinstance(meta, dict):
        return None
    names = meta.get("CLASSES") or (meta.get("dataset_meta") or {}).get("classes")
    return [str(name).strip() for name in names] if names else None  # ADE20K's "bed " has a trailing space there


def class_names_of_run(path: Path) -> list[str] | None:
    """Return the class names of a run folder, or of a .safetensors file in one; None if they are not recorded."""
    if path.is_file():
        try:
            with safe_open(path, "pt") as file:
                names = json.loads((file.metadata() or {}).get("saccade", "{}")).get("class_names")
        except (SafetensorError, OSError, ValueError):  # loading the weights reports what is wrong
            return None
        if names:
            return names
        # A checkpoint of an earlier version, or an exported model.
        path = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    try:
        names = json.loads((path / "config.json").read_text(encoding="utf-8"))["label_names"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def why_unreadable(file: Path, error: Exception) -> str:
    """Describe why a file can't be read as weights, from its first bytes and the reader's error."""
    with open(file, "rb") as content:
        start = content.read(256).lstrip().lower()
    if not start:
        return "is empty: download it again"
    if start.startswith(b"<"):
        return "is a web page (HTML), not weights: download the file itself, not the page about it"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not weights: fetch the file itself with git lfs pull"
    if start.startswith((b"{", b"[")):
        return "is JSON text, not weights: give the file of weights"
    if start.isascii() and re.fullmatch(rb"[\s\x20-\x7e]*", start):
        return "is text, not weights: give the file of weights"
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as content:
            members = content.namelist()
        if any("/code/" in member for member in members):
            return "is a TorchScript program, not weights: save its state_dict to another file with torch.save"
        if members and all(member.endswith(".npy") for member in members):
            return "holds NumPy arrays: save them as tensors, in a .safetensors file or with torch.save"
    blocked = re.search(r"GLOBAL ([\w.]+)|global (\w+\.[\w.]+)", str(error))
    if blocked:
        name = blocked[1] or blocked[2]
        whose = "as files of mmdet 3 and mmseg 1 do, " if name.startswith("mmengine.") else ""
        return (
            f"holds Python objects ({name}), {whose}which are not loaded as they can run code: where you trust "
            "it, save its state_dict alone to another file"
        )
    if "weights_only" in str(error) or "weights only" in str(error).lower():
        return "is not a file of weights, or is damaged: download or convert it again"
    return f"can't be read ({first_line(error)}): it is damaged or incomplete; download or convert it again"
