"""Pictures with boxes and masks, in COCO's json: COCO as it is downloaded, or a json and a folder of one's own.

    annotations/instances_train2017.json, annotations/instances_val2017.json, train2017/, val2017/

What the training data leave out, as the usual trainers do: crowd annotations; boxes that, clipped to the picture, are
less than a pixel wide or high; masks of no polygon; and pictures that then have no box. The evaluation has everything.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..runtime.config import check
from ..runtime.errors import UserError, closest
from .bad_images import BadImage
from .images import Strings, read_image

TRAIN = ("annotations/instances_train2017.json", "train2017")
VAL = ("annotations/instances_val2017.json", "val2017")
OFFENDERS = 3  # that an error names


class Coco:
    """The data of a run.

    root: the folder that the other names are in. train, val, test: (json, folder of pictures) of each split; test: None
    for val's. A test json without "annotations" (image_info_test-dev2017.json) can be predicted on, not evaluated.
    masks: whether training has them. short, long: a picture is enlarged or made smaller until its shorter side is
    `short` pixels, or its longer one is `long` if that comes first, in training; of several numbers it takes one at
    random. flip: how often training mirrors a picture.
    crop: of DETR's augmentation, dict(short=(400, 500, 600), side=(384, 600)): half the pictures are first resized to
    one of these and cut to a part whose sides are at random between those two; None: never.
    keep_empty: whether training has pictures without boxes. max_bad: how many pictures that can't be read, or are not
    there, a run goes on without.
    Raises UserError for a json that can't be read, disagrees with itself or names files that are not there.
    """

    img_size = None  # pictures differ in size

    def __init__(
        self,
        root: str,
        train: Sequence[str] = TRAIN,
        val: Sequence[str] = VAL,
        test: Sequence[str] | None = None,
        masks: bool = True,
        short: int | Sequence[int] = 800,
        long: int = 1333,
        flip: float = 0.5,
        crop: dict | None = None,
        keep_empty: bool = False,
        max_bad: int = 0,
    ):
        self.root, self.masks, self.keep_empty, self.max_bad = Path(root), masks, keep_empty, max_bad
        self.short = (short,) if isinstance(short, int) else tuple(short)
        self.long = long
        if not self.short or not all(isinstance(n, int) and n > 0 for n in (*self.short, long)):
            raise UserError(f"data.short={short}, data.long={long} must be whole numbers of pixels")
        if not 0 <= flip <= 1:
            raise UserError(f"data.flip={flip} must be a share, from 0 to 1")
        if max_bad < 0:
            raise UserError(f"data.max_bad={max_bad} must be 0 or more")
        if crop is not None:
            check("data.crop", crop, RandomPart)
        self.transform = augmentation(self.short, long, flip, crop)
        self._places = dict(train=train, val=val, test=val if test is None else test)
        for split, place in self._places.items():
            if len(place) != 2 or not all(isinstance(name, str) for name in place):
                raise UserError(f"data.{split}={place!r} must be two names: a json file and a folder of pictures")
        self.bad: dict[str, tuple[str, int]] = {}
        self._truths: dict[tuple[str, str], dict[str, Any]] = {}
        self.categories = self._categories("val")  # the small file: that of train takes half a minute
        self.class_names = list(self.categories.values())

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """The model's own preprocessing; input_size is that of the largest picture in training."""
        inputs = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
        return inputs | dict(input_size=(inputs["input_size"][0], min(max(self.short), self.long), self.long))

    def truth(self, split: str) -> dict[str, Any]:
        """What the split's json says, checked and with iscrowd and area filled in where it lacks them.

        "annotations" is missing where the json has none.
        """
        place = tuple(self._places[split])
        if place not in self._truths:
            self._truths[place] = read(self.root / place[0])
        return self._truths[place]

    def dataset(self, split: str, inputs: dict[str, Any], training: bool = False) -> "Pictures":
        """The pictures of "train", "val" or "test"; see Pictures."""
        file, folder = (self.root / name for name in self._places[split])
        categories = self._categories(split)
        if categories != self.categories:
            number = next(n for n in {**categories, **self.categories} if categories.get(n) != self.categories.get(n))
            said = [repr(c.get(number)) for c in (categories, self.categories)]
            raise UserError(
                f"{file} names category {number} {said[0]}, and {self._places['val'][0]} {said[1]}: "
                "all splits must have the same categories"
            )
        if training and "annotations" not in self.truth(split):
            raise UserError(f'{file} lacks "annotations": training needs them')
        truth = self.truth(split)
        self._find_files(file, folder, [image["file_name"] for image in truth["images"]])
        labels = {number: label for label, number in enumerate(self.categories, 1)}
        made = Pictures(split, folder, truth, labels, self.transform if training else None, self.masks, self.keep_empty)
        if training:
            self._truths.pop(tuple(self._places[split]))  # gigabytes of Python objects, in COCO's case
        if not len(made):
            raise UserError(f"{file} lists no picture{' with a box' if training else ''}: the {split} split is empty")
        return made

    def _categories(self, split: str) -> dict[int, str]:
        """id -> name, in the order of the ids, which is that of the labels 1 … K."""
        return {c["id"]: c["name"] for c in sorted(self.truth(split)["categories"], key=lambda c: c["id"])}

    def _find_files(self, file: Path, folder: Path, names: list[str]) -> None:
        """Raise UserError where more files are missing than the budget has room for; reading will meet the others."""
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}, where the pictures of {file} should be")
        there = {entry.name for entry in os.scandir(folder)}
        missing = [name for name in names if name not in there and not (folder / name).is_file()]
        if len(missing) > self.max_bad:
            budget = f" (data.max_bad={self.max_bad})" if self.max_bad else ""
            raise UserError(f"{folder} lacks {_first(missing)} of the {len(names)} pictures in {file}{budget}")


