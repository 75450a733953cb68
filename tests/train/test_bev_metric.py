"""nuScenes' metric: cases computed by hand, and nuscenes-devkit's own evaluator on generated scenes in its layout."""

import json
import math

import numpy as np
import pytest
import torch
from saccade.train.data.bev_scenes import BevScenes, write_nuscenes
from saccade.train.metrics.nuscenes import ATTRIBUTES, NuScenesMetric


def box(x, y, size=(4.0, 2.0, 1.5), yaw=0.0, velocity=(0.0, 0.0)):
    return [x, y, 0.0, *size, yaw, *velocity]


def found(rows):
    boxes, scores = zip(*rows)
    return torch.tensor(boxes), torch.tensor(scores), torch.zeros(len(rows), dtype=torch.long)


def test_hand_computed():
    """Two cars: one is found 0.3 m off, with a wrong one before it; the other 1.5 m off, so not at 0.5 and 1 m."""
    metric = NuScenesMetric(["car"])
    truth = torch.tensor([box(10, 0), box(-10, 0, yaw=0.5, velocity=(3.0, 0.0))])
    rows = [(box(0, 20), 0.9), (box(10, 0.3), 0.8), (box(-10, 1.5, (4, 2, 3), -0.5, (0.0, 4.0)), 0.7)]
    kinds = torch.tensor([ATTRIBUTES.index("vehicle.parked"), ATTRIBUTES.index("vehicle.parked")])
    metric.update(0, found(rows), truth, torch.zeros(2, dtype=torch.long), kinds)
    metrics, detail = metric.result()
    # Precision 0, 1/2 and 1/3 or 2/3 at recalls 0, 1/2 and 1/2 or 1, and straight lines between.
    steps = np.linspace(0, 1, 101)[11:]
    near, far = np.where(steps < 0.5, steps, 0.0), np.interp(steps, [0, 0.5, 1], [0, 1 / 2, 2 / 3])
    near[steps == 0.5] = 1 / 3
    for distance, curve in {"0.5": near, "1": near, "2": far, "4": far}.items():
        assert metrics[f"mAP_{distance}m"] == pytest.approx(100 * (curve - 0.1).clip(0).mean() / 0.9)
    errors = detail["car"]["errors"]
    # Of each error the running mean is 1st, then (1st + 2nd) / 2, along the recalls in between.
    assert 0.3 < errors["mATE"] < 0.9 and errors["mATE"] == pytest.approx(0.3 + 0.6 * errors["mAOE"] / 0.5, rel=1e-6)
    assert errors["mASE"] == pytest.approx(0.25 * errors["mAOE"] / 0.5, rel=1e-6)
    assert errors["mAVE"] == pytest.approx(2.5 * errors["mAOE"] / 0.5, rel=1e-6)


def test_perfect_and_nothing():
    metric = NuScenesMetric(["car", "barrier"])
    truth = torch.tensor([box(5, 5), box(-5, 5, yaw=1.0)])
    labels = torch.tensor([0, 1])
    turned = truth.clone()
    turned[1, 6] += torch.pi  # a barrier has no front
    metric.update(0, (turned, torch.tensor([0.9, 0.8]), labels), truth, labels, torch.tensor([6, -1]))
    metrics, _ = metric.result()
    assert metrics["mAP"] == pytest.approx(100) and metrics["NDS"] == pytest.approx(100)
    empty = NuScenesMetric(["car"])
    empty.update(0, (torch.zeros(0, 9), torch.zeros(0), torch.zeros(0)), truth[:1], labels[:1])
    metrics, _ = empty.result()
    assert metrics["mAP"] == 0 and metrics["NDS"] == 0 and metrics["mATE"] == 1
    blank = NuScenesMetric(["car"])
    blank.update(0, found([(box(5, 5), 0.9)]), torch.zeros(0, 9), torch.zeros(0))
    metrics, _ = blank.result()
    assert metrics.pop("images") == 1 and np.isnan(list(metrics.values())).all()


