"""Scenes to detect and segment: real handwritten digits on real photographs, all from scikit-learn's and scikit-image's
wheels, so that nothing is fetched; and scikit-image's coins, 24 real objects on one photograph.

The digits are those of saccade.train.data.digits, in its splits; photographs and digits of the val and test scenes are
in no training scene. Files are written in the layouts of COCO and of ADE20K:

    OUT/coco/images/{train,val,test}/000001.jpg    OUT/ade20k/images/{training,validation,test}/000001.jpg
    OUT/coco/annotations/instances_SPLIT.json      OUT/ade20k/annotations/{training,validation,test}/000001.png
                                                   OUT/ade20k/objectInfo.txt

COCO's category of digit d has id d + 1 and name "d". ADE20K's label 0 (to be ignored) does not occur, 1 is the
background, d + 2 is digit d; objectInfo.txt names them as ADE20K's objectInfo150.txt does. Scenes have equal bytes for
equal arguments, with equal versions of Pillow and numpy.
"""

import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..runtime.checkpoint import write_text
from ..runtime.errors import UserError, from_os
from .digits import Digits

PHOTOGRAPHS = dict(
    train=("china.jpg", "astronaut", "coffee", "retina", "hubble_deep_field", "immunohistochemistry", "camera")
    + ("brick", "grass", "gravel"),
    val=("stereo_motorcycle", "moon"),
    test=("flower.jpg", "chelsea", "rocket"),
)
COUNTS = dict(train=600, val=60, test=150)
FORMATS = ("coco", "ade20k")
NOTE = "scenes.json"  # in the folder written: how it was asked for
ADE_SPLITS = dict(train="training", val="validation", test="test")
CONTRAST = 60  # of a digit's brightness to its background's mean, of 255


class Ink(NamedTuple):
    """darkest, brightest: what photographs' brightness is multiplied by, at least and at most. colour: of digits' three
    channels, at least. visible: share of a digit's pixels that others leave uncovered, at least."""

    darkest: float
    brightest: float
    colour: float
    visible: float


# light: as chalk on dark photographs, no digit on another, of which a classifier of white digits on black knows a part.
# any: brighter or darker than what is behind, and over one another: which digit is which takes far longer to learn.
INKS = dict(light=Ink(0.3, 0.7, 200, 1.0), any=Ink(0.7, 1.2, 0, 0.6))


class Scene(NamedTuple):
    """image (H, W, 3) uint8; masks (n, H, W) bool, the pixels of each object that are seen; labels (n,), 0 … K-1."""

    image: np.ndarray
    masks: np.ndarray
    labels: list[int]


def scene(split: str, index: int, seed: int = 0, size: int = 160, ink: str = "light") -> Scene:
    """Scene number `index` of "train", "val" or "test": up to twelve digits, of 18 to 40 % of the picture's height.

    ink: of INKS.
    """
    rng = np.random.default_rng([seed, list(COUNTS).index(split), index])
    style = INKS[ink]
    image, glyphs, labels = _background(rng, split, size, style), *_glyphs(split)
    masks: list[np.ndarray] = []
    whole: list[int] = []
    chosen: list[int] = []
    for _ in range(rng.integers(5, 13)):
        for _attempt in range(20):
            number = int(rng.integers(len(glyphs)))
            alpha = _place(rng, glyphs[number], size)
            mask = alpha > 0.5
            left = [int((other & ~mask).sum()) for other in masks]
            if mask.any() and all(seen >= style.visible * pixels for seen, pixels in zip(left, whole)):
                break
        else:
            continue  # no room
        image = _paint(rng, image, alpha, mask, style)
        masks = [*(other & ~mask for other in masks), mask]
        whole.append(int(mask.sum()))
        chosen.append(labels[number])
    return Scene(image.round().astype(np.uint8), np.stack(masks), chosen)


