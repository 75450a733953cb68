"""A model is tested on its own classes, by their names: in any order, by a map, or not at all."""

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from saccade.train.data.digits import Digits
from saccade.train.models.class_names import match_classes, read_class_names, rename_classes
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.classify import Classify
from saccade.train.tasks.detect import Detect
from saccade.train.tasks.lift import Lift
from saccade.train.tasks.segment import Segment

from .conftest import ROOT

DIGITS = list("0123456789")
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
REFUSAL = "the data's classes are not the model's"


@pytest.mark.parametrize(
    "data, model, subset, expected",
    [
        ("abc", "abc", False, [0, 1, 2]),
        ("abc", "cab", False, [1, 2, 0]),
        ("ca", "abc", True, [2, 0]),
        ("aab", "aab", False, [0, 1, 2]),
    ],
)
def test_matching(data, model, subset, expected):
    assert match_classes(list(data), list(model), subset) == expected


@pytest.mark.parametrize(
    "data, model, subset, sentence",
    [
        ("abx", "abc", False, "the model does not have the data's 'x', and the data do not have the model's 'c'"),
        ("ab", "abc", False, "the data do not have the model's 'c'"),
        ("abcd", "abc", True, "the model does not have the data's 'd'"),
        ("vwxyz", "abcde", False, "the data's 'v', 'w', 'x' and 2 more"),
        ("aba", "aab", False, "the class name 'a' occurs twice"),
    ],
)
def test_refusals(data, model, subset, sentence):
    with pytest.raises(UserError) as error:
        match_classes(list(data), list(model), subset)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_maps():
    assert rename_classes(["cat", "dog", "fox"], dict(Katze="cat", Hund="dog")) == ["Katze", "Hund", "fox"]
    assert rename_classes(["cat", "dog"], dict(cat="dog", dog="cat")) == ["dog", "cat"]
    # A class of the data that has the name of another one of the model.
    assert rename_classes(["cat", "dog"], dict(cat="dog")) == ["cat (of the model)", "cat"]
    with pytest.raises(UserError, match="the model has no class 'dg', did you mean dog"):
        rename_classes(["cat", "dog"], dict(Hund="dg"))
    with pytest.raises(UserError, match="'tabby' and 'siamese' are both 'cat'"):
        rename_classes(["cat", "dog"], dict(tabby="cat", siamese="cat"))


def write_folders(root: Path, names: list[str], count: int = 60) -> Path:
    """Digits of the test split as ROOT/{train,val}/NAME/*.png."""
    data = Digits()
    for i in data._splits["test"][:count]:
        for split in ("train", "val"):
            folder = root / split / names[data._labels[i]]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(data._grey[i]).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folders(once):
    """Class folders of digits: under the model's names, and under others, whose order is another."""

    def make(folder: Path) -> None:
        write_folders(folder / "same", DIGITS)
        write_folders(folder / "other", NAMES)
        (folder / "map.json").write_text(json.dumps(dict(zip(NAMES, DIGITS))))

    return once("folders", make)


FOLDER = ROOT / "configs/finetune/folder.py"


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def classes_of(folder: Path, key: str) -> dict[str, str]:
    with open(folder / "classes.csv", newline="") as file:
        return {row["class"]: row[key] for row in csv.DictReader(file)}


def classifier_ways(run: Path, data: Path) -> dict[str, list]:
    """All ways to test the run's weights on a folder with train and val in it."""
    config = [FOLDER, f"data.root={data}", "data.img_size=16", "model={'name': 'test_resnet'}", "workers=0"]
    return dict(
        run=[*config, "--checkpoint", run],
        exported=[*config, "--checkpoint", run / "model.safetensors"],
        checkpoint=[*config, "--checkpoint", run / "checkpoints/last.safetensors"],
        images=[run, "--images", data / "val"],
        images_of_checkpoint=[FOLDER, "data.root=x", "model={'name': 'test_resnet'}", "data.img_size=16", "workers=0"]
        + ["--images", data / "val", "--checkpoint", run / "checkpoints/best.safetensors"],
    )


