"""Read JSON files in COCO's format: check every field of every entry, and decode masks."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UserError, closest
from .files import first, note

OFFENDERS = 3  # invalid entries that an error lists
LARGEST = 1e7  # limit of coordinates, in pixels
Size = tuple[int, int]


def read(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file in COCO's format, with missing iscrowd and area filled in.

    Raises UserError naming the first entries that are not valid.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(
            f"{file} can't be read ({error.strerror}): set data.root and the names of its splits"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not a complete JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not in COCO's format: it must contain an object, got {_kind(content)}")
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list) or not content[key]:
            raise UserError(f'{file} is not in COCO\'s format: it needs a list "{key}"{closest(key, content)}')
    _check_entries(file, "images", content["images"], dict(id=int, file_name=str, height=int, width=int))
    _check_entries(file, "categories", content["categories"], dict(id=int, name=str))
    names = Counter(category["name"] for category in content["categories"])
    for name, count in names.items():
        if count > 1:
            ids = ", ".join(str(c["id"]) for c in content["categories"] if c["name"] == name)
            raise UserError(f"{file} has {count} categories called {name!r}, with ids {ids}: give each a unique name")
    files = Counter(image["file_name"] for image in content["images"])
    if double := [name for name, count in files.items() if count > 1]:
        note(f"{file} lists images more than once: {first(double)}")
    if "annotations" not in content:
        return content
    annotations = content["annotations"]
    if not isinstance(annotations, list):
        raise UserError(f'{file} is not in COCO\'s format: "annotations" must be a list, got {_kind(annotations)}')
    _check_entries(file, "annotations", annotations, dict(id=int, image_id=int, category_id=int, bbox=list))
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    wrong = []
    for i, annotation in enumerate(annotations):
        if fault := _fault(annotation, sizes, categories):
            wrong.append(f"annotations[{i}] (id {annotation['id']}) {fault}")
            continue
        annotation["iscrowd"] = int(annotation.get("iscrowd") or 0)
        if annotation.get("area") is None:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    _refuse(file, wrong)
    _check_boxes(file, annotations, sizes)
    return content


def _check_boxes(file: Path, annotations: list[dict[str, Any]], sizes: dict[int, Size]) -> None:
    """Raise UserError if all boxes, or all polygons, are in another format; report annotations that are repeated."""
    if not annotations:
        return
    if 0 < max(max(a["bbox"]) for a in annotations) <= 1:
        raise UserError(f"{file} has boxes from 0 to 1 only: give left, top, width, height in pixels")
    beyond = 0
    for annotation in annotations:
        (x, y, w, h), (height, width) = annotation["bbox"], sizes[annotation["image_id"]]
        if w < x or h < y:
            break  # not right and bottom
        beyond += x + w > width + 1 or y + h > height + 1
    else:
        if beyond > len(annotations) / 10:
            raise UserError(
                f"{file} has {beyond} of {len(annotations)} boxes that reach beyond their image, as if they were left, "
                "top, right, bottom: give left, top, width, height"
            )
    sample = [corners for a in annotations[:1000] if (corners := _has_corners(a)) is not None]
    if sum(sample) > 0.9 * len(sample):
        raise UserError(
            f"{file} has boxes whose last two numbers are right and bottom, by their polygons or areas: give left, "
            "top, width, height"
        )
    polygons = (p for a in annotations if isinstance(a.get("segmentation"), list) for p in a["segmentation"] if p)
    largest = 0.0
    for polygon in polygons:
        largest = max(largest, *polygon)
        if largest > 1:
            break
    if 0 < largest <= 1:
        raise UserError(f"{file} has polygons from 0 to 1 only: give their points in pixels")
    repeated = len(annotations) - len({hash((a["image_id"], a["category_id"], *a["bbox"])) for a in annotations})
    if repeated:
        note(f"{file}: {repeated} annotations repeat the image, category and box of another")


def _has_corners(annotation: dict[str, Any]) -> bool | None:
    """Return whether an annotation's polygons, or else its area, say that its box is left, top, right, bottom; None if
    they say neither that nor that it is left, top, width, height."""
    x, y, a, b = annotation["bbox"]
    outline = annotation.get("segmentation")
    points = [number for polygon in outline for number in polygon] if isinstance(outline, list) else []
    if len(points) >= 6:
        truth = (min(points[::2]), min(points[1::2]), max(points[::2]), max(points[1::2]))
        corners, sizes = ((x, y, a, b), (x, y, x + a, y + b))
        are_corners, are_sizes = (all(abs(n - m) <= 2 for n, m in zip(truth, box)) for box in (corners, sizes))
    else:
        area = annotation["area"]
        are_corners, are_sizes = (abs(area - size) <= 0.01 * area for size in ((a - x) * (b - y), a * b))
    return are_corners if are_corners != are_sizes else None


def _check_entries(file: Path, key: str, entries: list, fields: dict[str, type]) -> None:
    """Raise UserError unless each entry has these fields, of these types, and a unique id."""
    wrong = []
    seen: set[int] = set()
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            wrong.append(f"{key}[{i}] is {_kind(entry)}, not an object")
            continue
        where = f"{key}[{i}]" + (f" (id {entry['id']})" if isinstance(entry.get("id"), int) and key != "images" else "")
        for name, kind in fields.items():
            value = entry.get(name)
            if name not in entry:
                wrong.append(f"{where} has no {name}")
            elif type(value) is not kind:
                wrong.append(f"{where}.{name} must be {_KINDS[kind]}, is {_kind(value)}")
            elif kind is int and abs(value) >= 2**63:
                wrong.append(f"{where}.{name} must be less than 2**63, is {value}")
            elif name in ("height", "width") and not 1 <= value < 2**16:
                wrong.append(f"{where}.{name} must be from 1 to {2**16 - 1} pixels, is {value}")
            elif kind is str and not value.strip():
                wrong.append(f"{where}.{name} is empty")
    _refuse(file, wrong)
    double = [f"{key}[{i}]" for i, e in enumerate(entries) if e["id"] in seen or seen.add(e["id"])]
    if double:
        raise UserError(f"{file} is invalid: {_first(double)} have ids that others have too: give each a unique id")


def _refuse(file: Path, wrong: list[str]) -> None:
    if wrong:
        raise UserError(f"{file} is invalid: {_first(wrong, '; ')}: correct {'it' if len(wrong) == 1 else 'them'}")


def _fault(annotation: dict[str, Any], sizes: dict[int, Size], categories: set[int]) -> str | None:
    """Describe what is invalid about an annotation, or return None."""
    if annotation["image_id"] not in sizes:
        return f"is of image {annotation['image_id']}, which is not listed"
    if annotation["category_id"] not in categories:
        return f"is of category {annotation['category_id']}, which is not listed"
    box = annotation["bbox"]
    if len(box) != 4 or not all(_is_finite(x) for x in box):
        return f"has bbox {_short(box)}, which must be four finite numbers: left, top, width, height"
    if box[2] < 0 or box[3] < 0:
        return f"has bbox {_short(box)}, whose width and height must be 0 or more"
    if max(map(abs, box)) > LARGEST:
        return f"has bbox {_short(box)}, which is far from any image"
    if (area := annotation.get("area")) is not None and not (_is_finite(area) and area >= 0):
        return f"has area {_short(area)}, which must be a finite number of 0 or more"
    crowd = annotation.get("iscrowd")
    if crowd is not None and not (isinstance(crowd, (int, float)) and crowd in (0, 1)):
        return f"has iscrowd {_short(crowd)}, which must be 0 or 1"
    return mask_fault(annotation.get("segmentation"), sizes[annotation["image_id"]])


def mask_fault(segmentation: Any, size: Size) -> str | None:
    """Describe what is invalid about a mask of an image of this height and width, or return None.

    Polygons of fewer than three points are ignored, as in COCO.
    """
    if segmentation is None:
        return None
    if isinstance(segmentation, list):
        if segmentation and not isinstance(segmentation[0], (list, dict)):
            return "has a flat list as segmentation, which must be a list of polygons: [[x1, y1, x2, y2, …], …]"
        return next((fault for polygon in segmentation if (fault := _polygon_fault(polygon, size))), None)
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return f"has as segmentation {_kind(segmentation)}, which must be polygons or an object with size and counts"
    if segmentation["size"] != list(size) or not all(type(side) is int for side in segmentation["size"]):
        return f"has run lengths of size {_short(segmentation['size'])}, but its image is {list(size)}"
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = _run_lengths(counts)
        if counts is None:
            return "has run lengths (segmentation.counts) that are truncated or have invalid characters"
    elif not isinstance(counts, list) or not all(type(count) is int for count in counts):
        return f"has as segmentation.counts {_short(counts)}, which must be run lengths: a list of numbers, or a string"
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        negative = ", some negative," if min(counts, default=0) < 0 else ""
        return f"has run lengths{negative} that add up to {sum(counts)}, not to the image's {size[0]} x {size[1]}"
    return None


def _polygon_fault(polygon: Any, size: Size) -> str | None:
    if not isinstance(polygon, list):
        return f"has among its polygons {_kind(polygon)}"
    try:
        finite = math.isfinite(sum(polygon))
    except (TypeError, OverflowError):  # null, strings, lists; integers that are too large
        finite = False
    if not finite or len(polygon) % 2:
        return f"has the polygon {_short(polygon)}, which must be pairs of finite numbers: x1, y1, x2, y2, …"
    side = max(size)
    if polygon and not (-side <= min(polygon) and max(polygon) <= 2 * side):
        return f"has the polygon {_short(polygon)}, which is far from its image of {size[1]}x{size[0]}"
    return None


def _run_lengths(text: str) -> list[int] | None:
    """Return the numbers of COCO's compressed run lengths; None if the text is not valid.

    A character has five bits of a number, lowest first, and a sixth bit that is set if more follow. From the fourth
    number on, the difference to the second-to-last number is stored.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text.encode(errors="replace"):
        bits = character - 48
        if not 0 <= bits < 64 or shift > 60:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts


