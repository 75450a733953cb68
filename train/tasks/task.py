"""The interface of tasks to training, testing and prediction: a task defines its batches, losses and metrics.

The engine uses nothing else of a task; it does not know labels, boxes or maps. A task is built from its section of the
config and the data source: `Task(source, **arguments)`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..models.build import probe, save_whole
from ..models.class_names import read_class_names
from ..models.weights import Weights
from ..runtime.errors import UserError


def format_counts(counts: Counter[str]) -> str:
    """Return "cat 7, dog 5": names in the order of their counts, the largest first."""
    return ", ".join(f"{name} {count}" for name, count in counts.most_common()) or "nothing"


class Predictor:
    """A trained model that takes images without preprocessing.

    class_names: of the model. A record is the prediction for an image, as JSON values. Not every task has `draw`,
    `label_map` and `to_coco`.
    """

    class_names: list[str]

    def predict(self, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
        """Return a record of each image."""
        raise NotImplementedError

    def describe(self, record: dict[str, Any]) -> str:
        """Describe a record in one line of text."""
        raise NotImplementedError

    def summarize(self, records: Sequence[dict[str, Any]]) -> str:
        """Summarize all records in one line of text: how often each class was predicted."""
        raise NotImplementedError

    def draw(self, image: Image.Image, record: dict[str, Any], limit: int = 50) -> Image.Image:
        """Return the image with its record drawn on it, `limit` objects at most."""
        raise NotImplementedError

    def label_map(self, record: dict[str, Any]) -> Image.Image:
        """Return a record's label map as a greyscale image of class indices."""
        raise NotImplementedError

    def to_coco(self, records: Sequence[tuple[Path, tuple[int, int], dict[str, Any]]]) -> dict[str, Any]:
        """Return the records of images (file, (width, height), record) in COCO's json format."""
        raise NotImplementedError


class Task:
    """The base of all tasks.

    methods: the model's methods besides forward that `loss` calls. scores: metrics, in percent, that curves are drawn
    of; the first chooses the best checkpoint. messages: for the user, on what was done with a checkpoint. of_lifters:
    whether its models are lifters of several cameras.
    """

    class_names: list[str]
    of_lifters = False
    methods: tuple[str, ...] = ()
    scores: tuple[str, ...]
    messages: tuple[str, ...] = ()

    def model(
        self, name: str, checkpoint: Any = None, new_head: bool = False, pretrained: bool = False, **kwargs: Any
    ) -> nn.Module:
        """Build the model of a config's section: a timm model's name and arguments.

        checkpoint: initial weights, as a path or read; with new_head, layers of the classes' size may differ from the
        file's.
        """
        raise NotImplementedError

    def restore(self, folder: Path, model: dict[str, Any], **kwargs: Any) -> nn.Module:
        """Build the finished model of a run's folder, `model` being that section of its config."""
        arguments = model | dict(pretrained=False) | kwargs
        return self.model(**arguments, checkpoint=folder / "model.safetensors")

    def published(self, model: dict[str, Any], **kwargs: Any) -> nn.Module:
        """Build the model with the weights that timm publishes. Raises UserError where there are none for the task."""
        raise UserError(f"no weights of {model['name']} are published for this task: give yours with --checkpoint FILE")

    def published_class_names(self, model: dict[str, Any]) -> list[str] | None:
        """Return the classes of the weights that timm publishes; None where they are not known."""
        return None

    def select_classes(self, model: nn.Module, indices: Sequence[int]) -> None:
        """Have the model predict its classes `indices` only, numbered in that order."""
        raise NotImplementedError

    def match_head(self, checkpoint: Any, reorders: bool = True) -> tuple[bool, list[int] | None]:
        """Compare the classes of a checkpoint to train on from with the task's.

        Returns (whether its classifier fits as it is, the order in which its rows fit, or None: it must be left out).
        reorders: whether the task can reorder rows. What will be done is added to `messages`.
        """
        theirs = read_class_names(checkpoint if isinstance(checkpoint, Weights) else Path(checkpoint))
        if theirs is None or theirs == list(self.class_names) or len(theirs) != len(self.class_names):
            return True, None
        if reorders and len(set(theirs)) == len(theirs) and set(theirs) == set(self.class_names):
            self.messages += (f"{checkpoint} has the classes in another order: its classifier is reordered by name",)
            return False, [theirs.index(name) for name in self.class_names]
        ours, other = next((a, b) for a, b in zip(self.class_names, theirs) if a != b)
        self.messages += (
            f"{checkpoint} is of other classes ({other!r} where the data have {ours!r}): its classifier is left out",
        )
        return False, None

    def trained(self, model: nn.Module) -> nn.Module:
        """Return the module that `loss` calls: here the model itself."""
        return model

    def probe(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Run the model on a black image. Raises UserError with the model's message if it fails."""
        probe(model, inputs["input_size"])

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (scalar loss, what to log beside it)."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batches: Iterable) -> tuple[dict[str, float], Any]:
        """Return (metrics over all processes, each image counted once; detail for `report` and `draw_results`).

        "images" is among the metrics.
        """
        raise NotImplementedError

    def score(self, metrics: dict[str, float]) -> float:
        """Return the metric that the best checkpoint maximizes."""
        return metrics[self.scores[0]]

    def draw_batch(self, folder: Path, batch: Any, inputs: dict[str, Any]) -> Path:
        """Draw a training batch into folder/pictures/batch.png. inputs: the preprocessing, as timm names it."""
        raise NotImplementedError

    def report(self, folder: Path, detail: Any) -> tuple[dict[str, Any], list[str]]:
        """Write tables into the folder; return further entries of metrics.json, and lines to print."""
        return {}, []

    def plot_training(self, folder: Path) -> list[Path]:
        """Plot the curves of folder/log.jsonl into folder/pictures; return the files."""
        from ..visual.curves import plot_curves  # matplotlib takes a second to import, and only this needs it

        file = plot_curves(folder / "log.jsonl", folder / "pictures" / "curves.png", self.scores)
        return [file] if file is not None else []

    def draw_results(self, folder: Path, model: nn.Module, dataset: Any, detail: Any) -> list[Path]:
        """Draw the results of a test into folder/pictures; return the files. detail: from `evaluate` on the dataset."""
        return []

    def export(self, model: nn.Module, folder: Path, inputs: dict[str, Any], class_names: list[str]) -> None:
        """Write model.safetensors, all of the model's weights, and config.json, which names the classes."""
        save_whole(model, folder, inputs, class_names)

    @classmethod
    def predictor(cls, folder: Path, settings: dict[str, Any], device: torch.device, **options: Any) -> Predictor:
        """Build the predictor of a run's folder; `settings` is the run's config."""
        raise NotImplementedError
