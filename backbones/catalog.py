"""What is known of each model of the zoo: its family, published accuracy, and where its weights are."""

import sys
from collections import defaultdict
from types import ModuleType
from typing import NamedTuple

import timm


class Published(NamedTuple):
    """top1: on ImageNet-1K, in percent. source: where that is reported."""

    top1: float
    source: str


def families() -> dict[str, list[str]]:
    """Return the names of the models of each family, by the name of its module: {"saccade.backbones.biformer": …}."""
    names: dict[str, list[str]] = defaultdict(list)
    package = __name__.rpartition(".")[0] + "."
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module.startswith(package):
            names[module].append(name)
    return dict(names)


def module_of(name: str) -> ModuleType:
    """Return the module of a model's family."""
    return sys.modules[timm.model_entrypoint(name).__module__]


def published(name: str) -> Published | None:
    """Return the published accuracy of a model, from its family's PUBLISHED; None where none is."""
    entry = getattr(module_of(name), "PUBLISHED", {}).get(name)
    return None if entry is None else Published(*entry)


def weights(name: str) -> str | None:
    """Return where a model's weights are: a hub id that timm downloads, or text from its family's WEIGHTS, or None."""
    return timm.get_pretrained_cfg(name).hf_hub_id or getattr(module_of(name), "WEIGHTS", {}).get(name)
