"""Images with boxes and masks in COCO's format: COCO as downloaded, or your own JSON file and folder of images.

    annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/, val2017/

As usual, training leaves out crowd annotations; boxes that, clipped to the image, are less than a pixel wide or high;
masks without a polygon; and images that then have no box. Evaluation uses everything.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..runtime.config import Count, Fraction, NonNegativeInt, check
from ..runtime.errors import UserError
from .bad_images import BadImage
from .coco_json import decode_mask, has_mask, read
from .files import first, fold, note, note_classes
from .images import SWAPS_SIDES, Strings, note_conversions, open_image, orientation, read_bytes, to_rgb

TRAIN = ("annotations/instances_train2017.json", "train2017")
VAL = ("annotations/instances_val2017.json", "val2017")


class Coco:
    """COCO, or data in its format, as the data of a run.

    root: the folder that the other names are relative to. train, val, test: (JSON file, folder of images) of each
    split; test=None uses val. A test file without "annotations" (image_info_test-dev2017.json) allows prediction, not
    evaluation.
    masks: whether to use masks in training and evaluation, if the detector has them. short, long: training resizes an
    image to a shorter side of `short` pixels (one of several numbers, at random), but a longer side of at most `long`.
    flip: probability of a horizontal flip in training.
    crop: DETR's augmentation, dict(short=(400, 500, 600), side=(384, 600)): half of the images are first resized to one
    of `short` and cropped to random sides within `side`; None: none.
    keep_empty: whether to train on images without boxes. max_bad: how many unreadable or missing images a run
    tolerates. Raises UserError for a JSON file that can't be read, is inconsistent or lists missing files.
    """

    img_size = None  # images differ in size

    def __init__(
        self,
        root: str,
        train: Sequence[str] = TRAIN,
        val: Sequence[str] = VAL,
        test: Sequence[str] | None = None,
        masks: bool = True,
        short: Count | Sequence[Count] = 800,
        long: Count = 1333,
        flip: Fraction = 0.5,
        crop: dict | None = None,
        keep_empty: bool = False,
        max_bad: NonNegativeInt = 0,
    ):
        self.root, self.masks, self.keep_empty, self.max_bad = Path(root), masks, keep_empty, max_bad
        self.short = (short,) if isinstance(short, int) else tuple(short)
        self.long = long
        if not self.short or not all(isinstance(n, int) and n > 0 for n in (*self.short, long)):
            raise UserError(f"data.short={short}, data.long={long} must be integers, in pixels")
        if not 0 <= flip <= 1:
            raise UserError(f"data.flip={flip} must be a probability from 0 to 1")
        if max_bad < 0:
            raise UserError(f"data.max_bad={max_bad} must be 0 or more")
        if crop is not None:
            check("data.crop", crop, RandomPart)
        self.transform = augmentation(self.short, long, flip, crop)
        self._places = dict(train=train, val=val, test=val if test is None else test)
        for split, place in self._places.items():
            if len(place) != 2 or not all(isinstance(name, str) for name in place):
                raise UserError(f"data.{split}={place!r} must be two names: a JSON file and a folder of images")
        self.bad: dict[str, tuple[str, int]] = {}
        self._truths: dict[tuple[str, str], dict[str, Any]] = {}
        self.categories = self._categories("val")  # the small file: the one of train takes half a minute
        self.class_names = list(self.categories.values())

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """Return the model's own preprocessing; input_size is the largest size in training."""
        inputs = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
        return inputs | dict(input_size=(inputs["input_size"][0], min(max(self.short), self.long), self.long))

    def truth(self, split: str) -> dict[str, Any]:
        """Return the content of the split's JSON file, checked, with missing iscrowd and area filled in.

        It has no "annotations" if the file has none.
        """
        place = tuple(self._places[split])
        if place not in self._truths:
            self._truths[place] = read(self.root / place[0])
        return self._truths[place]

    def dataset(self, split: str, inputs: dict[str, Any], training: bool = False) -> "CocoImages":
        """Return the images of "train", "val" or "test", with each class's share of the boxes reported.

        Raises UserError for a training split without boxes, and for a missing mask if masks are evaluated.
        """
        file, folder = (self.root / name for name in self._places[split])
        categories = self._categories(split)
        if categories != self.categories:
            number = next(n for n in {**categories, **self.categories} if categories.get(n) != self.categories.get(n))
            own, other = (repr(c.get(number)) for c in (categories, self.categories))
            raise UserError(
                f"category {number} is {own} in {file} but {other} in {self._places['val'][0]}: "
                "all splits must have the same categories"
            )
        if training and "annotations" not in self.truth(split):
            raise UserError(f'{file} lacks "annotations": training needs them')
        truth = self.truth(split)
        names = [image["file_name"] for image in truth["images"]]
        self._find_files(file, folder, names)
        if training and os.path.realpath(folder) == os.path.realpath(self.root / self._places["val"][1]):
            seen = {*names} & {image["file_name"] for image in self.truth("val")["images"]}
            if seen:
                note(f"{len(seen)} of the val images are in train too, so that val is not new to the model")
        without = [a["id"] for a in truth.get("annotations", ()) if self.masks and not has_mask(a.get("segmentation"))]
        if without and not training:
            raise UserError(
                f"{file} has no mask (segmentation) for the annotations with id {first(list(map(str, without)), 3)}, "
                "but masks are evaluated: add them, or train a detector of boxes"
            )
        labels = {number: label for label, number in enumerate(self.categories, 1)}
        transform = self.transform if training else None
        dataset = CocoImages(split, folder, truth, labels, transform, self.masks, self.keep_empty)
        if training:
            self._truths.pop(tuple(self._places[split]))  # gigabytes of Python objects, in COCO's case
        left_out = ", ".join(f"{count} {reason}" for reason, count in dataset.left_out.items() if count)
        objects = np.bincount(dataset.labels[dataset.crowd == 0], minlength=len(labels) + 1)[1:]
        if training and not objects.sum():
            reasons = f" (left out: {left_out})" if left_out else ""
            raise UserError(f"{file} has no box to learn from{reasons}")
        if left_out:
            note(f"{split}: left out of training: {left_out}")
        if dataset.unmatched:
            note(f"{split}: {dataset.unmatched} boxes are outside their image or have no area, so that none can match")
        if "annotations" in truth:
            note_classes(split, objects, self.class_names, "boxes", least=0)
        note_conversions(lambda i: read_bytes(folder / dataset.names[i]), len(dataset), f"{split} images")
        return dataset

    def _categories(self, split: str) -> dict[int, str]:
        """Return id -> name, sorted by id, in the order of the labels 1 … K."""
        return {c["id"]: c["name"] for c in sorted(self.truth(split)["categories"], key=lambda c: c["id"])}

    def _find_files(self, file: Path, folder: Path, names: list[str]) -> None:
        """Raise UserError if more files are missing than the budget allows; fewer are reported when they are read."""
        if not folder.is_dir():
            raise UserError(f"the folder {folder}, which should have the images of {file}, does not exist")
        there = {entry.name for entry in os.scandir(folder)}
        missing = [name for name in names if name not in there and not (folder / name).is_file()]
        if len(missing) > self.max_bad:
            budget = f" (data.max_bad={self.max_bad})" if self.max_bad else ""
            files = {fold(name): name for name in there}
            name = missing[0]
            path = unquote(name).replace("\\", "/")  # Windows' separators, a URL's %20
            twin = path if (folder / path).is_file() else files.get(fold(path.rpartition("/")[2]))
            hint = f'; {twin} is there: correct "file_name", or data.root and the folder of the split' if twin else ""
            raise UserError(f"{folder} lacks {first(missing, 3)} of the {len(names)} images in {file}{budget}{hint}")


