"""Images with a label for each pixel: ADE20K, COCO-Stuff, or your own pair of folders.

A label map is an image with one number per pixel. Each layout defines which number is which class; labels become
0 … K - 1, and IGNORED for pixels that are neither trained on nor evaluated.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..runtime.config import Count, Fraction, NonNegativeInt, Positive
from ..runtime.config import check as check_section
from ..runtime.distributed import derive_seed, rank
from ..runtime.errors import UserError
from .bad_images import BadImage
from .distort import distort_colors, uniform
from .files import Skipped, image_files, note_classes, read_text, split_folders
from .images import (
    SWAPS_SIDES,
    Strings,
    fit_size,
    note_conversions,
    open_image,
    orientation,
    read_bytes,
    stored_size,
    to_rgb,
)

IGNORED = 255
SPLITS = ("train", "val", "test")
INVALID = -1  # in a table of labels
STUFF = """banner blanket branch bridge building-other bush cabinet cage cardboard carpet ceiling-other
ceiling-tile cloth clothes clouds counter cupboard curtain desk-stuff dirt door-stuff fence floor-marble
floor-other floor-stone floor-tile floor-wood flower fog food-other fruit furniture-other grass gravel
ground-other hill house leaves light mat metal mirror-stuff moss mountain mud napkin net paper pavement pillow
plant-other plastic platform playingfield railing railroad river road rock roof rug salad sand sea shelf
sky-other skyscraper snow solid-other stairs stone straw structural-other table tent textile-other towel tree
vegetable wall-brick wall-concrete wall-other wall-panel wall-stone wall-tile wall-wood water-other waterdrops
window-blind window-other wood"""  # COCO-Stuff's categories 92 to 182


class LabelMaps:
    """Base of the layouts below, which implement `classes()`, to set the attributes here, and `pairs(split)`.

    root: the folder that has the images and label maps.
    scale: (long, short): images are resized to the largest size within these sides that keeps their aspect ratio; None:
    they are not resized. crop: size in pixels of the training crop. augment: arguments of `Augment`.
    max_bad: how many unreadable images a run tolerates. check: how many label maps of a split, evenly spaced, are
    checked before training; errors in the others are reported when they are read.
    """

    class_names: list[str]
    table: np.ndarray  # (256,) int16: number in a file -> label, IGNORED or INVALID
    meaning: str  # description of the valid numbers

    def __init__(
        self,
        root: str,
        scale: Sequence[Count] | None = (2048, 512),
        crop: Count = 512,
        augment: dict | None = None,
        max_bad: NonNegativeInt = 0,
        check: NonNegativeInt = 500,
    ):
        self.root, self._matched = Path(root), {}
        self.scale, self.img_size, self.augment = scale, crop, augment or {}
        self.max_bad, self.check, self.bad = max_bad, check, {}
        check_section("data.augment", self.augment, Augment, without=("scale", "crop", "fill"))
        if scale is not None and (len(scale) != 2 or min(scale) < 1):
            raise UserError(f"data.scale={scale} must be two sizes in pixels, of the longer and the shorter side")
        if crop < 1:
            raise UserError(f"data.crop={crop} must be 1 or more")
        self.classes()

    def classes(self) -> None:
        """Set class_names, table and meaning. Raises UserError if there are no class names."""
        raise NotImplementedError

    def pairs(self, split: str) -> tuple[Sequence[str], Sequence[str]]:
        """Return the files of a split's images, and of their label maps."""
        raise NotImplementedError

    def match(
        self, images: Path, labels: Path, image_suffix: str = "", label_suffix: str = ""
    ) -> tuple[Strings, Strings]:
        """Return `match_files` of two folders. They are searched once, and skipped files are reported."""
        if (images, labels) not in self._matched:
            self._matched[images, labels] = match_files(images, labels, image_suffix, label_suffix)
        return self._matched[images, labels]

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """Return the model's own mean and std; `input_size` is the training crop, `scale` the size in tests."""
        own = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
        size = (own["input_size"][0], self.img_size, self.img_size)
        return dict(input_size=size, mean=own["mean"], std=own["std"], scale=self.scale)

    def dataset(self, split: str, inputs: dict[str, Any], training: bool = False) -> "Maps":
        """Return "train", "val" or "test"; check some of its label maps and report each class's share of the pixels.

        Raises UserError for a label map that is not valid, naming it, and for a training split with nothing to learn.
        """
        images, labels = self.pairs(split)
        if not len(images):
            raise UserError(f"the {split} split holds no images")
        augment = Augment(self.scale, self.img_size, inputs["mean"], **self.augment) if training else None
        dataset = Maps(images, labels, self.table, f"{len(self.class_names)} classes: {self.meaning}", augment)
        if rank() == 0:
            note_conversions(lambda index: read_bytes(images[index]), len(images), f"{split} images")
            dataset.check(self.check, split, self.class_names)
        return dataset