def coins(half: str) -> Scene:
    """The left ("train") or the right part ("test") of scikit-image's coins, twelve coins in each; label 0."""
    from scipy.ndimage import binary_fill_holes
    from skimage import data, filters, measure, morphology

    image = data.coins()  # (303, 384) uint8
    # Brighter at the top left: each pixel is held to the brightness around it.
    bright = image > filters.threshold_local(image, 151, offset=-12)
    found = measure.label(morphology.opening(binary_fill_holes(bright), morphology.disk(3)))
    regions = [region for region in measure.regionprops(found) if region.area > 300]
    left = [region for region in regions if region.centroid[1] < image.shape[1] / 2]
    right = [region for region in regions if region not in left]
    # No straight cut passes between them: each part ends where the other's coins begin, which cuts some of its own.
    if half == "train":
        side, mine = slice(0, min(region.bbox[1] for region in right)), left
    else:
        side, mine = slice(max(region.bbox[3] for region in left), None), right
    masks = np.stack([(found == region.label)[:, side] for region in mine])
    return Scene(np.repeat(image[:, side, None], 3, 2), masks, [0] * len(mine))


def write(
    out: Path,
    formats: tuple[str, ...] = FORMATS,
    counts: dict[str, int] = COUNTS,
    size: int = 160,
    seed: int = 0,
    ink: str = "light",
    note: str = "",
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> None:
    """Write `counts` scenes of each split into `out`, all of them or, where that fails, nothing.

    note: what NOTE is to say. progress(done, total) is called after each scene.
    Raises UserError for a folder that holds something already.
    """
    total = sum(counts.values())
    with _Folder(out, note) as folder:
        done = 0
        for split, count in counts.items():
            writers = [_WRITERS[name](folder / name, split, [str(d) for d in range(10)]) for name in formats]
            for index in range(count):
                made = scene(split, index, seed, size, ink)
                for writer in writers:
                    writer.add(made)
                done += 1
                progress(done, total)
            for writer in writers:
                writer.finish()


def write_coins(out: Path, formats: tuple[str, ...] = FORMATS, note: str = "") -> None:
    """Write the coins into `out` as `write` does: train and val are the left half, test is the right one.

    The val split chooses the best checkpoint: it must not be the half that is tested on.
    """
    with _Folder(out, note) as folder:
        for split in COUNTS:
            for name in formats:
                writer = _WRITERS[name](folder / name, split, ["coin"])
                writer.add(coins("test" if split == "test" else "train"))
                writer.finish()


class _Folder:
    """`out` with all that the block writes, or as it was: the block has a folder beside it that takes its name."""

    def __init__(self, out: Path, note: str):
        self.out, self.note, self.beside = out, note, out.with_name(f".{out.name}.writing")

    def __enter__(self) -> Path:
        try:
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise UserError(f"{self.out} is not empty: choose another folder")
            shutil.rmtree(self.beside, ignore_errors=True)  # of a run that was killed
            self.beside.mkdir(parents=True)
        except OSError as error:
            raise from_os(error, f"writing {self.out}") from error
        return self.beside

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            write_text(self.beside / NOTE, self.note)
            self.beside.replace(self.out)
            return
        shutil.rmtree(self.beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise from_os(error, f"writing {self.out}") from error


class _Coco:
    """A split in COCO's layout. Masks are run-length encoded: polygons could not say them exactly."""

    def __init__(self, root: Path, split: str, names: list[str]):
        self.folder, self.file = root / "images" / split, root / "annotations" / f"instances_{split}.json"
        self.folder.mkdir(parents=True)
        categories = [dict(id=number + 1, name=name) for number, name in enumerate(names)]
        self.content: dict[str, list] = dict(images=[], annotations=[], categories=categories)

    def add(self, made: Scene) -> None:
        from pycocotools import mask as coder

        images, annotations = self.content["images"], self.content["annotations"]
        height, width = made.image.shape[:2]
        images.append(dict(id=len(images) + 1, file_name=f"{len(images) + 1:06d}.jpg", height=height, width=width))
        (self.folder / images[-1]["file_name"]).write_bytes(_jpeg(made.image))
        for mask, label in zip(made.masks, made.labels):
            rle = coder.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=images[-1]["id"],
                    category_id=label + 1,
                    bbox=coder.toBbox(rle).tolist(),
                    area=int(mask.sum()),
                    iscrowd=0,
                    segmentation=dict(size=[height, width], counts=rle["counts"].decode()),
                )
            )

    def finish(self) -> None:
        write_text(self.file, json.dumps(self.content) + "\n")


