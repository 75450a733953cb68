"""Pictures with label maps: the layouts that people have them in, what is wrong with them, and what training sees."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from saccade.train.data.ade20k import IGNORED, Ade20k, Augment, CocoStuff, Folders
from saccade.train.data.bad_images import BadImage
from saccade.train.runtime.errors import UserError

INPUTS = dict(mean=(0.5, 0.25, 0.75), std=(1, 1, 1))


def save(path: Path, pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return path


@pytest.fixture
def ade(tmp_path):
    """Two training pictures and one of validation, of 4x6 pixels and three classes."""
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t.5\t9\t1\twall, brick", "2\t.3\t9\t1\tsky", "3\t.2\t9\t1\tcar, auto"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    rng = np.random.default_rng(0)
    for split, count in (("training", 2), ("validation", 1)):
        for i in range(count):
            save(tmp_path / f"images/{split}/ADE_{i}.png", rng.integers(0, 256, (4, 6, 3)))
            save(tmp_path / f"annotations/{split}/ADE_{i}.png", np.arange(24).reshape(4, 6) % 4)
    return tmp_path


def test_ade20k_labels_are_reduced_by_one(ade):
    source = Ade20k(str(ade))
    assert source.class_names == ["wall", "sky", "car"]
    for split in ("val", "test"):  # there is no test folder
        picture, labels, index = source.dataset(split, INPUTS)[0]
        assert labels.tolist() == [
            [{0: IGNORED}.get(v, v - 1) for v in row] for row in (np.arange(24).reshape(4, 6) % 4).tolist()
        ]
        assert picture.dtype == torch.uint8 and index == 0
        assert np.array_equal(picture.permute(1, 2, 0), Image.open(ade / "images/validation/ADE_0.png"))
    assert len(source.dataset("train", INPUTS)) == 2
    save(ade / "images/test/x.png", np.zeros((5, 5, 3)))
    save(ade / "annotations/test/x.png", np.ones((5, 5)))
    assert source.dataset("test", INPUTS)[0][1].unique().tolist() == [0]


def test_coco_stuff_in_both_layouts(tmp_path):
    """Categories 1 (person), 13 (stop sign, after the missing 12), 92 (banner), 182 (wood), and no label."""
    values = {"downloaded": [[0, 12, 91, 181, 255]], "converted": [[0, 11, 80, 170, 255]]}
    for layout, row in values.items():
        suffix = "" if layout == "downloaded" else "_labelTrainIds"
        for split in ("train2017", "val2017"):
            save(tmp_path / layout / f"images/{split}/000000000009.jpg", np.zeros((1, 5, 3)))
            save(tmp_path / layout / f"annotations/{split}/000000000009{suffix}.png", row)
        source = CocoStuff(str(tmp_path / layout))
        assert len(source.class_names) == 171
        labels = source.dataset("val", INPUTS)[0][1][0].tolist()
        assert [source.class_names[c] for c in labels[:4]] == ["person", "stop sign", "banner", "wood"]
        assert labels[4] == IGNORED
    save(tmp_path / "downloaded/annotations/val2017/000000000009.png", [[0, 11, 0, 0, 0]])  # category 12 is none
    with pytest.raises(UserError, match=r"000000000009\.png has label 11 in row 0, column 1, but of 171 classes"):
        CocoStuff(str(tmp_path / "downloaded")).dataset("val", INPUTS)


def folders(root: Path, count: int = 20, names: str = "road\nsky\n") -> Path:
    for i in range(count):
        save(root / f"images/town/{i}_photo.png", np.full((3, 3, 3), i))
        save(root / f"labels/town/{i}_ids.png", [[0, 1, 255], [1, 1, 1], [0, 0, 0]])
    (root / "classes.txt").write_text(names)
    return root


def test_folders_are_divided_at_random_but_the_same_each_time(tmp_path):
    given = dict(root=str(folders(tmp_path)), image_suffix="_photo", label_suffix="_ids")
    source = Folders(**given)
    assert source.class_names == ["road", "sky"]
    parts = {split: list(source.pairs(split)[0]) for split in ("train", "val", "test")}
    assert {split: len(files) for split, files in parts.items()} == dict(train=14, val=2, test=4)
    assert len({file for files in parts.values() for file in files}) == 20
    assert parts == {split: list(Folders(**given).pairs(split)[0]) for split in parts}
    for split in parts:
        for image, labels in zip(*source.pairs(split)):
            assert labels == image.replace("images", "labels").replace("_photo", "_ids")
    assert source.dataset("val", INPUTS)[0][1].tolist() == [[0, 1, 255], [1, 1, 1], [0, 0, 0]]
    ignoring = Folders(**given | dict(classes=["sky", "sea"]), zero_ignored=True)
    assert ignoring.dataset("val", INPUTS)[0][1].tolist() == [[255, 0, 255], [0, 0, 0], [255, 255, 255]]


def test_folders_that_are_divided_already(tmp_path):
    for i, split in enumerate(("train", "val")):
        save(tmp_path / f"images/{split}/a.png", np.full((2, 2, 3), i))
        save(tmp_path / f"labels/{split}/a.png", np.full((2, 2), i))
    source = Folders(str(tmp_path), classes=["a", "b"])
    assert [int(source.dataset(split, INPUTS)[0][1][0, 0]) for split in ("train", "val", "test")] == [0, 1, 1]


def break_label(root):
    save(root / "annotations/training/ADE_1.png", [[1] * 6, [1] * 6, [1, 1, 7, 1, 1, 1], [1] * 6])


def break_size(root):
    save(root / "annotations/training/ADE_1.png", np.ones((6, 4)))


def break_colours(root):
    save(root / "annotations/training/ADE_1.png", np.arange(4 * 6 * 3).reshape(4, 6, 3))


def break_pair(root):
    (root / "annotations/training/ADE_1.png").unlink()


def break_picture(root):
    (root / "images/training/ADE_1.png").unlink()


def break_names(root):
    (root / "objectInfo150.txt").write_text("wall\nsky\n")


def break_folder(root):
    (root / "annotations/training").rename(root / "annotations/learning")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (
            break_label,
            r"training/ADE_1\.png has label 7 in row 2, column 2, but of 3 classes: labels must be 1 to 3",
        ),
        (break_size, r"annotations/training/ADE_1\.png is 6x4 pixels, its image .*images/training/ADE_1\.png is 4x6"),
        (break_colours, r"annotations/training/ADE_1\.png must have one number per pixel, got colours"),
        (break_pair, r"images/training/ADE_1\.png has no label map .*annotations/training/ADE_1\.\*: add or remove"),
        (break_picture, r"annotations/training/ADE_1\.png has no image .*images/training/ADE_1\.\*: add or remove"),
        (break_names, r"objectInfo150\.txt does not list classes 1, 2, "),
        (break_folder, r"there is no folder .*annotations/training"),
    ],
)
def test_what_is_wrong_is_said_before_training(ade, harm, said):
    harm(ade)
    with pytest.raises(UserError, match=said):
        Ade20k(str(ade)).dataset("train", INPUTS, training=True)


def test_what_was_not_checked_is_said_when_it_is_read(ade):
    break_label(ade)
    dataset = Ade20k(str(ade), check=1).dataset("train", INPUTS, training=True)
    dataset[0]
    with pytest.raises(UserError, match=r"ADE_1\.png has label 7"):
        dataset[1]


def test_files_that_are_no_images_are_left_to_the_budget(ade):
    (ade / "annotations/training/ADE_1.png").write_bytes(b"nothing")
    dataset = Ade20k(str(ade), max_bad=1).dataset("train", INPUTS)
    with pytest.raises(BadImage, match=r"annotations/training/ADE_1\.png can't be read as an image"):
        dataset[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(scale=(512,)), r"data\.scale=\(512,\) must be two sizes"),
        (dict(crop=0), r"data\.crop=0 must be 1 or more"),
        (dict(augment=dict(flip=0.5)), r"unknown key data\.augment\.flip, did you mean hflip"),
        (dict(augment=dict(ratios=(2, 1))), r"data\.augment\.ratios=\(2, 1\) must be"),
    ],
)
def test_mistaken_arguments(ade, given, said):
    with pytest.raises(UserError, match=said):
        Ade20k(str(ade), **given).dataset("train", INPUTS, training=True)


def striped(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture whose red tells each pixel's label: four labels in broad stripes."""
    labels = (torch.arange(width) // 20 % 4).repeat(height, 1).to(torch.uint8)
    return torch.stack([60 * labels, torch.zeros_like(labels), torch.full_like(labels, 9)]), labels


def test_augmentation_keeps_pictures_and_labels_together():
    torch.manual_seed(0)
    image, labels = striped(60, 160)
    augment = Augment((256, 64), 96, INPUTS["mean"], distort=False)
    heights = []
    for _ in range(200):
        x, y = augment(image, labels)
        assert x.shape == (3, 96, 96) and y.shape == (96, 96) and x.dtype == torch.float32 and y.dtype == torch.int64
        inside = y != IGNORED
        rows, columns = inside.any(1), inside.any(0)
        assert torch.equal(inside, rows[:, None] & columns)  # a rectangle, at the top left
        assert torch.equal(x[:, ~inside], torch.tensor(INPUTS["mean"])[:, None].expand(-1, int((~inside).sum())))
        agree = (x[0][inside] * 255 / 60 - y[inside]).abs() < 0.5
        assert agree.float().mean() > 0.94  # but at the borders of stripes, where colours are mixed
        heights.append(int(rows.sum()))
    # 60x160 fits (256, 64) as 64x171: half to twice that, cut to the crop of 96.
    assert 32 <= min(heights) < 36 and max(heights) == 96
    assert 0.2 < np.mean(np.array(heights) == 96) < 0.5  # of ratios from 1.5 to 2, a third


def test_no_class_takes_more_than_its_share_of_a_crop():
    """A corner has all that is not class 0: crops are drawn until it is met, but ten times at most."""
    torch.manual_seed(0)
    labels = torch.zeros(100, 100, dtype=torch.uint8)
    labels[:50, :50] = 1
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)

    def largest(share: float) -> np.ndarray:
        augment = Augment(None, 40, INPUTS["mean"], ratios=(1, 1), share=share, distort=False)
        return np.array([torch.bincount(augment(image, labels)[1].flatten()).max() / 1600 for _ in range(300)])

    assert (largest(1.0) > 0.75).mean() > 0.5
    assert (largest(0.75) > 0.75).mean() < 0.05