def find_split(split: str, images: Path, labels: Path) -> tuple[Path, Path]:
    """Return the folders of a split's images and label maps, by any of the split's usual names.

    Without a test folder, val is used. Raises UserError if there is no folder for the split.
    """
    own, theirs = split_folders(images), split_folders(labels)
    split = "val" if split == "test" and "test" not in own else split
    if split not in own:
        raise UserError(f"there is no folder {images / split}, with the images of the {split} split")
    return own[split], theirs.get(split, labels / own[split].name)


class Ade20k(LabelMaps):
    """ADE20K's scene parsing benchmark as downloaded (ADEChallengeData2016), or data in the same layout.

    root: has images/{training,validation}, annotations/{training,validation} and objectInfo150.txt, whose classes are
    numbered from 1. Label 0 is ignored, c becomes c - 1. Tests use a folder "test" if it exists, else the validation
    images. Other arguments: see LabelMaps.
    """

    def classes(self) -> None:
        files = sorted(self.root.glob("objectInfo*.txt"))
        if not files:
            raise UserError(f"data.root={self.root} has no objectInfo150.txt: give the folder that ADE20K unpacks to")
        self.class_names = _object_names(files[0])
        classes = len(self.class_names)
        self.table = _table({0: IGNORED} | {c + 1: c for c in range(classes)})
        self.meaning = f"labels must be 1 to {classes}, or 0 for ignored pixels"

    def pairs(self, split: str) -> tuple[Sequence[str], Sequence[str]]:
        return self.match(*find_split(split, self.root / "images", self.root / "annotations"))


class CocoStuff(LabelMaps):
    """COCO-Stuff's 171 classes on COCO's images, in either of its two layouts.

    root: has images/{train2017,val2017} and annotations/{train2017,val2017}: either stuffthingmaps_trainval2017's
    pixel maps as downloaded (000000000009.png, category number - 1), or mmsegmentation's converted ones
    (000000000009_labelTrainIds.png, 0 … 170). 255 is ignored in both. Other arguments: see LabelMaps.
    """

    def classes(self) -> None:
        things = _coco_things()
        self.class_names = [*things, *STUFF.split()]
        converted = next((self.root / "annotations/val2017").glob("*_labelTrainIds.png"), None)
        self.suffix = "_labelTrainIds" if converted else ""
        files = range(171) if converted else [number - 1 for number in (*things.values(), *range(92, 183))]
        self.table = _table({255: IGNORED} | {value: label for label, value in enumerate(files)})
        known = "0 to 170" if converted else "COCO-Stuff's category ids minus one, 0 to 181"
        self.meaning = f"labels must be {known}, or 255 for ignored pixels"

    def pairs(self, split: str) -> tuple[Sequence[str], Sequence[str]]:
        folder = "train2017" if split == "train" else "val2017"
        return self.match(self.root / "images" / folder, self.root / "annotations" / folder, "", self.suffix)


