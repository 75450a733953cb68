"""k-NN and the linear probe against loops, and their command."""

import json
import math
from pathlib import Path

import pytest
import torch
from saccade.train import probe
from saccade.train.data.digits import Digits
from saccade.train.models.build import create
from saccade.train.probe import KNN, LogisticProbe
from saccade.train.runtime import config
from saccade.train.runtime.errors import UserError
from support.forked import forked

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def made(images: int, classes: int, seed: int, width: int = 6):
    """Features in overlapping clouds, one per class."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(classes, (images,), generator=g)
    return centres[labels] + 0.9 * torch.randn(images, width, generator=g), labels


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (5, 0.07), (20, 0.07), (20, 1.0)])
def test_knn_is_a_loop(k, temperature):
    train, test = made(150, 9, 0), made(301, 9, 1)
    found = KNN(k, temperature)(train, ([], []), test, 9, CPU)
    right = [0, 0]
    for x, y in zip(test[0].tolist(), test[1].tolist()):
        near = []
        for other, label in zip(train[0].tolist(), train[1].tolist()):
            dot = sum(a * b for a, b in zip(x, other))
            near.append((dot / math.hypot(*x) / math.hypot(*other), label))
        votes: dict[int, float] = {}
        for cosine, label in sorted(near, reverse=True)[:k]:
            votes[label] = votes.get(label, 0) + math.exp(cosine / temperature)
        order = sorted(votes, key=lambda label: -votes[label])
        right[0] += order[0] == y
        right[1] += y in order[:5]
    assert (found["top1"], found["top5"]) == pytest.approx((100 * right[0] / 301, 100 * right[1] / 301))
    assert 30 < found["top1"] < 95


def test_knn_counts_no_class_without_a_vote():
    """One neighbour is one prediction, also among five."""
    train, test = made(100, 8, 0), made(200, 8, 1)
    found = KNN(k=1)(train, ([], []), test, 8, CPU)
    assert found["top5"] == found["top1"] < 100


def test_linear_probe():
    """C is chosen on val, top1 counted on test; predictions are those of scikit-learn's own classifier."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, val, test = made(120, 7, 0), made(100, 7, 1), made(200, 7, 2)
    scale = torch.tensor([1.0, 10.0, 0.1, 1.0, 3.0, 100.0])  # standardised away
    train, val, test = ((x * scale + 5, y) for x, y in (train, val, test))
    found = LogisticProbe(C=(10.0, 1e-3, 0.1))(train, val, test, 7, CPU)
    scores = {}
    for c in (1e-3, 0.1, 10.0):
        own = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
        own.fit(train[0].double().numpy(), train[1].numpy())
        scores[c] = tuple(100 * own.score(x.double().numpy(), y.numpy()) for x, y in (val, test))
        assert found["val_top1_by_C"][str(c)] == pytest.approx(scores[c][0])
    assert found["C"] == max(scores, key=lambda c: scores[c][0]) and found["converged"]
    assert (found["val_top1"], found["top1"]) == pytest.approx(scores[found["C"]])
    assert found["top1"] < found["top5"] <= 100
    assert not LogisticProbe(C=(10.0,), iterations=1)(train, val, test, 7, CPU)["converged"]


def test_features_are_the_heads(tmp_path):
    """In the dataset's order, and no classifier on them: what the head pools."""
    digits = Digits(img_size=16)
    inputs = digits.inputs({})
    images = digits.dataset("val", inputs)
    model = create("test_resnet", 10).eval()
    found, labels = probe.features(model, images, inputs["input_size"], 50, 0, CPU)
    assert found.shape == (180, 96) and found.dtype == torch.float32
    assert labels.tolist() == [label for _, label in images]
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in images]))
        torch.testing.assert_close(model.get_classifier()(found), logits, rtol=1e-4, atol=1e-5)


CONFIG = """
from saccade.train.data.digits import Digits
from saccade.train.probe import {probe}

model = dict(name="test_resnet")
data = dict(type=Digits, img_size=16)
probe = dict(type={probe})
batch_size = 100
device = "cpu"
"""


@pytest.fixture(scope="module")
def weights(classifier_run):
    return classifier_run


