"""What a detector or segmenter has of the timm model it stands on: maps, parameter groups, weights from files."""

import math
import re
from collections.abc import Callable
from pathlib import Path

from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn

from ..runtime.errors import UserError


class OnBody(nn.Module):
    """A whole model with a `body`, which is of saccade.train.models.build.create_features and stands at `body_path` in it.

    It answers what timm's optimisers and the engine ask of a classifier. no_decay: patterns of parameters' names that
    get no weight decay, beside those that the body's own model names.
    """

    body_path = "backbone.body"
    no_decay: tuple[str, ...] = ()

    @property
    def body(self) -> nn.Module:
        return self.get_submodule(self.body_path)

    def _own_names(self) -> dict[str, str]:
        """The body's parameters: name in this model -> name in the classifier that the body was made of."""
        return {f"{self.body_path}.{name}": _unflattened(name) for name, _ in self.body.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """Name of a parameter -> its layer, as timm's layer decay counts them: the body's, then all heads as one."""
        names = self._own_names()
        layers = group_with_matcher(((name, None) for name in names.values()), self.body.layers, reverse=True)
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
    """Have a module's BatchNorms use their running statistics; weights and biases go on learning."""
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.eval()


def float32(module: nn.Module) -> nn.Module:
    """The module, its outputs made float32 under autocast: boxes, and the operators on them, need that precision."""
    module.register_forward_hook(_as_float32)
    return module


def _as_float32(module: nn.Module, inputs: tuple, out: object) -> object:
    if isinstance(out, Tensor):
        return out.float()
    if isinstance(out, dict):
        return type(out)((key, _as_float32(module, (), value)) for key, value in out.items())
    return type(out)(_as_float32(module, (), value) for value in out)


def load_whole(model: nn.Module, tensors: dict[str, Tensor], file: Path, new_head: bool) -> None:
    """Load all of a model's weights; with `new_head`, those of another shape, as other classes make them, are left out.

    Raises UserError where anything else differs.
    """
    own = model.state_dict()
    unlike = [key for key in own if key not in tensors or own[key].shape != tensors[key].shape]
    unlike += [key for key in tensors if key not in own]
    resized = [key for key in unlike if key in own and key in tensors]
    if new_head and len(resized) == len(unlike) and len(unlike) < len(own) / 4:
        tensors = own | {key: value for key, value in tensors.items() if key not in resized}
    elif unlike:
        has, wants = (tuple(d[unlike[0]].shape) if unlike[0] in d else "missing" for d in (tensors, own))
        raise UserError(
            f"checkpoint {file} is of another model: {unlike[0]} is {has} there and {wants} here, and "
            f"{len(unlike) - 1} more differ; give the model and task sections that it was trained with"
        )
    model.load_state_dict(tensors)
