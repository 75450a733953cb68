"""nuScenes' tables: every field that is used is checked, and the entry with the fault is named."""

import copy
import json

import pytest
from saccade.train.data.bev_scenes import BevScenes, write_nuscenes
from saccade.train.data.nuscenes_tables import check_tables
from saccade.train.runtime.errors import UserError

NAN = float("nan")


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    root = tmp_path_factory.mktemp("nuscenes") / "made"
    write_nuscenes(root, BevScenes(img_size=(8, 12), most=4), frames=1)
    return {file.stem: json.loads(file.read_text()) for file in (root / "v1.0-mini").glob("*.json")}


def test_made_scenes_are_valid(tables, tmp_path):
    check_tables(tables, tmp_path)


@pytest.mark.parametrize(
    "table, field, values, must",
    [
        ("ego_pose", "translation", [None, [1, 2], [1, 2, NAN], ["1", 2, 3], "x"], "3 finite numbers"),
        ("ego_pose", "rotation", [[1, 0, 0], [NAN, 0, 0, 1], None], "4 finite numbers"),
        ("ego_pose", "rotation", [[0, 0, 0, 0], [2, 0, 0, 0]], "of length 1"),
        (
            "calibrated_sensor",
            "camera_intrinsic",
            [None, [[1, 2], [3, 4]], [[1, 0, NAN]] * 3, "x"],
            "3 x 3 finite numbers",
        ),
        ("sample_annotation", "size", [[1, 2, 0], [1, -2, 3]], "three numbers above 0"),
        ("sample_annotation", "size", [[1, 2, "3"], [1, 2, None]], "3 finite numbers"),
        ("sample_annotation", "num_lidar_pts", ["3", -1, None, 1.5, True], "a whole number of 0 or more"),
        ("sample_annotation", "instance_token", ["none", None], "a token of instance.json"),
        ("sample_annotation", "attribute_tokens", [["none"], None, "x"], "tokens of nuScenes' attributes"),
        ("sample_data", "ego_pose_token", ["none", None], "a token of ego_pose.json"),
        ("sample_data", "filename", ["", None, 3], "a file's name"),
        ("sample_data", "width", ["12", -1, None], "a whole number of 0 or more"),
        ("sample", "scene_token", [None], "a token of scene.json"),
    ],
)
def test_faults_are_named(tables, tmp_path, table, field, values, must):
    for value in values:
        changed = tables | {table: copy.deepcopy(tables[table])}
        changed[table][1][field] = value
        with pytest.raises(
            UserError, match=rf"{table}.json: entry 1 \(token \w+\) has {field} .*, which must be {must}"
        ):
            check_tables(changed, tmp_path)
