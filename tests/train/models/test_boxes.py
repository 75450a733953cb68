"""The parts of detectors against values recorded from MMDetection, in float64."""

import math

import pytest
import torch
from saccade.train.models import boxes, roi_heads
from saccade.train.models.anchor_heads import Anchors
from saccade.train.models.resize import resize_uint8, scaled_size
from saccade.train.models.roi_align import roi_align
from support.images import coarse_image
from support.parity import assert_equal, load, seeded
from torchvision.ops import roi_align as roi_align_of_torchvision


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", load("detectors", "unit_anchors")["cases"], ids=lambda case: case["kind"])
def test_anchors(case):
    """Positions, order, and which take part in the training of an image smaller than its batch."""
    scales = [8] if case["kind"] == "rpn" else [4 * 2 ** (i / 3) for i in range(3)]
    anchors = Anchors(case["strides"], scales)
    maps = [torch.zeros(1, 1, *size, dtype=torch.float64) for size in case["maps"]]
    levels = anchors(maps)
    for level, base, summary, some in zip(
        levels, case["base"], case["levels"], case["eleven_to_fourteen"], strict=True
    ):
        assert_equal("anchors", level, summary)
        torch.testing.assert_close(level[: len(base)], tensor(base), rtol=0, atol=1e-9)
        torch.testing.assert_close(level[11 : 11 + len(some)], tensor(some), rtol=0, atol=1e-9)
    valid = anchors.valid(maps, case["pad_shape"]).split([len(level) for level in levels])
    assert [int(mask.sum()) for mask in valid] == case["valid"]


