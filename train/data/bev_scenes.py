"""Rendered road scenes for six cameras around an ego vehicle, with exact boxes, depth and ego motion.

    python -m saccade.train.data.bev_scenes FOLDER    writes ten scenes in nuScenes' layout, as v1.0-mini

A scene is determined by its seed: an ego that drives and turns, surrounded by cars, trucks, pedestrians and barriers of
various sizes, colours and textures, which do not overlap and some of which move; their fronts and backs differ. The
ground is a plane or, on one side of a line some metres from the ego, a slope, and static objects may stand on
pedestals, so that the image row where an object ends does not determine its distance. Images are rendered by casting
one ray through the centre of every pixel at the ground and the boxes, so depth and visibility are exact. Light comes
from a sun and the sky.

Coordinates are those of nuScenes' LiDAR: x to the right, y ahead, z up, with the origin `LIDAR` metres above the ground
at the ego. A box is (x, y, z of its centre, length, width, height, yaw, velocity x, y), in metres, radians (from the x
axis, counterclockwise) and metres per second; its length is along the yaw.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import Dataset

from ..runtime.config import BelowOne, Count, Fraction, NonNegative, NonNegativeInt, Positive
from ..runtime.distributed import derive_seed
from ..runtime.errors import UserError, run
from .bev_frames import ATTRIBUTES, attribute, collate

CLASSES = ("car", "truck", "pedestrian", "barrier")
SIZES = dict(  # length, width and height in metres, their relative spread, and the top speed in metres per second
    car=((4.5, 1.9, 1.6), 0.08, 6.0),
    truck=((6.5, 2.5, 3.0), 0.1, 5.0),
    pedestrian=((0.75, 0.7, 1.75), 0.08, 1.5),
    barrier=((0.6, 2.4, 1.0), 0.1, 0.0),
)
CAMERAS = dict(  # direction in degrees, counterclockwise from straight ahead
    CAM_FRONT=0, CAM_FRONT_LEFT=60, CAM_BACK_LEFT=120, CAM_BACK=180, CAM_BACK_RIGHT=240, CAM_FRONT_RIGHT=300
)
LIDAR, CAMERA, FOV = 1.8, 1.6, 70.0  # heights above the ground in metres; horizontal field of view in degrees
STEP = 0.5  # seconds between frames
MEAN, STD = (0.45,) * 3, (0.25,) * 3
SEEN = 4  # least number of pixels, over all cameras, for an object to be annotated


@dataclass
class Frame:
    """All data of one time step: images (N, H, W, 3) uint8, depth (N, H, W) in metres (0: sky), lidar2img (N, 4, 4),
    boxes (n, 9), labels (n,), number of visible pixels (n,) per object, pose (4, 4) from LiDAR to world coordinates."""

    images: ndarray
    depth: ndarray
    lidar2img: ndarray
    boxes: ndarray
    labels: ndarray
    pixels: ndarray
    pose: ndarray


class World:
    """A scene: its random parameters, and rendering of any of its frames."""

    def __init__(self, seed: int, radius: float, most: int, slope: float = 0.0, stands: float = 0.0):
        r = self.random = np.random.default_rng(seed)
        self.heading, self.turning = r.uniform(0, 2 * np.pi), np.deg2rad(r.uniform(-20, 20))  # per second
        self.speed, self.start = r.uniform(0, 6), r.uniform(-200, 200, 2)
        self.sun = np.array([*r.uniform(-1, 1, 2), r.uniform(0.8, 1.6)])
        self.sun /= np.linalg.norm(self.sun)
        self.sky, self.ground = r.uniform([0.5, 0.6, 0.7], [0.8, 0.85, 1.0]), r.uniform(0.25, 0.55)
        self.ground_tint, self.lane = 1 + r.uniform(-0.12, 0.12, 3), r.uniform(3, 4.5)
        self.labels, placed = [], []
        self.sizes, self.colours, self.stripes, self.pace = [], [], [], []
        for _ in range(r.integers(most // 2, most + 1)):
            label = r.integers(len(CLASSES))
            mean, spread, fastest = SIZES[CLASSES[label]]
            size = np.array(mean) * (1 + spread * r.standard_normal(3).clip(-2, 2))
            reach = np.hypot(*size[:2]) / 2
            for _ in range(30):
                away, angle = np.sqrt(r.uniform(3.5**2, (0.95 * radius) ** 2)), r.uniform(0, 2 * np.pi)
                at = away * np.array([np.cos(angle), np.sin(angle)])
                free = all(np.hypot(*(at - other)) > reach + far + 0.3 for other, far in placed)
                if free and away - reach > 2.5:
                    placed.append((at, reach))
                    self.labels.append(label)
                    self.sizes.append(size)
                    self.colours.append(r.uniform(0.1, 0.95, 3))
                    self.stripes.append(r.uniform(0.5, 1.0))
                    self.pace.append(fastest * r.uniform(0, 1) * (r.uniform() < 0.5))
                    break
        self.labels = np.array(self.labels, np.int64)
        self.sizes, self.colours = np.array(self.sizes).reshape(-1, 3), np.array(self.colours).reshape(-1, 3)
        yaw = r.uniform(-np.pi, np.pi, len(placed))
        # Positions are relative to the ego at time 0 so far; convert them to world coordinates.
        at = np.array([at for at, _ in placed]).reshape(-1, 2)
        turn = rotation(self.heading - np.pi / 2)[:2, :2]
        self.at, self.yaw = at @ turn.T + self.start, yaw + self.heading - np.pi / 2
        self.pace = np.array(self.pace)
        # From a line on, `fold` along `uphill` in the world, the ground rises by `slope` metres a metre.
        angle, ahead, self.slope = r.uniform(0, 2 * np.pi), r.uniform(4, 8), slope * r.uniform(-1, 1)
        self.uphill = np.array([np.cos(angle), np.sin(angle)])
        self.fold = self.start @ self.uphill + ahead
        raised = (r.uniform(size=len(placed)) < stands) & (self.pace == 0)
        self.stands = np.where(raised, r.uniform(0.3, 1.2, len(placed)), 0.0)  # metres between ground and object
        self.stand_greys = r.uniform(0.15, 0.8, len(placed))

    def ground_height(self, at: ndarray) -> ndarray:
        """Return the ground's height in metres at points (n, 2) of the world."""
        return self.slope * (at @ self.uphill - self.fold).clip(0)

    def pose(self, time: float) -> ndarray:
        """Return the transform (4, 4) from LiDAR coordinates at that time to world coordinates. The ego drives an
        arc."""
        heading = self.heading + self.turning * time
        if abs(self.turning) > 1e-9:
            bow = self.speed / self.turning
            moved = bow * np.array([np.sin(heading) - np.sin(self.heading), np.cos(self.heading) - np.cos(heading)])
        else:
            moved = self.speed * time * np.array([np.cos(heading), np.sin(heading)])
        pose = rotation(heading - np.pi / 2)
        at = self.start + moved
        pose[:3, 3] = *at, self.ground_height(at) + LIDAR
        return pose

    def boxes(self, time: float) -> ndarray:
        """Return the boxes (n, 9) in LiDAR coordinates at that time."""
        pose = self.pose(time)
        velocity = self.pace[:, None] * np.stack([np.cos(self.yaw), np.sin(self.yaw)], 1)
        at = self.at + velocity * time
        z = self.ground_height(at) + self.stands + self.sizes[:, 2] / 2
        at = np.concatenate([at, z[:, None]], 1)
        at = (at - pose[:3, 3]) @ pose[:3, :3]
        yaw = self.yaw - np.arctan2(pose[1, 0], pose[0, 0])
        yaw = (yaw + np.pi) % (2 * np.pi) - np.pi
        return np.concatenate([at, self.sizes, yaw[:, None], velocity @ pose[:2, :2]], 1)

    def stand_boxes(self, boxes: ndarray) -> ndarray:
        """Return the pedestals of those objects that have one, as boxes; they reach a metre into the ground."""
        under = boxes[self.stands > 0].copy()
        tall = self.stands[self.stands > 0] + 1
        under[:, 2] -= (under[:, 5] + tall) / 2
        under[:, 3:5] *= 0.6
        under[:, 5] = tall
        return under

    def frame(self, time: float, size: tuple[int, int]) -> Frame:
        boxes, pose = self.boxes(time), self.pose(time)
        images, depths, pixels = [], [], np.zeros(len(boxes), np.int64)
        for camera in CAMERAS:
            image, depth, hit = self.render(camera, boxes, pose, size)
            images.append(image)
            depths.append(depth)
            pixels += np.bincount(hit[hit >= 0], minlength=len(boxes))
        matrices = np.stack([projection(camera, size) for camera in CAMERAS])
        return Frame(np.stack(images), np.stack(depths), matrices, boxes, self.labels, pixels, pose)

    def render(
        self, camera: str, boxes: ndarray, pose: ndarray, size: tuple[int, int]
    ) -> tuple[ndarray, ndarray, ndarray]:
        """Render a camera: image (H, W, 3) uint8, depth (H, W), and index of the visible box (H, W), -1 for none."""
        matrix = projection(camera, size)
        H, W = size
        inverse = np.linalg.inv(matrix)
        v, u = np.meshgrid(np.arange(H) + 0.5, np.arange(W) + 0.5, indexing="ij")
        ray = (np.stack([u, v, np.ones_like(u)], -1).reshape(-1, 3) @ inverse[:3, :3].T).astype(np.float32)
        eye = inverse[:3, 3].astype(np.float32)  # ray is for a depth of one metre
        depth = self.hit_ground(pose, eye, ray)
        depth = np.where(depth < 80, depth, np.inf).astype(np.float32)
        hit = np.full(len(ray), -1)
        for i, box in enumerate(np.concatenate([boxes, self.stand_boxes(boxes)]).astype(np.float32)):
            rows = window(box, matrix, size)
            turn = rotation(box[6])[:3, :3].astype(np.float32)
            near, far = intersect_box(box, (eye - box[:3]) @ turn, ray[rows] @ turn)
            closer = (near < far) & (near > 0) & (near < depth[rows])
            depth[rows[closer]], hit[rows[closer]] = near[closer], i
        colour = self.shade(boxes, pose, eye, ray, depth, hit)
        image = (255 * colour.clip(0, 1)).round().astype(np.uint8).reshape(H, W, 3)
        hit = np.where(hit < len(boxes), hit, -1)
        return image, np.where(np.isfinite(depth), depth, 0).reshape(H, W), hit.reshape(H, W)

    def hit_ground(self, pose: ndarray, eye: ndarray, ray: ndarray) -> ndarray:
        """Return where rays (n, 3) from a camera centre, in LiDAR coordinates, meet the ground, in lengths of the rays;
        inf where they do not."""
        uphill = np.array([*self.uphill, 0.0]) @ pose[:3, :3]
        level, fold = -pose[2, 3], self.fold - pose[:2, 3] @ self.uphill  # in LiDAR coordinates
        along, start = ray @ uphill, eye @ uphill - fold
        with np.errstate(divide="ignore", invalid="ignore"):
            flat = (level - eye[2]) / ray[:, 2]
            steep = (level + self.slope * start - eye[2]) / (ray[:, 2] - self.slope * along)
            flat = np.where((flat > 0) & (start + flat * along <= 0), flat, np.inf)
            steep = np.where((steep > 0) & (start + steep * along > 0), steep, np.inf)
        return np.minimum(flat, steep)

    def shade(self, boxes: ndarray, pose: ndarray, eye: ndarray, ray: ndarray, depth: ndarray, hit: ndarray) -> ndarray:
        """Return the colours (pixels, 3), 0 to 1, of the surfaces that the rays hit."""
        up = ray[:, 2] / np.linalg.norm(ray, axis=1)
        colour = self.sky * (1 - 0.35 * up.clip(0)[:, None])
        sun = self.sun @ pose[:3, :3]
        ground = np.isfinite(depth) & (hit < 0)
        at = (eye + ray[ground] * depth[ground, None]) @ pose[:3, :3].T + pose[:3, 3]
        shine = self.ground * (0.85 + 0.3 * noise(at[:, :2], 0.4) + 0.15 * noise(at[:, :2], 2.5))
        shine = np.where(np.abs(at[:, 1] % self.lane - 0.1) < 0.1, 0.85, shine)
        on_slope = at[:, :2] @ self.uphill > self.fold
        facing = (self.sun[2] - self.slope * (self.uphill @ self.sun[:2])) / np.hypot(1, self.slope) / self.sun[2]
        shine = np.where(on_slope, facing * shine, shine)
        shade = np.zeros(len(at), bool)
        seen = eye + ray[ground] * depth[ground, None]
        lowest = seen[:, 2].min(initial=0.0)
        for box in boxes.astype(np.float32):  # shadows
            above = max(box[5], box[2] + box[5] / 2 - lowest)
            reach = np.hypot(*box[3:5]) / 2 + above * np.hypot(*sun[:2]) / sun[2]
            rows = np.flatnonzero(np.square(seen[:, :2] - box[:2]).sum(1) < reach**2)
            turn = rotation(box[6])[:3, :3].astype(np.float32)
            near, far = intersect_box(box, (seen[rows] - box[:3]) @ turn, (sun @ turn).astype(np.float32))
            shade[rows] |= (near < far) & (far > 0)
        colour[ground] = (shine * np.where(shade, 0.55, 1.0))[:, None] * self.ground_tint
        for i, box in enumerate(np.concatenate([boxes, self.stand_boxes(boxes)])):
            mine = hit == i
            turn = rotation(box[6])[:3, :3]
            at = (eye + ray[mine] * depth[mine, None] - box[:3]) @ turn  # in the box's coordinates
            face = np.abs(at / (box[3:6] / 2)).argmax(1)
            normal = np.eye(3)[face] * np.sign(at[np.arange(len(at)), face])[:, None]
            light = 0.45 + 0.6 * (normal @ turn.T @ sun).clip(0)
            if i >= len(boxes):
                colour[mine] = self.stand_greys[self.stands > 0][i - len(boxes)] * light[:, None]
                continue
            paint = self.colours[i] * (1 - 0.25 * (noise(at[:, :2] + at[:, 2:], self.stripes[i]) > 0.5))[:, None]
            name = CLASSES[self.labels[i]]
            ahead, up = at[:, 0] / box[3], at[:, 2] / box[5]  # -1/2 to 1/2
            if name in ("car", "truck"):  # windows, white front and red rear lamps
                glass = (up > 0.1) & (up < 0.4) & (face < 2) & (ahead > (0.3 if name == "truck" else -0.2))
                paint = np.where(glass[:, None], [0.08, 0.1, 0.13], paint)
                low = (up > -0.4) & (up < 0.1)  # lamps on the ends, and on the sides next to them
                front, rear = (low & ((face == 0) | (face == 1)) & (sign * ahead > 0.25) for sign in (1, -1))
                paint = np.where(front[:, None], [1.0, 1.0, 0.85], paint)
                paint = np.where(rear[:, None], [0.85, 0.05, 0.05], paint)
            elif name == "pedestrian":  # a face, and hair
                head = up > 0.36
                paint = np.where((head & (ahead > 0))[:, None], [0.75, 0.57, 0.45], paint)
                paint = np.where((head & (ahead <= 0))[:, None], [0.15, 0.1, 0.05], paint)
            else:  # stripes on the front, none on the back
                stripe = (at[:, 1] + at[:, 2]) % 0.8 < 0.4
                paint = np.where(stripe[:, None], [0.9, 0.25, 0.1], [0.95, 0.95, 0.95])
                paint = np.where((ahead < 0)[:, None], [0.4, 0.4, 0.42], paint)
            colour[mine] = paint * light[:, None]
        return colour


