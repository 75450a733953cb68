"""tools/test.py: what it writes is what counting by hand gives, on any test set and number of processes."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from matplotlib import pyplot as plt
from PIL import Image
from saccade.train import engine, probe
from saccade.train.data.digits import Digits
from saccade.train.data.test_folder import TestFolder
from saccade.train.runtime import config
from saccade.train.runtime.errors import UserError
from saccade.train.visual.confusion import plot_reliability
from support.forked import forked
from timm.data import create_transform

ROOT = Path(__file__).resolve().parents[2]
TIMING = {"seconds", "images_per_s", "model_images_per_s"}


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(classifier_run):
    return classifier_run


@pytest.fixture(scope="module")
def outputs(trained):
    """Logits and labels of the 360 test images."""
    digits = Digits(img_size=16)
    images, labels = zip(*digits.dataset("test", digits.inputs({})))
    model = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
    with torch.no_grad():
        return model(torch.stack(images)), torch.tensor(labels)


def write(folder: Path, name: str, split: str = "test", count: int = 90, digits=range(10), file: str = "{i}.png"):
    """Digits as files, folder/name.format(digit)/file.format(number)."""
    data = Digits()
    found = [(data._grey[i], int(data._labels[i])) for i in data._splits[split] if data._labels[i] in digits][:count]
    for i, (grey, label) in enumerate(found):
        path = folder / name.format(label) / file.format(i=i + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(grey).save(path)
    return [label for _, label in found]


def logits_of(trained: Path, folder: Path, labels: list[int], name: str, file: str = "{i}.png", **inputs):
    """The model's logits of what `write` wrote, image by image."""
    model = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
    transform = create_transform(**timm.data.resolve_data_config(model=model) | inputs)
    paths = [folder / name.format(label) / file.format(i=i + 1) for i, label in enumerate(labels)]
    with torch.no_grad():
        return torch.cat([model(transform(Image.open(path).convert("RGB"))[None]) for path in paths])


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def percent(right: torch.Tensor) -> float:
    return 100 * right.double().mean().item()


def test_what_is_written(command, trained, outputs, tmp_path):
    logits, labels = outputs
    code, out, err = command("test", trained, "device=cpu", "--out", tmp_path)
    assert (code, err) == (0, "")
    found = metrics_of(tmp_path)
    said = logits.argmax(1)
    assert found["top1"] == pytest.approx(percent(said == labels)) and 20 < found["top1"] < 100
    assert found["top5"] == pytest.approx(percent((logits.topk(5).indices == labels[:, None]).any(1)))
    assert (found["split"], found["images"], found["precision"]) == ("test", 360, "fp32")
    assert (found["input_size"], found["crop_pct"], found["interpolation"]) == ([3, 16, 16], 1.0, "bicubic")
    assert 0 < found["images_per_s"] <= found["model_images_per_s"]

    # Calibration: the bins hold all images, and the error is their weighted gap.
    p = logits.double().softmax(1).max(1).values
    bins = found["calibration"]
    assert sum(row["images"] for row in bins) == 360
    assert found["ece"] == pytest.approx(sum(r["images"] * abs(r["top1"] - r["confidence"]) for r in bins) / 360)
    assert sum(r["images"] * r["confidence"] for r in bins) / 360 == pytest.approx(percent(p))

    # Classes and pairs.
    lines = (tmp_path / "classes.csv").read_text().splitlines()
    assert lines[0] == "class,images,right,top1,taken_for,times" and len(lines) == 11
    for digit, line in enumerate(lines[1:]):
        name, images, right, top1, *_ = line.split(",")
        here = labels == digit
        assert (name, int(images), int(right)) == (str(digit), here.sum(), (said[here] == digit).sum())
        assert float(top1) == pytest.approx(percent(said[here] == digit))
    first = found["confused"][0]
    counts = {(a, b): int(((labels == a) & (said == b)).sum()) for a in range(10) for b in range(10) if a != b}
    assert first["images"] == max(counts.values()) == counts[int(first["true"]), int(first["predicted"])]
    assert "worst classes" in out and f"{tmp_path / 'classes.csv'}" in out
    drawn = {path.name for path in tmp_path.glob("pictures/*")}
    assert drawn == {"confusion.png", "reliability.png"}


