"""Check the tables of nuScenes before anything is made of them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.errors import UserError
from .bev_frames import ATTRIBUTES

VECTORS = dict(  # numbers of a field
    ego_pose=dict(translation=3, rotation=4),
    calibrated_sensor=dict(translation=3, rotation=4),
    sample_annotation=dict(translation=3, size=3, rotation=4),
)
TOKENS = dict(  # the table that a field's token is of
    sample_data=dict(sample_token="sample", ego_pose_token="ego_pose", calibrated_sensor_token="calibrated_sensor"),
    sample_annotation=dict(sample_token="sample", instance_token="instance"),
    sample=dict(scene_token="scene"),
)


def check_tables(tables: Mapping[str, list[dict[str, Any]]], folder: Path) -> None:
    """Raise UserError, naming file, entry and field, for the first that is missing, not finite or out of range."""
    for name, rows in tables.items():
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{folder / name}.json is not a list of entries: unpack the tables again")
        _refuse([not isinstance(row.get("token"), str) for row in rows], tables, name, "token", folder, "text")
    tokens = {name: {row["token"] for row in rows} for name, rows in tables.items()}
    for name, fields in VECTORS.items():
        for field, count in fields.items():
            values = _vectors(tables[name], name, field, count, folder)
            if field == "rotation":
                _refuse(np.abs(np.linalg.norm(values, axis=1) - 1) > 0.01, tables, name, field, folder, "of length 1")
            if field == "size":
                _refuse((values <= 0).any(1), tables, name, field, folder, "three numbers above 0")
    for name, fields in TOKENS.items():
        for field, other in fields.items():
            given = [row.get(field) for row in tables[name]]
            wrong = [not isinstance(token, str) or token not in tokens[other] for token in given]
            _refuse(wrong, tables, name, field, folder, f"a token of {other}.json")
    annotations, images = tables["sample_annotation"], tables["sample_data"]
    for field in ("num_lidar_pts", "num_radar_pts"):
        wrong = [not _is_count(row.get(field)) for row in annotations]
        _refuse(wrong, tables, "sample_annotation", field, folder, "a whole number of 0 or more")
    names, known = {row["token"]: row.get("name") for row in tables["attribute"]}, list(ATTRIBUTES)
    traits = [_list(row.get("attribute_tokens")) for row in annotations]
    wrong = [any(not isinstance(token, str) or names.get(token) not in known for token in row) for row in traits]
    _refuse(wrong, tables, "sample_annotation", "attribute_tokens", folder, "tokens of nuScenes' attributes")
    wrong = [not isinstance(row.get("filename"), str) or not row["filename"] for row in images]
    _refuse(wrong, tables, "sample_data", "filename", folder, "a file's name")
    for field in ("width", "height"):
        wrong = [not _is_count(row.get(field)) for row in images]
        _refuse(wrong, tables, "sample_data", field, folder, "a whole number of 0 or more")
    wrong = [not _is_intrinsic(row.get("camera_intrinsic")) for row in tables["calibrated_sensor"]]
    _refuse(wrong, tables, "calibrated_sensor", "camera_intrinsic", folder, "3 x 3 finite numbers, or []")


def _vectors(rows: list[dict[str, Any]], name: str, field: str, count: int, folder: Path) -> np.ndarray:
    """Return the vectors of a field (N, count), all of them finite."""
    values = [row.get(field) for row in rows]
    try:
        array = np.array(values).reshape(-1, count) if values else np.zeros((0, count))
        if len(array) == len(values) and array.dtype.kind in "fi":
            _refuse(~np.isfinite(array).all(1), {name: rows}, name, field, folder, f"{count} finite numbers")
            return array
    except (TypeError, ValueError):
        pass
    wrong = [not _is_vector(value, count) for value in values]
    _refuse(wrong, {name: rows}, name, field, folder, f"{count} finite numbers")
    return np.array(values, np.float64)


def _is_vector(value: Any, count: int) -> bool:
    numbers = isinstance(value, list) and len(value) == count
    return numbers and all(type(x) in (int, float) and abs(x) < float("inf") for x in value)


def _is_intrinsic(value: Any) -> bool:
    return value == [] or (isinstance(value, list) and len(value) == 3 and all(_is_vector(row, 3) for row in value))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _refuse(wrong: Iterable, tables: Mapping[str, list], name: str, field: str, folder: Path, must: str) -> None:
    """Raise UserError for the first entry that is wrong."""
    places = np.flatnonzero(np.asarray(wrong, bool))
    if len(places):
        row = tables[name][places[0]]
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        raise UserError(
            f"{folder / name}.json: entry {places[0]} (token {row.get('token')}) has {field} {row.get(field)!r}{more}, "
            f"which must be {must}: unpack the tables again or correct it"
        )
