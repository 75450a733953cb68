"""COCO's metric: pycocotools' numbers to the last digit, on any number of processes; and what went wrong where."""

import copy
import importlib.util
import io
import json
from contextlib import redirect_stdout
from itertools import groupby

import numpy as np
import pytest
import torch
from pycocotools import mask as coder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from saccade.train.metrics import coco
from saccade.train.metrics.coco import CocoMetric
from saccade.train.runtime.errors import UserError
from support.forked import in_processes

CLASSES = ["cat", "dog", "cow", "none"]
IDS = [2, 5, 9, 11]  # of the categories: gaps, as COCO has
STATS = list(coco.SUMMARY)  # in the order of COCOeval.stats


def fuzz(seed: int = 0, images: int = 14, side: int = 160) -> tuple[dict, dict[int, dict]]:
    """A json's content and a detector's outputs by image id: hits, near misses, wrong classes, crowds, empty pictures,
    objects of every size, masks of every kind, equal scores."""
    rng = np.random.default_rng(seed)
    truth = dict(images=[], annotations=[], categories=[dict(id=i, name=n) for i, n in zip(IDS, CLASSES)])
    outputs = {}
    for image in rng.permutation(images).tolist():
        truth["images"].append(dict(id=image, file_name=f"{image}.jpg", height=side, width=side))
        boxes, labels, scores = [], [], []
        for _ in range(rng.integers(0, 7) if image % 5 else 0):
            w, h = rng.integers(3, 130, 2)
            x, y = rng.integers(0, side - w), rng.integers(0, side - h)
            label = int(rng.integers(3))  # of "none" there is none
            crowd = int(rng.random() < 0.15)
            mask = np.zeros((side, side), np.uint8)
            mask[y : y + h, x : x + w] = rng.random((h, w)) < 0.9
            rle = coder.encode(np.asfortranarray(mask))
            outline = dict(size=rle["size"], counts=rle["counts"].decode())
            if crowd:  # as COCO's are
                counts = [len(list(run)) for _, run in groupby(mask.ravel(order="F").tolist())]
                outline["counts"] = [0] * int(mask[0, 0]) + counts
            elif rng.random() < 0.5:
                outline = [[int(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]]
            truth["annotations"].append(
                dict(id=len(truth["annotations"]) + 1, image_id=image, category_id=IDS[label], iscrowd=crowd)
                | dict(bbox=[int(x), int(y), int(w), int(h)], area=int(mask.sum()))
                | dict(segmentation=outline)
            )
            for _ in range(rng.integers(0, 4)):
                shift = rng.normal(0, 0.12, 4) * [w, h, w, h]
                box = np.clip(np.array([x, y, x + w, y + h]) + shift, 0, side)
                boxes.append([min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])])
                labels.append(1 + (label if rng.random() < 0.8 else int(rng.integers(4))))
                scores.append(round(float(rng.random()), 1 + image % 2))
        masks = torch.zeros(len(boxes), 1, side, side)
        for mask, box in zip(masks, boxes):
            x1, y1, x2, y2 = map(int, box)
            mask[0, y1:y2, x1:x2] = torch.rand(y2 - y1, x2 - x1, generator=torch.Generator().manual_seed(x1)) + 0.45
        outputs[image] = dict(
            boxes=torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            labels=torch.tensor(labels, dtype=torch.int64),
            scores=torch.tensor(scores, dtype=torch.float32),
            masks=masks,
        )
    return truth, outputs


