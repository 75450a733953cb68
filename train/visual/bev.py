"""Drawings of 3D boxes around a vehicle: on its cameras' images and from above."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor

from ..runtime.checkpoint import atomic_write
from .captions import add_legend

COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#469990")
EDGES = [(a, b) for a in range(8) for b in range(a + 1, 8) if (a ^ b) in (1, 2, 4)]
WIDTH = 360  # pixels of a camera's image


def corners(box: Tensor) -> ndarray:
    """Return a box's corners (8, 3); bits 4, 2 and 1 of a corner's index are ahead, left and up."""
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
    x, y, z, length, width, height, yaw = box[:7].tolist()
    turn = np.array([[np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return (signs * [length, width, height]) @ turn + [x, y, z]


def project_line(matrix: ndarray, ends: ndarray) -> list[tuple[float, float]] | None:
    """Project the part of a line (2, 3) that lies in front of a camera to pixels; None where no part does."""
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
    """Draw the boxes' edges on all images of a frame, three per row."""
    tiles = []
    for image, matrix in zip(frame["images"].cpu(), frame["lidar2img"].double().cpu().numpy()):
        pixels = (image * std + mean).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
        scale = WIDTH / pixels.shape[1]
        tile = Image.fromarray(pixels).resize((WIDTH, round(pixels.shape[0] * scale)), Image.Resampling.BILINEAR)
        draw = ImageDraw.Draw(tile)
        for box, label in zip(boxes.cpu(), labels.tolist()):
            points = corners(box)
            for edge in EDGES:
                line = project_line(matrix, points[list(edge)])
                if line:
                    draw.line([(u * scale, v * scale) for u, v in line], COLORS[label % len(COLORS)], 2)
        tiles.append(tile)
    height, rows = tiles[0].height, -(-len(tiles) // 3)
    sheet = Image.new("RGB", (min(3, len(tiles)) * WIDTH, rows * height))
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % 3 * WIDTH, i // 3 * height))
    return sheet


def draw_top_view(boxes: Tensor, labels: Tensor, ground_truth: Tensor, side: int, reach: float) -> Image.Image:
    """Draw boxes from above, y up: ground truth filled in grey, detections as outlines with a line to the front."""
    view = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(view)

    def to_pixels(points: ndarray) -> list[tuple[float, float]]:
        return [(side / 2 * (1 + x / reach), side / 2 * (1 - y / reach)) for x, y, *_ in points]

    for radius in range(5, int(reach) + 1, 5):
        (left, top), (right, bottom) = to_pixels(np.array([[-radius, radius], [radius, -radius]]))
        draw.ellipse([left, top, right, bottom], outline="#dddddd")
    draw.polygon(to_pixels(np.array([[-0.9, -2], [0.9, -2], [0.9, 1], [0, 2.3], [-0.9, 1]])), outline="black")
    for box in ground_truth.cpu():
        draw.polygon(to_pixels(corners(box)[[0, 2, 6, 4]]), fill="#c8c8c8")
    for box, label in zip(boxes.cpu(), labels.tolist()):
        points, color = corners(box), COLORS[label % len(COLORS)]
        draw.line(to_pixels(points[[0, 2, 6, 4, 0]]), color, 2)
        draw.line(to_pixels(np.stack([box[:3].numpy(), points[4:].mean(0)])), color, 2)
    return view


def save_side_by_side(left: Image.Image, right: Image.Image, class_names: Sequence[str], file: Path) -> Path:
    """Write two images beside each other, with the classes' colors below them, as a PNG."""
    sheet = Image.new("RGB", (left.width + right.width, max(left.height, right.height)), "white")
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width, 0))
    sheet = add_legend(sheet, [(COLORS[i % len(COLORS)], name) for i, name in enumerate(class_names)])
    with atomic_write(file) as temporary:
        sheet.save(temporary, "PNG")
    return file


def draw_sample(
    sample: dict[str, Any],
    detections: tuple[Tensor, Tensor, Tensor],
    class_names: Sequence[str],
    min_score: float,
    inputs: dict[str, Any],
    file: Path,
) -> Path:
    """Draw the detections (boxes, scores, labels) of at least min_score on a sample's cameras and from above."""
    boxes, _, labels = (t[detections[1] >= min_score] for t in detections)
    mean, std = (torch.tensor(inputs[name]).view(3, 1, 1) for name in ("mean", "std"))
    left = draw_cameras(sample["frames"][-1], boxes, labels, mean, std)
    true = sample["boxes"]
    reach = float(max([10.0, *(boxes[:, :2].abs().amax(1).tolist()), *(true[:, :2].abs().amax(1).tolist())])) + 3
    above = draw_top_view(boxes, labels, true, max(left.height, WIDTH), reach)
    return save_side_by_side(left, above, class_names, file)


def draw_batch(batch: dict[str, Any], class_names: Sequence[str], inputs: dict[str, Any], file: Path) -> Path:
    """Draw the first sample of a training batch with its ground truth."""
    frame = {name: value[0] for name, value in batch["frames"][-1].items()}
    boxes, labels = batch["boxes"][0], batch["labels"][0]
    detections = boxes, torch.ones(len(boxes), device=boxes.device), labels
    return draw_sample(dict(frames=[frame], boxes=boxes), detections, class_names, 0.0, inputs, file)
