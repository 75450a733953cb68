"""Another folder of labelled images to test a model on: ImageNetV2, -A, -R, -Sketch, or your own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config

from ..runtime.errors import UserError, closest
from .files import Skipped
from .folder import scan_classes
from .images import Files, Source


class TestFolder(Source):
    """A folder of class folders, named by the model's classes or by their indices.

    class_names: of the model, in its order. If the folder has only some of the classes, the test is restricted to them:
    `classes` are their indices among the model's `model_classes`, and labels and `class_names` refer to them.
    img_size, max_bad: see ImageFolder.
    Raises UserError for a folder whose name is not a class of the model.
    """

    __test__ = False  # not a test class for pytest

    def __init__(self, root: str, class_names: Sequence[str], img_size: int | None = None, max_bad: int = 0):
        super().__init__(img_size, None, None, max_bad)
        if not Path(root).is_dir():
            raise UserError(f"--images {root} is not a folder: give the folder that contains the class folders")
        skipped = Skipped()
        files = scan_classes(Path(root), skipped)
        skipped.report(root)
        number = {name: i for i, name in enumerate(class_names)}
        if not files.keys() <= number.keys() and all(name.isdecimal() for name in files):
            number = {name: int(name) for name in files if int(name) < len(class_names)}
        for name in files:
            if name not in number:
                raise UserError(
                    f"{Path(root, name)} is not a class of the model, which has {len(class_names)}"
                    f"{closest(name, class_names)}"
                )
        names = sorted(files, key=number.__getitem__)  # as numbers: "10" comes after "9"
        self.root, self.model_classes = root, list(class_names)
        self.classes = [number[name] for name in names]
        self.class_names = [class_names[i] for i in self.classes]
        self._samples = [(path, label) for label, name in enumerate(names) for path in files[name]]

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """Return the model's own preprocessing for tests at `img_size`, with timm's keys."""
        inputs = resolve_data_config(pretrained_cfg=pretrained_cfg, use_test_size=self.img_size is None)
        if self.img_size:
            inputs["input_size"] = (inputs["input_size"][0], self.img_size, self.img_size)
        return inputs

    def images(self, split: str) -> tuple[Files, Sequence[int]]:
        """Return all images, for any split."""
        paths, labels = zip(*self._samples)
        return Files(paths), labels
