"""Exported models compute what the model computes, in their own runtime; what cannot be is one sentence."""

import json
import re
import warnings
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from saccade.train import export
from saccade.train.predict import predictor
from saccade.train.runtime import config
from saccade.train.runtime.errors import UserError
from support.families import SMALL, build
from support.levels import exhaustive
from torch import Tensor, nn

FORMATS = ["onnx", "openvino", "torch-export", "torchscript", "aoti"]
FAMILIES = [name for name in SMALL if not name.startswith("dfa3d")]


def needs(to: str) -> None:
    for package in export.NEEDS.get(to, ()):
        pytest.importorskip(package, reason=f"{package}, which --to {to} needs, is not installed")


@pytest.mark.parametrize("to", [exhaustive(to) if to in ("aoti", "openvino") else to for to in FORMATS])
def test_run(command, classifier_run, tmp_path, to):
    needs(to)
    out = tmp_path / f"model{export.SUFFIXES[to]}"
    code, said, err = command("export", classifier_run, out, "--to", to, "--size", 32, 48)
    assert (code, err) == (0, "") and "at batches of 1, 2, 5" in said
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["input_size"] == [3, 32, 48] and facts["classes"] == [str(i) for i in range(10)]
    model = timm.create_model(f"local-dir:{classifier_run}", pretrained=True).eval()
    assert facts["mean"] == list(model.pretrained_cfg["mean"])
    x = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(export._runner(out, to)(x), model(x), rtol=1e-4, atol=1e-5)
    code, _, err = command("export", classifier_run, out, "--to", to)
    assert code == 2 and f"{out} exists" in err


def test_segmenter(command, segmenter_run, tmp_path):
    out = tmp_path / "model.pt2"
    code, _, err = command("export", segmenter_run, out, "--to", "torch-export", "--size", 64, 96)
    assert (code, err) == (0, "")
    found = export._runner(out, "torch-export")(torch.rand(3, 3, 64, 96))
    assert found.shape[0] == 3 and found.shape[2:] == (16, 24)
    assert json.loads(out.with_suffix(".json").read_text())["std"] == [1.0, 1.0, 1.0]


def table() -> dict[tuple[str, str], str]:
    """The cells of the table in docs/export.md: (model, column) -> what it says."""
    text = (Path(__file__).parents[2] / "docs/export.md").read_text()
    rows = [[cell.strip(" `") for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head = next(row for row in rows if row[0] == "small model of")
    return {(row[0], name): cell for row in rows if row[0] in SMALL for name, cell in zip(head[1:], row[1:])}


def test_table_has_every_family_and_format():
    assert table().keys() == {(name, column) for name in FAMILIES for column in (*FORMATS, "any size as onnx")}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "column"), table())
def test_families(name, column, tmp_path):
    """The documentation's table is true: "equal" is, and what is "refused" is."""
    to, dynamic = ("onnx", True) if column not in FORMATS else (column, False)
    if table()[name, column] == "not run":
        pytest.skip("docs/export.md says that it has not been run")
    needs(to)
    file, model = tmp_path / f"model{export.SUFFIXES[to]}", build(name).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if table()[name, column] == "equal":
            found, compared = export._export(model, file, to, (64, 64), dynamic)
            assert found < 1e-3 and "at batches of 1, 2, 5" in compared
        else:
            with pytest.raises(UserError):
                export._export(model, file, to, (64, 64), dynamic)


