"""Images with boxes and masks from COCO's json: what training leaves out, augmentation, what is wrong with a json."""

import json
import os
from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coder
from saccade.train.data.bad_images import BadImage
from saccade.train.data.coco import Coco, RandomPart, augmentation, decode_mask
from saccade.train.data.coco_json import _run_lengths
from saccade.train.data.loader import EvaluationOrder, TrainingOrder, batches
from saccade.train.runtime.errors import UserError
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes

H, W = 40, 60
CFG = dict(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", crop_pct=1.0)
SMALL = dict(short=H, long=W, flip=0.0)


def rectangle(x: int, y: int, w: int, h: int, height: int = H, width: int = W) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[y : y + h, x : x + w] = 1
    return mask


def polygon(x: float, y: float, w: float, h: float) -> list[float]:
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def runs(mask: np.ndarray) -> dict:
    """Run-length encoded, uncompressed: columns first, beginning with zeros."""
    counts = [(value, len(list(run))) for value, run in groupby(mask.ravel(order="F").tolist())]
    return dict(size=list(mask.shape), counts=[0] * counts[0][0] + [length for _, length in counts])


def compressed(mask: np.ndarray) -> dict:
    rle = coder.encode(np.asfortranarray(mask))
    return dict(size=rle["size"], counts=rle["counts"].decode())


def content() -> dict:
    """Three pictures, categories 7 and 3; the first has all that there is, the second a crowd alone, the third none."""
    annotations = [
        dict(category_id=7, bbox=[5, 5, 20, 10], segmentation=[polygon(5, 5, 20, 10)]),
        dict(category_id=3, bbox=[30, 10, 8, 12], segmentation=compressed(rectangle(30, 10, 8, 12))),
        dict(category_id=3, bbox=[-6, 30, 20, 30], segmentation=runs(rectangle(0, 30, 14, 10))),  # out of the picture
        dict(category_id=7, bbox=[70, 10, 10, 10], segmentation=[polygon(70, 10, 10, 10)]),  # wholly
        dict(category_id=7, bbox=[20, 20, 0.5, 10], segmentation=[polygon(20, 20, 0.5, 10)]),  # tiny
        dict(category_id=7, bbox=[20, 20, 10, 0], segmentation=[polygon(20, 20, 10, 0)]),  # of no area
        dict(category_id=7, bbox=[40, 20, 10, 10], segmentation=[[1, 2, 3, 4]]),  # no polygon
        dict(category_id=7, bbox=[0, 0, 60, 40], iscrowd=1, segmentation=runs(rectangle(0, 0, 60, 40))),
        dict(category_id=7, bbox=[0, 0, 60, 40], iscrowd=1, segmentation=runs(rectangle(0, 0, 60, 40)), image_id=20),
    ]
    return dict(
        images=[dict(id=i, file_name=f"{i}.png", height=H, width=W) for i in (10, 20, 30)],
        annotations=[dict(image_id=10, id=100 + i) | a for i, a in enumerate(annotations)],
        categories=[dict(id=7, name="dog"), dict(id=3, name="cat")],
    )


@pytest.fixture
def root(tmp_path):
    write(tmp_path, content())
    return tmp_path


def write(root, said: dict | str | bytes, name: str = "all.json") -> None:
    if isinstance(said, dict):
        (root / "pictures").mkdir(exist_ok=True)
        for image in content()["images"]:
            pixels = np.random.default_rng(image["id"]).integers(0, 256, (H, W, 3), np.uint8)
            Image.fromarray(pixels).save(root / "pictures" / image["file_name"])
        said = json.dumps(said)
    (root / name).write_bytes(said.encode() if isinstance(said, str) else said)


def coco(root, **kwargs) -> Coco:
    files = ("all.json", "pictures")
    return Coco(str(root), **dict(train=files, val=files) | SMALL | kwargs)


def training(root, **kwargs):
    source = coco(root, **kwargs)
    return source.dataset("train", source.inputs(CFG), training=True)


def test_masks_of_every_kind():
    mask = rectangle(3, 4, 20, 9) | rectangle(10, 2, 5, 30)
    assert np.array_equal(decode_mask(runs(mask), H, W), mask)
    assert np.array_equal(decode_mask(compressed(mask), H, W), mask)
    parts = [polygon(3, 4, 20, 9), polygon(10, 2, 5, 30), [1, 2]]
    assert np.array_equal(decode_mask(parts, H, W), mask)
    corner = rectangle(0, 0, 2, 2)  # begins with ones
    assert runs(corner)["counts"][0] == 0 and np.array_equal(decode_mask(runs(corner), H, W), corner)


def test_training_leaves_out_what_can_not_be_learnt(root):
    dataset = training(root)
    assert len(dataset) == 1 and dataset.filename(0) == "10.png"
    image, target = dataset[0]
    assert target["boxes"].tolist() == [[5, 5, 25, 15], [30, 10, 38, 22], [0, 30, 14, 40]]  # the last one clipped
    assert target["labels"].tolist() == [2, 1, 1]  # in the order of the category ids: cat, dog
    expected = [rectangle(5, 5, 20, 10), rectangle(30, 10, 8, 12), rectangle(0, 30, 14, 10)]
    assert np.array_equal(target["masks"], expected)
    assert target["area"].tolist() == [200, 96, 600] and target["iscrowd"].tolist() == [0, 0, 0]
    assert target["image_id"].tolist() == [10] and target["orig_size"].tolist() == [H, W]
    kinds = {name: value.dtype for name, value in target.items() if name != "split"}
    floats, ints = dict.fromkeys(("boxes", "area"), torch.float32), ("labels", "iscrowd", "image_id", "orig_size")
    assert kinds == floats | dict.fromkeys(ints, torch.int64) | dict(masks=torch.uint8)
    assert all(type(value) is torch.Tensor for name, value in target.items() if name != "split")
    pixels = np.asarray(Image.open(root / "pictures/10.png"))
    assert type(image) is torch.Tensor and image.dtype == torch.float32
    torch.testing.assert_close(image, torch.tensor(pixels).permute(2, 0, 1).float() / 255)


def test_without_masks_their_kind_does_not_matter(root):
    _, target = training(root, masks=False)[0]
    assert target["labels"].tolist() == [2, 1, 1, 2] and "masks" not in target
    assert target["boxes"].tolist()[3] == [40, 20, 50, 30]


def test_pictures_without_boxes_when_asked_for(root):
    dataset = training(root, keep_empty=True)
    assert [dataset[i][1]["image_id"].item() for i in range(len(dataset))] == [10, 20, 30]
    assert dataset[2][1]["boxes"].shape == (0, 4) and dataset[2][1]["masks"].shape == (0, H, W)
    assert dataset[2][1]["labels"].shape == (0,)


def test_evaluation_has_everything_as_it_is(root):
    source = coco(root, masks=False, short=20, flip=1.0, crop=dict(short=(10,), side=(8, 9)))
    dataset = source.dataset("test", source.inputs(CFG))
    assert [dataset[i][1]["image_id"].item() for i in range(len(dataset))] == [10, 20, 30]
    image, target = dataset[0]
    assert image.shape == (3, H, W) and target["split"] == "test" and "masks" not in target
    assert target["boxes"].shape == (8, 4) and target["boxes"][3].tolist() == [70, 10, 80, 20]
    assert target["iscrowd"].tolist() == [0] * 7 + [1]
    assert source.class_names == ["cat", "dog"]
    truth = source.truth("test")
    assert len(truth["annotations"]) == 9 and truth["annotations"][0] == content()["annotations"][0] | dict(
        iscrowd=0, area=200
    )
    assert np.array_equal(dataset.load_image(20), Image.open(root / "pictures/20.png"))


def test_annotations_may_be_in_any_order(root):
    said = content()
    said["annotations"].append(dict(id=200, image_id=30, category_id=3, bbox=[1, 1, 5, 5]))
    said["annotations"].sort(key=lambda a: (-a["image_id"], a["id"]))
    write(root, said)
    dataset = training(root, masks=False)
    assert [dataset[i][1]["boxes"].shape[0] for i in range(len(dataset))] == [4, 1]
    assert dataset[1][1]["boxes"].tolist() == [[1, 1, 6, 6]]


@pytest.mark.parametrize(
    "size, short, long, expected",
    [((480, 640), 800, 1333, (800, 1066)), ((300, 900), 800, 1333, (444, 1333)), ((1000, 500), 250, 400, (400, 200))],
)
def test_sizes(size, short, long, expected):
    image = tv_tensors.Image(torch.zeros(3, *size, dtype=torch.uint8))
    assert augmentation([short], long, 0.0, None)(image, sample_target(size))[0].shape[1:] == expected


def sample_target(size, boxes=((10, 10, 200, 150),)) -> dict:
    boxes = torch.tensor(boxes, dtype=torch.float32)
    masks = torch.stack([torch.from_numpy(rectangle(a, b, c - a, d - b, *size)) for a, b, c, d in boxes.int().tolist()])
    n = len(boxes)
    return dict(
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        labels=torch.arange(n),
        area=torch.ones(n),
        iscrowd=torch.zeros(n, dtype=torch.int64),
        masks=tv_tensors.Mask(masks),
    )


def test_boxes_and_masks_go_with_the_picture():
    """The picture is bright where the objects are: so are masks and boxes after any augmentation."""
    size, corners = (240, 320), ((20, 30, 120, 130), (150, 60, 300, 220), (10, 200, 60, 230))
    target = sample_target(size, corners)
    image = tv_tensors.Image(target["masks"].sum(0).clamp(max=1).mul(255).byte().expand(3, -1, -1))
    transform = augmentation((160, 200, 240), 400, 0.5, dict(short=(120, 150), side=(90, 140)))
    seen, flipped, counts = set(), 0, set()
    for seed in range(60):
        torch.manual_seed(seed)
        x, t = transform(image, target)
        height, width = x.shape[1:]
        seen.add(min(height, width))
        counts.add(len(t["labels"]))
        assert len(t["boxes"]) == len(t["masks"]) == len(t["labels"]) == len(t["area"])
        assert t["masks"].shape[1:] == (height, width)
        bright = x[0] > 127
        assert (bright != t["masks"].any(0)).float().mean() < 0.04  # of edges
        for box, mask, label in zip(t["boxes"], t["masks"], t["labels"]):
            if mask.sum() > 400:
                assert (masks_to_boxes(mask[None])[0] - box).abs().max() < 3
            assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
            flipped += bool(label == 0 and len(t["labels"]) == 3 and box[0] > width / 2)
    assert seen >= {160, 200, 240} and counts >= {1, 3} and 8 < flipped < 40


def test_part_is_between_the_two_sides():
    part, image = RandomPart((50, 80), (40, 60)), tv_tensors.Image(torch.zeros(3, 100, 150, dtype=torch.uint8))
    shapes = set()
    for seed in range(80):
        torch.manual_seed(seed)
        shapes.add(part(image, sample_target((100, 150), ((0, 0, 100, 90),)))[0].shape[1:])
    heights, widths = ({shape[i] for shape in shapes} for i in (0, 1))
    assert (min(heights), max(heights)) == (40, 60) and (min(widths), max(widths)) == (40, 60)
    tiny = RandomPart((20,), (40, 60))(image, sample_target((100, 150), ((0, 0, 100, 90),)))[0]
    assert tiny.shape[1:] == (20, 30)  # smaller than the least: as it is


def test_loader_gives_the_same_with_workers_and_in_the_middle(root):
    write(
        root, content() | dict(annotations=[content()["annotations"][0] | dict(id=i, image_id=i) for i in (10, 20, 30)])
    )
    dataset = training(root, short=(30, 40, 50), flip=0.5, crop=dict(short=(30, 40), side=(20, 30)))
    device = torch.device("cpu")

    def run(start: int, workers: int) -> list:
        order = TrainingOrder(3, 2, 0, start, 4, aspects=dataset.aspects)
        return list(batches(dataset, order, 5, workers, device))

    whole, shared, late = run(0, 0), run(0, 2), run(2, 0)
    for a, b in [*zip(whole, shared), *zip(whole[2:], late)]:
        for x, y in zip(a[0], b[0]):
            assert torch.equal(x, y)
        for x, y in zip(a[1], b[1]):
            assert all(torch.equal(x[k], y[k]) for k in x if k != "split") and x["split"] == "train"
    assert len({tuple(x.shape) for images, _ in whole for x in images}) > 2
    order = EvaluationOrder(3, 2)
    source = coco(root)
    seen = [len(images) for images, _ in batches(source.dataset("val", source.inputs(CFG)), order, 0, 0, device)]
    assert seen == [2, 1]
    assert dataset.aspects.tolist() == [H / W] * 3


def test_pictures_that_can_not_be_read(root):
    (root / "pictures/10.png").write_bytes(b"nothing")
    with pytest.raises(BadImage, match=r"10.png can't be read as an image"):
        training(root)[0]
    Image.new("RGB", (W, H - 1)).save(root / "pictures/10.png")
    with pytest.raises(BadImage, match=rf"10.png is {W}x{H - 1}, but its JSON file says {W}x{H}"):
        training(root)[0]
    os.remove(root / "pictures/10.png")
    with pytest.raises(UserError, match=r"pictures lacks 10.png of the 3 images in .*all.json$"):
        training(root)
    dataset = training(root, max_bad=1)
    with pytest.raises(BadImage, match=r"10.png can't be read as an image"):
        dataset[0]
    said = content()
    said["images"] += [dict(id=i, file_name=f"deep/{i}.png", height=H, width=W) for i in range(5)]
    write(root, said)
    (root / "pictures/deep").mkdir()
    Image.new("RGB", (W, H)).save(root / "pictures/deep/1.png")
    with pytest.raises(UserError, match=r"lacks deep/0.png, deep/2.png, deep/3.png and 1 more of the 8 images"):
        coco(root).dataset("val", {})


def broken(change) -> dict:
    said = content()
    change(said)
    return said


@pytest.mark.parametrize(
    "said, sentence",
    [
        (b'{"images": [', r"all.json is not a complete JSON file \("),
        ("[]", "all.json is not in COCO's format: it must contain an object, got a list"),
        ('{"imgs": []}', 'needs a list "images", did you mean imgs?'),
        ('{"images": [{"id": 1, "file_name": "a", "height": 1, "width": 1}], "category": []}', "did you mean category"),
        (
            broken(lambda c: c["images"][1].pop("height")),
            r"all.json is invalid: images\[1\] has no height: correct it$",
        ),
        (broken(lambda c: c["images"][1].update(width="60")), r"images\[1\].width must be a whole number, is a text"),
        (broken(lambda c: c["images"][0].update(height=0)), r"images\[0\].height must be from 1 to 65535 pixels, is 0"),
        (broken(lambda c: c["images"][1].update(id=10)), r"images\[1\] have ids that others have too"),
        (broken(lambda c: c["categories"].append(dict(id=7, name="x"))), r"categories\[2\] have ids"),
        (broken(lambda c: c.update(annotations={})), '"annotations" must be a list, got an object'),
        (
            broken(lambda c: [a.pop("bbox") for a in c["annotations"]]),
            r"annotations\[0\] \(id 100\) has no bbox; .* and 6 more: correct them$",
        ),
        (
            broken(lambda c: c["annotations"][2].update(image_id=5)),
            r"annotations\[2\] \(id 102\) is of image 5, which is not listed",
        ),
        (
            broken(lambda c: c["annotations"][2].update(category_id=5)),
            r"annotations\[2\] \(id 102\) is of category 5, which",
        ),
        (
            broken(lambda c: c["annotations"][0].update(bbox=[1, 2])),
            r"has bbox \[1, 2\], which must be four finite numbers",
        ),
        (
            broken(lambda c: c["annotations"][0]["bbox"].__setitem__(0, None)),
            r"has bbox \[null, 5, 20, 10\], which must be",
        ),
        (
            broken(lambda c: c["annotations"][1]["segmentation"].update(size=[9, 9])),
            r"of size \[9, 9\], but its image is \[40, 60\]",
        ),
        (
            broken(lambda c: c["annotations"][2]["segmentation"].update(counts=[3])),
            r"add up to 3, not to the image's 40 x 60",
        ),
        (
            broken(lambda c: c["annotations"][2].update(segmentation="x")),
            r"has as segmentation a text, which must be polygons or an object",
        ),
    ],
)
def test_what_is_wrong_with_a_json(root, said, sentence):
    write(root, said)
    with pytest.raises(UserError, match=sentence):
        coco(root)


def test_splits_that_do_not_do(root):
    with pytest.raises(UserError, match=r"none.json can't be read \(No such file or directory\): set data.root"):
        coco(root, val=("none.json", "pictures"))
    with pytest.raises(
        UserError, match=r"the folder .*/elsewhere, which should have the images of .*json, does not exist"
    ):
        training(root, train=("all.json", "elsewhere"))
    write(root, broken(lambda c: c["categories"][0].update(name="wolf")), "other.json")
    with pytest.raises(
        UserError, match=r"category 7 is 'wolf' in .*other.json but 'dog' in all.json: all splits must have"
    ):
        training(root, train=("other.json", "pictures"))
    write(root, broken(lambda c: c.pop("annotations")), "unlabelled.json")
    with pytest.raises(UserError, match=r'unlabelled.json lacks "annotations": training needs them'):
        training(root, train=("unlabelled.json", "pictures"))
    assert len(coco(root, test=("unlabelled.json", "pictures")).dataset("test", {})) == 3
    write(root, content() | dict(annotations=[]), "empty.json")
    for keep_empty in (False, True):
        with pytest.raises(UserError, match=r"empty.json has no box to learn from$"):
            training(root, train=("empty.json", "pictures"), keep_empty=keep_empty)
    write(root, broken(lambda c: [a.update(iscrowd=1) for a in c["annotations"]]), "crowds.json")
    with pytest.raises(UserError, match=r"crowds.json has no box to learn from \(left out: 9 crowds\)$"):
        training(root, train=("crowds.json", "pictures"))
    with pytest.raises(UserError, match=r"all.json has no mask \(segmentation\) for the annotations with id 106, but"):
        coco(root).dataset("val", {})
    coco(root, masks=False).dataset("val", {})


def test_shares_of_classes_are_reported(root, capsys):
    training(root)
    out = capsys.readouterr().out
    left_out = "2 crowds, 3 outside their image, or less than a pixel wide or high, 1 without a mask"
    assert f"data: train: left out of training: {left_out}\n" in out
    assert "data: train: 3 boxes, cat 66.7 %, dog 33.3 %\n" in out
    write(root, broken(lambda c: c["categories"].append(dict(id=9, name="cow"))))
    coco(root, masks=False).dataset("val", {})
    out = capsys.readouterr().out
    assert "data: val has no boxes of cow\n" in out
    assert "data: val: 2 boxes are outside their image or have no area, so that none can match\n" in out


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "entry, field, values, sentence",
    [
        ("images", "id", ["1", None, 1.5, True, 2**63, -(2**63), [1]], r"images\[0\].id must be"),
        ("images", "width", ["60", None, 60.0, True, 0, -1, 2**40], r"images\[0\].width must be"),
        ("images", "height", [NAN, INF, 0, False], r"images\[0\].height must be"),
        ("images", "file_name", ["", " ", None, 7, ["a"]], r"images\[0\].file_name (is empty|must be a text)"),
        ("categories", "id", ["7", None, 2**64, 7.0], r"categories\[0\].* ?.id must be"),
        ("categories", "name", ["", None, 3], r"categories\[0\] \(id 7\).name (is empty|must be a text)"),
        ("annotations", "id", ["100", None, 2**63, True, 1e3], r"annotations\[0\].*.id must be"),
        ("annotations", "image_id", ["10", None, 10.0, 2**65], r"annotations\[0\] \(id 100\).image_id must be"),
        ("annotations", "category_id", ["7", None, 7.0], r"annotations\[0\] \(id 100\).category_id must be"),
        ("annotations", "bbox", [None, "5 5 20 10", {}], r"annotations\[0\] \(id 100\).bbox must be a list"),
        (
            "annotations",
            "bbox",
            [[5, 5, 20], [5, 5, 20, 10, 1], [5, 5, NAN, 1], [INF, 0, 1, 1], ["5", 5, 2, 1], [5, True, 2, 1]],
            r"annotations\[0\] \(id 100\) has bbox .* must be four finite numbers",
        ),
        ("annotations", "bbox", [[25, 15, -20, -10], [5, 5, 20, -1]], "width and height must be 0 or more"),
        ("annotations", "bbox", [[1e9, 5, 20, 10], [0, 0, 1e300, 1]], "is far from any image"),
        ("annotations", "area", ["200", NAN, INF, -1, [], True], r"has area .* must be a finite number of 0 or more"),
        ("annotations", "iscrowd", ["0", "1", "false", 2, -1, NAN, [], 0.5], r"has iscrowd .*, which must be 0 or 1"),
        (
            "annotations",
            "segmentation",
            [[5, 5, 25, 5, 25, 15]],
            "has a flat list as segmentation, which must be a list",
        ),
        (
            "annotations",
            "segmentation",
            [[[5, 5, 25, 5, 25, 15, 9]], [[5, 5, 25, 5, 25, NAN]], [[5, 5, 25, 5, 25, None]], [[5, 5, 25, 5, 25, "1"]]]
            + [[[5, 5, 25, 5, INF, 15]], [[1, 1, 9, 1, 9, 9], [1, 1, 9, [1], 9, 9]], [[5, 5, 25, 5, 25, 10**400]]],
            r"has the polygon .*, which must be pairs of finite numbers",
        ),
        ("annotations", "segmentation", [[[5, 5, 25, 5, 25, 1e9]], [[-999, 5, 25, 5, 25, 9]]], "far from its image"),
        ("annotations", "segmentation", [[[1, 1, 9, 1, 9, 9], None], [{}]], "has among its polygons (null|an object)"),
        (
            "annotations",
            "segmentation",
            [5, True, "x", {}, {"size": [H, W]}],
            "has as segmentation .* must be polygons",
        ),
        (
            "annotations",
            "segmentation",
            [dict(size=size, counts=[H * W]) for size in ([W, H], [H], None, [H, "60"], [float(H), W])],
            r"has run lengths of size .*, but its image is \[40, 60\]",
        ),
        (
            "annotations",
            "segmentation",
            [dict(size=[H, W], counts=c) for c in (5, None, [1.5, 2398.5], ["2400"], [None], [True, 2399], {})],
            "has as segmentation.counts .* must be run lengths",
        ),
        (
            "annotations",
            "segmentation",
            [dict(size=[H, W], counts=c) for c in ([], [2399], [-100, 2500], [2400, 2400], "", "52203", "0")],
            "has run lengths,?.* that add up to .*, not to the image's 40 x 60",
        ),
        (
            "annotations",
            "segmentation",
            [dict(size=[H, W], counts=c) for c in ("é", "~~~", "o", "ooooooooooooooooooooo0", " 1")],
            "are truncated or have invalid characters",
        ),
    ],
)
def test_every_field_is_checked_before_training(root, entry, field, values, sentence):
    for value in values:
        said = content()
        said[entry][0][field] = value
        write(root, json.dumps(said))
        with pytest.raises(UserError, match=sentence):
            coco(root)


