"""The backbone of detectors and segmenters, a timm model: maps, parameter groups, weights from files."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn


class OnBody(nn.Module):
    """A model whose `backbone` is a `body` from saccade.train.models.build.create_features.

    It has the methods that timm's optimizers and the engine call on a classifier. no_decay: patterns of parameter names
    without weight decay, besides those of the body's own model.
    """

    no_decay: tuple[str, ...] = ()

    @property
    def body(self) -> nn.Module:
        return self.backbone

    def _own_names(self) -> dict[str, str]:
        """The body's parameters: name in this model -> name in the classifier that the body was made of."""
        return {f"backbone.{name}": _unflattened(name) for name, _ in self.body.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Return parameter name -> layer (coarse: stage) as timm counts them: the body's, then all heads as one."""
        names = self._own_names()
        matcher = self.body.stages if coarse else self.body.layers
        layers = group_with_matcher(((name, None) for name in names.values()), matcher, reverse=True)
        return lambda name: float(layers[names[name]]) if name in names else math.inf

    def no_weight_decay(self) -> set[str]:
        exempt = self.body.exempt
        return {ours for ours, theirs in self._own_names().items() if theirs in exempt} | set(self.no_decay)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        getattr(self.body, "model", self.body).set_grad_checkpointing(enable)


def _unflattened(name: str) -> str:
    """A parameter's name before timm took the model's maps: `model.` is put before, or `stages.0.` made `stages_0.`"""
    return re.sub(r"^([a-z]\w*?)_(\d+)\.", r"\1.\2.", name.removeprefix("model."))


def freeze_batchnorm(module: nn.Module) -> None:
    """Make a module's BatchNorms use their running statistics; their weights and biases are still trained."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()


def keep_full_precision(module: nn.Module) -> nn.Module:
    """Convert a module's half-precision outputs, as autocast makes them, to float32; returns the module.

    Boxes, and the operators on them, need that precision.
    """
    module.register_forward_hook(_convert_output)
    return module


def _convert_output(module: nn.Module, inputs: tuple, output: Any) -> Any:
    return to_full_precision(output)


def to_full_precision(value: Any) -> Any:
    """Convert half-precision tensors, alone or in lists, tuples and dicts, to float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, dict):
        return {key: to_full_precision(part) for key, part in value.items()}
    return type(value)(map(to_full_precision, value))
