"""Shared by the datasets of several cameras: nuScenes' attributes and ranges, and how samples become a batch."""

from collections.abc import Sequence
from typing import Any

import torch

RANGES = dict(  # metres from the ego; the classes in the order of published detectors
    car=50.0, truck=50.0, construction_vehicle=50.0, bus=50.0, trailer=50.0, barrier=30.0, motorcycle=40.0,
    bicycle=40.0, pedestrian=40.0, traffic_cone=30.0,
)  # fmt: skip
ATTRIBUTES = (
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.sitting_lying_down",
    "pedestrian.standing",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
)


def attribute(name: str, speed: float) -> str:
    """Return a guess of a box's attribute from its class and its speed: it moves if faster than 0.2 m/s."""
    moving = speed > 0.2
    if name == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    if name in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    if name in ("traffic_cone", "barrier"):
        return ""
    if moving:
        return "vehicle.moving"
    return "vehicle.stopped" if name == "bus" else "vehicle.parked"


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a batch: the frames' tensors stacked; boxes, labels and attributes, if any, as lists of one per sample."""
    frames = [
        {name: torch.stack([sample["frames"][t][name] for sample in samples]) for name in frame}
        for t, frame in enumerate(samples[0]["frames"])
    ]
    lists = {
        name: [sample[name] for sample in samples] for name in ("boxes", "labels", "attributes") if name in samples[0]
    }
    return dict(frames=frames, **lists, index=torch.stack([sample["index"] for sample in samples]))