def interpolate(x: float, xs: list[float], ys: list[float], right: float) -> float:
    """Piecewise linear, at a jump its upper end; beyond the last, `right`; before the first, the first."""
    if x < xs[0]:
        return ys[0]
    if x >= xs[-1]:
        return ys[-1] if x == xs[-1] else right
    i = max(i for i in range(len(xs)) if xs[i] <= x)
    return ys[i] + (ys[i + 1] - ys[i]) * (x - xs[i]) / (xs[i + 1] - xs[i])


def by_definition(samples: list[tuple], name: str, label: int, reach: float, distance: float) -> tuple:
    """The average precision and the five mean errors of a class, match by match."""
    claims, left, objects = [], [], 0
    for i, (boxes, scores, labels, truth, true_labels, kinds) in enumerate(samples):
        near = lambda b: math.hypot(b[0], b[1]) < reach  # noqa: E731
        claims += [(s, i, b) for b, s, k in zip(boxes, scores, labels) if k == label and near(b)]
        left.append([(b, kind) for b, k, kind in zip(truth, true_labels, kinds) if k == label and near(b)])
        objects += len(left[-1])
    claims.sort(key=lambda claim: claim[0])
    claims.reverse()  # of equal scores, the later one first
    hits, matches, recalls, precisions = 0, [], [], []
    for n, (score, i, b) in enumerate(claims, 1):
        ranked = sorted(left[i], key=lambda one: math.hypot(one[0][0] - b[0], one[0][1] - b[1]))
        if ranked and math.hypot(ranked[0][0][0] - b[0], ranked[0][0][1] - b[1]) < distance:
            t, kind = ranked[0]
            left[i] = [one for one in left[i] if one[0] is not t]
            hits += 1
            common = math.prod(map(min, b[3:6], t[3:6]))
            turned = abs(b[6] - t[6]) % (math.pi if name == "barrier" else 2 * math.pi)
            turned = min(turned, (math.pi if name == "barrier" else 2 * math.pi) - turned)
            moving = math.hypot(b[7], b[8]) > 0.2
            guess = dict(car=("vehicle.parked", "vehicle.moving"), bus=("vehicle.stopped", "vehicle.moving"))
            guess |= dict(pedestrian=("pedestrian.standing", "pedestrian.moving"))
            wrong = math.nan if kind < 0 else float(guess.get(name, ("", ""))[moving] != ATTRIBUTES[int(kind)])
            scale = 1 - common / (math.prod(b[3:6]) + math.prod(t[3:6]) - common)
            away = math.hypot(b[0] - t[0], b[1] - t[1])
            matches.append((score, away, scale, turned, math.hypot(b[7] - t[7], b[8] - t[8]), wrong))
        recalls.append(hits / max(objects, 1))
        precisions.append(hits / n)
    if not hits:
        return 0.0, [1.0] * 5
    steps = [i / 100 for i in range(101)]
    ap = sum(max(interpolate(r, recalls, precisions, 0) - 0.1, 0) for r in steps[11:]) / 90 / 0.9
    confidence = [interpolate(r, recalls, [score for score, _, _ in claims], 0) for r in steps]
    reached = [i for i, value in enumerate(confidence) if value > 0 and i > 10]
    errors = []
    for values in list(zip(*matches))[1:]:
        means = []
        for n in range(1, len(values) + 1):
            known = [v for v in values[:n] if not math.isnan(v)]
            means.append(sum(known) / len(known) if known else 0.0)
        if all(map(math.isnan, values)):
            means = [1.0] * len(values)
        scores = [score for score, *_ in matches][::-1]
        curve = [interpolate(confidence[i], scores, means[::-1], means[0]) for i in reached]
        errors.append(sum(curve) / len(curve) if curve else 1.0)
    return ap, errors