def test_boxes_and_polygons_of_other_formats(root, capsys):
    """Corners instead of sizes, and fractions of the image, are refused; repeated annotations are reported."""

    def boxes(*given) -> dict:
        return broken(lambda c: c.update(annotations=[dict(a, bbox=b) for a, b in zip(c["annotations"], given)]))

    write(root, boxes([5, 5, 50, 39], [30, 10, 58, 30], [0, 0, 20, 20]))
    with pytest.raises(UserError, match=r"has 2 of 3 boxes that reach beyond .*: give left, top, width, height"):
        coco(root)
    write(root, boxes([5, 5, 50, 30], [30, 10, 30, 30], [0, 0, 60, 40]))  # large, and within their image
    coco(root)
    outline = [polygon(10, 5, 20, 12)]  # corners 10, 5, 30, 17
    for others in (dict(segmentation=outline), dict(segmentation=None, area=240)):
        said = content()
        said["annotations"] = [a | others | dict(bbox=[10, 5, 30, 17], iscrowd=0) for a in said["annotations"]]
        write(root, said)
        with pytest.raises(UserError, match=r"last two numbers are right and bottom, .* give left, top, width, height"):
            coco(root)
        for a in said["annotations"]:
            a["bbox"] = [10, 5, 20, 12]
        write(root, said)
        coco(root)
    write(root, boxes([0.1, 0.2, 0.5, 0.3], [0, 0, 1, 1]))
    with pytest.raises(UserError, match=r"has boxes from 0 to 1 only: give left, top, width, height in pixels"):
        coco(root)
    write(root, broken(lambda c: c["annotations"][0].update(segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 1]])))
    coco(root)  # others are in pixels
    shrunk = dict(segmentation=[[0.1, 0.1, 0.5, 0.1, 0.5, 1]])
    write(root, broken(lambda c: c.update(annotations=[a | shrunk for a in c["annotations"]])))
    with pytest.raises(UserError, match=r"has polygons from 0 to 1 only: give their points in pixels"):
        coco(root)
    write(root, broken(lambda c: c["annotations"].append(c["annotations"][0] | dict(id=99))))
    capsys.readouterr()
    coco(root)
    assert "all.json: 1 annotations repeat the image, category and box of another\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", [r"pictures\10.png", "C:\\data\\10.PNG", "train/10.png", "10.PNG", "/home/me/10.png"])
