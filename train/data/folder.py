"""A folder of images with one subfolder per class: ImageNet's layout, or your own images."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from ..runtime.config import Count, NonNegativeInt
from ..runtime.distributed import derive_seed
from ..runtime.errors import UserError
from ..runtime.run_folder import is_run
from .augment import Decode
from .files import Skipped, fold, image_files, is_hidden, note, split_folders, split_of
from .images import Files, Source


class ImageFolder(Source):
    """A folder of images as the data of a run.

    root: either ROOT/train, ROOT/val and optionally ROOT/test, each with one folder per class; or a folder of class
    folders, which is split randomly, stratified and always in the same way. Usual other names of splits are recognised,
    case-insensitively (Training, validation, valid, dev, testing, train_set); a test folder without class folders is
    not used. Images may be in subfolders of their class folder. Hidden files and folders, run folders and files that
    are not images are skipped and counted.
    img_size: image size in pixels; None: that of the model's published weights. shares: fractions of val and test in an
    automatic split. augment: arguments of timm.data.create_transform for training (hflip, color_jitter, auto_augment,
    re_prob, …). sizes: image size in training from given epochs on, for example {0: 192, 280: 224}; None: img_size.
    max_bad: how many unreadable images a run tolerates. decode: "exact"; "cropped": of a JPEG in training no more than
    the crop is decoded, to the same pixels, which needs libjpeg-turbo 3; "scaled": large JPEGs are decoded at 1/2, 1/4
    or 1/8 of their size where that leaves what is needed of them, in evaluation too.
    Raises UserError, naming the folder, if there is nothing to learn.
    """

    def __init__(
        self,
        root: str,
        img_size: Count | None = None,
        shares: Sequence[float] = (0.1, 0.2),
        augment: dict | None = None,
        sizes: dict | None = None,
        max_bad: NonNegativeInt = 0,
        decode: Decode = "exact",
    ):
        super().__init__(img_size, sizes, augment, max_bad, decode)
        if len(shares) != 2 or min(shares) < 0 or sum(shares) >= 1:
            raise UserError(
                f"data.shares={tuple(shares)} must be two fractions, of val and test, that leave some to train on"
            )
        folder = Path(root)
        if not folder.is_dir():
            raise UserError(f"data.root={root} is not a folder: give the folder that contains the class folders")
        splits, skipped = find_splits(folder), Skipped()
        if splits:
            if "val" not in splits:
                train = splits["train"]
                raise UserError(f"{folder} has {train.name} but no val: add {folder / 'val'}, or give {train} itself")
            if "test" in splits and _is_unlabelled(splits["test"]):
                note(f"{splits.pop('test')} holds images without class folders: tests use val instead")
            parts = {split: scan_classes(path, skipped) for split, path in splits.items()}
        else:
            parts = _divide(scan_classes(folder, skipped), *shares)
        skipped.report(folder)
        parts.setdefault("test", parts["val"])
        self.class_names = sorted(parts["train"])
        if len(self.class_names) == 1:
            only = splits.get("train", folder) / self.class_names[0]
            nested = any(entry.is_dir() and not is_hidden(entry.name) for entry in os.scandir(only))
            hint = f", or data.root={only} if that contains the class folders" if nested else ""
            raise UserError(f"{root} holds one class only, {only.name}: a classifier needs two or more{hint}")
        for part, classes in parts.items():
            for name in classes:
                if name not in parts["train"]:
                    alike = next((other for other in parts["train"] if fold(other) == fold(name)), None)
                    hint = f": rename it as {alike!r} there, which it only looks like" if alike else ""
                    raise UserError(f"{splits[part] / name} is a class that {splits['train']} does not have{hint}")
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._splits = {
            part: [(path, labels[name]) for name in sorted(classes) for path in classes[name]]
            for part, classes in parts.items()
        }

    @classmethod
    def scanned(cls, root: str, **_: object) -> list[Path]:
        """Return the folders all of whose images are taken as data: no run may write there."""
        folder = Path(root)
        return [*find_splits(folder).values()] or [folder] if folder.is_dir() else []

    def images(self, split: str) -> tuple[Files, list[int]]:
        if not self._splits[split]:
            raise UserError(f"the {split} split is empty: give more images, or another data.shares")
        paths, labels = zip(*self._splits[split])
        return Files(paths), list(labels)


def find_splits(folder: Path) -> dict[str, Path]:
    """Return the folders of train, val and test; {} if `folder` contains class folders.

    A class may be called "train" (the vehicle): a single folder of that name is a split if it contains only folders.
    """
    names = [path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    splits = {split_of(name) for name in names} - {None}
    if "train" not in splits and len(splits) < 2:
        return {}
    if splits == {"train"}:
        (first, *_) = (folder / name for name in names if split_of(name) == "train")
        inside = [path for path in first.iterdir() if not is_hidden(path.name)]
        if not all(path.is_dir() for path in inside):
            return {}
    found = split_folders(folder, names)
    if "train" not in found:
        raise UserError(f"{folder} has {' and '.join(path.name for path in found.values())} but no train: add it")
    return found


def scan_classes(folder: Path, skipped: Skipped) -> dict[str, list[str]]:
    """Return the image files of every class folder, sorted; skipped files are counted in `skipped`.

    Raises UserError for a folder without classes or images, and for a class folder that is a link to another one.
    """
    classes: dict[str, list[str]] = {}
    real: dict[str, str] = {}
    root = os.path.realpath(folder)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir() or is_hidden(entry.name):
            continue
        if is_run(Path(entry.path)):
            skipped.runs.append(entry.path)
            continue
        target = os.path.realpath(entry.path)
        if entry.is_symlink() and os.path.commonpath([root, target]) == target:  # to a parent folder
            skipped.links.append(entry.path)
            continue
        if (other := real.setdefault(target, entry.path)) != entry.path:
            raise UserError(f"class folders {other} and {entry.path} are the same, by a link: remove one")
        here = Skipped()
        classes[entry.name] = image_files(entry.path, here, root)
        skipped.add(here)
        if not classes[entry.name] and here.runs and not here.endings:
            del classes[entry.name]  # contains only run folders
        elif not classes[entry.name]:
            others = ", ".join(ending or "none" for ending in sorted(here.endings))
            seen = f" (only files with extension {others})" if others else ""
            raise UserError(f"class folder {entry.path} holds no images{seen}: add some or remove the folder")
    if not classes:
        inside = Skipped()
        images = image_files(folder, inside)
        seen = f", but {len(images)} images" if images else ""
        hint = "put the images of each class in a folder of its own"
        if images and all(name.startswith("ILSVRC2012_") for name in map(os.path.basename, images[:100])):
            hint += ", as valprep.sh does for ImageNet's, or give ImageNet's tar files"
        elif tars := inside.endings[".tar"]:
            seen, hint = f", but {tars} tar files", "unpack each into a folder of its name"
        raise UserError(f"{folder} holds no class folders{seen}: {hint}")
    return classes


def _is_unlabelled(folder: Path) -> bool:
    """Return whether a folder has images but no folders, as the test images of a competition."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not is_hidden(entry.name)]
        return not any(os.path.isdir(folder / name) for name in names) and bool(image_files(folder))


def _divide(classes: dict[str, list[str]], val: float, test: float) -> dict[str, dict[str, list[str]]]:
    """Split each class's files by the shares of val and test, with at least one image for training."""
    parts: dict[str, dict[str, list[str]]] = dict(train={}, val={}, test={})
    for number, (name, files) in enumerate(classes.items()):
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(derive_seed(number))).tolist()
        first = min(round(val * len(files)), len(files) - 1)
        second = min(first + round(test * len(files)), len(files) - 1)
        for part, chosen in (("val", order[:first]), ("test", order[first:second]), ("train", order[second:])):
            parts[part][name] = sorted(files[i] for i in chosen)
    return parts