WAYS = ["run", "exported", "checkpoint", "images", "images_of_checkpoint"]


@pytest.mark.parametrize("way", WAYS)
def test_classifier(command, classifier_run, folders, tmp_path, way):
    """Other names are refused; by a map, in whatever order, the numbers are those under the model's own names."""
    arguments = ["device=cpu", "--out", tmp_path]
    code, _, err = command("test", *classifier_ways(classifier_run, folders / "other")[way], *arguments)
    assert code == 2 and err.count("\n") == 1
    assert (REFUSAL in err and "'eight'" in err) or ("eight is not a class of the model" in err and "images" in way)
    assert not (tmp_path / "metrics.json").exists()
    if way not in ("checkpoint", "images"):
        return
    assert command("test", *classifier_ways(classifier_run, folders / "same")[way], *arguments)[0] == 0
    expected, rows = metrics_of(tmp_path), classes_of(tmp_path, "top1")
    assert expected["top1"] > (30 if way == "images" else 10)  # --images has the run's own mean and std, not ImageNet's
    arguments += ["--class-map", folders / "map.json"]
    code, _, err = command("test", *classifier_ways(classifier_run, folders / "other")[way], *arguments)
    assert (code, err) == (0, "")
    for key in ("top1", "top5", "ece", "loss"):
        assert metrics_of(tmp_path)[key] == pytest.approx(expected[key], rel=1e-5), key
    assert classes_of(tmp_path, "top1") == {NAMES[int(digit)]: top1 for digit, top1 in rows.items()}


def test_some_of_the_classes(command, classifier_run, folders, tmp_path):
    """By a map the data may have some of the model's classes; without one, only --images does so."""
    for split in ("train", "val"):
        for name in ("one", "eight", "two"):
            shutil.copytree(folders / "other" / split / name, tmp_path / "some" / split / name)
    (tmp_path / "map.json").write_text(json.dumps(dict(one="1", two="2", eight="8")))
    ways = classifier_ways(classifier_run, tmp_path / "some")
    for way, lowest in (("checkpoint", 30), ("images", 60)):
        arguments = ["device=cpu", "--class-map", tmp_path / "map.json", "--out", tmp_path / way]
        assert command("test", *ways[way], *arguments)[0] == 0
        assert metrics_of(tmp_path / way)["top1"] > lowest and metrics_of(tmp_path / way)["top5"] == 100
        assert set(classes_of(tmp_path / way, "top1")) == {"one", "eight", "two"}
    code, _, err = command("test", *ways["checkpoint"], "device=cpu", "--out", tmp_path / "none")
    assert code == 2 and REFUSAL in err


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "can't be read"),
        ("{", "can't be read"),
        ('["a"]', "names only"),
        ('{"eight": 8}', "names only"),
        ('{"eight": "ate"}', "the model has no class 'ate'"),
        ("\ufeff{}", REFUSAL),
    ],
)
def test_mistakes_of_maps(command, classifier_run, folders, tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "map.json").write_text(content, encoding="utf-8")
    arguments = [*classifier_ways(classifier_run, folders / "other")["run"], "--class-map", tmp_path / "map.json"]
    code, _, err = command("test", *arguments, "device=cpu", "--out", tmp_path)
    assert code == 2 and err.count("\n") == 1 and sentence in err


def test_training_checkpoint_is_not_for_tests(command, classifier_run, folders):
    """It would be ignored."""
    code, _, err = command("test", classifier_run, "checkpoint=other.pth")
    assert code == 2 and "test weights with --checkpoint FILE" in err


@pytest.fixture(scope="module")
def renamed_coco(once, scenes):
    """The scenes with two categories under each other's id, and with a category of another name."""

    def make(folder: Path) -> None:
        for kind in ("order", "names"):
            for file in (scenes / "coco/annotations").iterdir():
                content = json.loads(file.read_text())
                if kind == "order":
                    content["categories"][0]["name"], content["categories"][7]["name"] = "7", "0"
                    for one in content["annotations"]:
                        one["category_id"] = {1: 8, 8: 1}.get(one["category_id"], one["category_id"])
                else:
                    content["categories"][3]["name"] = "drei"
                (folder / kind / "annotations").mkdir(parents=True, exist_ok=True)
                (folder / kind / "annotations" / file.name).write_text(json.dumps(content))
            (folder / kind / "images").symlink_to(scenes / "coco/images")

    return once("renamed_coco", make)


