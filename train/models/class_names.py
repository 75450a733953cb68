"""The class names of models, compared with those of the data that they are tested on or trained further with."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.errors import UserError, closest
from .published import read_published
from .weights import Weights, class_names_of_run


def read_class_names(weights: Path | Weights) -> list[str] | None:
    """Return the classes of a run's folder, a checkpoint or an OpenMMLab file; None where nothing names them."""
    if isinstance(weights, Path) and (weights.suffix == ".safetensors" or not weights.is_file()):
        return class_names_of_run(weights)
    try:
        return read_published(weights).class_names
    except UserError:  # loading the weights will raise it
        return None


def read_class_map(file: Path) -> dict[str, str]:
    """Read {class of the data: class of the model} from a JSON file."""
    try:
        mapping = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"--class-map {file} can't be read ({error}): give a JSON file") from error
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise UserError(f'--class-map {file} must be {{"class of the data": "class of the model", …}} with names only')
    return mapping


def rename_classes(model: Sequence[str], class_map: dict[str, str]) -> list[str]:
    """Return the model's classes under the data's names, by {class of the data: class of the model}."""
    renamed: dict[str, str] = {}
    for ours, theirs in class_map.items():
        if theirs not in model:
            raise UserError(f"--class-map: the model has no class {theirs!r}{closest(theirs, model)}")
        if theirs in renamed:
            raise UserError(
                f"--class-map: {renamed[theirs]!r} and {ours!r} are both {theirs!r}: each class of the model stands "
                "for one of the data"
            )
        renamed[theirs] = ours
    # An unmapped class of the model with the name of a class of the data is a different class.
    free = {name: f"{name} (of the model)" for name in class_map}
    return [(free | renamed).get(name, name) for name in model]


def match_classes(data: Sequence[str], model: Sequence[str], subset: bool = False) -> list[int]:
    """Return the index, among the model's classes, of each class of the data.

    subset: whether the data may have some of the model's classes only. Raises UserError where names differ.
    """
    if list(data) == list(model):
        return list(range(len(model)))
    unknown = [name for name in data if name not in model]
    missing = [] if subset else [name for name in model if name not in data]
    if unknown or missing:
        parts = [f"the model does not have the data's {_few(unknown)}"] if unknown else []
        parts += [f"the data do not have the model's {_few(missing)}"] if missing else []
        raise UserError(
            f"the data's classes are not the model's: {', and '.join(parts)}; test on data of the model's classes, or "
            "map the names with --class-map FILE.json"
        )
    repeated = [name for name in data if list(data).count(name) > 1 or list(model).count(name) > 1]
    if repeated:
        raise UserError(
            f"the class name {repeated[0]!r} occurs twice, and the data's classes are in another order than the "
            "model's: give each class a unique name"
        )
    return [list(model).index(name) for name in data]


def _few(names: Sequence[str]) -> str:
    """List the first three."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def find_labels(labels: Tensor, indices: Sequence[int]) -> Tensor:
    """Return the position in `indices` of each label, or -1 where it is not among them."""
    equal = labels[:, None] == torch.tensor(indices, device=labels.device)
    return torch.where(equal.any(1), equal.int().argmax(1), -1)


def fit_head(
    tensors: dict[str, Tensor], classifiers: Sequence[str], own: dict[str, Tensor], order: Sequence[int] | None
) -> dict[str, Tensor]:
    """Return a file's tensors with its classifiers' rows in the data's order, or (None) with the model's own rows.

    classifiers: names of tensors with a row for each class. own: the model's state_dict.
    """
    if order is None:
        return tensors | {name: own[name] for name in classifiers if name in tensors}
    return tensors | {name: tensors[name][list(order)] for name in classifiers if name in tensors}
