"""Generated scenes: what is in them is what the files say, the same bytes each time, and all or nothing."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from saccade.train.data import scenes
from saccade.train.runtime.errors import UserError

COUNTS = dict(train=4, val=2, test=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "new"
    said = []
    scenes.write(out, counts=COUNTS, size=96, seed=3, progress=lambda *done: said.append(done))
    assert said == [(i + 1, 9) for i in range(9)]
    return out


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_both_layouts_say_what_was_drawn(written):
    for split, count in COUNTS.items():
        coco = COCO(written / f"coco/annotations/instances_{split}.json")
        assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list("0123456789")
        for index, (number, image) in enumerate(sorted(coco.imgs.items())):
            made = scenes.scene(split, index, 3, 96)
            annotations = coco.loadAnns(coco.getAnnIds(number))
            masks = np.stack([coco.annToMask(a) for a in annotations]).astype(bool)
            assert np.array_equal(masks, made.masks)
            assert [a["category_id"] - 1 for a in annotations] == made.labels
            for a, mask in zip(annotations, made.masks):
                rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
                assert a["area"] == mask.sum()
                assert a["bbox"] == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            picture = Image.open(written / "coco/images" / split / image["file_name"])
            assert picture.size == (image["width"], image["height"]) == (96, 96)
            assert np.abs(np.asarray(picture, float) - made.image).mean() < 6
            labels = Image.open(written / f"ade20k/annotations/{scenes.ADE_SPLITS[split]}/{index + 1:06d}.png")
            expected = 1 + (np.array(made.labels) + 1) @ made.masks.reshape(len(masks), -1)
            assert np.array_equal(np.asarray(labels).ravel(), expected)
        assert len(coco.imgs) == count
    assert (written / "ade20k/objectInfo.txt").read_text().splitlines()[1:3] == ["1\tbackground", "2\t0"]


@pytest.mark.parametrize("ink", scenes.INKS)
def test_digits_stand_out_and_are_seen(ink):
    counts = []
    for index in range(20):
        made = scenes.scene("train", index, ink=ink)
        assert made.masks.sum(0).max() == 1 and made.masks.any((1, 2)).all()
        counts.append(len(made.labels))
        grey = made.image @ [0.299, 0.587, 0.114]
        ground = grey[~made.masks.any(0)].mean()
        if ink == "light":
            assert all(grey[mask].mean() > ground for mask in made.masks)
    assert min(counts) >= 1 and 8 <= max(counts) <= 12


def test_light_digits_lie_apart(monkeypatch):
    """Each mask is the whole of its digit: what was placed is what is seen."""
    placed = []
    place = scenes._place
    monkeypatch.setattr(scenes, "_place", lambda *args: placed.append(place(*args)) or placed[-1])
    made = scenes.scene("train", 4)
    whole = [alpha > 0.5 for alpha in placed]
    assert all(any(np.array_equal(mask, one) for one in whole) for mask in made.masks)


def test_test_scenes_share_nothing_with_training():
    photographs = [set(names) for names in scenes.PHOTOGRAPHS.values()]
    assert not any(a & b for i, a in enumerate(photographs) for b in photographs[:i])
    digits = [{glyph.tobytes() for glyph in scenes._glyphs(split)[0]} for split in scenes.COUNTS]
    assert [len(d) for d in digits] == [1257, 180, 360]
    assert not any(a & b for i, a in enumerate(digits) for b in digits[:i])


def test_bytes_repeat_and_follow_the_seed(written, tmp_path):
    scenes.write(tmp_path / "again", counts=COUNTS, size=96, seed=3)
    assert contents(tmp_path / "again") == contents(written)
    scenes.write(tmp_path / "one", ("coco",), dict(train=1, val=1, test=1), 96, 3)
    assert contents(tmp_path / "one")["coco/images/test/000001.jpg"] == contents(written)["coco/images/test/000001.jpg"]
    assert not np.array_equal(scenes.scene("train", 0, 3, 96).image, scenes.scene("train", 0, 4, 96).image)
    assert not np.array_equal(scenes.scene("train", 0, ink="any").image, scenes.scene("train", 0).image)


def test_all_or_nothing(tmp_path, monkeypatch):
    made = scenes.scene
    monkeypatch.setattr(scenes, "scene", lambda split, *rest: 1 / 0 if split == "test" else made(split, *rest))
    with pytest.raises(ZeroDivisionError):
        scenes.write(tmp_path / "out", counts=dict(train=1, val=1, test=1), size=32)
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty: choose another folder"):
        scenes.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_coins(tmp_path):
    scenes.write_coins(tmp_path / "coins")
    whole = []
    for split, width in (("train", 186), ("test", 183)):
        content = json.loads((tmp_path / f"coins/coco/annotations/instances_{split}.json").read_text())
        assert len(content["images"]) == 1 and content["images"][0]["width"] == width
        assert len(content["annotations"]) == 12
        assert min(a["area"] for a in content["annotations"]) > 700
        whole.append(scenes.coins(split).image)
    assert 186 + 183 < 384  # the strip between, with coins of both, is in neither
    assert not np.array_equal(whole[0][:, :100], whole[1][:, :100])


def test_command(command, tmp_path):
    out = tmp_path / "scenes"
    line = ("make_scenes", out, "--train", 2, "--val", 1, "--test", 1, "--size", 32, "--format", "coco")
    code, said, _ = command(*line)
    assert code == 0 and said.splitlines()[-1] == f"{out}: coco/"
    before = contents(out)
    assert command(*line)[:2] == (0, f"{out} already exists\n") and contents(out) == before
    code, _, error = command(*line, "--seed", 1)
    assert code == 2 and error == f"error: {out} is not empty: choose another folder\n"
    assert contents(out) == before
    code, _, error = command("make_scenes", tmp_path / "coins", "--coins", "--size", 32)
    assert code == 2 and error == "error: --size applies to scenes of digits and has no effect with --coins\n"
    assert not (tmp_path / "coins").exists()