def test_names_of_images_with_other_paths(root, name):
    write(root, broken(lambda c: c["images"][0].update(file_name=name)))
    with pytest.raises(
        UserError, match=r'lacks .* of the 3 images in .*all\.json; 10\.png is there: correct "file_name"'
    ):
        training(root)


@pytest.mark.parametrize("name", [r"a b\1.png", "a%20b/1.png"])
def test_names_of_images_in_folders(root, name):
    (root / "pictures/a b").mkdir()
    (root / "pictures/10.png").rename(root / "pictures/a b/1.png")
    write(root, json.dumps(broken(lambda c: c["images"][0].update(file_name=name))))
    with pytest.raises(UserError, match=r'; a b/1\.png is there: correct "file_name"'):
        training(root)


def test_val_images_that_are_in_train(root, capsys):
    training(root)
    assert "data: 3 of the val images are in train too" in capsys.readouterr().out
    write(root, broken(lambda c: (c["images"].pop(0), c["annotations"].clear())), "other.json")
    training(root, val=("other.json", "pictures"), masks=False)
    assert "data: 2 of the val images are in train too" in capsys.readouterr().out


def test_what_is_meant_is_taken(root):
    """Fields that are null or false, decimals that end a box, a byte-order mark; categories of one name are refused."""
    said = broken(lambda c: c["annotations"][0].update(iscrowd=False, area=None))
    write(root, "\ufeff" + json.dumps(said))
    first, *_, crowd = coco(root).truth("val")["annotations"]
    assert (first["iscrowd"], first["area"], crowd["iscrowd"]) == (0, 200, 1)
    assert type(first["iscrowd"]) is int
    write(root, broken(lambda c: c["categories"][1].update(name="dog")))
    with pytest.raises(UserError, match="has 2 categories called 'dog', with ids 7, 3: give each a unique name"):
        coco(root)


