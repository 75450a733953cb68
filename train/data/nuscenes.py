"""nuScenes as it is downloaded (arXiv 1903.11027), through nuscenes-devkit: `pip install saccade[bev]`.

The view's frame is the LiDAR's of a sample: x to the right, y ahead, z up. Matrices account for how the ego moves
between the LiDAR's moment and each camera's.

A frame's `can_bus` is what published BEVFormer and DFA3D get: the ego's position in the world less that of the frame
before (3), its quaternion w, x, y, z (4), acceleration, rotation rate and velocity (9), yaw in radians from 0 to 2π,
and yaw in degrees less that of the frame before. Where there is no frame before, the differences are 0. The nine come
from the CAN bus expansion, a download of its own: from the first message after the sample; without it they are 0.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.spatial.transform import Rotation
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset

from ..runtime.config import Count, Fraction, NonNegativeInt, Positive
from ..runtime.errors import UserError
from .bad_images import BadImage
from .bev_frames import ATTRIBUTES, RANGES, attribute, collate
from .bev_scenes import quaternion
from .distort import distort_colors
from .files import note_classes
from .images import read_image
from .nuscenes_tables import check_tables

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
SPLITS = {"v1.0-trainval": ("train", "val"), "v1.0-mini": ("mini_train", "mini_val"), "v1.0-test": ("test", "test")}


class NuScenes:
    """The data of a run.

    root: the folder that has samples/ and the tables' folder, and can_bus/ if the CAN bus expansion is there.
    version: name of the tables' folder.
    scale: of the images, which are then padded to multiples of 32 on the right and the bottom. frames: key frames that
    a training sample shows, oldest first; fewer where a scene begins. In tests a sample shows one frame: the frames of
    a scene come in their order, and the view is carried on; with frames=1 each is for itself.
    In training only: samples without boxes are left out. skip: the earlier frames are those of the last `frames` that
    remain when a random one is left out, so that intervals vary; distort: photometric distortion; grid_mask: the
    probability of GridMask (arXiv 2001.04086), of all images and depths of the last frame alike.
    max_bad: see saccade.train.data.bad_images.
    "val" and "test" are the validation scenes.
    """

    def __init__(
        self,
        root: str,
        version: str = "v1.0-trainval",
        scale: Positive = 1.0,
        frames: Count = 1,
        skip: bool = True,
        distort: bool = True,
        grid_mask: Fraction = 0.7,
        max_bad: NonNegativeInt = 0,
    ):
        try:
            from nuscenes.nuscenes import NuScenes as Tables
        except ImportError as error:
            raise UserError(f"nuScenes is read by nuscenes-devkit ({error}): pip install 'saccade[bev]'") from error
        if version not in SPLITS:
            raise UserError(f"data.version must be one of {', '.join(SPLITS)}, got {version!r}")
        if not Path(root, version).is_dir():
            raise UserError(f"data.root={root} has no folder {version}: give the folder nuScenes was unpacked in")
        try:
            self.tables = Tables(version, str(root), verbose=False)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(
                f"the tables in {Path(root, version)} can't be read ({error}): unpack them again"
            ) from error
        check_tables({name: getattr(self.tables, name) for name in self.tables.table_names}, Path(root, version))
        self.root, self.version, self.scale, self.frames = str(root), version, scale, frames
        self.augmentation = dict(skip=skip, distort=distort, grid_mask=grid_mask)
        self.max_bad, self.bad = max_bad, {}
        self.class_names = list(RANGES)
        self.messages = lru_cache(maxsize=None)(self._messages)
        first = next((row for row in self.tables.sample_data if row["width"] and row["height"]), None)
        if first is None:
            raise UserError(f"{Path(root, version)}/sample_data.json lists no image with a width and a height")
        self.img_size = tuple(32 * -(-int(scale * first[side]) // 32) for side in ("height", "width"))

    def inputs(self, pretrained_cfg: dict[str, Any]) -> dict[str, Any]:
        """The preprocessing, as timm names it: the size of the data, the mean and deviation of the model."""
        mean, std = pretrained_cfg.get("mean", IMAGENET_DEFAULT_MEAN), pretrained_cfg.get("std", IMAGENET_DEFAULT_STD)
        size = (3, *self.img_size)
        return dict(input_size=size, interpolation="bilinear", mean=mean, std=std, crop_pct=1.0, crop_mode="center")

    def tokens(self, split: str) -> list[str]:
        """The samples of a split, scene by scene, in time's order."""
        from nuscenes.utils.splits import create_splits_scenes

        names = set(create_splits_scenes()[SPLITS[self.version][split != "train"]])
        found = []
        for scene in self.tables.scene:
            token = scene["first_sample_token"] if scene["name"] in names else ""
            while token:
                found.append(token)
                token = self.tables.get("sample", token)["next"]
        if not found:
            raise UserError(f"{self.root} has no scenes of {split}: {self.version} may be the wrong data.version")
        return found

    def dataset(self, split: str, inputs: dict[str, Any], training: bool = False) -> Dataset:
        self.evaluated = self.tokens(split)
        if training and self.version != "v1.0-test":
            self.evaluated = [token for token in self.evaluated if sum(self.count([token]))]
        if self.version != "v1.0-test":  # which has no annotations
            note_classes(split, self.count(self.evaluated), self.class_names, "boxes", least=int(training))
        return Samples(self, self.evaluated, inputs, self.augmentation if training else None)

    def count(self, tokens: list[str]) -> list[int]:
        """Return how many boxes of each class the samples have that a LiDAR or radar point has hit."""
        from nuscenes.eval.detection.utils import category_to_detection_name

        counts = dict.fromkeys(self.class_names, 0)
        for token in tokens:
            for annotation in self.tables.get("sample", token)["anns"]:
                row = self.tables.get("sample_annotation", annotation)
                name = category_to_detection_name(row["category_name"])
                if name is not None and row["num_lidar_pts"] + row["num_radar_pts"]:
                    counts[name] += 1
        return list(counts.values())

    def submission(self, found: dict[int, tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        """What was found on the samples of the split of the last `dataset`, as nuScenes' evaluator takes it: boxes in
        the world, at most 500 a sample."""
        results = {}
        for index, (boxes, scores, labels) in found.items():
            token = self.evaluated[index]
            pose = self.pose(self.tables.get("sample", token)["data"]["LIDAR_TOP"])
            rows = results[token] = []
            best = scores.argsort(descending=True)[:500]
            for box, score, label in zip(boxes[best].double().numpy(), scores[best].tolist(), labels[best].tolist()):
                turn = np.eye(4)
                turn[:2, :2] = [[np.cos(box[6]), -np.sin(box[6])], [np.sin(box[6]), np.cos(box[6])]]
                name = self.class_names[label]
                rows.append(
                    dict(
                        sample_token=token,
                        translation=(pose @ [*box[:3], 1])[:3].tolist(),
                        size=box[[4, 3, 5]].tolist(),
                        rotation=quaternion(pose @ turn),
                        velocity=(pose[:3, :3] @ [*box[7:9], 0])[:2].tolist(),
                        detection_name=name,
                        detection_score=score,
                        attribute_name=attribute(name, float(np.hypot(*box[7:9]))),
                    )
                )
        used = dict(use_camera=True, use_lidar=False, use_radar=False, use_map=False, use_external=False)
        return dict(meta=used, results=results)

    def pose(self, data_token: str) -> ndarray:
        """From a sensor's axes at its moment to the world: (4, 4)."""
        row = self.tables.get("sample_data", data_token)
        ego = self.tables.get("ego_pose", row["ego_pose_token"])
        return rigid(ego) @ rigid(self.tables.get("calibrated_sensor", row["calibrated_sensor_token"]))

    def ego(self, sample: dict[str, Any]) -> ndarray:
        """Return a sample's (18,) numbers of the ego, as the module's docstring has them, but absolute."""
        row = self.tables.get("sample_data", sample["data"]["LIDAR_TOP"])
        pose = self.tables.get("ego_pose", row["ego_pose_token"])
        ahead = rigid(pose)[:2, 0]
        yaw = np.arctan2(ahead[1], ahead[0]) % (2 * np.pi)
        times, values = self.messages(self.tables.get("scene", sample["scene_token"])["name"])
        after = min(np.searchsorted(times, sample["timestamp"], side="right"), len(times) - 1)
        measured = values[after] if len(times) else np.zeros(9)
        return np.array([*pose["translation"], *pose["rotation"], *measured, yaw, np.rad2deg(yaw)])

    def _messages(self, scene: str) -> tuple[ndarray, ndarray]:
        """Return the times (n,) in microseconds and the nine numbers (n, 9) of a scene's messages of its pose."""
        file = Path(self.root, "can_bus", f"{scene}_pose.json")
        if not file.is_file():
            return np.zeros(0), np.zeros((0, 9))
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
            times = np.array([row["utime"] for row in rows], np.int64)
            values = np.array([[*row["accel"], *row["rotation_rate"], *row["vel"]] for row in rows], np.float64)
            if values.shape != (len(rows), 9) or not np.isfinite(values).all():
                raise ValueError("accel, rotation_rate and vel must be three finite numbers each")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"the CAN bus messages {file} can't be read ({error}): unpack them again") from error
        return times, values


def ego_motion(now: ndarray, before: ndarray | None) -> tuple[Tensor, Tensor]:
    """Return the motion (3,) and can_bus (18,) of a frame, from NuScenes.ego's of it and of the frame before."""
    bus = now.copy()
    bus[[0, 1, 2, 17]] -= now[[0, 1, 2, 17]] if before is None else before[[0, 1, 2, 17]]
    beyond = bus[16] - np.arctan2(bus[1], bus[0])  # the yaw, seen from the direction of travel
    distance = np.hypot(bus[0], bus[1])
    motion = [distance * np.sin(beyond), distance * np.cos(beyond), bus[17]]
    return torch.tensor(motion, dtype=torch.float32), torch.from_numpy(bus).float()


def rigid(row: dict[str, Any]) -> ndarray:
    """(4, 4) of a table's translation and rotation (w, x, y, z)."""
    w, x, y, z = row["rotation"]
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = Rotation.from_quat([x, y, z, w]).as_matrix(), row["translation"]
    return matrix


class Samples(Dataset):
    """Samples as saccade.train.tasks.lift has them."""

    def __init__(
        self, source: NuScenes, tokens: list[str], inputs: dict[str, Any], augmentation: dict[str, Any] | None
    ):
        self.source, self.tokens, self.inputs, self.augmentation = source, tokens, inputs, augmentation
        self.mean, self.std = (torch.tensor(inputs[name]).view(3, 1, 1) for name in ("mean", "std"))
        self.distort = augmentation is not None and augmentation["distort"]
        self.streams = augmentation is None and source.frames > 1
        self.sequences = split_scenes(source.tables, tokens) if self.streams else None

    def __len__(self) -> int:
        return len(self.tokens)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Samples at the beginning of a scene have their first frame several times; the view of the last one counts."""
        most = max(len(sample["frames"]) for sample in samples)
        for sample in samples:
            sample["frames"] = sample["frames"][:1] * (most - len(sample["frames"])) + sample["frames"]
        return collate(samples) | (dict(streams=True) if self.streams else {})

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, token = self.source, self.tokens[index]
        samples = [source.tables.get("sample", name) for name in (*self.earlier(token), token)]
        before = samples[0]["prev"] if self.streams else ""
        last = source.ego(source.tables.get("sample", before)) if before else None
        frames = []
        for sample in samples:
            now = source.ego(sample)
            frame, pose = self.frame(sample)
            frame["motion"], frame["can_bus"] = ego_motion(now, last)
            frame["scene_start"] = torch.tensor(last is None)
            frames.append(frame)
            last = now
        if self.augmentation and torch.rand(()) < self.augmentation["grid_mask"]:
            kept = grid(*self.source.img_size)
            frames[-1] |= {name: frames[-1][name] * kept for name in ("images", "depth")}
        boxes, labels, attributes = self.annotations(samples[-1], pose)
        return dict(frames=frames, boxes=boxes, labels=labels, attributes=attributes, index=torch.tensor(index))

    def earlier(self, token: str) -> list[str]:
        """Return the frames to show before a sample's own, oldest first: none in tests."""
        if self.augmentation is None:
            return []
        skip = self.augmentation["skip"]
        before: list[str] = []
        for _ in range(self.source.frames - (not skip)):
            token = token and self.source.tables.get("sample", token)["prev"]  # "" before a scene's first
            before.insert(0, token)
        if skip:
            del before[int(torch.randint(len(before), ()))]
        return [token for token in before if token]

    def frame(self, sample: dict[str, Any]) -> tuple[dict[str, Tensor], ndarray]:
        source, tables = self.source, self.source.tables
        pose = source.pose(sample["data"]["LIDAR_TOP"])
        cloud = tables.get("sample_data", sample["data"]["LIDAR_TOP"])["filename"]
        try:
            points = np.fromfile(Path(source.root, cloud), np.float32).reshape(-1, 5)[:, :3].astype(np.float64)
        except (OSError, ValueError) as error:
            raise BadImage(str(Path(source.root, cloud)), f"can't be read as a LiDAR's sweep ({error})") from error
        H, W = source.img_size
        images, matrices, depths, present = [], [], [], []
        for camera in CAMERAS:
            present.append(camera in sample["data"])
            if not present[-1]:
                images.append(torch.zeros(3, H, W))
                matrices.append(np.eye(4))
                depths.append(torch.zeros(H, W))
                continue
            row = tables.get("sample_data", sample["data"][camera])
            image = torch.from_numpy(np.array(read_image(Path(source.root, row["filename"])))).permute(2, 0, 1)
            image = image.float() / 255
            if self.distort:
                image = distort_colors(image, hue=0.05, clip=False, swap=True)
            known = tables.get("calibrated_sensor", row["calibrated_sensor_token"])["camera_intrinsic"]
            matrix = np.eye(4)
            matrix[:3, :3] = known
            matrix = matrix @ np.linalg.inv(source.pose(sample["data"][camera])) @ pose
            depth = sparse_depth(points, matrix, tuple(image.shape[1:]))
            tall, wide = (int(source.scale * side) for side in image.shape[1:])
            # As OpenCV resizes: bilinear without antialiasing, and depth by the nearest pixel.
            image = interpolate(image[None], (tall, wide), mode="bilinear")[0]
            depths.append(pad(interpolate(depth[None, None], (tall, wide))[0, 0], (0, W - wide, 0, H - tall)))
            images.append(pad((image - self.mean) / self.std, (0, W - wide, 0, H - tall)))
            matrices.append(np.diag([source.scale, source.scale, 1, 1]) @ matrix)
        matrices = torch.from_numpy(np.stack(matrices)).float()
        frame = dict(images=torch.stack(images), lidar2img=matrices, depth=torch.stack(depths))
        frame["cameras"] = torch.tensor(present)
        return frame, pose

    def annotations(self, sample: dict[str, Any], pose: ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (n, 9), labels and attributes (n,) that a LiDAR or radar point has hit, in the view."""
        from nuscenes.eval.detection.utils import category_to_detection_name

        tables, back = self.source.tables, np.linalg.inv(pose)
        boxes, labels, attributes = [], [], []
        for token in sample["anns"]:
            row = tables.get("sample_annotation", token)
            name = category_to_detection_name(row["category_name"])
            if name is None or row["num_lidar_pts"] + row["num_radar_pts"] == 0:
                continue
            matrix = back @ rigid(row)
            speed = back[:3, :3] @ np.nan_to_num(tables.box_velocity(token))
            width, length, height = row["size"]
            yaw = np.arctan2(matrix[1, 0], matrix[0, 0])
            boxes.append([*matrix[:3, 3], length, width, height, yaw, *speed[:2]])
            labels.append(self.source.class_names.index(name))
            traits = [tables.get("attribute", trait)["name"] for trait in row["attribute_tokens"]]
            attributes.append(ATTRIBUTES.index(traits[0]) if traits else -1)
        boxes = torch.tensor(boxes, dtype=torch.float32).view(-1, 9)
        return boxes, torch.tensor(labels, dtype=torch.long), torch.tensor(attributes, dtype=torch.long)


def sparse_depth(points: ndarray, matrix: ndarray, size: tuple[int, int]) -> Tensor:
    """Depth (H, W) in metres of the nearest point in each pixel, 0 where there is none."""
    u, v, d = matrix[:3, :3] @ points.T + matrix[:3, 3:]
    with np.errstate(divide="ignore", invalid="ignore"):
        u, v = np.floor(u / d), np.floor(v / d)
    kept = (d > 0) & (u >= 0) & (u < size[1]) & (v >= 0) & (v < size[0])
    depth = np.full(size, np.inf, np.float32)
    np.minimum.at(depth, (v[kept].astype(int), u[kept].astype(int)), d[kept].astype(np.float32))
    return torch.from_numpy(np.where(np.isfinite(depth), depth, 0))


def grid(height: int, width: int) -> Tensor:
    """(height, width), 0 in a lattice of squares of random size and place, 1 between: GridMask without its turn."""
    period = int(torch.randint(2, max(3, height), ()))
    side = min(max(int(period / 2 + 0.5), 1), period - 1)
    down, right = torch.randint(period, (2,)).tolist()
    row = (torch.arange(height) + down) % period < side
    column = (torch.arange(width) + right) % period < side
    return 1.0 - (row[:, None] & column).float()


def split_scenes(tables: Any, tokens: list[str]) -> list[list[int]]:
    """Return the indices of samples, in the order of time, of each scene."""
    scenes: dict[str, list[int]] = {}
    for index, token in enumerate(tokens):
        scenes.setdefault(tables.get("sample", token)["scene_token"], []).append(index)
    return list(scenes.values())