def test_encode_and_decode():
    unit = load("detectors", "unit_decode")
    rois, deltas, targets = (tensor(unit[name]) for name in ("boxes", "deltas", "targets"))
    stds = (0.1, 0.1, 0.2, 0.2)
    same = dict(rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(boxes.decode(rois, deltas, stds, unit["clipped_to"]), tensor(unit["decoded"]), **same)
    torch.testing.assert_close(boxes.decode(rois, deltas, stds), tensor(unit["unclipped"]), **same)
    several = boxes.decode(rois, torch.stack((deltas, 2 * deltas), 1), stds)
    torch.testing.assert_close(several[:, 0], tensor(unit["unclipped"]), **same)
    encoded = boxes.encode(rois[: len(targets)], targets, stds)
    torch.testing.assert_close(encoded, tensor(unit["encoded"]), **same)


@pytest.mark.parametrize("case", load("detectors", "unit_assign")["cases"], ids=lambda case: case["name"])
def test_assign(case):
    """Including several boxes that share a target's best overlap, which it then gets all."""
    unit, rule = load("detectors", "unit_assign"), case["settings"]
    torch.testing.assert_close(
        boxes.box_iou(tensor(unit["true"]), tensor(unit["boxes"])), tensor(unit["iou"]), rtol=1e-12, atol=1e-12
    )
    low_quality = rule["min_pos_iou"] if rule["match_low_quality"] else None
    assigned = boxes.assign(
        tensor(unit["boxes"]), tensor(unit["true"]), rule["pos_iou_thr"], rule["neg_iou_thr"], low_quality
    )
    expected = [{-1: -2, 0: -1}.get(value, value - 1) for value in case["assigned"]]
    assert assigned.tolist() == expected
    assert boxes.assign(tensor(unit["boxes"]), torch.zeros(0, 4).double(), 0.5, 0.5).tolist() == [-1] * len(expected)


def test_sample():
    """A quarter at most positive, negatives fill up, all where there are few; ignored ones never."""
    torch.manual_seed(0)
    assigned = torch.tensor([-2] * 5 + [3] * 10 + [-1] * 50)
    positive, negative = boxes.sample(assigned, 16, 0.25)
    assert len(positive) == 4 and len(negative) == 12
    assert (assigned[positive] == 3).all() and (assigned[negative] == -1).all()
    positive, negative = boxes.sample(assigned, 1000, 0.25)
    assert positive.tolist() == list(range(5, 15)) and negative.tolist() == list(range(15, 65))


@pytest.mark.parametrize("repeats", [1, 30], ids=["few", "many"])
def test_detections_by_class(repeats):
    """NMS within classes, of few boxes and of so many that torchvision takes its other way; copies change nothing."""
    unit = load("detectors", "unit_nms")
    scores, candidates = tensor(unit["scores"])[:, :-1].repeat(repeats, 1), tensor(unit["boxes"]).repeat(repeats, 1)
    result = boxes.select_detections(candidates[:, None], scores, 0.1, 30)
    torch.testing.assert_close(result.scores, tensor(unit["kept_scores"]), rtol=1e-12, atol=0)
    assert result.labels.tolist() == [label - 1 for label in unit["kept_labels"]]
    torch.testing.assert_close(result.boxes, tensor(unit["kept"]), rtol=1e-12, atol=1e-9)


def test_losses():
    unit = load("detectors", "unit_losses")
    labels = torch.tensor(unit["labels"])
    truth = torch.nn.functional.one_hot(labels, 5)[:, :4].double()
    focal = boxes.focal_sum(seeded(110, (6, 4)), truth) / (3 + boxes.COUNT_EPS)
    assert focal.item() == pytest.approx(unit["focal"], rel=1e-9)
    predicted, target = tensor(unit["predicted"]), tensor(unit["true"])
    giou = 10 * boxes.giou_sum(predicted, target) / (7 + boxes.COUNT_EPS)
    assert giou.item() == pytest.approx(unit["giou_times_10"], rel=1e-9)
    smooth = boxes.smooth_l1_sum(predicted, target, 1 / 9)
    d = (predicted - target).abs()
    assert smooth.item() == pytest.approx(torch.where(d < 1 / 9, 4.5 * d**2, d - 1 / 18).sum().item(), rel=1e-12)


def test_pooling_levels():
    unit = load("detectors", "unit_levels")
    maps = [seeded(70 + i, shape) for i, shape in enumerate(unit["maps"])]
    rois = tensor(unit["rois"])
    pooled, rows = roi_heads.pool_regions(maps, [rois[:, 1:]], (4, 8, 16, 32), 7)
    assert_equal("RoIAlign", pooled[rows], unit["roi_align"])
    # Maps that are constant tell which level a box was pooled from.
    flat = [torch.full(shape, float(i), dtype=torch.float64) for i, shape in enumerate(unit["maps"])]
    some = tensor(unit["boxes"])
    inside = (some[:, 2] < 224) & (some[:, 3] < 160) & (some[:, 2] > some[:, 0])
    pooled, rows = roi_heads.pool_regions(flat, [some[inside]], (4, 8, 16, 32), 7)
    levels = [level for level, kept in zip(unit["levels"], inside.tolist()) if kept]
    assert pooled[rows, 0, 3, 3].round(decimals=6).tolist() == levels


def test_mask_targets():
    """Bitmaps cropped to boxes, bit for bit; other boxes' masks do not matter."""
    unit = load("detectors", "unit_mask_targets")
    masks = torch.zeros(2, unit["height"], unit["width"], dtype=torch.uint8)
    for mask, rectangles in zip(masks, unit["rectangles"]):
        for x0, y0, x1, y1 in rectangles:
            mask[y0:y1, x0:x1] = 1
    targets = roi_heads.mask_targets(masks, tensor(unit["boxes"]), torch.tensor(unit["which"]))
    for target, rows in zip(targets, unit["targets"], strict=True):
        assert ["".join(str(int(v)) for v in row) for row in target] == rows


def test_paste_masks():
    """Area, sum inside the box and samples of pasted probabilities; nothing outside, not even of an empty box."""
    unit = load("detectors", "unit_paste")
    probabilities, at = (2 * seeded(80, (4, 28, 28))).sigmoid(), tensor(unit["boxes"])
    pasted = roi_heads.paste_masks(probabilities, at, (unit["height"], unit["width"]))
    y, x = torch.arange(unit["height"]) + 0.5, torch.arange(unit["width"]) + 0.5
    for mask, box, facts in zip(pasted, at, unit["pasted"], strict=True):
        inside = ((y > box[1]) & (y < box[3]))[:, None] & ((x > box[0]) & (x < box[2]))
        assert abs(int((mask >= 0.5).sum()) - facts["area"]) <= facts["near"]
        assert mask[inside].sum().item() == pytest.approx(facts["sum"], rel=1e-9)
        assert int(inside.sum()) == facts["inside"]
        for row, column, value in facts["samples"]:
            assert mask[row, column].item() == pytest.approx(value, rel=1e-9)
    empty = roi_heads.paste_masks(probabilities[:1], tensor([[5.0, 5.0, 5.0, 9.0]]), (20, 20))
    assert empty.isfinite().all() and not empty.any()


@pytest.mark.parametrize("case", load("detectors", "unit_resize")["cases"], ids=lambda case: str(case["seed"]))
def test_resize(case):
    """OpenCV's bytes: sums, and rows of pixels at the start, the middle and the end."""
    image = coarse_image(case["seed"], case["height"], case["width"])
    size = scaled_size(case["height"], case["width"], case["test_size"])
    assert list(size) == case["resized"]
    for dtype in (torch.float32, torch.float64, torch.uint8):
        pixels = resize_uint8(image.to(dtype), size).long().permute(1, 2, 0)
        flat = pixels.flatten()
        assert int(flat.sum()) == case["sum"]
        assert int((flat * (torch.arange(len(flat)) % 251)).sum()) == case["weighted"]
        assert pixels[0, :4].tolist() == case["first"]
        assert pixels[-1, -4:].tolist() == case["last"]


def test_resize_to_its_own_size_changes_nothing():
    image = 255 * torch.rand(3, 9, 7)
    assert resize_uint8(image, (9, 7)) is image


def test_ratio_limit():
    """A box grows at most 62.5 times at once, and shrinks no further."""
    unit = tensor([[0.0, 0.0, 1.0, 1.0]])
    grown = boxes.decode(unit, tensor([[0.0, 0.0, 50.0, -50.0]]))
    assert (grown[0, 2] - grown[0, 0]).item() == pytest.approx(62.5)
    assert (grown[0, 3] - grown[0, 1]).item() == pytest.approx(1 / 62.5)
    assert pytest.approx(math.log(62.5)) == boxes.MAX_LOG_RATIO


@pytest.mark.parametrize("side", [7, 14])
def test_regions_are_pooled_as_by_torchvision(side):
    """Of all sizes: within the map, over its border, beyond it, empty, turned over; and the gradient of the map."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 20, 31, dtype=torch.float64)
    extent = torch.tensor([248.0, 160.0], dtype=torch.float64)
    middle, half = (torch.rand(80, 2).double() * 1.2 - 0.1) * extent, torch.rand(80, 2).double().square() * extent / 2
    regions = torch.cat((middle - half, middle + half), 1)
    regions[:5] = tensor([[10, 10, 10, 10], [0, 0, 248, 160], [5, 5, 4, 9], [-500, -500, -400, -400], [0, 0, 2, 2]])
    rois = torch.cat((torch.randint(2, (80, 1)).double(), regions), 1)
    mine, theirs = (x.clone().requires_grad_() for _ in range(2))
    out = roi_align(mine, rois, side, 1 / 8)
    expected = roi_align_of_torchvision(theirs, rois, side, 1 / 8, 0, aligned=True)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)
    assert roi_align(x, rois[:0], side, 1 / 8).shape == (0, 3, side, side)
    rois[0, 1] = torch.nan  # of a training that diverges
    assert roi_align(x, rois, side, 1 / 8).shape == (80, 3, side, side)