REACH = dict(car=50, bus=50, pedestrian=40, barrier=30, traffic_cone=30, other=50)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition(seed):
    """Boxes in and out of reach, doubled, of other classes and with equal scores; objects without an attribute."""
    rng, names = np.random.default_rng(seed), list(REACH)
    metric, samples = NuScenesMetric(names), []
    for index in range(5):
        count = int(rng.integers(8)) + 4 * (index == 4)
        truth = np.concatenate([rng.uniform(-40, 40, (count, 2)), rng.normal(size=(count, 1))], 1)
        truth = np.concatenate([truth, rng.uniform(0.5, 4, (count, 3)), rng.uniform(-9, 9, (count, 3))], 1)
        labels, kinds = rng.integers(0, 5, count), rng.integers(-1, len(ATTRIBUTES), count)
        boxes = np.repeat(truth, 2, 0) + rng.normal(size=(2 * count, 9)) * [0.9, 0.9, 0, 0.2, 0.2, 0.2, 0.5, 0.5, 0.5]
        boxes[:, 3:6] = boxes[:, 3:6].clip(0.1)
        boxes[::3, 7:9] *= 0.01
        claimed = np.where(rng.random(2 * count) < 0.8, np.repeat(labels, 2), rng.integers(0, 6, 2 * count))
        scores = rng.integers(1, 60, 2 * count) / 64
        samples.append((boxes, scores, claimed, truth, labels, kinds))
        metric.update(
            index,
            tuple(map(torch.from_numpy, (boxes, scores, claimed))),
            *map(torch.from_numpy, (truth, labels, kinds)),
        )
    metrics, detail = metric.result()
    aps, errors = [], []
    for label, name in enumerate(names):
        found = [by_definition(samples, name, label, REACH[name], distance) for distance in (0.5, 1, 2, 4)]
        aps.append([100 * ap for ap, _ in found])
        assert list(detail[name]["ap"].values()) == pytest.approx(aps[-1])
        undefined = dict(traffic_cone=(2, 3, 4), barrier=(3, 4)).get(name, ())
        errors.append([math.nan if i in undefined else error for i, error in enumerate(found[2][1])])
        assert list(detail[name]["errors"].values()) == pytest.approx(errors[-1], nan_ok=True)
    assert sum(ap > 5 for row in aps for ap in row) > 10
    means = [float(np.nanmean(column)) for column in zip(*errors)]
    assert [metrics[f"mAP_{d}m"] for d in ("0.5", "1", "2", "4")] == pytest.approx(list(np.mean(aps, 0)))
    assert [metrics[key] for key in ("mATE", "mASE", "mAOE", "mAVE", "mAAE")] == pytest.approx(means)
    assert metrics["mAP"] == pytest.approx(np.mean(aps)) and metrics["images"] == 5
    assert metrics["NDS"] == pytest.approx((5 * np.mean(aps) + 100 * sum(max(0, 1 - e) for e in means)) / 10)


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    root = tmp_path_factory.mktemp("nuscenes") / "made"
    write_nuscenes(root, BevScenes(img_size=(28, 48), most=16), frames=2)
    return root