def _is_polygon(points: Any) -> bool:
    return isinstance(points, list) and len(points) >= 6 and len(points) % 2 == 0


def has_mask(segmentation: Any) -> bool:
    """Return whether a segmentation has a mask: a polygon, or run lengths."""
    return any(map(_is_polygon, segmentation)) if isinstance(segmentation, list) else segmentation is not None


def encode_mask(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Encode COCO's polygons or run lengths, which must be valid, as pycocotools' compressed run lengths."""
    from pycocotools import mask as coder

    if isinstance(segmentation, list):
        return coder.merge(coder.frPyObjects([p for p in segmentation if _is_polygon(p)], height, width))
    if isinstance(segmentation["counts"], list):
        return coder.frPyObjects(segmentation, height, width)
    return segmentation


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decode COCO's polygons or run lengths, compressed or not, to a mask (height, width) uint8.

    Raises ValueError for invalid input, for which pycocotools would read out of bounds.
    """
    from pycocotools import mask as coder

    if fault := mask_fault(segmentation, (height, width)):
        raise ValueError(f"the mask {fault}")
    return np.asarray(coder.decode([encode_mask(segmentation, height, width)]))[:, :, 0]


_KINDS = {int: "a whole number", str: "a text", list: "a list", dict: "an object", float: "a number", bool: "a bool"}


def _kind(value: Any) -> str:
    return "null" if value is None else _KINDS.get(type(value), repr(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _first(offenders: list[str], between: str = ", ") -> str:
    """Return the first few, and how many more there are."""
    more = f" and {len(offenders) - OFFENDERS} more" if len(offenders) > OFFENDERS else ""
    return between.join(offenders[:OFFENDERS]) + more