def test_processes_equal_one(command, trained, tmp_path):
    """Two processes, batches that do not come out even: the same numbers."""
    images, real = tmp_path / "images", tmp_path / "real.json"
    write(images, "{0}", count=77, file="ILSVRC2012_val_{i:08d}.png")
    real.write_text(json.dumps([[i % 10, (i * 7) % 10] if i % 3 else [] for i in range(77)]))
    arguments = [trained, "device=cpu", "batch_size=24", "--images", images, "--real", real]
    assert command("test", *arguments, "--out", tmp_path / "1")[0] == 0
    expected = metrics_of(tmp_path / "1")
    assert expected["images"] == 77 and expected["real_images"] == 51
    assert forked(2, "test", *arguments, "--out", tmp_path / "2") == [0, 0]
    found = metrics_of(tmp_path / "2")
    assert found.keys() == expected.keys()
    for key in found.keys() - TIMING - {"loss", "ece", "calibration"}:
        assert found[key] == expected[key], key
    assert (found["loss"], found["ece"]) == pytest.approx((expected["loss"], expected["ece"]))
    for row, other in zip(found["calibration"], expected["calibration"], strict=True):
        assert row == pytest.approx(other)
    assert (tmp_path / "2/classes.csv").read_text() == (tmp_path / "1/classes.csv").read_text()


def test_folders_are_mapped_as_numbers(tmp_path):
    """As text, "10" and "11" would come before "2": ImageNetV2's thousand folders are numbers."""
    names = [f"n{i:08d}" for i in range(12)]
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / str(i) / f"of_{i}.png")
    data = TestFolder(str(tmp_path), names)
    assert data.class_names == names and data.classes == list(range(12)) and len(data.model_classes) == 12
    images = data.dataset("test", data.inputs(dict(input_size=(3, 32, 32))))
    assert [images.filename(i) for i in range(12)] == [f"of_{i}.png" for i in range(12)]
    assert [images[i][1] for i in range(12)] == list(range(12))
    with pytest.raises(UserError, match=r"11 is not a class of the model, which has 11"):
        TestFolder(str(tmp_path), names[:11])


def test_folders_are_mapped_by_name(tmp_path):
    """A subset in the model's own order, not the alphabet's."""
    names = ["wolf", "cat", "fox", "dog"]
    for name in ("dog", "wolf", "cat"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / f"{name}.png")
    data = TestFolder(str(tmp_path), names)
    assert data.class_names == ["wolf", "cat", "dog"] and data.classes == [0, 1, 3] and data.model_classes == names
    images = data.dataset("test", data.inputs(dict(input_size=(3, 32, 32))))
    assert [(images.filename(i), images[i][1]) for i in range(3)] == [("wolf.png", 0), ("cat.png", 1), ("dog.png", 2)]
    with pytest.raises(UserError, match="cat is not a class of the model, which has 2, did you mean cats"):
        TestFolder(str(tmp_path), ["cats", "dog"])
    with pytest.raises(UserError, match="is not a folder"):
        TestFolder(str(tmp_path / "none"), names)


def test_subset(command, trained, tmp_path):
    """Some classes only: the model chooses among those, and every number is about them."""
    labels = write(tmp_path / "images", "{0}", digits=(2, 3, 7, 8))
    logits = logits_of(trained, tmp_path / "images", labels, "{0}")
    assert command("test", trained, "device=cpu", "--images", tmp_path / "images", "--out", tmp_path / "out")[0] == 0
    found = metrics_of(tmp_path / "out")
    kept = torch.tensor([2, 3, 7, 8])
    own = torch.tensor([[2, 3, 7, 8].index(label) for label in labels])
    assert found["top1"] == pytest.approx(percent(logits[:, kept].argmax(1) == own))
    assert found["top1"] > percent(logits.argmax(1) == torch.tensor(labels))
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits[:, kept], own).item(), rel=1e-5)
    assert found["top5"] == 100.0 and found["images"] == 90 and found["split"] == str(tmp_path / "images")
    rows = (tmp_path / "out/classes.csv").read_text().splitlines()[1:]
    assert [row[0] for row in rows] == ["2", "3", "7", "8"]