class Folders(LabelMaps):
    """Your own images and label maps: ROOT/images, ROOT/labels, and one class name per line in ROOT/classes.txt.

    root: images and labels each have train, val and optionally test, by any of their usual names; or they have files,
    which are split randomly, always in the same way. An image and its label map have the same path except for the
    extension. Label c is the class on line c + 1, 255 is ignored. images, labels: other names of the two folders.
    classes: the class names, instead of classes.txt. zero_ignored: label 0 is ignored and c is the class on line c, as
    in ADE20K. image_suffix, label_suffix: suffixes of the file names before the extension, if they differ
    ("_leftImg8bit", "_gtFine_labelTrainIds"). shares: fractions of val and test in an automatic split. Other arguments:
    see LabelMaps.
    """

    def __init__(
        self,
        root: str,
        images: str = "images",
        labels: str = "labels",
        classes: Sequence[str] | None = None,
        zero_ignored: bool = False,
        image_suffix: str = "",
        label_suffix: str = "",
        shares: Sequence[float] = (0.1, 0.2),
        scale: Sequence[Count] | None = (2048, 512),
        crop: Count = 512,
        augment: dict | None = None,
        max_bad: NonNegativeInt = 0,
        check: NonNegativeInt = 500,
    ):
        self.shares, self.names, self.zero_ignored = shares, classes, zero_ignored
        self.folders, self.suffixes = (Path(root, images), Path(root, labels)), (image_suffix, label_suffix)
        if len(shares) != 2 or min(shares) < 0 or sum(shares) >= 1:
            raise UserError(
                f"data.shares={tuple(shares)} must be two fractions, of val and test, that leave some to train on"
            )
        super().__init__(root, scale, crop, augment, max_bad, check)

    def classes(self) -> None:
        file = self.root / "classes.txt"
        if self.names is None and not file.is_file():
            raise UserError(f"data.root={self.root} has no classes.txt: write the class names there, one per line")
        names = read_text(file).rstrip().splitlines() if self.names is None else self.names
        where = f"{file}, line" if self.names is None else "data.classes, name"
        self.class_names = [str(name).strip() for name in names]
        for line, name in enumerate(self.class_names, 1):
            if not name:
                raise UserError(f"{where} {line} is empty: name that class, or remove the line")
            if (before := self.class_names.index(name) + 1) < line:
                raise UserError(f"{where} {line} is {name!r}, like {before}: give each class a unique name")
        count, lowest = len(self.class_names), int(self.zero_ignored)
        if not 2 <= count < IGNORED:
            raise UserError(
                f"{'data.classes' if self.names else file} names {count} classes: there must be 2 to {IGNORED - 1}"
            )
        self.table = _table(
            {255: IGNORED} | ({0: IGNORED} if self.zero_ignored else {}) | {c + lowest: c for c in range(count)}
        )
        self.meaning = f"labels must be {lowest} to {count - 1 + lowest}, or {'0 or ' * lowest}255 for ignored pixels"

    def pairs(self, split: str) -> tuple[Sequence[str], Sequence[str]]:
        images, labels = self.folders
        if split_folders(images):
            return self.match(*find_split(split, images, labels), *self.suffixes)
        files = self.match(images, labels, *self.suffixes)
        generator = torch.Generator().manual_seed(derive_seed("division", len(files[0])))
        order = torch.randperm(len(files[0]), generator=generator).tolist()
        val, test = (round(share * len(order)) for share in self.shares)
        parts = dict(val=order[:val], test=order[val : val + test], train=order[val + test :])
        return tuple([column[i] for i in sorted(parts[split])] for column in files)

    @classmethod
    def scanned(cls, root: str, images: str = "images", labels: str = "labels", **_: object) -> list[Path]:
        """Return the folders whose images are all used as data, so that no run may be written there."""
        return [Path(root, images), Path(root, labels)]


