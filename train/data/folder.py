"""A folder of images, sorted into one folder a class: ImageNet's layout, or anybody's own pictures."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..runtime.distributed import derive_seed
from ..runtime.errors import UserError
from .images import Files, Source


class ImageFolder(Source):
    """The data of a run.

    root: either ROOT/train, ROOT/val and perhaps ROOT/test, each with a folder a class, or one folder of class folders,
    which is then divided at random, the same way each time, every class alike. Images may lie deeper inside their
    class's folder; hidden files and files that are no images are passed over.
    img_size: pixels a side; None: what the model's published weights were trained at. shares: of val and test in an
    automatic division. augment: arguments of timm.data.create_transform for training (hflip, color_jitter,
    auto_augment, re_prob, …). sizes: pixels a side in training by the first epoch, as in {0: 192, 280: 224}; None:
    img_size. max_bad: how many images that can't be read a run goes on without.
    Raises UserError where there is nothing to learn from, naming the folder.
    """

    def __init__(
        self,
        root: str,
        img_size: int | None = None,
        shares: Sequence[float] = (0.1, 0.2),
        augment: dict | None = None,
        sizes: dict | None = None,
        max_bad: int = 0,
    ):
        super().__init__(img_size, sizes, augment, max_bad)
        if len(shares) != 2 or min(shares) < 0 or sum(shares) >= 1:
            raise UserError(
                f"data.shares={tuple(shares)} must be two shares, of val and test, that leave some to train on"
            )
        folder = Path(root)
        if not folder.is_dir():
            raise UserError(f"data.root={root} is no folder: give the folder that holds the class folders")
        if (folder / "train").is_dir():
            parts = {part: _scan(folder / part) for part in ("train", "val", "test") if (folder / part).is_dir()}
            if "val" not in parts:
                raise UserError(
                    f"{folder} has train but no val: add {folder / 'val'}, or give {folder / 'train'} itself"
                )
        else:
            parts = _divide(_scan(folder), *shares)
        parts.setdefault("test", parts["val"])
        self.class_names = sorted(parts["train"])
        if len(self.class_names) == 1:
            raise UserError(f"{root} holds one class only, {self.class_names[0]}: a classifier needs two or more")
        for part, classes in parts.items():
            for name in classes:
                if name not in parts["train"]:
                    raise UserError(f"{folder / part / name} is a class that {folder / 'train'} does not have")
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._splits = {
            part: [(path, labels[name]) for name in sorted(classes) for path in classes[name]]
            for part, classes in parts.items()
        }

    def images(self, split: str) -> tuple[Files, list[int]]:
        if not self._splits[split]:
            raise UserError(f"the {split} split is empty: give more images, or another data.shares")
        paths, labels = zip(*self._splits[split])
        return Files(paths), list(labels)


def _scan(folder: Path) -> dict[str, list[str]]:
    """The image files of every class folder, sorted. Raises UserError for a folder without classes or images."""
    extensions = set(Image.registered_extensions())
    classes = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir() or entry.name.startswith("."):
            continue
        files = [
            os.path.join(place, file)
            for place, _, names in os.walk(entry.path, followlinks=True)
            for file in names
            if not file.startswith(".")
        ]
        classes[entry.name] = sorted(file for file in files if os.path.splitext(file)[1].lower() in extensions)
        if not classes[entry.name]:
            others = sorted({os.path.splitext(file)[1] or "none" for file in files})
            seen = f" (only files with extension {', '.join(others)})" if files else ""
            raise UserError(f"class folder {entry.path} holds no images{seen}: add some or remove the folder")
    if not classes:
        raise UserError(f"{folder} holds no class folders: put the images of each class in a folder of its own")
    return classes


def _divide(classes: dict[str, list[str]], val: float, test: float) -> dict[str, dict[str, list[str]]]:
    """Divide each class's files by shares, one image or more for training."""
    parts: dict[str, dict[str, list[str]]] = dict(train={}, val={}, test={})
    for number, (name, files) in enumerate(classes.items()):
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(derive_seed(number))).tolist()
        first = min(round(val * len(files)), len(files) - 1)
        second = min(first + round(test * len(files)), len(files) - 1)
        for part, chosen in (("val", order[:first]), ("test", order[first:second]), ("train", order[second:])):
            parts[part][name] = sorted(files[i] for i in chosen)
    return parts
