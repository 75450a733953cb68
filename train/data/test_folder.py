"""Further images to test a model on, whose classes are known: ImageNetV2, -A, -R, -Sketch, or a folder of one's own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config

from ..runtime.errors import UserError, closest
from .files import Skipped
from .folder import scan_classes
from .images import Files, Source


class TestFolder(Source):
    """A folder of class folders, each named as a class of the model is, or all of them by the classes' numbers.

    class_names: of the model, in its order. A folder that has some of them only is a test on those: `classes` are their
    numbers among the model's `model_classes`, to which its outputs are to be restricted; labels and this object's
    `class_names` are theirs. img_size, max_bad: as of ImageFolder.
    Raises UserError for a folder whose name is no class of the model.
    """

    __test__ = False  # pytest, it is no test

    def __init__(self, root: str, class_names: Sequence[str], img_size: int | None = None, max_bad: int = 0):
        super().__init__(img_size, None, None, max_bad)
        if not Path(root).is_dir():
            raise UserError(f"--images {root} is no folder: give the folder that holds the class folders")
        skipped = Skipped()
        files = scan_classes(Path(root), skipped)
        skipped.report(root)
        number = {name: i for i, name in enumerate(class_names)}
        if not files.keys() <= number.keys() and all(name.isdecimal() for name in files):
            number = {name: int(name) for name in files if int(name) < len(class_names)}
        for name in files:
            if name not in number:
                raise UserError(
                    f"{Path(root, name)} is no class of the model, which has {len(class_names)}"
                    f"{closest(name, class_names)}"
                )
        found = sorted(files, key=number.__getitem__)  # as numbers: "10" comes after "9"
        self.root, self.model_classes = root, list(class_names)
        self.classes = [number[name] for name in found]
        self.class_names = [class_names[i] for i in self.classes]
        self._samples = [(path, label) for label, name in enumerate(found) for path in files[name]]

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """The model's own preprocessing for tests, at `img_size`, as timm names it."""
        inputs = resolve_data_config(pretrained_cfg=pretrained_cfg, use_test_size=self.img_size is None)
        if self.img_size:
            inputs["input_size"] = (inputs["input_size"][0], self.img_size, self.img_size)
        return inputs

    def images(self, split: str) -> tuple[Files, Sequence[int]]:
        """All of them, whatever the split."""
        paths, labels = zip(*self._samples)
        return Files(paths), labels