class _Ade20k:
    """A split in ADE20K's layout."""

    def __init__(self, root: Path, split: str, names: list[str]):
        self.images, self.labels = (root / kind / ADE_SPLITS[split] for kind in ("images", "annotations"))
        for folder in (self.images, self.labels):
            folder.mkdir(parents=True)
        rows = [f"{number}\t{name}\n" for number, name in enumerate(["background", *names], 1)]
        self.classes = root / "objectInfo.txt", "Idx\tName\n" + "".join(rows)
        self.count = 0

    def add(self, made: Scene) -> None:
        self.count += 1
        labels = np.ones(made.image.shape[:2], np.uint8)
        for mask, label in zip(made.masks, made.labels):
            labels[mask] = label + 2
        (self.images / f"{self.count:06d}.jpg").write_bytes(_jpeg(made.image))
        Image.fromarray(labels).save(self.labels / f"{self.count:06d}.png")

    def finish(self) -> None:
        write_text(*self.classes)


_WRITERS = dict(coco=_Coco, ade20k=_Ade20k)


def _jpeg(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.getvalue()


@cache
def _photograph(name: str) -> Image.Image:
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    from skimage import data

    pixels = getattr(data, name)()
    return Image.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")


@cache
def _glyphs(split: str) -> tuple[np.ndarray, list[int]]:
    """The digits of a split, with a black margin: (N, 10, 10) uint8; and which they are."""
    digits = Digits(img_size=8)
    images = digits.dataset(split, digits.inputs({}))
    return np.pad(images.pixels.numpy(), ((0, 0), (1, 1), (1, 1))), images.labels


def _background(rng: np.random.Generator, split: str, size: int, ink: Ink) -> np.ndarray:
    """A square part of one of the split's photographs, mirrored or not, brighter or darker: (size, size, 3) float."""
    photograph = _photograph(PHOTOGRAPHS[split][rng.integers(len(PHOTOGRAPHS[split]))])
    side = int(rng.uniform(0.4, 1.0) * min(photograph.size))
    x, y = (int(rng.integers(length - side + 1)) for length in photograph.size)
    part = photograph.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side), reducing_gap=2.0)
    pixels = np.asarray(part, np.float64)[:, :: rng.choice([-1, 1])]
    return np.clip(pixels * rng.uniform(ink.darkest, ink.brightest), 0, 255)


def _place(rng: np.random.Generator, glyph: np.ndarray, size: int) -> np.ndarray:
    """The digit enlarged, turned by up to 20 degrees, somewhere in the picture: opacity (size, size), 0 to 1."""
    height = size * rng.uniform(0.18, 0.4) * len(glyph) / 8
    sides = round(height * rng.uniform(0.7, 1.0)), round(height)
    turned = Image.fromarray(glyph).resize(sides, Image.Resampling.BICUBIC)
    turned = turned.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    stroke = np.clip((np.asarray(turned) / 255 - 0.3) / 0.3, 0, 1)  # from what is half grey, sharp edges
    inside = stroke > 0.5
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    alpha = np.zeros((size, size))
    if not len(rows):
        return alpha
    stroke = stroke[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    h, w = stroke.shape
    y, x = rng.integers(size - h + 1), rng.integers(size - w + 1)
    alpha[y : y + h, x : x + w] = stroke
    return alpha


def _paint(rng: np.random.Generator, image: np.ndarray, alpha: np.ndarray, mask: np.ndarray, ink: Ink) -> np.ndarray:
    """The image with a digit in a colour that stands out from what it covers, lit from one side, a little grainy."""
    behind = _brightness(image[mask]).mean()
    while True:
        colour = rng.uniform(ink.colour, 255, 3)
        if abs(_brightness(colour) - behind) >= CONTRAST:
            break
    y, x = np.indices(mask.shape) / len(mask) - 0.5
    direction = rng.uniform(0, 2 * np.pi)
    light = 1 + 0.3 * (np.cos(direction) * x + np.sin(direction) * y)
    painted = colour * light[..., None] + rng.normal(0, 4, image.shape)
    return np.clip(image + alpha[..., None] * (painted - image), 0, 255)


def _brightness(colour: np.ndarray) -> np.ndarray:
    return colour @ [0.299, 0.587, 0.114]
