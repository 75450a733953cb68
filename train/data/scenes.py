"""Scenes for detection and segmentation: handwritten digits on photographs, and scikit-image's photograph of 24 coins.

All images are real and come from the wheels of scikit-learn and scikit-image, so that nothing is downloaded. The digits
are those of saccade.train.data.digits, in its splits; val and test scenes share no photograph or digit with training
scenes. Files are written in the layouts of COCO and ADE20K:

    OUT/coco/images/{train,val,test}/000001.jpg    OUT/ade20k/images/{training,validation,test}/000001.jpg
    OUT/coco/annotations/instances_SPLIT.json      OUT/ade20k/annotations/{training,validation,test}/000001.png
                                                   OUT/ade20k/objectInfo.txt

Digit d has the COCO category id d + 1 and the name "d". ADE20K's label 0 (ignored) does not occur, 1 is the background,
d + 2 is digit d; objectInfo.txt lists them in the format of ADE20K's objectInfo150.txt. The same arguments give
byte-identical files, with the same versions of Pillow and NumPy.
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
ARGUMENTS_FILE = "scenes.json"  # in the output folder: the arguments that it was written with
ADE_SPLITS = dict(train="training", val="validation", test="test")
CONTRAST = 60  # least difference between a digit's brightness and the mean of its background, of 255


class Ink(NamedTuple):
    """A style of digits. darkest, brightest: range of the factor of the photographs' brightness. colour: least value of
    a digit's colour channels. visible: least share of a digit's pixels that is not covered by others."""

    darkest: float
    brightest: float
    colour: float
    visible: float


# light: like chalk on dark photographs, without overlap; close to the white digits on black of data/digits.
# any: brighter or darker than the background, overlapping; takes far longer to learn.
INKS = dict(light=Ink(0.3, 0.7, 200, 1.0), any=Ink(0.7, 1.2, 0, 0.6))


class Scene(NamedTuple):
    """image (H, W, 3) uint8; masks (n, H, W) bool, the visible pixels of each object; labels (n,), 0 … K-1."""

    image: np.ndarray
    masks: np.ndarray
    labels: list[int]


def scene(split: str, index: int, seed: int = 0, size: int = 160, ink: str = "light") -> Scene:
    """Make scene number `index` of "train", "val" or "test": up to twelve digits, of 18 to 40 % of the image's height.

    ink: a key of INKS.
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
    """Return the left ("train") or right half ("test") of scikit-image's coins: twelve in each, with label 0."""
    from scipy.ndimage import binary_fill_holes
    from skimage import data, filters, measure, morphology

    image = data.coins()  # (303, 384) uint8
    # The photograph is brighter at the top left, so each pixel is compared with the brightness around it.
    bright = image > filters.threshold_local(image, 151, offset=-12)
    found = measure.label(morphology.opening(binary_fill_holes(bright), morphology.disk(3)))
    regions = [region for region in measure.regionprops(found) if region.area > 300]
    left = [region for region in regions if region.centroid[1] < image.shape[1] / 2]
    right = [region for region in regions if region not in left]
    # No straight line separates the halves: each part ends where the other's coins begin, which cuts some of its own.
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
    arguments: str = "",
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> None:
    """Write `counts` scenes of each split to the folder `out`. On failure, nothing is written.

    arguments: the content of ARGUMENTS_FILE. progress(done, total) is called after each scene.
    Raises UserError if the folder is not empty.
    """
    total = sum(counts.values())
    with _Folder(out, arguments) as folder:
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


def write_coins(out: Path, formats: tuple[str, ...] = FORMATS, arguments: str = "") -> None:
    """Write the coins to `out` as `write` does: train and val are the left half, test is the right half.

    val is not the test half, since it selects the best checkpoint.
    """
    with _Folder(out, arguments) as folder:
        for split in COUNTS:
            for name in formats:
                writer = _WRITERS[name](folder / name, split, ["coin"])
                writer.add(coins("test" if split == "test" else "train"))
                writer.finish()


class _Folder:
    """Write a folder atomically: the block writes to a temporary folder, which is renamed to `out` on success."""

    def __init__(self, out: Path, arguments: str):
        self.out, self.arguments, self.temporary = out, arguments, out.with_name(f".{out.name}.writing")

    def __enter__(self) -> Path:
        try:
            if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
                raise UserError(f"{self.out} is not empty: choose another folder")
            shutil.rmtree(self.temporary, ignore_errors=True)  # left by a killed process
            self.temporary.mkdir(parents=True)
        except OSError as error:
            raise from_os(error, f"writing {self.out}") from error
        return self.temporary

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            write_text(self.temporary / ARGUMENTS_FILE, self.arguments)
            self.temporary.replace(self.out)
            return
        shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise from_os(error, f"writing {self.out}") from error


class _Coco:
    """Write a split in COCO's layout. Masks are run-length encoded, since polygons are not exact."""

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
    """Write a split in ADE20K's layout."""

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
    """Return the digits of a split with a black margin, (N, 10, 10) uint8, and their labels."""
    digits = Digits(img_size=8)
    images = digits.dataset(split, digits.inputs({}))
    return np.pad(images.pixels.numpy(), ((0, 0), (1, 1), (1, 1))), images.labels


def _background(rng: np.random.Generator, split: str, size: int, ink: Ink) -> np.ndarray:
    """Return a square crop of one of the split's photographs, (size, size, 3) float, with random flip and
    brightness."""
    photograph = _photograph(PHOTOGRAPHS[split][rng.integers(len(PHOTOGRAPHS[split]))])
    side = int(rng.uniform(0.4, 1.0) * min(photograph.size))
    x, y = (int(rng.integers(length - side + 1)) for length in photograph.size)
    part = photograph.resize((size, size), Image.Resampling.BICUBIC, (x, y, x + side, y + side), reducing_gap=2.0)
    pixels = np.asarray(part, np.float64)[:, :: rng.choice([-1, 1])]
    return np.clip(pixels * rng.uniform(ink.darkest, ink.brightest), 0, 255)


def _place(rng: np.random.Generator, glyph: np.ndarray, size: int) -> np.ndarray:
    """Return the opacity (size, size), 0 to 1, of a digit at a random size and position, rotated by up to 20
    degrees."""
    height = size * rng.uniform(0.18, 0.4) * len(glyph) / 8
    sides = round(height * rng.uniform(0.7, 1.0)), round(height)
    turned = Image.fromarray(glyph).resize(sides, Image.Resampling.BICUBIC)
    turned = turned.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
    stroke = np.clip((np.asarray(turned) / 255 - 0.3) / 0.3, 0, 1)  # sharpen the edges
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
    """Return the image with a digit, in a colour that contrasts with the background, shaded and with some noise."""
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
