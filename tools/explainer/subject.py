"""The model that is explained: a run's or one by name, and how an image is prepared for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import saccade.backbones  # noqa: F401  (registers the models)
import torch
from PIL import Image
from saccade.train.models.bev import BevDetector
from saccade.train.models.detectors import Detector
from saccade.train.models.segmenter import Segmenter
from saccade.train.predict import load_model
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.task import Predictor
from timm.data import resolve_data_config
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor


@dataclass
class Subject:
    """A model with the preparation of its images.

    name: as it was asked for. body: takes prepared images (1, 3, H, W), as `prepare` returns them; a detector's or
    segmenter's is its backbone. size_for: (height, width) of an image -> that of the prepared one. note: where the
    weights are from. predictor: predicts on images; None where the classes are not known.
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

    def prepare(self, image: Image.Image) -> Tensor:
        """Resize the whole image to the model's size, and normalise it: (1, 3, H, W)."""
        height, width = self.size_for(image.height, image.width)
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        x = pil_to_tensor(resized).to(self.device).float() / 255
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((x - mean) / std)[None]

    def predict(self, image: Image.Image) -> tuple[str, Image.Image | None]:
        """Return what a run predicts, in one line, and the image with it drawn where the task draws; "" and None of
        a model by name, whose classes are not known."""
        if self.predictor is None:
            return "", None
        with torch.inference_mode():
            (prediction,) = self.predictor.predict([image])
        draws = type(self.predictor).draw is not Predictor.draw
        return self.predictor.describe(prediction), self.predictor.draw(image, prediction) if draws else None


def load(spec: str, checkpoint: Path | None = None, pretrained: bool = False, device: str | None = None) -> Subject:
    """Load the folder of a finished run, or a model by its name: see saccade.train.predict.load_model."""
    loaded = load_model(spec, checkpoint, pretrained, device, new_head=checkpoint is not None)
    note = "untrained weights: maps show the architecture, not what a trained model looks at"
    if Path(spec).is_dir():
        note = f"weights of the run {spec}"
    elif checkpoint is not None:
        note = f"weights of {checkpoint}"
    elif pretrained:
        note = "weights that timm publishes"
    return _of_model(spec, loaded.model, note, loaded.predictor, loaded.inputs)


def _of_model(
    name: str,
    net: nn.Module,
    note: str,
    loaded: Predictor | None = None,
    prepared: dict[str, Any] | None = None,
) -> Subject:
    """prepared: how a run prepares images, where its model does not say it."""
    if isinstance(net, BevDetector):
        if net.known_depth:
            raise UserError(f"{name} is a lifter that is given depth, which an image does not have")
        net = net.lifter
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
    inputs = prepared or resolve_data_config(model=net)
    size = inputs["input_size"][-2:]
    lifter = hasattr(net, "lift")
    return Subject(
        name, net, lambda height, width: size, inputs["mean"], inputs["std"], note, loaded, not lifter, lifter
    )
