"""Published files, whatever their container and their keys, to the state dict of one of our models."""

import re
from collections.abc import Callable, Iterable

from torch import Tensor, nn

Rules = Iterable[tuple[str, str | Callable[[re.Match], str]]]  # patterns and what replaces them, applied in order


def renamed(key: str, rules: Rules) -> str:
    for pattern, ours in rules:
        key = re.sub(pattern, ours, key)
    return key


def opened(state_dict: dict, containers: tuple[str, ...] = ("state_dict", "model")) -> dict[str, Tensor]:
    """The weights in a file: containers opened in this order, 'module.' stripped, and of a whole detector or segmentor
    the `backbone.` part."""
    for container in containers:
        if isinstance(state_dict.get(container), dict):
            state_dict = state_dict[container]
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}
    if any(key.startswith("backbone.") for key in state_dict):
        state_dict = {k.removeprefix("backbone."): v for k, v in state_dict.items() if k.startswith("backbone.")}
    return state_dict


def fitted(state_dict: dict[str, Tensor], model: nn.Module, body: str = "stages.") -> dict[str, Tensor]:
    """state_dict, under our names, for model: what a file may lack is the model's own.

    A dense model's file lacks the head and the last norm, a classification file the `out_norms`, which are left out
    where the model has none; old files lack the counts of BatchNorm's batches. All other keys that start with `body`
    must be there and have the model's shapes.

    Raises:
        ValueError: a weight of the body is missing, left over or of another shape.
    """
    own = model.state_dict()
    out = {k: v for k, v in own.items() if k.endswith("num_batches_tracked")} | state_dict
    keys = [key for key in own | out if key.startswith(body)]
    if unlike := [k for k in keys if k not in own or k not in out or own[k].shape != out[k].shape]:
        has, wants = (tuple(d[unlike[0]].shape) if unlike[0] in d else "missing" for d in (out, own))
        raise ValueError(
            f"not the weights of this {type(model).__name__}: {len(unlike)} of {len(keys)} entries of its {body[:-1]} "
            f"do not fit, {unlike[0]} is {has} there and {wants} here"
        )
    out = {k: v for k, v in out.items() if k in own or not k.startswith("out_norms.")}
    dense_file = "head.fc.weight" not in out
    for key in own:
        if key not in out and (key.startswith("out_norms.") or (dense_file and key.startswith(("norm.", "head.")))):
            out[key] = own[key]
    return out