def _coco_things() -> dict[str, int]:
    """Return COCO's 80 thing classes and their category ids, which have gaps."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return {name: number for number, name in enumerate(names) if name not in ("__background__", "N/A")}


def _object_names(file: Path) -> list[str]:
    """Return the names in objectInfo150.txt: the first name in the last column, in the order of the first column."""
    rows = [line.split("\t") for line in read_text(file).splitlines() if line.strip()]
    try:
        names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()}
    except (ValueError, IndexError):
        names = {}
    if not names or sorted(names) != list(range(1, len(names) + 1)) or len(names) >= IGNORED:
        raise UserError(f"{file} does not list classes 1, 2, … in tab-separated columns: download it again")
    return [names[number] for number in sorted(names)]


def _table(labels: dict[int, int]) -> np.ndarray:
    table = np.full(256, INVALID, np.int16)
    for value, label in labels.items():
        table[value] = label
    return table


def match_files(images: Path, labels: Path, image_suffix: str = "", label_suffix: str = "") -> tuple[Strings, Strings]:
    """Return the images below a folder and their label maps below another, sorted by path.

    Raises UserError for a missing folder, an image or label map without its counterpart, and two files of the same
    name.
    """

    def by_name(folder: Path, suffix: str) -> dict[str, str]:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}")
        files: dict[str, str] = {}
        skipped = Skipped()
        for file in image_files(folder, skipped):
            name = os.path.splitext(os.path.relpath(file, folder))[0]
            if not name.endswith(suffix):
                continue
            other = files.setdefault(name.removesuffix(suffix), file)
            if other != file:
                raise UserError(f"{other} and {file} differ only in their extension: remove one of them")
        skipped.report(folder)
        return files

    files, maps = by_name(images, image_suffix), by_name(labels, label_suffix)
    for own, others, folder, suffix, what in (
        (files, maps, labels, label_suffix, "label map"),
        (maps, files, images, image_suffix, "image"),
    ):
        alone = sorted(own.keys() - others.keys())
        if alone:
            more = f" (nor have {len(alone) - 1} others)" if len(alone) > 1 else ""
            raise UserError(f"{own[alone[0]]} has no {what} {folder / alone[0]}{suffix}.*{more}: add or remove")
    names = sorted(files)
    return Strings(files[name] for name in names), Strings(maps[name] for name in names)


class Augment:
    """Augment an image (3, H, W) uint8 and its labels (H, W) randomly; both get `crop` pixels per side.

    scale: see LabelMaps; ratios: range of a random factor of it. share: the largest fraction of a crop that one class
    may have; after ten attempts any crop is used. hflip: probability of a horizontal flip. distort: random brightness,
    contrast, saturation and hue. fill: colour, 0 … 1, of padding if the image is smaller than the crop; its labels are
    IGNORED.
    """

    def __init__(
        self,
        scale: Sequence[int] | None,
        crop: int,
        fill: Sequence[float],
        ratios: Sequence[Positive] = (0.5, 2.0),
        share: Fraction = 0.75,
        hflip: Fraction = 0.5,
        distort: bool = True,
    ):
        self.scale, self.crop, self.ratios, self.share = scale, crop, ratios, share
        self.flip, self.distort, self.fill = v2.RandomHorizontalFlip(hflip), distort, list(fill)
        if len(ratios) != 2 or not 0 < ratios[0] <= ratios[1]:
            raise UserError(
                f"data.augment.ratios={tuple(ratios)} must be the least and the largest factor of data.scale"
            )

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[1:]
        ratio = uniform(*self.ratios)
        if self.scale is None:
            height, width = height * ratio, width * ratio
        else:
            height, width = fit_size(height, width, [int(side * ratio) for side in self.scale])
        size = [max(1, int(height + 0.5)), max(1, int(width + 0.5))]
        image = F.resize(tv_tensors.Image(image), size, v2.InterpolationMode.BILINEAR, antialias=False)
        labels = F.resize(tv_tensors.Mask(labels[None]), size, v2.InterpolationMode.NEAREST)
        box = self._box(labels[0])
        image, labels = self.flip(F.crop(image, *box), tv_tensors.Mask(F.crop(labels, *box)))
        image = F.to_dtype(image, torch.float32, scale=True)
        if self.distort:
            image = distort_colors(image, hue=0.1, clip=True)
        border = [0, 0, self.crop - image.shape[2], self.crop - image.shape[1]]
        image = F.pad(image, border, fill=self.fill)
        labels = F.pad(labels, border, fill=IGNORED)
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)[0].long()

    def _box(self, labels: Tensor) -> tuple[int, int, int, int]:
        """Return (top, left, height, width) of a crop in which no class has more than `share` of the pixels."""
        height, width = (min(self.crop, side) for side in labels.shape)
        for attempt in range(11):
            top, left = (int(torch.randint(n - c + 1, ())) for n, c in zip(labels.shape, (height, width)))
            if self.share >= 1 or attempt == 10:
                break
            seen = torch.bincount(labels[top : top + height, left : left + width].flatten(), minlength=256)[:IGNORED]
            if (seen > 0).sum() > 1 and seen.max() < self.share * seen.sum():
                break
        return top, left, height, width


class Maps(Dataset):
    """A split. With `augment`, samples are (image (3, crop, crop) float32 in [0, 1], labels (crop, crop) int64).
    Without, they are unchanged, (image (3, H, W) uint8, labels (H, W) int64, index), and a batch has a list of each.

    table: number in a file -> label. meaning: description of the valid numbers.
    """

    def __init__(
        self, images: Sequence[str], labels: Sequence[str], table: np.ndarray, meaning: str, augment: Augment | None
    ):
        self.images, self.labels, self.table, self.meaning, self.augment = images, labels, table, meaning, augment

    def __len__(self) -> int:
        return len(self.images)

    def filename(self, index: int) -> str:
        return self.images[index]

    def __getitem__(self, index: int) -> tuple:
        name = self.images[index]
        image = open_image(read_bytes(name), lambda: name)
        turn, size = orientation(image), image.size
        image = to_rgb(image, lambda: name)
        image = image if turn is None else image.transpose(turn)
        labels = torch.from_numpy(self._labels(index, size, turn))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return (pixels, labels.long(), index) if self.augment is None else self.augment(pixels, labels)

    def collate(self, samples: list[tuple]) -> Any:
        return default_collate(samples) if self.augment is not None else [list(column) for column in zip(*samples)]

    def check(self, most: int, split: str, class_names: Sequence[str]) -> None:
        """Read up to `most` label maps, evenly spaced, and report each class's share of their pixels.

        If those of a training split have fewer than two classes, the others are read too, until two are found.
        Raises UserError for the first invalid label map, and for a training split with fewer than two classes.
        """
        from rich.progress import track  # here, since running a model does not need it

        order = np.linspace(0, len(self) - 1, min(most, len(self))).round().astype(int).tolist()
        sample = dict.fromkeys(order)
        rest = (index for index in range(len(self)) if index not in sample)
        counts, done = np.zeros(256, np.int64), 0
        text = f"checking {len(sample)} of {len(self)} label maps ({split})"
        for index in track(sample, text, transient=True, disable=len(sample) < 200):
            counts += self._count(index)
            done += 1
        while done and self.augment is not None and (counts[:IGNORED] > 0).sum() < 2 and done < len(self):
            counts += self._count(next(rest))
            done += 1
        if not done:
            return
        ignored = counts[IGNORED] / max(counts.sum(), 1)
        hint = ""
        if ignored and (counts[: len(class_names)] == 0).any():
            hint = f"{100 * ignored:.3g} % of the pixels are ignored: of {self.meaning}"
        where = f"{split} ({done} of {len(self)} label maps)" if done < len(self) else split
        least = 0 if self.augment is None else 2
        note_classes(where, counts[: len(class_names)], class_names, "pixels", least, hint)

    def _count(self, index: int) -> np.ndarray:
        """Count the pixels of each label in a label map, (256,); zeros if a file can't be read."""
        try:
            size, turn = stored_size(self.images[index])
            labels = self._labels(index, size, turn)
        except (OSError, BadImage):  # counted in training, which may tolerate some
            return np.zeros(256, np.int64)
        return np.bincount(labels.ravel(), minlength=256)

    def _labels(self, index: int, size: tuple[int, int], turn: Image.Transpose | None) -> np.ndarray:
        """Return the upright labels (H, W) uint8 of an image that is stored with this width and height.

        turn: the transpose that turns the image upright. A label map is turned by its own EXIF orientation, or like the
        image if it has none and has the stored size of the image.
        """
        name = self.labels[index]
        stored = open_image(read_bytes(name), lambda: name)
        if stored.format in ("JPEG", "MPO"):
            raise UserError(f"label map {name} is a JPEG file, which is lossy: save it as PNG")
        upright = size[::-1] if turn in SWAPS_SIDES else size
        own = orientation(stored)
        if own is None and stored.size == size != upright:
            own = turn
        values = np.array(stored if own is None else stored.transpose(own))
        if values.ndim == 3:
            colours = values[..., : values.shape[2] - (stored.mode in ("LA", "PA", "RGBA"))]
            if (colours != colours[..., :1]).any():
                raise UserError(
                    f"label map {name} must have one number per pixel, got colours ({stored.mode}): "
                    "save the class numbers as a greyscale or palette image",
                )
            values = colours[..., 0]
        if values.dtype.kind not in "uib":
            raise UserError(f"label map {name} has float values: save it as a greyscale image of integers")
        if values.shape != upright[::-1]:
            here, there = (f"{height}x{width}" for height, width in (values.shape, upright[::-1]))
            turned = "" if turn is None else " (by its EXIF orientation)"
            raise UserError(f"label map {name} is {here} pixels, its image {self.images[index]} is {there}{turned}")
        values = values.astype(np.int64)
        labels = self.table[values.clip(0, 255)]
        wrong = (labels == INVALID) | (values > 255) | (values < 0)
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            value = int(values[row, column])
            raise UserError(f"{name} has label {value} in row {row}, column {column}, but of {self.meaning}")
        return labels.astype(np.uint8)