class CocoImages(Dataset):
    """A dataset of (image (3, H, W) float32, 0 to 1, not normalised; target).

    In training the image is augmented and has its final size; otherwise it is unchanged. An image with an EXIF
    orientation is rotated unless its stored size is the one in the JSON file.

    target   boxes (n, 4) float32, x1 y1 x2 y2 in pixels of the image; labels (n,) int64, 1 … K; area (n,) float32, from
             the JSON file, in pixels of the file; iscrowd (n,) int64; image_id (1,) int64; orig_size (2,) int64, H and
             W of the file; split. In training also masks (n, H, W) uint8, if requested.

    aspects (N,): height / width. left_out: number of boxes left out of training, by reason. unmatched: in evaluation,
    the number of boxes that no detection can match. truth: see Coco.truth.
    labels: category id -> label. transform: a function of (image, target), or None in evaluation.
    """

    def __init__(
        self,
        split: str,
        folder: Path,
        truth: dict[str, Any],
        labels: dict[int, int],
        transform: Any,
        masks: bool,
        keep_empty: bool,
    ):
        self.split, self.folder, self.transform = split, folder, transform
        self.masks = masks and transform is not None
        images, annotations = truth["images"], truth.get("annotations", ())
        size = {image["id"]: (image["height"], image["width"]) for image in images}
        owner = np.array([a["image_id"] for a in annotations], np.int64)
        boxes = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        limits = np.array([size[i][::-1] * 2 for i in owner.tolist()]).reshape(-1, 4)
        inside = boxes.clip(0, limits)
        crowd = np.array([a["iscrowd"] for a in annotations], bool)
        keep = np.ones(len(boxes), bool)
        self.left_out: dict[str, int] = {}
        self.unmatched = 0
        if transform is None:
            self.unmatched = int((((inside[:, 2:] - inside[:, :2]) <= 0).any(1) & ~crowd).sum())
        else:
            boxes = inside
            small = ((boxes[:, 2:] - boxes[:, :2]) < 1).any(1)
            masked = np.array([not self.masks or has_mask(a.get("segmentation")) for a in annotations], bool)
            keep = ~crowd & ~small & masked
            self.left_out["crowds"] = int(crowd.sum())
            self.left_out["outside their image, or less than a pixel wide or high"] = int((small & ~crowd).sum())
            self.left_out["without a mask"] = int((~masked & ~small & ~crowd).sum())
        kept = np.flatnonzero(keep)
        ids = np.array([image["id"] for image in images], np.int64)
        if transform is not None and not keep_empty:
            shown = np.isin(ids, owner[kept])
            images, ids = [image for image, there in zip(images, shown) if there], ids[shown]
        # Arrays, since Python objects would be copied to each worker process by their reference counts.
        index = {number: i for i, number in enumerate(ids.tolist())}
        image_of = np.array([index[i] for i in owner[kept].tolist()], np.int64)
        kept = kept[np.argsort(image_of, kind="stable")]
        self.ends = np.cumsum([0, *np.bincount(image_of, minlength=len(ids))])
        self.ids, self.names = ids, Strings(image["file_name"] for image in images)
        self.sizes = np.array([size[i] for i in ids.tolist()], np.int64).reshape(-1, 2)
        self.aspects = self.sizes[:, 0] / self.sizes[:, 1]
        self.boxes, self.crowd = boxes[kept].astype(np.float32), crowd[kept].astype(np.int64)
        self.labels = np.array([labels[annotations[i]["category_id"]] for i in kept], np.int64)
        self.areas = np.array([annotations[i]["area"] for i in kept], np.float32)
        self.outlines = Strings(json.dumps(annotations[i]["segmentation"]) for i in kept) if self.masks else None

    def __len__(self) -> int:
        return len(self.ids)

    def filename(self, index: int) -> str:
        return self.names[index]

    def load_image(self, image_id: int) -> Image.Image:
        """Return the image with that id. Raises BadImage."""
        return self._read(int(np.flatnonzero(self.ids == image_id)[0]))

    def _read(self, index: int) -> Image.Image:
        """Return an image of the size in the JSON file. Raises BadImage if the file has another size."""
        path, size = self.folder / self.names[index], tuple(self.sizes[index, ::-1].tolist())
        image = open_image(read_bytes(path), lambda: str(path))
        turn, stored = orientation(image), image.size
        image = to_rgb(image, lambda: str(path))
        if stored == size:
            return image
        if turn in SWAPS_SIDES and stored[::-1] == size:
            return image.transpose(turn)
        turned = f" ({stored[1]}x{stored[0]} by its EXIF orientation)" if turn in SWAPS_SIDES else ""
        raise BadImage(str(path), f"is {stored[0]}x{stored[1]}{turned}, but its JSON file says {size[0]}x{size[1]}")

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        image = self._read(index)
        height, width = self.sizes[index].tolist()
        mine = slice(self.ends[index], self.ends[index + 1])
        boxes = torch.from_numpy(self.boxes[mine].copy())
        target = dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            labels=torch.from_numpy(self.labels[mine].copy()),
            area=torch.from_numpy(self.areas[mine].copy()),
            iscrowd=torch.from_numpy(self.crowd[mine].copy()),
        )
        if self.masks:
            outlines = [json.loads(self.outlines[i]) for i in range(mine.start, mine.stop)]
            masks = [decode_mask(outline, height, width) for outline in outlines]
            masks = np.stack(masks) if masks else np.zeros((0, height, width), np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        image = v2.functional.pil_to_tensor(image)
        if self.transform is not None:
            image, target = self.transform(tv_tensors.Image(image), target)
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        target |= dict(
            image_id=torch.from_numpy(self.ids[index : index + 1].copy()),
            orig_size=torch.from_numpy(self.sizes[index].copy()),
            split=self.split,
        )
        return v2.functional.to_dtype(image.as_subclass(Tensor), torch.float32, scale=True), target

    @staticmethod
    def collate(samples: Sequence[tuple]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Return images and targets as two lists: images differ in size, and the model pads them."""
        images, targets = zip(*samples)
        return list(images), list(targets)


def augmentation(short: Sequence[int], long: int, flip: float, crop: dict | None) -> v2.Transform:
    """Return the transform of (image, target) for training; see Coco. It drops boxes cropped to less than a pixel.

    Resizing is bilinear without antialiasing, as in torchvision's detectors in evaluation.
    """
    steps = [v2.RandomHorizontalFlip(flip)]
    if crop is not None:
        steps.append(v2.RandomApply([RandomPart(**crop)], 0.5))
    steps.append(v2.RandomShortestSize(list(short), long, antialias=False))
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_per_box)])


def _per_box(inputs: tuple) -> tuple[Tensor, ...]:
    return tuple(inputs[1][name] for name in ("labels", "area", "iscrowd"))


class RandomPart(v2.Transform):
    """Resize an image to a shorter side of one of `short`, and crop it randomly (DETR, arXiv 2005.12872).

    side: range of the random height and width of the crop; a smaller image is not cropped.
    """

    def __init__(self, short: Sequence[int], side: Sequence[int]):
        super().__init__()
        pixels = [*short, *side]
        if not short or len(side) != 2 or not all(isinstance(n, int) and n > 0 for n in pixels) or side[0] > side[1]:
            raise UserError(
                f"data.crop.short={short}, data.crop.side={side} must be in pixels, side the least and the most"
            )
        self.resize, self.side = v2.RandomShortestSize(list(short), antialias=False), tuple(side)

    def forward(self, *inputs: Any) -> Any:
        image, target = self.resize(*inputs)
        least, most = self.side
        height, width = (int(torch.randint(min(n, least), min(n, most) + 1, ())) for n in v2.functional.get_size(image))
        image, target = v2.RandomCrop((height, width))(image, target)
        return image, target
