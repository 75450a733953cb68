"""Boxes around an ego, drawn on its cameras' images and from above."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor

from ..runtime.checkpoint import atomic_write

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#469990")
EDGES = [(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b) in (1, 2, 4)]
WIDE = 360  # pixels of a camera's picture


def corners(box: Tensor) -> ndarray:
    """(8, 3); bits 4, 2 and 1 of a corner's number are ahead, left and up."""
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
    x, y, z, length, width, height, yaw = box[:7].tolist()
    turn = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return (signs * [length, width, height]) @ turn + [x, y, z]


def project_line(matrix: ndarray, ends: ndarray) -> list[tuple[float, float]] | None:
    """The part of a line (2, 3) that lies before a camera, in pixels; None: nothing of it does."""
    points = ends @ matrix[:3, :3].T + matrix[:3, 3]
    near = 0.1
    if points[:, 2].max() < near:
        return None
    for i in (0, 1):
        if points[i, 2] < near:
            share = (near - points[i, 2]) / (points[1 - i, 2] - points[i, 2])
            points[i] += share * (points[1 - i] - points[i])
    return [tuple(p[:2] / p[2]) for p in points]


def draw_cameras(frame: dict[str, Tensor], boxes: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> Image.Image:
    """All images of a frame, three a row, with the boxes' edges."""
    pictures = []
    for image, matrix in zip(frame["images"].cpu(), frame["lidar2img"].double().cpu().numpy()):
        pixels = (image * std + mean).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        scale = WIDE / pixels.shape[1]
        picture = Image.fromarray(pixels).resize((WIDE, round(pixels.shape[0] * scale)), Image.Resampling.BILINEAR)
        draw = ImageDraw.Draw(picture)
        for box, label in zip(boxes.cpu(), labels.tolist()):
            points = corners(box)
            for edge in EDGES:
                line = project_line(matrix, points[list(edge)])
                if line:
                    draw.line([(u * scale, v * scale) for u, v in line], COLOURS[label % len(COLOURS)], 2)
        pictures.append(picture)
    high, rows = pictures[0].height, -(-len(pictures) // 3)
    sheet = Image.new("RGB", (min(3, len(pictures)) * WIDE, rows * high))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % 3 * WIDE, i // 3 * high))
    return sheet


def draw_top_view(boxes: Tensor, labels: Tensor, truth: Tensor, side: int, reach: float) -> Image.Image:
    """From above, y up: what there is in grey, filled, what was found as outlines, a line towards the front."""
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)

    def place(points: ndarray) -> list[tuple[float, float]]:
        return [(side / 2 * (1 + x / reach), side / 2 * (1 - y / reach)) for x, y, *_ in points]

    for radius in range(5, int(reach) + 1, 5):
        (left, top), (right, bottom) = place(np.array([[-radius, radius], [radius, -radius]]))
        draw.ellipse([left, top, right, bottom], outline="#dddddd")
    draw.polygon(place(np.array([[-0.9, -2], [0.9, -2], [0.9, 1], [0, 2.3], [-0.9, 1]])), outline="black")
    for box in truth.cpu():
        draw.polygon(place(corners(box)[[0, 2, 6, 4]]), fill="#c8c8c8")
    for box, label in zip(boxes.cpu(), labels.tolist()):
        points, colour = corners(box), COLOURS[label % len(COLOURS)]
        draw.line(place(points[[0, 2, 6, 4, 0]]), colour, 2)
        draw.line(place(np.stack([box[:3].numpy(), points[4:].mean(0)])), colour, 2)
    return picture


def save_side_by_side(left: Image.Image, right: Image.Image, class_names: Sequence[str], file: Path) -> Path:
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height) + 18), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    draw, x = ImageDraw.Draw(sheet), 4
    for i, name in enumerate(class_names):
        draw.text((x, sheet.height - 15), name, COLOURS[i % len(COLOURS)])
        x += 12 + round(draw.textlength(name))
    with atomic_write(file) as temporary:
        sheet.save(temporary, "PNG")
    return file


def draw_sample(
    shown: dict[str, Any],
    found: tuple[Tensor, Tensor, Tensor],
    class_names: Sequence[str],
    least: float,
    inputs: dict[str, Any],
    file: Path,
) -> Path:
    """A sample's cameras with the boxes that were found with at least that score, and both those and the true ones
    from above."""
    boxes, _, labels = (t[found[1] >= least] for t in found)
    mean, std = (torch.tensor(inputs[name]).view(3, 1, 1) for name in ("mean", "std"))
    left = draw_cameras(shown["frames"][-1], boxes, labels, mean, std)
    true = shown["boxes"]
    reach = float(max([10.0, *(boxes[:, :2].abs().amax(1).tolist()), *(true[:, :2].abs().amax(1).tolist())])) + 3
    return save_side_by_side(left, draw_top_view(boxes, labels, true, max(left.height, WIDE), reach), class_names, file)


def draw_batch(shown: dict[str, Any], class_names: Sequence[str], inputs: dict[str, Any], file: Path) -> Path:
    """The first sample of a training batch with its true boxes."""
    frame = {name: value[0] for name, value in shown["frames"][-1].items()}
    boxes, labels = shown["boxes"][0], shown["labels"][0]
    found = boxes, torch.ones(len(boxes), device=boxes.device), labels
    return draw_sample(dict(frames=[frame], boxes=boxes), found, class_names, 0.0, inputs, file)
