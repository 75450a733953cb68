"""Insert plug-in layers into any network: `insert(model, "ela", "layer?.*.bn2", version="b")`."""

import fnmatch
import re
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from .ela import ELA
from .ulsam import ULSAM

LAYERS = dict(ela=ELA, ulsam=ULSAM)


def insert(model: nn.Module, layer: str, where: str | re.Pattern | Iterable[str], **kwargs) -> nn.Module:
    """Insert a plug-in layer after modules of a convolutional network, in place; returns the model.

    Args:
        model: timm's, or any other, also wrapped for `features_only`.
        layer: "ela" or "ulsam".
        where: the modules to follow, by their names in `model.named_modules()`: one or several glob patterns (each must
            match), or a compiled regular expression that matches whole names. Each module must return a map
            (B, C, H, W) when the model runs.
        kwargs: the layer's arguments, except for the channels, which are determined by running the model on a fake
            image.

    A layer becomes the submodule `inserted.ela` or `inserted.ulsam` of the module that it follows, so all other keys of
    the state dict are unchanged: load the weights of the original network before, or after with strict=False.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(map(repr, LAYERS))}, got {layer!r}")
    targets = _matching(model, where)
    outputs = _outputs(model, targets)
    layers = {}
    for name, module in targets.items():  # create all layers before inserting the first
        y = outputs.get(name)
        if not isinstance(y, Tensor) or y.dim() != 4 or y.shape[2] != y.shape[3]:  # of a square image
            got = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            got = got if name in outputs else "nothing, since it does not run"
            raise ValueError(f"{name} must return a map (B, C, H, W) for a layer to follow it, got {got}")
        if hasattr(getattr(module, "inserted", None), layer):
            raise ValueError(f"{name} is already followed by {layer!r}")
        try:
            layers[name] = LAYERS[layer](y.shape[1], device=y.device, dtype=y.dtype, **kwargs).train(module.training)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    fresh = {name: module for name, module in targets.items() if not hasattr(module, "inserted")}
    for module in fresh.values():
        module.add_module("inserted", nn.Sequential().train(module.training))
    try:
        run = _outputs(model, {name: module.inserted for name, module in fresh.items()})  # type: ignore[misc]
    except Exception as error:  # of some module that runs all its children, but not one after the other
        for module in fresh.values():
            del module.inserted
        raise ValueError(f"a layer cannot follow {', '.join(fresh)}, which run their children differently") from error
    for name, module in fresh.items():
        if name not in run:  # else it is an nn.Sequential or its like, which runs whatever its children are
            module.register_forward_hook(_follow, prepend=True)  # before hooks that collect features
    for name, module in targets.items():
        module.inserted.add_module(layer, layers[name])
    return model


def _follow(module: nn.Module, args: tuple, y: Tensor) -> Tensor:
    return module.inserted(y)


def _matching(model: nn.Module, where: str | re.Pattern | Iterable[str]) -> dict[str, nn.Module]:
    modules = {name: m for name, m in model.named_modules() if name and "inserted" not in name.split(".")}
    names: list[str] = []
    for pattern in [where] if isinstance(where, str | re.Pattern) else where:
        regex = re.compile(fnmatch.translate(pattern)) if isinstance(pattern, str) else pattern
        matches = [name for name in modules if regex.fullmatch(name)]
        if not matches:
            raise ValueError(f"no module of {type(model).__name__} has a name that matches {pattern!r}")
        names += matches
    return {name: modules[name] for name in dict.fromkeys(names)}


def _outputs(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, object]:
    """Return the output of each module that runs for a square image, on fake tensors."""
    outputs: dict[str, object] = {}

    def keep(name: str, module: nn.Module, args: tuple, y: object) -> None:
        outputs[name] = y

    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    side = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (3, 224, 224))[-1]
    modes = {m: m.training for m in model.modules()}  # in training a BatchNorm would count the batch
    hooks = [m.register_forward_hook(partial(keep, name), prepend=True) for name, m in modules.items()]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            model.eval()(first.weight.new_empty(2, first.in_channels, side, side))
    finally:
        for hook in hooks:
            hook.remove()
        for m, mode in modes.items():
            m.training = mode
    return outputs