def dense_ways(run: Path, arguments: tuple, data: Path) -> dict[str, list]:
    file, overrides = arguments
    own = [*overrides, f"data.root={data}"]
    return dict(
        run=[run, f"data.root={data}"],
        config=[file, *own, "--checkpoint", run],
        checkpoint=[file, *own, "--checkpoint", run / "checkpoints/best.safetensors"],
    )


@pytest.mark.parametrize("way", ["run", "config", "checkpoint"])
def test_detector(command, detector_run, detector_arguments, scenes, renamed_coco, tmp_path, way):
    """In another order the numbers are the same, class by class; other names are refused, or mapped."""

    def test(data: Path, *more) -> tuple[int, str]:
        arguments = [*dense_ways(detector_run, detector_arguments, data)[way], "device=cpu", "--out", tmp_path, *more]
        code, _, err = command("test", *arguments)
        return code, err

    code, err = test(renamed_coco / "names")
    assert code == 2 and REFUSAL in err and "'drei'" in err and "'3'" in err
    if way == "config":
        return
    assert test(scenes / "coco") == (0, "")
    expected, rows = metrics_of(tmp_path), classes_of(tmp_path, "box_ap")
    if way == "run":
        assert test(renamed_coco / "order") == (0, "")
        found = metrics_of(tmp_path)
        keys = ("box_ap", "mask_ap", "box_ar100")
        assert {k: found[k] for k in keys} == pytest.approx({k: expected[k] for k in keys})
        assert classes_of(tmp_path, "box_ap") == rows and list(classes_of(tmp_path, "box_ap")) != list(rows)
        return
    (tmp_path / "map.json").write_text('{"drei": "3"}')
    assert test(renamed_coco / "names", "--class-map", tmp_path / "map.json") == (0, "")
    assert classes_of(tmp_path, "box_ap") == {{"3": "drei"}.get(name, name): ap for name, ap in rows.items()}


@pytest.fixture(scope="module")
def renamed_ade20k(once, scenes):
    """The scenes with the classes listed the other way around, and with a class of another name."""

    def make(folder: Path) -> None:
        lines = (scenes / "ade20k/objectInfo.txt").read_text().splitlines()
        names = [line.split("\t")[1] for line in lines[1:]]
        shutil.copytree(scenes / "ade20k", folder / "order")
        shutil.copytree(scenes / "ade20k", folder / "names")
        for file in (folder / "order/annotations").glob("*/*.png"):
            labels = np.asarray(Image.open(file))
            Image.fromarray(np.where(labels > 0, len(names) + 1 - labels, 0).astype(np.uint8)).save(file)
        for kind, given in (("order", names[::-1]), ("names", [*names[:-1], "neun"])):
            rows = "".join(f"{number}\t{name}\n" for number, name in enumerate(given, 1))
            (folder / kind / "objectInfo.txt").write_text(f"{lines[0]}\n{rows}")

    return once("renamed_ade20k", make)


@pytest.mark.parametrize("way", ["run", "config", "checkpoint"])
def test_segmenter(command, segmenter_run, segmenter_arguments, scenes, renamed_ade20k, tmp_path, way):
    def test(data: Path, *more) -> tuple[int, str]:
        arguments = [*dense_ways(segmenter_run, segmenter_arguments, data)[way], "task.class_weights=None"]
        code, _, err = command("test", *arguments, "device=cpu", "--out", tmp_path, *more)
        return code, err

    assert test(scenes / "ade20k") == (0, "")
    expected = metrics_of(tmp_path)
    assert test(renamed_ade20k / "order") == (0, "")
    found = metrics_of(tmp_path)
    assert found["classes"] == expected["classes"] and list(found["classes"]) == list(expected["classes"])[::-1]
    assert (found["miou"], found["aacc"]) == pytest.approx((expected["miou"], expected["aacc"]))
    code, err = test(renamed_ade20k / "names")
    assert code == 2 and REFUSAL in err and "'neun'" in err and "'9'" in err
    (tmp_path / "map.json").write_text('{"neun": "9"}')
    assert test(renamed_ade20k / "names", "--class-map", tmp_path / "map.json") == (0, "")
    assert metrics_of(tmp_path)["miou"] == pytest.approx(expected["miou"])