def test_equals_nuscenes_devkit(layout, tmp_path):
    pytest.importorskip("nuscenes", reason="nuscenes-devkit is the optional extra [bev]")
    from nuscenes.eval.common.config import config_factory
    from nuscenes.eval.detection.evaluate import DetectionEval
    from saccade.train.data.nuscenes import NuScenes

    source = NuScenes(str(layout), version="v1.0-mini", distort=False, grid_mask=0.0)
    dataset = source.dataset("val", source.inputs({}))
    metric, detected = NuScenesMetric(source.class_names), {}
    generator = torch.Generator().manual_seed(0)
    for i in range(len(dataset)):
        sample = dataset[i]
        boxes, labels = sample["boxes"].repeat(3, 1), sample["labels"].repeat(3)
        noise = torch.randn(boxes.shape, generator=generator) * torch.tensor(
            [0.8, 0.8, 0.3, 0.2, 0.2, 0.1, 0.6, 0.4, 0.4]
        )
        boxes = boxes + noise
        boxes[:, 3:6].clamp_(min=0.2)
        labels = torch.where(torch.rand(len(labels), generator=generator) < 0.1, 0, labels)
        kept = torch.rand(len(labels), generator=generator) < 0.6
        scores = (-noise[:, :2].norm(dim=1) + 0.3 * torch.randn(len(boxes), generator=generator)).sigmoid()
        detected[i] = boxes[kept], scores[kept], labels[kept]
        metric.update(i, detected[i], sample["boxes"], sample["labels"], sample["attributes"])
    metrics, detail = metric.result()
    file = tmp_path / "results.json"
    file.write_text(json.dumps(source.submission(detected)))
    judge = DetectionEval(
        source.tables, config_factory("detection_cvpr_2019"), str(file), "mini_val", str(tmp_path), verbose=False
    )
    official, _ = judge.evaluate()
    official = official.serialize()
    assert 5 < metrics["mAP"] < 35  # of ten classes four are there
    assert metrics["mAP"] == pytest.approx(100 * official["mean_ap"], abs=1e-4)
    assert metrics["NDS"] == pytest.approx(100 * official["nd_score"], abs=1e-4)
    for ours, theirs in dict(
        mATE="trans_err", mASE="scale_err", mAOE="orient_err", mAVE="vel_err", mAAE="attr_err"
    ).items():
        assert metrics[ours] == pytest.approx(official["tp_errors"][theirs], abs=1e-5)
    for name, one in detail.items():
        for distance, ap in one["ap"].items():
            assert ap == pytest.approx(100 * official["label_aps"][name][float(distance)], abs=1e-4)


def test_layout_is_the_world(layout):
    """What nuScenes' tables say of a generated scene is the scene."""
    pytest.importorskip("nuscenes", reason="nuscenes-devkit is the optional extra [bev]")
    from saccade.train.data.bev_scenes import CAMERAS as MADE
    from saccade.train.data.bev_scenes import SEEN, STEP, motion_between
    from saccade.train.data.nuscenes import CAMERAS, NuScenes

    source = NuScenes(str(layout), version="v1.0-mini", frames=2, distort=False, grid_mask=0.0)
    dataset = source.dataset("train", source.inputs({}))
    made = BevScenes(img_size=(28, 48), most=16)
    world = made.world("train", 0)
    frame, sample = world.frame(STEP, (28, 48)), dataset[1]
    shown = frame.pixels >= SEEN
    torch.testing.assert_close(sample["boxes"], torch.from_numpy(frame.boxes[shown]).float(), atol=1e-4, rtol=1e-4)
    names = [source.class_names[label] for label in sample["labels"]]
    assert names == [made.class_names[label] for label in frame.labels[shown]]
    order = [list(MADE).index(camera) for camera in CAMERAS]
    last = sample["frames"][-1]
    torch.testing.assert_close(last["lidar2img"], torch.from_numpy(frame.lidar2img[order]).float())
    torch.testing.assert_close(last["motion"], motion_between(world.pose(0), world.pose(STEP)), atol=1e-4, rtol=1e-4)
    depth, true = last["depth"][:, :28, :48], torch.from_numpy(frame.depth[order])
    known = depth > 0
    assert known.float().mean() > 0.1
    assert ((depth - true)[known].abs() < 0.01).float().mean() > 0.85  # a camera is shown what another one sees, too
    assert torch.equal(dataset[0]["frames"][0]["motion"].abs() < 1e-5, torch.ones(3, dtype=torch.bool))
    # In tests one frame after another of each scene, in training those before as well, fewer where a scene begins.
    batch = dataset.collate([dataset[1]])
    assert len(batch["frames"]) == 1 and batch["streams"] and dataset.sequences[:2] == [[0, 1], [2, 3]]
    starts = [bool(dataset[i]["frames"][0]["scene_start"]) for i in range(4)]
    assert starts == [True, False, True, False] and last["can_bus"].shape == (18,) and not last["can_bus"][7:16].any()
    training = source.dataset("train", source.inputs({}), training=True)
    training.augmentation["skip"] = False
    batch = training.collate([training[0], training[1]])
    assert len(batch["frames"]) == 2 and batch["frames"][0]["images"].shape == (2, 6, 3, 32, 64)
    assert [frame["scene_start"].tolist() for frame in batch["frames"]] == [[True, True], [True, False]]