def rotation(angle: float) -> ndarray:
    """Return the rotation (4, 4) around z."""
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return matrix


def intersect_box(box: ndarray, origin: ndarray, along: ndarray) -> tuple[ndarray, ndarray]:
    """Return where rays (n, 3), in a box's coordinates, enter and leave it, in lengths of `along`. If a ray misses the
    box, it leaves before it enters."""
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (-box[3:6] / 2 - origin) / along, (box[3:6] / 2 - origin) / along
    return np.minimum(one, other).max(1), np.maximum(one, other).min(1)


def corners(box: ndarray) -> ndarray:
    """(8, 3)."""
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return (signs * box[3:6] / 2) @ rotation(box[6])[:3, :3].T + box[:3]


def window(box: ndarray, matrix: ndarray, size: tuple[int, int]) -> ndarray:
    """Return the flat indices of the pixels in a rectangle that contains the projection of a box."""
    H, W = size
    u, v, d = matrix[:3, :3] @ corners(box).T + matrix[:3, 3:]
    if d.max() <= 0:
        return np.empty(0, np.int64)
    low, high = (0, 0), (W, H)
    if d.min() > 0:
        at = np.stack([u / d, v / d])
        low = np.floor(at.min(1)).clip(0, (W, H)).astype(int)
        high = np.ceil(at.max(1)).clip(0, (W, H)).astype(int)
    return (np.arange(low[1], high[1])[:, None] * W + np.arange(low[0], high[0])).ravel()