def pycocotools(truth: dict, results: list[dict], kind: str) -> COCOeval:
    with redirect_stdout(io.StringIO()):
        real = COCO()
        real.dataset = copy.deepcopy(truth)
        real.createIndex()
        kept = [{k: v for k, v in r.items() if kind == "bbox" or k != "bbox"} for r in copy.deepcopy(results)]
        judge = COCOeval(real, real.loadRes(kept), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge


def measured(truth: dict, outputs: dict, masks: bool = True, faster: bool | None = None):
    metric = CocoMetric(truth, CLASSES, masks, faster)
    for image, output in outputs.items():
        metric.update([image], [output])
    return metric.result()


@pytest.mark.parametrize("faster", [False, True], ids=["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools(seed, faster):
    if faster:
        pytest.importorskip("faster_coco_eval")
    truth, outputs = fuzz(seed)
    before = copy.deepcopy(truth)
    metrics, detail = measured(truth, outputs, faster=faster)
    assert truth == before
    assert metrics["images"] == 14
    for name, kind in coco.KINDS.items():
        judge = pycocotools(truth, detail["results"], kind)
        assert judge.stats[0] > 0.05
        assert [metrics[f"{name}_{key}"] for key in STATS] == [100 * value for value in judge.stats]
        assert np.array_equal(detail["precision"][name], judge.eval["precision"][..., 0, 2])
        for k, row in enumerate(detail["classes"]):
            values = judge.eval["precision"][:, :, k, 0, 2]
            assert row[f"{name}_ap"] == (None if k == 3 else 100 * values.mean())
            assert row[f"{name}_ap50"] == (None if k == 3 else 100 * values[0].mean())
    real = [a for a in truth["annotations"] if a["category_id"] == 5 and not a["iscrowd"]]
    row = detail["classes"][1]
    assert (row["class"], row["objects"], row["images"]) == ("dog", len(real), len({a["image_id"] for a in real}))


def test_boxes_alone_and_results_as_the_server_takes_them(tmp_path):
    truth, outputs = fuzz()
    metrics, detail = measured(truth, outputs, masks=False)
    assert not any("mask" in name for name in metrics)
    coco.write_results(tmp_path / "results.json", detail["results"])
    with redirect_stdout(io.StringIO()):
        real = COCO()
        real.dataset = truth
        real.createIndex()
        judge = COCOeval(real, real.loadRes(str(tmp_path / "results.json")), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    assert metrics["box_ap"] == 100 * judge.stats[0]
    first = next(image for image in sorted(outputs) if len(outputs[image]["boxes"]))
    entry, output = json.loads((tmp_path / "results.json").read_text())[0], outputs[first]
    assert entry["image_id"] == first and entry["category_id"] == IDS[output["labels"][0] - 1]
    x1, y1, x2, y2 = output["boxes"][0].double().tolist()
    assert entry["bbox"] == [x1, y1, x2 - x1, y2 - y1] and entry["score"] == float(output["scores"][0])


def test_masks_are_encoded_from_probabilities():
    mask = torch.tensor([[0.2, 0.6, 0.5], [0.9, 0.51, 0.0]])
    assert np.array_equal(coder.decode(coco.encode(mask)), [[0, 1, 0], [1, 1, 0]])
    assert np.array_equal(coder.decode(coco.encode(mask > 0.5)), [[0, 1, 0], [1, 1, 0]])


def test_nothing_found_and_images_left_out():
    truth, outputs = fuzz()
    empty = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), scores=torch.zeros(0))
    empty["masks"] = torch.zeros(0, 1, 160, 160)
    metrics, _ = measured(truth, dict.fromkeys(outputs, empty))
    assert metrics["box_ap"] == metrics["mask_ar100"] == 0.0
    half = dict(list(outputs.items())[:7])  # as when pictures can't be read: the others count alone
    metrics, detail = measured(truth, half)
    cut = truth | dict(images=[i for i in truth["images"] if i["id"] in half])
    cut["annotations"] = [a for a in truth["annotations"] if a["image_id"] in half]
    assert metrics["images"] == 7
    assert metrics["mask_ap"] == 100 * pycocotools(cut, detail["results"], "segm").stats[0]
    unlabelled = {key: value for key, value in truth.items() if key != "annotations"}
    metrics, detail = measured(unlabelled, outputs)
    assert [list(row.values()) for row in detail["classes"]] == [[name, 0, 0] for name in CLASSES]
    assert metrics == dict(images=14) and len(detail["results"]) == sum(len(o["boxes"]) for o in outputs.values())


@pytest.mark.parametrize("faster", [False, True])
def test_cut_short_before_the_first_image(faster):
    if faster:
        pytest.importorskip("faster_coco_eval")
    metrics, detail = measured(fuzz()[0], {}, faster=faster)
    assert metrics.pop("images") == 0 and np.isnan(list(metrics.values())).all() and len(metrics) == 24
    assert detail["results"] == detail["mistakes"] == []


def test_no_large_object_no_number():
    truth, outputs = fuzz()
    truth["annotations"] = [a | dict(area=10) for a in truth["annotations"]]
    metrics, _ = measured(truth, outputs, masks=False)
    assert np.isnan(metrics["box_ap_large"]) and np.isnan(metrics["box_ar_medium"]) and metrics["box_ap_small"] >= 0
    truth["annotations"] = [a | dict(iscrowd=1) for a in truth["annotations"]]
    for annotations in (truth["annotations"], []):  # crowds alone, and nothing
        for faster in (False, True):
            metrics, detail = measured(truth | dict(annotations=annotations), outputs, faster=faster)
            assert metrics.pop("images") == 14 and np.isnan(list(metrics.values())).all()
            assert {row["mask_ap"] for row in detail["classes"]} == {None}


def brute_force(truth: dict, outputs: dict, ids: list[int]) -> float:
    """AP by its definition (COCO's: 10 IoUs, 101 recalls, greedy by score), in percent, of boxes without crowds."""
    precisions = []
    for label, category in enumerate(ids, 1):
        count = sum(a["category_id"] == category for a in truth["annotations"])
        if not count:
            continue
        for threshold in np.linspace(0.5, 0.95, 10):
            claims = []
            for image in sorted(outputs):
                real = [
                    a["bbox"] for a in truth["annotations"] if (a["image_id"], a["category_id"]) == (image, category)
                ]
                free, output = [True] * len(real), outputs[image]
                order = np.argsort(-output["scores"].double().numpy(), kind="stable")
                for i in order[output["labels"].numpy()[order] == label]:
                    overlaps = [iou(output["boxes"][i].double().numpy(), box) for box in real]
                    best = max((o, j) for j, o in enumerate([*overlaps, 0.0]) if j == len(real) or free[j])
                    hit = best[1] < len(real) and best[0] >= min(threshold, 1 - 1e-10)
                    if hit:
                        free[best[1]] = False
                    claims.append((-float(output["scores"][i]), hit))
            hits = np.array([hit for _, hit in sorted(claims, key=lambda claim: claim[0])], float)
            true = np.cumsum(hits)
            recall, precision = true / count, true / np.arange(1, len(hits) + 1)
            at = [precision[recall >= r] for r in np.linspace(0, 1, 101)]
            precisions.append(np.mean([p.max() if len(p) else 0 for p in at]))
    return 100 * float(np.mean(precisions))


def iou(corners, box) -> float:
    x, y, w, h = box
    x1, y1, x2, y2 = corners
    inside = max(0, min(x2, x + w) - max(x1, x)) * max(0, min(y2, y + h) - max(y1, y))
    return inside / ((x2 - x1) * (y2 - y1) + w * h - inside)


@pytest.mark.parametrize("faster", [False, True], ids=["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("first", [0, -7, 3, 2**62])
def test_equals_the_definition_whatever_the_ids(first, faster):
    """Ids that begin at 0 or below, have gaps, are huge, and are in any order."""
    if faster:
        pytest.importorskip("faster_coco_eval")
    truth, outputs = fuzz(1)
    rng = np.random.default_rng(0)
    annotations = [a for a in truth["annotations"] if not a["iscrowd"]]
    numbers = rng.permutation(len(annotations))
    ids = [first + 2 * i for i in range(len(IDS))]
    move = lambda image: first + 5 * image  # noqa: E731
    annotations = [
        a | dict(id=first + 3 * int(n), image_id=move(a["image_id"]), category_id=ids[IDS.index(a["category_id"])])
        for a, n in zip(annotations, numbers)
    ]
    truth = dict(
        images=[image | dict(id=move(image["id"])) for image in truth["images"]],
        categories=[dict(id=i, name=name) for i, name in zip(ids, CLASSES)],
        annotations=annotations,
    )
    outputs = {move(image): output for image, output in outputs.items()}
    metrics, detail = measured(truth, outputs, masks=False, faster=faster)
    assert metrics["box_ap"] == pytest.approx(brute_force(truth, outputs, ids), abs=1e-6)
    assert {r["image_id"] for r in detail["results"]} <= set(outputs)
    assert {r["category_id"] for r in detail["results"]} <= set(ids)


def test_errors():
    truth, outputs = fuzz()
    image = next(i for i, o in outputs.items() if len(o["boxes"]))
    for name in ("boxes", "scores"):
        with pytest.raises(UserError) as error:
            measured(truth, {image: outputs[image] | {name: outputs[image][name] * float("nan")}})
        assert str(error.value) == (
            f"the model's boxes or scores on image {image} are not finite numbers: "
            "evaluate with precision=fp32 or train it again"
        )
    with pytest.raises(ValueError, match="classes must be the json's 4 categories, got 2"):
        CocoMetric(truth, ["a", "b"], True)
    del truth["annotations"][3]["segmentation"]
    with pytest.raises(UserError) as error:
        CocoMetric(truth, CLASSES, True)
    assert str(error.value) == (
        "masks are evaluated, but 1 annotations have none, for example the one with id 4: add their segmentation, or "
        "train a detector of boxes"
    )
    CocoMetric(truth, CLASSES, False)


def test_mistakes_by_hand():
    """One found, one confused, one missed, one false; what is unsure, doubled or on a crowd."""
    categories = [dict(id=1, name="a"), dict(id=2, name="b")]
    images = [dict(id=7, file_name="7.jpg", height=100, width=100), dict(id=8, file_name="8.jpg", height=9, width=9)]
    objects = [(1, [0, 0, 20, 20], 0), (1, [40, 0, 20, 20], 0), (2, [0, 60, 20, 20], 0), (2, [50, 50, 50, 50], 1)]
    annotations = [
        dict(id=i, image_id=7, category_id=c, bbox=box, iscrowd=crowd, area=400)
        for i, (c, box, crowd) in enumerate(objects)
    ]
    claims = [
        (1, [1, 0, 20, 20], 0.9),  # found
        (1, [0, 0, 20, 20], 0.8),  # the same again: false
        (2, [41, 0, 20, 20], 0.7),  # confused
        (2, [60, 60, 10, 10], 0.6),  # on the crowd
        (1, [60, 60, 10, 10], 0.6),  # false: the crowd is of another class
        (2, [0, 60, 20, 20], 0.4),  # not sure enough: missed
    ]
    results = [dict(image_id=7, category_id=c, bbox=box, score=score) for c, box, score in claims]
    truth = dict(images=images, annotations=annotations, categories=categories)
    worst, clean = coco.mistakes(truth, {7: results, 8: []})
    assert (worst["image_id"], worst["file_name"], worst["found"]) == (7, "7.jpg", 1)
    assert worst["missed"] == [annotations[2]]
    assert worst["false"] == [results[1], results[4]]
    assert worst["confused"] == [(results[2], annotations[1])]
    assert clean == dict(image_id=8, file_name="8.jpg", found=0, missed=[], false=[], confused=[])


def test_the_least_score_and_overlap():
    """A score of 0.5 is sure, and an overlap of a half is a match; less is not. faster-coco-eval is optional."""
    truth = dict(images=[dict(id=1, file_name="1.jpg", height=9, width=9)], categories=[dict(id=1, name="a")])
    truth["annotations"] = [dict(id=1, image_id=1, category_id=1, bbox=[0, 0, 4, 2], iscrowd=0, area=8)]
    for box, score, expected in (
        ([0, 0, 4, 1], 0.5, (1, 0, 0)), ([0, 0, 4, 1], 0.4999, (0, 1, 0)), ([0, 0, 3.9, 1], 0.5, (0, 1, 1)),
    ):  # fmt: skip
        (row,) = coco.mistakes(truth, {1: [dict(image_id=1, category_id=1, bbox=box, score=score)]})
        assert (row["found"], len(row["missed"]), len(row["false"])) == expected
    installed = importlib.util.find_spec("faster_coco_eval") is not None
    assert CocoMetric(truth, ["a"], False).faster == installed and not CocoMetric(truth, ["a"], False, False).faster


def test_two_processes_count_each_image_once(tmp_path):
    """One has most of the images, and some that the other has too."""
    truth, outputs = fuzz()
    expected, detail = measured(truth, outputs)

    def run(number: int) -> int:
        torch.distributed.init_process_group("gloo")
        order = list(outputs)
        mine = {image: outputs[image] for image in (order[:9] if number == 0 else order[7:])}
        metrics, said = measured(truth, mine)
        same = said is None if number else said["results"] == detail["results"]
        (tmp_path / f"{number}.json").write_text(json.dumps([metrics, same]))
        torch.distributed.destroy_process_group()
        return 0

    assert in_processes(2, run) == [0, 0]
    assert [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)] == [[expected, True]] * 2