@pytest.mark.parametrize("to", ["torchscript", exhaustive("onnx"), exhaustive("openvino")])
def test_detector(command, detector_run, tmp_path, to):
    """All that it finds is compared: a box, a mask, a label or a score that differs is refused."""
    needs(to)
    out = tmp_path / f"model{export.SUFFIXES[to]}"
    code, said, err = command("export", detector_run, out, "--to", to, "--size", 64, 64)
    assert (code, err) == (0, "") and "boxes, scores, labels, masks of" in said, err
    assert int(re.search(r"masks of (\d+) objects", said)[1]) > 10
    if to == "torchscript":
        net, theirs = predictor(detector_run, "cpu").model, export._runner(out, to)
        for i, sentence in enumerate(
            ["boxes differ", "other labels or scores", "other labels or scores", "masks differ"]
        ):

            def spoilt(image, i=i):
                outputs = list(theirs(image))
                outputs[i] = outputs[i].clone()
                outputs[i][len(outputs[i]) // 2] += 1 if i != 0 else 3
                return tuple(outputs)

            with pytest.raises(UserError, match=sentence):
                export.compare_objects(net, spoilt, (64, 64))
        with pytest.raises(UserError, match="finds 1 objects where"):
            export.compare_objects(net, lambda image: tuple(output[:1] for output in theirs(image)), (64, 64))


def test_dynamic_size(command, classifier_run, tmp_path):
    out = tmp_path / "model.pt2"
    code, said, err = command("export", classifier_run, out, "--to", "torch-export", "--size", 64, 96, "--dynamic-size")
    assert (code, err) == (0, ""), err
    assert "sizes of 64x96, 128x96, 96x192" in said
    model = timm.create_model(f"local-dir:{classifier_run}", pretrained=True).eval()
    x = torch.randn(3, 3, 160, 224)
    with torch.no_grad():
        torch.testing.assert_close(export._runner(out, "torch-export")(x), model(x), rtol=1e-4, atol=1e-5)


def test_sizes_that_a_model_does_not_take(tmp_path, monkeypatch):
    """With --dynamic-size a refusal is one sentence of ours: the size made from, the one that fails, what to do."""
    file = tmp_path / "model.pt2"

    def refusal(net: nn.Module, to: str = "torch-export") -> str:
        with pytest.raises(UserError) as raised:
            export._export(net.eval(), file, to, (64, 64), True)
        return str(raised.value)

    hint = "leave out --dynamic-size, and all images have one size, now 64x64 (see --size)"
    begin = "Sequential cannot be written as torch-export for images of any size: "
    flat = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.Flatten(), nn.Linear(64, 5))  # of one size only
    assert refusal(flat) == f"{begin}its program depends on the size; {hint}"

    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[2] != 64:
                raise ValueError(f"images must be 64 rows high, got {x.shape[2]}")
            return x.mean((2, 3))

    assert refusal(Strict()).endswith(f"of any size: images must be 64 rows high, got 128; {hint}")

    class Rows(nn.Module):  # with a branch on the size that its graph loses
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) * (2 if x.shape[2] > 64 else 1)

    assert refusal(Rows()).endswith(f"the file made from images of 64x64 does not run on images of 128x64; {hint}")

    def raw(x: Tensor) -> Tensor:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : node_Add_227\x1b[96m")

    monkeypatch.setattr(export, "_runner", lambda *args: raw)
    with pytest.raises(UserError, match=r"as torch-export for 64x64: \[ONNXRuntimeError\] : 1 : FAIL : node_Add_227$"):
        export._export(Rows(), file, "torch-export", (64, 64))


@pytest.mark.exhaustive
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8(command, classifier_run, tmp_path, to):
    """Top-1 before and after on the digits' own test images, as files; of other folders the agreement."""
    needs(to)
    pytest.importorskip(export.QUANTIZERS[to][0], reason="the quantiser is not installed")
    settings = config.load(classifier_run / "config.py")
    digits = config.build(settings["data"])
    images, classes = tmp_path / "images", tmp_path / "other"
    grey, labels = digits._grey, digits._labels
    for index in digits._splits["test"][:80]:
        for folder in (images / str(labels[index]), classes):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey[index]).resize((16, 16)).save(folder / f"{index}.png")
    out = tmp_path / f"model{export.SUFFIXES[to]}"
    side = 16 if to == "onnx" else 32  # as trained; OpenVINO refuses to pool a map of one pixel
    arguments = ("export", classifier_run, out, "--to", to, "--size", side, side, "--int8", images, "--max-drop", 15)
    code, said, err = command(*arguments)
    assert (code, err) == (0, ""), err
    facts = json.loads(out.with_suffix(".json").read_text())
    found = facts["accuracy"]
    assert facts["int8"] and found["metric"] == "top-1" and found["images"] == 60 and found["calibrated"] == 20
    assert (
        found["before"] > (40 if to == "onnx" else 0)
        and found["after"] > found["before"] - 15
        and "int8: top-1" in said
    )
    written = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert written == {"model.onnx", "model.json"} if to == "onnx" else {"model.xml", "model.bin", "model.json"}
    x = torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = timm.create_model(f"local-dir:{classifier_run}", pretrained=True).eval()(x)
    difference = (export._runner(out, to)(x) - expected).abs().max()
    assert difference > 1e-4  # it is another model
    again = tmp_path / f"again{out.suffix}"
    code, said, _ = command(
        "export", classifier_run, again, "--to", to, "--size", side, side, "--int8", classes, "--max-drop", 90
    )
    assert code == 0 and "int8: agreement 100.00 % before" in said
    for folder, drop, sentence in [
        (tmp_path / "none", 5, "is not a folder"),
        (classifier_run / "checkpoints", 5, "holds no images"),
        (images, -100, "so it is not kept"),
    ]:
        code, _, err = command(
            *arguments[:2], tmp_path / f"no{out.suffix}", *arguments[3:-3], folder, "--max-drop", drop
        )
        assert code == 2 and sentence in err, err


