"""The model that is explained: a run's or one by name, and how a picture is prepared for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from PIL import Image
from saccade.train.models.build import create
from saccade.train.models.detectors import Detector
from saccade.train.models.segmenter import Segmenter
from saccade.train.models.weights import read_weights
from saccade.train.predict import predictor
from saccade.train.runtime.distributed import choose_device
from saccade.train.runtime.errors import UserError, closest
from saccade.train.tasks.task import Predictor
from timm.data import resolve_data_config
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor


@dataclass
class Subject:
    """A model with the preparation of its pictures.

    name: as it was asked for. body: takes prepared pictures (1, 3, H, W), as `prepare` returns them; a detector's or
    segmenter's is its backbone. size_for: (height, width) of a picture -> that of the prepared one. note: where the
    weights are from. predictor: predicts on pictures; None where the classes are not known.
    """

    name: str
    body: nn.Module
    size_for: Callable[[int, int], tuple[int, int]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str
    predictor: Predictor | None = None
    is_classifier: bool = True
    is_lifter: bool = False

    @property
    def device(self) -> torch.device:
        return next(self.body.parameters()).device

    def prepare(self, picture: Image.Image) -> Tensor:
        """Resize the whole picture to the model's size, and normalise it: (1, 3, H, W)."""
        height, width = self.size_for(picture.height, picture.width)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        x = pil_to_tensor(resized).to(self.device).float() / 255
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((x - mean) / std)[None]


def load(spec: str, checkpoint: Path | None = None, pretrained: bool = False, device: str | None = None) -> Subject:
    """Load the folder of a finished run, or a model by its name.

    checkpoint: weights for a name; pretrained: those that timm publishes; neither: untrained ones, always the same.
    Raises UserError with near names for a misspelt model, and for files that can't be read or don't fit.
    """
    chosen = choose_device(device)
    if Path(spec).is_dir():
        if checkpoint is not None or pretrained:
            raise UserError(f"--checkpoint and --pretrained go with a model's name; {spec} is a run, with its weights")
        loaded = predictor(Path(spec), device)
        return _of_model(spec, loaded.model, f"weights of the run {spec}", loaded)
    if not timm.is_model(spec.partition(".")[0]):
        raise UserError(f"there is no run and no model {spec}{closest(spec, timm.list_models())}")
    if checkpoint is not None and pretrained:
        raise UserError("--checkpoint and --pretrained exclude each other: give one of them")
    cfg = timm.get_pretrained_cfg(spec)
    if cfg is not None and cfg.num_classes == 0:  # a lifter
        if checkpoint is None:
            torch.manual_seed(0)
            net = timm.create_model(spec)
        else:
            read_weights(checkpoint)  # says what is wrong with the file
            net = timm.create_model(spec, pretrained=True, pretrained_cfg_overlay=dict(file=str(checkpoint)))
    else:
        weights = None if checkpoint is None else read_weights(checkpoint)
        classes = len(weights.class_names) if weights and weights.class_names else (cfg.num_classes if cfg else 1000)
        torch.manual_seed(0)
        net = create(spec, classes, checkpoint=weights, new_head=weights is not None, pretrained=pretrained)
    note = "untrained weights: maps show the architecture, not what a trained model looks at"
    if checkpoint is not None:
        note = f"weights of {checkpoint}"
    elif pretrained:
        note = "weights that timm publishes"
    return _of_model(spec, net.to(chosen).eval(), note)


def _of_model(name: str, net: nn.Module, note: str, loaded: Predictor | None = None) -> Subject:
    if isinstance(net, Detector | Segmenter):
        inputs = resolve_data_config(pretrained_cfg=net.pretrained_cfg)

        def size_for(height: int, width: int) -> tuple[int, int]:
            if isinstance(net, Segmenter):
                size = net.inference.size(height, width, 1.0)
            else:
                factor = min(min(net.test_size) / min(height, width), max(net.test_size) / max(height, width))
                size = (height * factor, width * factor)
            return tuple(max(32, round(side / 32) * 32) for side in size)  # type: ignore[return-value]

        return Subject(name, net.backbone, size_for, inputs["mean"], inputs["std"], note, loaded, False)
    inputs = resolve_data_config(model=net)
    size = inputs["input_size"][1:]
    lifter = hasattr(net, "lift")
    return Subject(
        name, net, lambda height, width: size, inputs["mean"], inputs["std"], note, loaded, not lifter, lifter
    )