def noise(at: ndarray, grain: float) -> ndarray:
    """Return noise (n,), 0 to 1, at points of a plane (n, 2): constant on squares of `grain` metres per side."""
    x, y = np.floor(at / grain).astype(np.int64).T
    mixed = (x * 73856093 ^ y * 19349663) & 0xFFFFFF
    return (mixed * 2654435761 % 2**24) / 2**24


def intrinsics(size: tuple[int, int]) -> ndarray:
    """Return the intrinsic matrix (3, 3) of every camera; the horizon is slightly above the image centre."""
    H, W = size
    focal = W / 2 / np.tan(np.deg2rad(FOV) / 2)
    return np.array([[focal, 0, W / 2], [0, focal, 0.42 * H], [0, 0, 1]])


def sensor(camera: str) -> ndarray:
    """Return the transform (4, 4) from a camera's coordinates (right, down, ahead) to LiDAR coordinates."""
    turn = rotation(np.deg2rad(CAMERAS[camera]))
    axes = np.eye(4)
    axes[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    axes[:3, 3] = 0, 0.5, CAMERA - LIDAR  # half a metre ahead of the centre
    return turn @ axes


def projection(camera: str, size: tuple[int, int]) -> ndarray:
    """Return lidar2img (4, 4): from LiDAR coordinates to (u · d, v · d, d, 1) for images of this size."""
    matrix = np.eye(4)
    matrix[:3, :3] = intrinsics(size)
    return matrix @ np.linalg.inv(sensor(camera))


class BevScenes:
    """Rendered road scenes as the data of a run. They are rendered on demand; the same seed gives the same scenes.

    train, val, test: number of scenes per split. img_size: (height, width) of each of the six images. radius: distance
    in metres from the ego within which objects are placed. most: objects of a scene, at most. seed: of the scenes.
    slope: on one side of a line, the ground rises or falls by up to this many metres per metre. stands: the share of
    the static objects that stand on a pedestal, 0.3 to 1.2 m high.
    frames: frames per sample, half a second apart, oldest first; the boxes are those of the last one.
    Augmentation in training: turn: the largest random rotation around z in degrees. mirror: whether to flip samples
    horizontally with probability 0.5. light: strength of random brightness and contrast.
    """

    max_bad, bad = 0, {}

    def __init__(
        self,
        train: Count = 400,
        val: Count = 40,
        test: Count = 100,
        img_size: tuple[Count, Count] = (64, 112),
        radius: Positive = 16.0,
        most: Count = 12,
        frames: Count = 1,
        seed: NonNegativeInt = 0,
        turn: NonNegative = 45.0,
        mirror: bool = True,
        light: BelowOne = 0.3,
        slope: NonNegative = 0.0,
        stands: Fraction = 0.0,
    ):
        if frames < 1 or most < 1:
            raise UserError(f"data.frames and data.most must be 1 or more, got {frames} and {most}")
        self.counts = dict(train=train, val=val, test=test)
        self.img_size, self.radius, self.most, self.frames, self.seed = tuple(img_size), radius, most, frames, seed
        self.augmentation = dict(turn=turn, mirror=mirror, light=light)
        self.slope, self.stands = slope, stands
        self.class_names = list(CLASSES)
        self.cameras = list(CAMERAS)

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """Return the preprocessing with timm's keys. It depends on the data only, not on the model's pretrained_cfg."""
        size = (3, *self.img_size)
        return dict(input_size=size, interpolation="bilinear", mean=MEAN, std=STD, crop_pct=1.0, crop_mode="center")

    def world(self, split: str, index: int) -> World:
        return World(derive_seed("scene", self.seed, split, index), self.radius, self.most, self.slope, self.stands)

    def dataset(self, split: str, inputs: dict[str, Any], training: bool = False) -> "Scenes":
        return Scenes(self, split, inputs, self.augmentation if training else None)


class Scenes(Dataset):
    """Samples in the format of saccade.train.tasks.lift. Rendered frames are cached."""

    def __init__(self, source: BevScenes, split: str, inputs: dict[str, Any], augmentation: dict[str, Any] | None):
        self.source, self.split, self.inputs, self.augmentation = source, split, inputs, augmentation
        self.mean, self.std = (torch.tensor(inputs[name]).view(3, 1, 1) for name in ("mean", "std"))
        self.made = lru_cache(maxsize=None)(self._make)

    def __len__(self) -> int:
        return self.source.counts[self.split]

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return collate(samples)

    def _make(self, index: int) -> list[Frame]:
        world = self.source.world(self.split, index)
        times = [STEP * k for k in range(1 - self.source.frames, 1)]
        return [world.frame(time, self.source.img_size) for time in times]

    def __getitem__(self, index: int) -> dict[str, Any]:
        made = self.made(index)
        last = made[-1]
        shown = (last.pixels >= SEEN) & (np.hypot(*last.boxes[:, :2].T) <= self.source.radius)
        boxes, labels = torch.from_numpy(last.boxes[shown]).float(), torch.from_numpy(last.labels[shown])
        frames, pose = [], None
        for frame in made:
            images = torch.from_numpy(frame.images).permute(0, 3, 1, 2).float().div(255)
            frames.append(
                dict(
                    images=images,
                    lidar2img=torch.from_numpy(frame.lidar2img).float(),
                    depth=torch.from_numpy(frame.depth).float(),
                    motion=motion_between(frame.pose if pose is None else pose, frame.pose),
                )
            )
            pose = frame.pose
        if self.augmentation:
            boxes = augment(frames, boxes, **self.augmentation)
        for frame in frames:
            frame["images"] = (frame["images"] - self.mean) / self.std
        return dict(frames=frames, boxes=boxes, labels=labels, index=torch.tensor(index))


def motion_between(before: ndarray, now: ndarray) -> Tensor:
    """Return the ego motion (3,): (x, y) in metres, in the current axes, and the change of heading in degrees."""
    change = np.linalg.inv(now) @ before  # the previous pose in current coordinates
    turned = np.rad2deg(np.arctan2(change[1, 0], change[0, 0]))
    return -torch.tensor([change[0, 3], change[1, 3], turned], dtype=torch.float32)


def augment(frames: list[dict[str, Tensor]], boxes: Tensor, turn: float, mirror: bool, light: float) -> Tensor:
    """Augment a sample in place by random rotation, flip and lighting, and return its boxes (n, 9). The projection
    matrices are changed to match."""
    angle = float(torch.deg2rad((2 * torch.rand(()) - 1) * turn))
    flip = mirror and torch.rand(()) < 0.5
    gain, lift = 1 + light * (2 * torch.rand(2) - 1) * torch.tensor([1.0, 0.3])
    change = torch.from_numpy(rotation(angle)).float()
    if flip:
        change = torch.diag(torch.tensor([-1.0, 1, 1, 1])) @ change  # flipped horizontally after the rotation
    for frame in frames:
        frame["images"] = (frame["images"] * gain + (lift - 1)).clamp(0, 1)
        frame["lidar2img"] = frame["lidar2img"] @ torch.linalg.inv(change)
        x, y, yaw = frame["motion"].tolist()
        x, y = (change[:2, :2] @ torch.tensor([x, y])).tolist()
        frame["motion"] = torch.tensor([x, y, -yaw if flip else yaw])
        if flip:
            width = frame["images"].shape[-1]
            swap = torch.eye(4)
            swap[0, 0], swap[0, 2] = -1, width
            frame["images"], frame["depth"] = frame["images"].flip(-1), frame["depth"].flip(-1)
            frame["lidar2img"] = swap @ frame["lidar2img"]
    boxes = boxes.clone()
    boxes[:, :2], boxes[:, 7:] = boxes[:, :2] @ change[:2, :2].T, boxes[:, 7:] @ change[:2, :2].T
    yaw = boxes[:, 6] + angle
    yaw = torch.pi - yaw if flip else yaw
    boxes[:, 6] = torch.remainder(yaw + torch.pi, 2 * torch.pi) - torch.pi
    return boxes


MINI = dict(  # scene names of v1.0-mini in nuscenes-devkit
    mini_train=("0061", "0553", "0655", "0757", "0796", "1077", "1094", "1100"), mini_val=("0103", "0916")
)
CATEGORIES = dict(
    car="vehicle.car", truck="vehicle.truck", pedestrian="human.pedestrian.adult", barrier="movable_object.barrier"
)


def write_nuscenes(root: Path, source: BevScenes, frames: int = 4) -> None:
    """Write ten scenes in nuScenes' layout, as v1.0-mini: tables, images and LiDAR sweeps (a quarter of the visible
    points). The first eight are `source`'s first of "train", the others of "val". The folder must not exist; on
    failure, nothing is written."""
    if root.exists():
        raise UserError(f"{root} already exists: choose another folder")
    scratch = root.with_name(f".{root.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    tables: dict[str, list[dict]] = {name: [] for name in TABLES}

    def add(table: str, *key: object, **row: object) -> str:
        token = f"{derive_seed(table, *key):032x}"
        tables[table].append(dict(token=token, **row))
        return token

    for name in (*CAMERAS, "LIDAR_TOP"):
        (scratch / "samples" / name).mkdir(parents=True)
    (scratch / "maps").mkdir()
    (scratch / "v1.0-mini").mkdir()
    log = add("log", 0, logfile="made", vehicle="none", date_captured="2000-01-01", location="singapore-onenorth")
    add("map", 0, category="semantic_prior", filename="maps/plane.png", log_tokens=[log])
    Image.new("L", (10, 10)).save(scratch / "maps" / "plane.png")
    kinds = {name: add("category", name, name=full, description="") for name, full in CATEGORIES.items()}
    traits = {name: add("attribute", name, name=name, description="") for name in ATTRIBUTES}
    visible = add("visibility", 4, level="v80-100", description="")
    sensors = {name: add("sensor", name, channel=name, modality="camera") for name in CAMERAS}
    sensors["LIDAR_TOP"] = add("sensor", "LIDAR_TOP", channel="LIDAR_TOP", modality="lidar")
    # The ego's axes are ahead, left and up, with the origin on the ground.
    to_ego = rotation(-np.pi / 2)
    to_ego[2, 3] = LIDAR

    def place(matrix: ndarray) -> dict[str, list[float]]:
        return dict(translation=matrix[:3, 3].tolist(), rotation=quaternion(matrix))

    calibrated = {
        name: add(
            "calibrated_sensor", name, sensor_token=token,
            **place(to_ego @ sensor(name) if name in CAMERAS else to_ego),
            camera_intrinsic=intrinsics(source.img_size).tolist() if name in CAMERAS else [],
        )
        for name, token in sensors.items()
    }  # fmt: skip
    names = [(split, i, name) for split, own in MINI.items() for i, name in enumerate(own)]
    for number, (split, index, name) in enumerate(names):
        world = source.world(split.removeprefix("mini_"), index)
        tokens = [f"{derive_seed('sample', name, t):032x}" for t in range(frames)]
        scene = add(
            "scene", name, log_token=log, nbr_samples=frames, first_sample_token=tokens[0],
            last_sample_token=tokens[-1], name=f"scene-{name}", description="",
        )  # fmt: skip
        seen: dict[int, list[dict]] = {}
        for t, token in enumerate(tokens):
            frame, stamp = world.frame(STEP * t, source.img_size), int(1e6 * (1000 * number + STEP * t))
            around = dict(prev=tokens[t - 1] if t else "", next=tokens[t + 1] if t + 1 < frames else "")
            tables["sample"].append(dict(token=token, timestamp=stamp, scene_token=scene, **around))
            pose = add("ego_pose", name, t, timestamp=stamp, **place(frame.pose @ np.linalg.inv(to_ego)))
            for i, channel in enumerate(sensors):
                file = f"samples/{channel}/{name}__{t}" + (".png" if channel in CAMERAS else ".pcd.bin")
                if channel in CAMERAS:
                    Image.fromarray(frame.images[i]).save(scratch / file)
                else:
                    sweep(frame).tofile(scratch / file)
                H, W = source.img_size if channel in CAMERAS else (0, 0)
                add(
                    "sample_data", name, t, channel, sample_token=token, ego_pose_token=pose,
                    calibrated_sensor_token=calibrated[channel], timestamp=stamp, is_key_frame=True, filename=file,
                    fileformat=file.split(".", 1)[1], height=H, width=W, prev="", next="",
                )  # fmt: skip
            for i, (box, label) in enumerate(zip(frame.boxes, frame.labels)):
                matrix = frame.pose @ rotation(box[6])
                matrix[:3, 3] = (frame.pose @ [*box[:3], 1])[:3]
                trait = attribute(CLASSES[label], float(world.pace[i]))
                row = dict(
                    token=f"{derive_seed('annotation', name, t, i):032x}", sample_token=token,
                    instance_token=f"{derive_seed('instance', name, i):032x}", visibility_token=visible,
                    attribute_tokens=[traits[trait]] if trait else [], **place(matrix),
                    size=[box[4], box[3], box[5]], prev="", next="", num_radar_pts=0,
                    num_lidar_pts=int(frame.pixels[i]) if frame.pixels[i] >= SEEN else 0,
                )  # fmt: skip
                if i in seen:
                    row["prev"], seen[i][-1]["next"] = seen[i][-1]["token"], row["token"]
                seen.setdefault(i, []).append(row)
                tables["sample_annotation"].append(row)
        for i, rows in seen.items():
            add(
                "instance", name, i, category_token=kinds[CLASSES[world.labels[i]]], nbr_annotations=len(rows),
                first_annotation_token=rows[0]["token"], last_annotation_token=rows[-1]["token"],
            )  # fmt: skip
    for table, rows in tables.items():
        (scratch / "v1.0-mini" / f"{table}.json").write_text(json.dumps(rows))
    scratch.rename(root)


TABLES = ("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene")
TABLES += ("sample", "sample_data", "sample_annotation", "map")


def quaternion(matrix: ndarray) -> list[float]:
    """Return the quaternion (w, x, y, z) of a rotation."""
    x, y, z, w = Rotation.from_matrix(matrix[:3, :3]).as_quat()
    return [w, x, y, z]


def sweep(frame: Frame) -> ndarray:
    """Return the points visible to the cameras in the format of a LiDAR file, (n, 5) float32: x, y, z, intensity,
    ring."""
    clouds = []
    for depth, matrix in zip(frame.depth, frame.lidar2img):
        v, u = np.nonzero(depth)
        kept = (u % 2 == 0) & (v % 2 == 0)
        u, v = u[kept], v[kept]
        d = depth[v, u]
        points = np.stack([(u + 0.5) * d, (v + 0.5) * d, d, np.ones_like(d)], 1) @ np.linalg.inv(matrix).T
        clouds.append(points[:, :3])
    points = np.concatenate(clouds)
    return np.pad(points, [(0, 0), (0, 2)]).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write ten rendered road scenes in nuScenes' layout, as v1.0-mini.")
    parser.add_argument("root", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--size", type=int, nargs=2, default=(56, 96), metavar=("HEIGHT", "WIDTH"), help="of images")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_nuscenes(args.root, BevScenes(img_size=args.size, seed=args.seed))
    print(f"wrote {args.root}")


if __name__ == "__main__":
    sys.exit(run(main))