def test_another_result_is_not_kept(classifier_run, tmp_path, monkeypatch):
    runner = export._runner
    monkeypatch.setattr(export, "_runner", lambda *args: lambda x: runner(*args)(x) + (len(x) == 5))
    with pytest.raises(UserError, match="computes something else at a batch of 5"):
        export.export(classifier_run, tmp_path / "out" / "model.pt", "torchscript")
    assert not list((tmp_path / "out").iterdir())


def test_mistakes(command, tmp_path, classifier_run, detector_run, monkeypatch):
    """Each is one sentence, before anything is written."""
    out = tmp_path / "model.pt"
    for arguments, sentence in [
        (
            (classifier_run, out, "--to", "onxn"),
            "--to must be one of onnx, openvino, torch-export, aoti, torchscript, got onxn",
        ),
        ((classifier_run, out, "--to", "onnx"), "the output of --to onnx must end in .onnx"),
        ((classifier_run, out, "--to", "torchscript", "--size", 0, 5), "--size must be two numbers of pixels"),
        (("biformer_x", out, "--to", "torchscript"), "there is no run and no model biformer_x, did you mean"),
        ((tmp_path, out, "--to", "torchscript"), "has no model.safetensors"),
        ((detector_run, tmp_path / "m.pt2", "--to", "aoti"), "a detector is exported as onnx, openvino, torchscript"),
        ((detector_run, out, "--to", "torchscript", "--dynamic-size"), "a detector is exported for one image size"),
        ((detector_run, tmp_path / "m.onnx", "--to", "onnx", "--int8", tmp_path), "--int8 is for classifiers"),
        ((classifier_run, out, "--to", "torchscript", "--int8", tmp_path), "--int8 is for onnx and openvino"),
        ((classifier_run, tmp_path / "m.onnx", "--to", "onnx", "--int8", tmp_path), "holds no images"),
        (("test_resnet", out, "--to", "torchscript", "--checkpoint", tmp_path / "no.pth"), "there is no checkpoint"),
        ((classifier_run, out, "--to", "torchscript", "--checkpoint", out), "--checkpoint goes with a model's name"),
    ]:
        code, _, err = command("export", *arguments)
        assert code == 2 and sentence in err and "Traceback" not in err, (arguments, err)
    monkeypatch.setitem(export.NEEDS, "torchscript", ("no_such_package",))
    code, _, err = command("export", classifier_run, out, "--to", "torchscript")
    assert code == 2 and "--to torchscript needs no_such_package" in err
    monkeypatch.setattr(export, "find_cpp_compiler", lambda: None)
    code, _, err = command("export", classifier_run, tmp_path / "m.pt2", "--to", "aoti")
    assert code == 2 and "--to aoti needs a C++ compiler" in err
    assert not list(tmp_path.iterdir())