@pytest.mark.parametrize("judge, least", [("KNN", 75), ("LogisticProbe", 75)])
def test_command(command, weights, tmp_path, judge, least):
    """On real digits: the features of a backbone that has learned a little."""
    (tmp_path / "c.py").write_text(CONFIG.format(probe=judge))
    code, out, err = command("probe", tmp_path / "c.py", f"checkpoint={weights}", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert found["probe"] == judge and found["images"] == 360 and found["train_images"] == 1257
    assert found["features"] == 96 and least < found["top1"] < found["top5"] <= 100
    assert f"test: 360 images top1 {found['top1']:.2f}" in out and str(tmp_path / "out/metrics.json") in out
    assert not list(tmp_path.glob("out/.*"))


def test_processes_equal_one(command, weights, tmp_path):
    """Batches that do not come out even over two processes: the same neighbours."""
    (tmp_path / "c.py").write_text(CONFIG.format(probe="KNN"))
    arguments = [tmp_path / "c.py", f"checkpoint={weights}", "batch_size=50"]
    assert command("probe", *arguments, "--out", tmp_path / "one")[0] == 0
    assert forked(2, "probe", *arguments, "--out", tmp_path / "two") == [0, 0]
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one.pop("seconds") and two.pop("seconds") and one == two


@pytest.mark.parametrize("name", ["knn", "linear_probe"])
@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "checkpoint is missing: give the weights to judge"),
        (["checkpoint=w", "k=3"], "unknown key k"),
        (["checkpoint=w", "probe.kk=3"], "unknown key probe.kk"),
        (["checkpoint=w", "batch_size=0"], "batch_size must be a whole number, 1 or more; got 0"),
        (["checkpoint=w", "workers=-1"], "workers must be a whole number, 0 or more; got -1"),
        (["checkpoint=w", "model.num_classes=3"], "model.num_classes can't be set"),
        (["checkpoint=w", "probe=3"], "probe must be a section"),
        (["checkpoint=w"], "there is no checkpoint w: give a file of weights or the folder of a finished run"),
        ([f"checkpoint={ROOT}"], "model.name is missing: give it with model.name=…, or a run's folder as checkpoint"),
    ],
)
def test_mistakes(name, arguments, sentence):
    with pytest.raises(UserError) as error:
        probe.validate(config.load(ROOT / f"configs/finetune/{name}.py", ["data.root=x", *arguments]))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_mistakes_of_values():
    train, test = made(10, 3, 0), made(10, 3, 1)
    with pytest.raises(UserError, match=r"probe\.k=11 is more than the 10 training images"):
        KNN(k=11)(train, test, test, 3, CPU)
    for override in ("probe.k=0", "probe.temperature=0", "probe.temperature=nan"):
        settings = config.load(
            ROOT / "configs/finetune/knn.py", ["data.root=x", "checkpoint=w", "model.name=test_resnet", override]
        )
        with pytest.raises(UserError, match=override.partition("=")[0]):
            probe.validate(settings)
    with pytest.raises(UserError, match="must be numbers above 0"):
        LogisticProbe(C=(0.0, 1.0))
    digits = Digits(img_size=16)
    model = create("test_resnet", 10).eval()
    with torch.no_grad():
        model.conv1[0].weight.fill_(float("nan"))
    inputs = digits.inputs({})
    with pytest.raises(UserError, match="features are not finite"):
        probe.features(model, digits.dataset("val", inputs), inputs["input_size"], 50, 0, CPU)


def test_model_of_a_run(weights, tmp_path):
    """The model's arguments and the image size are the run's, unless the config says otherwise."""

    def validated(*overrides: str) -> dict:
        settings = config.load(ROOT / "configs/finetune/knn.py", ["data.root=x", *overrides])
        probe.validate(settings)
        return settings

    for checkpoint in (weights, weights / "model.safetensors", weights / "checkpoints/last.safetensors"):
        settings = validated(f"checkpoint={checkpoint}")
        assert settings["model"] == config.load(weights / "config.py")["model"]
        assert settings["model"]["name"] == "test_resnet" and settings["data"]["img_size"] == 16
    settings = validated(f"checkpoint={weights}", "data.img_size=24", "model.drop_rate=0.5")
    assert settings["data"]["img_size"] == 24 and settings["model"]["drop_rate"] == 0.5
    assert validated(f"checkpoint={weights}", "model.name=resnet18")["model"] == dict(name="resnet18")
    (tmp_path / "weights.pth").touch()
    with pytest.raises(UserError, match=r"model\.name is missing"):
        validated(f"checkpoint={tmp_path / 'weights.pth'}")


def test_progress(monkeypatch):
    """A bar on a terminal, which goes away; nothing in a file."""
    shown = []
    monkeypatch.setattr(probe, "track", lambda items, text, disable, **_: shown.append((text, not disable)) or items)
    assert probe.progress([1, 2], "features of val") == [1, 2]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert probe.progress([1, 2], "features of val") == [1, 2]
    assert shown == [("features of val", False), ("features of val", True)]
