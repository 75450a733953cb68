"""What the engine, tests and predictions ask of any task; a task says what its batches, losses and metrics are.

Of a task the engine knows no more than this, and nothing of labels, boxes or maps. A task is built from its section of
the config and the data source: `Task(source, **arguments)`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..models.build import probe, save_whole
from ..runtime.errors import UserError


class Predictor:
    """A finished model that takes pictures as they are."""

    def batch(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """What the model finds on each, as JSON can hold it."""
        raise NotImplementedError

    def say(self, record: dict[str, Any]) -> str:
        """One line on what was found on a picture."""
        raise NotImplementedError

    def draw(self, image: Image.Image, record: dict[str, Any]) -> Image.Image:
        """The picture with what was found on it."""
        raise UserError("--out needs a task that draws on pictures; this run's does not")


class Task:
    """The base of all.

    methods: the model's methods besides forward that `loss` calls. scores: metrics, in percent, that curves are drawn
    of; the first chooses the best checkpoint.
    """

    methods: tuple[str, ...] = ()
    scores: tuple[str, ...]

    def model(
        self, name: str, checkpoint: Any = None, new_head: bool = False, pretrained: bool = False, **kwargs: Any
    ) -> nn.Module:
        """The model of a config's section: a timm model's name and arguments.

        checkpoint: weights to begin with; with new_head, layers of the classes' size may differ from the file's.
        """
        raise NotImplementedError

    def restore(self, folder: Path, model: dict[str, Any], **kwargs: Any) -> nn.Module:
        """The finished model of a run's folder, `model` being that section of its config."""
        whole = model | dict(pretrained=False) | kwargs
        return self.model(**whole, checkpoint=folder / "model.safetensors")

    def published(self, model: dict[str, Any], **kwargs: Any) -> nn.Module:
        """The model with weights that timm publishes, to be tested as it is. Raises UserError where there are none."""
        raise UserError(f"no weights of {model['name']} are published for this task: give yours with --checkpoint FILE")

    def trained(self, model: nn.Module) -> nn.Module:
        """What `loss` calls: here the model itself."""
        return model

    def probe(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Show the model a black image; raises UserError in its own words if it can't take it."""
        probe(model, inputs["input_size"])

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, what to log beside it)."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], Any]:
        """(metrics, "images" among them, over all processes, each image counted once; detail for report, pictures)."""
        raise NotImplementedError

    def score(self, metrics: dict[str, float]) -> float:
        """What the best checkpoint has most of."""
        return metrics[self.scores[0]]

    def sample(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        """Draw a training batch into folder/pictures/batch.png. inputs: the preprocessing, as timm names it."""
        raise NotImplementedError

    def report(self, folder: Path, detail: Any) -> tuple[dict[str, Any], list[str]]:
        """Write tables into the folder; returns what goes beside the metrics in metrics.json, and lines for people."""
        return {}, []

    def pictures(
        self, folder: Path, model: nn.Module | None = None, images: Any = None, detail: Any = None
    ) -> list[Path]:
        """Draw into folder/pictures; returns the files. After training: the curves of folder/log.jsonl.

        After testing, with `model`, the split's dataset `images` and the evaluation's `detail`: what it shows.
        """
        from ..visual.curves import plot_curves  # matplotlib takes a second to import, and only this needs it

        if model is not None:
            return []
        file = plot_curves(folder / "log.jsonl", folder / "pictures" / "curves.png", self.scores)
        return [file] if file is not None else []

    def export(self, model: nn.Module, folder: Path, inputs: dict[str, Any], class_names: list[str]) -> None:
        """Write model.safetensors, all of the model's weights, and config.json, which names the classes."""
        save_whole(model, folder, inputs, class_names)

    @classmethod
    def predictor(cls, folder: Path, settings: dict[str, Any], place: torch.device, **options: Any) -> Predictor:
        """The finished model of a run's folder, for pictures; `settings` is the run's config."""
        raise NotImplementedError
