"""Convert published checkpoints, whatever their container and keys, to state dicts of our models."""

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

Rules = Iterable[tuple[str, str | Callable[[re.Match], str]]]  # patterns and what replaces them, applied in order


class MismatchError(ValueError):
    """Weights that are not a model's. differences: for each entry that does not fit, its key and what is wrong."""

    def __init__(self, message: str, differences: list[str]):
        super().__init__(message)
        self.differences = differences


def rename_key(key: str, rules: Rules) -> str:
    for pattern, ours in rules:
        key = re.sub(pattern, ours, key)
    return key


def unwrap(state_dict: dict, containers: tuple[str, ...] = ("state_dict", "model")) -> dict[str, Tensor]:
    """Return the weights of a checkpoint: from the first of `containers` that it has, without the prefix 'module.', and
    of a detector or segmenter only the `backbone.` part."""
    for container in containers:
        if isinstance(state_dict.get(container), dict):
            state_dict = state_dict[container]
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    return state_dict


def compare_shapes(theirs: dict[str, Tensor], own: dict[str, Tensor], keys: Iterable[str]) -> list[str]:
    """Describe each of these entries: "KEY is SHAPE there and SHAPE here", where a missing one has no shape."""
    described = []
    for key in keys:
        has, wants = (tuple(d[key].shape) if key in d else "missing" for d in (theirs, own))
        described.append(f"{key} is {has} there and {wants} here")
    return described


def complete(state_dict: dict[str, Tensor], model: nn.Module, body: str = "stages.") -> dict[str, Tensor]:
    """Complete a state dict under our names with the model's own values for what a file may lack.

    A dense model's file lacks the head and the last norm, a classification file the `out_norms`; old files lack
    BatchNorm's batch counts. `out_norms` that the model does not have are dropped. All other keys that start with
    `body` must be present with the model's shapes.

    Raises:
        MismatchError: if a weight of the body is missing, unexpected or has another shape.
    """
    own = model.state_dict()
    out = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | state_dict
    keys = [key for key in own | out if key.startswith(body)]
    if unlike := [k for k in keys if k not in own or k not in out or own[k].shape != out[k].shape]:
        differences = compare_shapes(out, own, unlike)
        raise MismatchError(
            f"not the weights of this {type(model).__name__}: {len(unlike)} of {len(keys)} entries of its {body[:-1]} "
            f"do not fit, {differences[0]}",
            differences,
        )
    out = {k: v for k, v in out.items() if k in own or not k.startswith("out_norms.")}
    dense_file = "head.fc.weight" not in out
    for key in own:
        if key not in out and (key.startswith("out_norms.") or (dense_file and key.startswith(("norm.", "head.")))):
            out[key] = own[key]
    return out