def test_lifter():
    """The boxes of the classes kept, under the data's numbers."""
    boxes, scores, labels = torch.arange(18.0).view(2, 9), torch.tensor([0.9, 0.8]), torch.tensor([2, 1])
    head = SimpleNamespace(boxes=lambda outputs: [(boxes, scores, labels)])
    Lift.select_classes(None, SimpleNamespace(head=head), [0, 2])
    ((kept, score, number),) = head.boxes(None)
    assert torch.equal(kept, boxes[:1]) and score.tolist() == pytest.approx([0.9]) and number.tolist() == [1]


# Training on from a checkpoint: its classifier fits by name, or is left out.


def data_of(names: list[str], **more) -> SimpleNamespace:
    return SimpleNamespace(class_names=names, img_size=16, **more)


def test_classifier_trained_further(classifier_run):
    """In the data's order, or new where the names are others."""
    x = torch.randn(4, 3, 16, 16)

    def logits(names: list[str], checkpoint: str):
        task = Classify(data_of(names))
        net = task.model("test_resnet", checkpoint=classifier_run / checkpoint, new_head=True).eval()
        return net(x).detach(), net.forward_features(x).detach(), task.messages

    own, features, messages = logits(DIGITS, "model.safetensors")
    assert not messages
    for checkpoint in (".", "checkpoints/best.safetensors"):
        turned, same, messages = logits(DIGITS[::-1], checkpoint)
        assert torch.equal(same, features)
        torch.testing.assert_close(turned.flip(1), own, rtol=0, atol=2e-6)  # products may sum a row in another order
        assert "in another order: its classifier is reordered by name" in messages[0]
    new, same, messages = logits(NAMES, "model.safetensors")
    assert not torch.allclose(new, own) and torch.equal(same, features)
    assert "is of other classes ('0' where the data have 'zero'): its classifier is left out" in messages[0]


def test_segmenter_trained_further(segmenter_run):
    names = read_class_names(segmenter_run)
    inputs = dict(mean=(0.5,) * 3, std=(0.5,) * 3)
    image = torch.rand(2, 3, 64, 64)

    def logits(names: list[str]) -> tuple:
        task = Segment(data_of(names, scale=None, inputs=lambda cfg: inputs), channels=8)
        net = task.model("test_resnet", checkpoint=segmenter_run, new_head=True).eval()
        return net(image).detach(), net.auxiliary_head(net._maps(image)).detach(), task.messages

    own, turned, new = logits(names), logits(names[::-1]), logits([*names[:-1], "neun"])
    for i in range(2):
        assert torch.allclose(turned[i].flip(1), own[i], atol=1e-5) and not torch.allclose(new[i], own[i])
    assert not own[2] and "reordered" in turned[2][0] and "left out" in new[2][0]


def test_detector_trained_further(detector_run):
    """Its class layers start anew, also where only the order differs; the others are the checkpoint's."""
    arguments = dict(channels=16, hidden=32, rois=16, proposals=30)

    def tensors(names: list[str]) -> dict:
        task = Detect(data_of(names), **arguments)
        return task.model("test_resnet", checkpoint=detector_run, new_head=True).state_dict()

    own, turned, new = tensors(DIGITS), tensors(DIGITS[::-1]), tensors(NAMES)
    for other in (turned, new):
        differing = {key.split(".")[-2] for key in own if not torch.equal(own[key], other[key])}
        assert differing and differing <= {"fc_cls", "fc_reg", "conv_logits"}
