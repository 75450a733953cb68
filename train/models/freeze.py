"""Freeze parts of a model."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from timm.models import group_parameters
from torch import nn

from ..runtime.errors import UserError, closest


def freeze(model: nn.Module, what: int | str | Sequence[str]) -> list[nn.Module]:
    """Freeze a part of a model; returns its modules, which must be kept in eval mode.

    what: the number of first stages (of a model without stages: blocks), including the stem, as defined by the model's
    group_matcher. Or names of modules and parameters, with everything below them: "stem", "stages.0", "*.norm1",
    "pos_embed". In eval mode a frozen BatchNorm keeps its statistics, and there is no dropout.
    Raises UserError for a number or name that the model does not have, and if nothing would be left to train.
    """
    frozen = _first_stages(model, what) if isinstance(what, int) else _named(model, what)
    parameters = {parameter for name, parameter in model.named_parameters() if name in frozen}
    for parameter in parameters:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze={what!r} leaves no trainable parameters: freeze fewer modules or stages")

    def frozen_modules(module: nn.Module) -> list[nn.Module]:
        own = set(module.parameters())
        if own and own <= parameters:
            return [module]
        return [frozen for child in module.children() for frozen in frozen_modules(child)]

    return frozen_modules(model)


def _first_stages(model: nn.Module, count: int) -> set[str]:
    group = group_parameters(model, model.group_matcher(coarse=True), reverse=True)  # stem 0, head last
    stages = max(group.values()) - 1
    if not 1 <= count <= stages:
        raise UserError(f"freeze={count} must be 1 to {stages}, the number of stages of this model")
    return {name for name, number in group.items() if number <= count}


def _named(model: nn.Module, patterns: str | Sequence[str]) -> set[str]:
    parameters = [name for name, _ in model.named_parameters()]
    names = {name for name, _ in model.named_modules() if name} | set(parameters)
    frozen = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        below = {p for p in parameters if any(p == name or p.startswith(f"{name}.") for name in matched)}
        if not below:
            raise UserError(f"freeze: {pattern!r} matches no part of the model with weights{closest(pattern, names)}")
        frozen |= below
    return frozen