class Pictures(Dataset):
    """(image (3, H, W) float32, 0 to 1, not normalised; target) of each index.

    In training the image is augmented and of its final size; otherwise it is the picture as it is.

    target   boxes (n, 4) float32, x1 y1 x2 y2 in the image's pixels; labels (n,) int64, 1 … K; area (n,) float32, the
             json's, in the picture's pixels; iscrowd (n,) int64; image_id (1,) int64; orig_size (2,) int64, the
             picture's H and W; split. In training also masks (n, H, W) uint8, if wanted, decoded now.

    aspects (N,): height / width. truth: see Coco.truth. labels: of category ids. transform: of (image, target), or None
    in evaluation.
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
        crowd = np.array([a["iscrowd"] for a in annotations], bool)
        keep = np.ones(len(boxes), bool)
        if transform is not None:
            boxes = boxes.clip(0, limits)
            keep = ~crowd & ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
            if self.masks:
                keep &= np.array([has_mask(a.get("segmentation")) for a in annotations], bool)
        kept = np.flatnonzero(keep)
        ids = np.array([image["id"] for image in images], np.int64)
        if transform is not None and not keep_empty:
            shown = np.isin(ids, owner[kept])
            images, ids = [image for image, there in zip(images, shown) if there], ids[shown]
        # Arrays, not objects: each worker process would come to hold its own copy of those.
        position = {number: i for i, number in enumerate(ids.tolist())}
        place = np.array([position.get(i, -1) for i in owner[kept].tolist()], np.int64)
        kept = kept[np.argsort(place, kind="stable")]
        self.ends = np.cumsum([0, *np.bincount(place, minlength=len(ids))])
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

    def picture(self, image_id: int) -> Image.Image:
        """The picture with that id. Raises BadImage."""
        return read_image(self.folder / self.names[int(np.flatnonzero(self.ids == image_id)[0])])

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        path = self.folder / self.names[index]
        picture = read_image(path)
        height, width = self.sizes[index].tolist()
        if picture.size != (width, height):
            raise BadImage(str(path), f"is {picture.width}x{picture.height}, and its json says {width}x{height}")
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
        image = v2.functional.pil_to_tensor(picture)
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
        """Images and targets; images differ in size, so that they are padded by whoever takes them."""
        images, targets = zip(*samples)
        return list(images), list(targets)


def augmentation(short: Sequence[int], long: int, flip: float, crop: dict | None) -> v2.Transform:
    """Training's transform of (image, target): see Coco. Boxes that lose all but a pixel of a side go, and their masks.

    Bilinear without antialiasing, as torchvision's detectors resize in evaluation.
    """
    steps = [v2.RandomHorizontalFlip(flip)]
    if crop is not None:
        steps.append(v2.RandomApply([RandomPart(**crop)], 0.5))
    steps.append(v2.RandomShortestSize(list(short), long, antialias=False))
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_per_box)])


def _per_box(inputs: tuple) -> tuple[Tensor, ...]:
    return tuple(inputs[1][name] for name in ("labels", "area", "iscrowd"))


class RandomPart(v2.Transform):
    """The picture with its shorter side at one of `short`, cut to a part of it (DETR, arXiv 2005.12872).

    side: least and largest height and width of the part, each drawn at random; a picture that is smaller stays so.
    """

    def __init__(self, short: Sequence[int], side: Sequence[int]):
        super().__init__()
        pixels = [*short, *side]
        if not short or len(side) != 2 or not all(isinstance(n, int) and n > 0 for n in pixels) or side[0] > side[1]:
            raise UserError(f"data.crop.short={short}, data.crop.side={side} must be pixels, side the least and most")
        self.resize, self.side = v2.RandomShortestSize(list(short), antialias=False), tuple(side)

    def forward(self, *inputs: Any) -> Any:
        image, target = self.resize(*inputs)
        least, most = self.side
        height, width = (int(torch.randint(min(n, least), min(n, most) + 1, ())) for n in v2.functional.get_size(image))
        image, target = v2.RandomCrop((height, width))(image, target)
        return image, target


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """(height, width) uint8 of COCO's polygons, or of a run-length encoding, compressed or not."""
    from pycocotools import mask as coder

    if isinstance(segmentation, list):
        encoded = coder.merge(coder.frPyObjects([p for p in segmentation if _is_polygon(p)], height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = coder.frPyObjects(segmentation, height, width)
    else:
        encoded = segmentation
    return np.asarray(coder.decode([encoded]))[:, :, 0]


def _is_polygon(points: Any) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0


def has_mask(segmentation: Any) -> bool:
    """Whether it is something that decode_mask reads."""
    if isinstance(segmentation, list):
        return any(map(_is_polygon, segmentation))
    return isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys()


def read(file: Path) -> dict[str, Any]:
    """The content of a json in COCO's format, its entries held to what they must say.

    Raises UserError with the first that do not.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{file} can't be read ({error.strerror}): set data.root and the names of its splits"
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is no whole json file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not in COCO's format: it must hold an object, and holds {_kind(content)}")
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise UserError(f'{file} is not in COCO\'s format: it needs a list "{key}"{closest(key, content)}')
    _check_entries(file, "images", content["images"], dict(id=int, file_name=str, height=int, width=int))
    _check_entries(file, "categories", content["categories"], dict(id=int, name=str))
    _check_unique(file, "images", content["images"])
    _check_unique(file, "categories", content["categories"])
    if "annotations" not in content:
        return content
    annotations = content["annotations"]
    if not isinstance(annotations, list):
        raise UserError(f'{file} is not in COCO\'s format: "annotations" must be a list, got {_kind(annotations)}')
    _check_entries(file, "annotations", annotations, dict(id=int, image_id=int, category_id=int, bbox=list))
    _check_unique(file, "annotations", annotations)
    images, categories = ({entry["id"] for entry in content[key]} for key in ("images", "categories"))
    sizes = {image["id"]: [image["height"], image["width"]] for image in content["images"]}
    wrong = []
    for i, a in enumerate(annotations):
        box = a["bbox"]
        if a["image_id"] not in images:
            wrong.append(f"annotations[{i}] is of image {a['image_id']}, which is not listed")
        elif a["category_id"] not in categories:
            wrong.append(f"annotations[{i}] is of category {a['category_id']}, which is not listed")
        elif len(box) != 4 or not all(isinstance(x, (int, float)) and abs(x) < float("inf") for x in box):
            wrong.append(f"annotations[{i}].bbox must be four numbers, is {str(box)[:60]}")
        elif said := _wrong_mask(a.get("segmentation"), sizes[a["image_id"]]):
            wrong.append(f"annotations[{i}].segmentation {said}")
        else:
            a.setdefault("iscrowd", 0)
            a.setdefault("area", box[2] * box[3])
    if wrong:
        raise UserError(f"{file} is wrong: {_first(wrong, '; ')}")
    return content


def _check_entries(file: Path, key: str, entries: list, fields: dict[str, type]) -> None:
    wrong = []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            wrong.append(f"{key}[{i}] is {_kind(entry)}")
            continue
        for name, kind in fields.items():
            if name not in entry:
                wrong.append(f"{key}[{i}] has no {name}")
            elif not isinstance(entry[name], kind) or entry[name] is True or entry[name] is False:
                wrong.append(f"{key}[{i}].{name} must be {_KINDS[kind]}, is {_kind(entry[name])}")
            elif name in ("height", "width") and entry[name] < 1:
                wrong.append(f"{key}[{i}].{name} must be 1 or more, is {entry[name]}")
    if wrong:
        raise UserError(f"{file} is wrong: {_first(wrong)}")


def _check_unique(file: Path, key: str, entries: list[dict]) -> None:
    seen: set[int] = set()
    double = [f"{key}[{i}]" for i, e in enumerate(entries) if e["id"] in seen or seen.add(e["id"])]
    if double:
        raise UserError(f"{file} is wrong: {_first(double)} have ids that others have too")


def _wrong_mask(segmentation: Any, size: list[int]) -> str | None:
    """What is wrong with a mask of a picture of size [height, width]; a list of what are no polygons counts as none."""
    if segmentation is None or isinstance(segmentation, list):
        return None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return f"must be polygons or an object with size and counts, is {_kind(segmentation)}"
    if segmentation["size"] != size:
        return f"is of size {segmentation['size']}, and its picture of {size}"
    if isinstance(segmentation["counts"], list) and sum(segmentation["counts"]) != size[0] * size[1]:
        return f"has counts that add up to {sum(segmentation['counts'])}, not to {size[0]} x {size[1]}"
    return None


_KINDS = {int: "a whole number", str: "a text", list: "a list", dict: "an object", float: "a number"}


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), repr(value))


def _first(offenders: list[str], between: str = ", ") -> str:
    """The first few, and how many more."""
    more = f" and {len(offenders) - OFFENDERS} more" if len(offenders) > OFFENDERS else ""
    return between.join(offenders[:OFFENDERS]) + more
