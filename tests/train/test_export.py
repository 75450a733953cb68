"""Exported models compute what the model computes, in their own runtime; what cannot be is one sentence."""

import json

import pytest
import timm
import torch
from saccade.train import export
from saccade.train.runtime.errors import UserError
from support.families import SMALL, build
from support.levels import exhaustive

FORMATS = ["onnx", "torch-export", "torchscript", "openvino"]
FAMILIES = [name for name in SMALL if not name.startswith("dfa3d")]


def needs(to: str) -> None:
    for package in export.NEEDS.get(to, ()):
        pytest.importorskip(package, reason=f"{package}, which --to {to} needs, is not installed")


@pytest.mark.parametrize("to", FORMATS)
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


@pytest.mark.parametrize("to", [exhaustive(to) for to in FORMATS])
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, to, tmp_path):
    needs(to)
    found, batches = export._export(build(name).eval(), tmp_path / f"model{export.SUFFIXES[to]}", to, (64, 64))
    assert found < 1e-3 and batches == (1, 2, 5)


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
            "--to must be one of onnx, torch-export, torchscript, openvino, got onxn",
        ),
        ((classifier_run, out, "--to", "onnx"), "the output of --to onnx must end in .onnx"),
        ((classifier_run, out, "--to", "torchscript", "--size", 0, 5), "--size must be two numbers of pixels"),
        (("biformer_x", out, "--to", "torchscript"), "there is no run and no model biformer_x, did you mean"),
        ((tmp_path, out, "--to", "torchscript"), "has no model.safetensors"),
        ((detector_run, out, "--to", "torchscript"), "a detector is exported as onnx only"),
        ((classifier_run, out, "--to", "torchscript", "--checkpoint", out), "--checkpoint goes with a model's name"),
    ]:
        code, _, err = command("export", *arguments)
        assert code == 2 and sentence in err and "Traceback" not in err, (arguments, err)
    monkeypatch.setitem(export.NEEDS, "torchscript", ("no_such_package",))
    code, _, err = command("export", classifier_run, out, "--to", "torchscript")
    assert code == 2 and "--to torchscript needs no_such_package" in err
    assert not list(tmp_path.iterdir())