def test_masks_are_checked_where_they_are_decoded():
    with pytest.raises(ValueError, match="the mask has run lengths that add up to 16, not to"):
        decode_mask(dict(size=[96, 96], counts="52203"), 96, 96)


def test_run_lengths_as_pycocotools_writes_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = (rng.random(rng.integers(1, 60, 2)) < rng.random()).astype(np.uint8)
        assert _run_lengths(compressed(mask)["counts"]) == runs(mask)["counts"]
    large = np.zeros((3000, 4000), np.uint8)
    large[:, 2000:] = large[5, 7] = 1
    assert _run_lengths(compressed(large)["counts"]) == runs(large)["counts"]


@pytest.mark.parametrize("first", [0, -5, 2**62])
def test_ids_of_any_size(root, first):
    def change(c):
        for image, number in zip(c["images"], (0, 9, 4)):
            image["id"] = first + number
        for i, annotation in enumerate(c["annotations"]):
            annotation.update(id=first + 3 * i, image_id=first)

    write(root, broken(change))
    _, target = training(root)[0]
    assert target["image_id"].item() == first and target["labels"].tolist() == [2, 1, 1]


def test_turned_images(root):
    """EXIF data turn an image where the json has the turned size, and not where it has that of the file."""
    pixels = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(root / "pictures/10.png", exif=exif)
    source = coco(root, masks=False)
    for turned in (False, True):
        expected = np.rot90(pixels, -1) if turned else pixels
        assert np.array_equal(source.dataset("val", {})[0][0].permute(1, 2, 0).mul(255).round().byte(), expected)
        write_json = broken(lambda c: c["images"][0].update(height=W, width=H))
        (root / "all.json").write_text(json.dumps(write_json | dict(annotations=content()["annotations"][8:])))
        source = coco(root, masks=False)
    (root / "all.json").write_text(json.dumps(broken(lambda c: c["images"][0].update(height=9)) | dict(annotations=[])))
    with pytest.raises(
        BadImage, match=rf"is {W}x{H} \({H}x{W} by its EXIF orientation\), but its JSON file says {W}x9"
    ):
        coco(root).dataset("val", {})[0]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(short=()), r"data.short=\(\), data.long=60 must be integers, in pixels"),
        (dict(short=(20, 0)), "must be integers, in pixels"),
        (dict(flip=1.5), "data.flip=1.5 must be a probability"),
        (dict(max_bad=-1), "data.max_bad=-1 must be 0 or more"),
        (dict(crop=dict(short=(20,))), "data.crop.side is missing"),
        (dict(crop=dict(short=(20,), side=(9, 5))), r"data.crop.side=\(9, 5\) must be in pixels"),
        (dict(train=("all.json",)), r"data.train=\('all.json',\) must be two names"),
    ],
)
def test_arguments_that_do_not_do(root, arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        coco(root, **arguments)


def test_inputs(root):
    inputs = coco(root, short=(480, 800), long=1333).inputs(CFG)
    assert inputs["input_size"] == (3, 800, 1333) and inputs["mean"] == (0.5,) * 3
    assert coco(root, short=160, long=160).inputs(CFG)["input_size"] == (3, 160, 160)