def test_real_labels(command, trained, tmp_path):
    """Against counting by hand; an image without labels counts in top1 but not in real_top1."""
    labels = write(tmp_path / "images", "{0}", count=60, file="ILSVRC2012_val_{i:08d}.png")
    logits = logits_of(trained, tmp_path / "images", labels, "{0}", "ILSVRC2012_val_{i:08d}.png")
    real = [[] if i % 5 == 0 else sorted({label, (label + i) % 10}) for i, label in enumerate(labels)]
    (tmp_path / "real.json").write_text(json.dumps(real))
    arguments = [trained, "device=cpu", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    assert command("test", *arguments, "--real", tmp_path / "real.json")[0] == 0
    found = metrics_of(tmp_path / "out")
    counted = [i for i in range(60) if real[i]]
    assert found["real_images"] == len(counted) == 48 and found["images"] == 60
    hits = [[said in real[i] for said in logits[i].topk(5).indices.tolist()] for i in counted]
    assert found["real_top1"] == pytest.approx(100 * sum(hit[0] for hit in hits) / 48)
    assert found["real_top5"] == pytest.approx(100 * sum(map(any, hits)) / 48)
    assert found["top1"] == pytest.approx(percent(logits.argmax(1) == torch.tensor(labels)))

    code, _, err = command("test", *arguments, "--real", "timm")
    assert code == 2 and err.count("\n") == 1 and "these labels are for classifiers of ImageNet's 1000 classes" in err
    code, _, err = command("test", trained, "device=cpu", "--out", tmp_path / "out", "--real", tmp_path / "real.json")
    assert code == 2 and "--real needs the images' file names, which this data does not have" in err


def test_size_crop_and_interpolation(command, trained, tmp_path):
    """The model's own unless told otherwise."""
    labels = write(tmp_path / "images", "{0}", count=40)
    arguments = [trained, "device=cpu", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    assert command("test", *arguments)[0] == 0
    own = metrics_of(tmp_path / "out")
    assert (own["input_size"], own["crop_pct"], own["interpolation"]) == ([3, 16, 16], 1.0, "bicubic")
    changed = ["--img-size", "24", "--crop-pct", "0.75", "--interpolation", "bilinear"]
    assert command("test", *arguments, *changed)[0] == 0
    found = metrics_of(tmp_path / "out")
    assert (found["input_size"], found["crop_pct"], found["interpolation"]) == ([3, 24, 24], 0.75, "bilinear")
    inputs = dict(input_size=(3, 24, 24), crop_pct=0.75, interpolation="bilinear")
    logits = logits_of(trained, tmp_path / "images", labels, "{0}", **inputs)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-5) and abs(loss - own["loss"]) > 1e-3


def test_bf16(command, trained, outputs, tmp_path):
    arguments = [trained, "device=cpu", "precision=bf16", "--out", tmp_path]
    assert command("test", *arguments)[0] == 0
    found = metrics_of(tmp_path)
    loss = torch.nn.functional.cross_entropy(*outputs).item()
    assert found["precision"] == "bf16" and found["loss"] == pytest.approx(loss, rel=0.02) and found["loss"] != loss


def test_weights_that_timm_publishes(command, trained, tmp_path):
    """model.pretrained, here read from a file instead of the network; its classes must be the images'."""
    write(tmp_path / "images", "{0}", count=40)
    arguments = ["device=cpu", "--out", tmp_path / "out", "--images", tmp_path / "images"]
    published = dict(file=str(trained / "model.safetensors"), num_classes=10)
    model = dict(name="test_resnet", pretrained=True, pretrained_cfg_overlay=published)
    folder = ROOT / "configs/finetune/folder.py"
    code, _, err = command("test", folder, f"model={model}", "workers=0", *arguments)
    assert code == 2 and err.count("\n") == 1 and "have 10 classes, and 1000 are needed" in err
    code, _, err = command(
        "test", ROOT / "configs/digits/resnet18.py", "data.img_size=16", f"model={model}", *arguments[:3]
    )
    assert code == 0, err
    assert command("test", trained, "device=cpu", "--out", tmp_path / "run")[0] == 0
    assert metrics_of(tmp_path / "out")["loss"] == pytest.approx(metrics_of(tmp_path / "run")["loss"])
    published["num_classes"] = 7
    code, _, err = command("test", ROOT / "configs/digits/resnet18.py", f"model={model}", *arguments[:3])
    assert code == 2 and "published for test_resnet have 7 classes, and 10 are needed" in err


def test_imagenet_model_on_numbered_folders(command, tmp_path):
    """A classifier of 1000 classes: 12 numbered folders are a test on 12 of them."""
    model = timm.create_model("test_resnet", num_classes=1000)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    write(tmp_path / "images", "{0}", count=20, digits=(0, 1))
    (tmp_path / "images/1").rename(tmp_path / "images/10")
    arguments = ["device=cpu", "workers=0", "model={'name': 'test_resnet'}", "--img-size", "16"]
    arguments += ["--checkpoint", tmp_path / "weights.pth", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    code, _, err = command("test", ROOT / "configs/finetune/folder.py", *arguments)
    assert (code, err) == (0, "")
    found = metrics_of(tmp_path / "out")
    rows = (tmp_path / "out/classes.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["n01440764", "n01530575"]  # tench and brambling, 0 and 10
    assert found["images"] == 20 and found["loss"] < math.log(1000)


def test_images_that_cannot_be_read(command, trained, tmp_path):
    """Named, and the test ends; or left out, as far as data.max_bad allows."""
    write(tmp_path / "images", "{0}", count=30)
    broken = next((tmp_path / "images").glob("*/*.png"))
    broken.write_bytes(b"no image")
    arguments = [trained, "device=cpu", "--images", tmp_path / "images", "--out", tmp_path / "out"]
    code, _, err = command("test", *arguments)
    assert code == 65 and err.count("\n") == 1 and str(broken) in err and "data.max_bad=0 is less than 1" in err
    assert not (tmp_path / "out/metrics.json").exists()
    assert command("test", *arguments, "data.max_bad=1")[0] == 0
    found = metrics_of(tmp_path / "out")
    assert (found["images"], found["skipped"]) == (29, 1)


def test_reliability_is_drawn(tmp_path):
    """Bars as high as the accuracy: of three bins, 30 % and twice 90 %."""
    rows = [dict(low=60.0, high=200 / 3, images=10, top1=30.0, confidence=62.0)]
    rows += [dict(low=100 * i / 15, high=100 * (i + 1) / 15, images=40, top1=90.0, confidence=94.0) for i in (13, 14)]
    image = plt.imread(plot_reliability(rows, tmp_path / "reliability.png"))[..., :3]
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    columns = ((blue > 0.75) & (red < 0.5) & (green > 0.4)).sum(0)  # the accuracy's blue
    heights = [int(height) for height in columns if height > 30]
    assert 2.7 < max(heights) / min(heights) < 3.3 and len(heights) > 60


def test_documented_commands():
    """Each config command of docs/evaluate.md is one that its tool takes."""
    text = (ROOT / "docs/evaluate.md").read_text().replace("\\\n", "")
    found = re.findall(r"tools/(train|test|probe)\.py (configs/.*)", text)
    assert {tool for tool, _ in found} == {"train", "test", "probe"}
    for tool, line in found:
        path, *words = shlex.split(line, comments=True)
        of_run = ["model.name=biformer_t"] if tool == "probe" else []  # what a run given as checkpoint would say
        overrides = [word for word in words if re.match(r"[\w.]+=", word)]
        settings = config.load(ROOT / path, ["data.root=x", *of_run, *overrides])
        (probe if tool == "probe" else engine).validate(settings)
        assert {word for word in words if word.startswith("--")} <= {"--images", "--checkpoint", "--split"}
    for stages in re.findall(r"(?m)^(freeze=.*?)(?: +#.*)?$", text):
        (override,) = shlex.split(stages)
        engine.validate(config.load(ROOT / "configs/finetune/folder.py", ["data.root=x", override]))
