"""tools/gpu.py: what of it runs without a GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import saccade.backbones  # noqa: F401  registers the models

ROOT = Path(__file__).parents[2]
SMALL = dict(dims=(32, 32, 32, 32), depths=(1, 1, 1, 1), num_classes=5, img_size=64)


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "tools" / "gpu.py")
    module = sys.modules["gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def small(monkeypatch):
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, img_size=None, **kwargs: create(name, **kwargs))


def test_accuracy_against_float64(gpu, small):
    row = gpu.accuracy("biformer_t", "cpu", **SMALL)
    assert row["passed"]
    assert 0 < row["float32"]["output"] < 1e-5
    assert row["float32"]["gradients"] < 1e-4
    assert 1e-4 < row["bfloat16"]["output"] < 0.1


def test_accuracy_finds_a_wrong_model(gpu, small, monkeypatch):
    monkeypatch.setattr(gpu, "TOLERANCE", {"float32": 1e-12, "bfloat16": 1e-12})
    assert not gpu.accuracy("biformer_t", "cpu", **SMALL)["passed"]


@pytest.mark.exhaustive
def test_rates(gpu, small, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "compile", lambda model: model)
    row = gpu.rates("biformer_t", "cpu", batches=(2,), runs=1, **SMALL)
    forms = {f"{form} {mode} 2" for form in ("eager", "compiled") for mode in ("inference", "training")}
    assert row.keys() == forms | {"passed"}
    for form in forms:
        assert row[form]["images_per_second"] > 0
        assert row[form]["peak_bytes"] > 1000


def test_names_that_fail_or_are_not_run_are_told(gpu, monkeypatch):
    def step(name):
        if name == "b":
            raise RuntimeError("broken")
        monkeypatch.setattr(gpu, "LIMIT", -1 if name == "c" else 540)
        return dict(passed=True)

    result = gpu.within("abcd", step)
    assert result == dict(
        passed=False,
        rows=[dict(model="a", passed=True), dict(model="b", passed=False, error="RuntimeError: broken"),
              dict(model="c", passed=True)],
        not_run=["d"],
    )  # fmt: skip
    monkeypatch.setattr(gpu, "LIMIT", 540)
    assert gpu.within("ac", lambda name: dict(passed=True))["passed"]


def test_a_command_and_its_end(gpu):
    assert gpu.run("-c", "print('done')") == dict(passed=True, tail="done\n")
    failed = gpu.run("-c", "import sys; sys.exit('wrong')")
    assert failed == dict(passed=False, tail="wrong\n")


def test_results_of_parts_are_merged(gpu, tmp_path):
    done = dict(date="2026-01-01", seconds=3)
    machine = dict(gpu="Card X", torch="2.11")
    gpu.write(tmp_path, "card_x", dict(ops=dict(passed=False, tail="1 failed", **done)), machine)
    rows = [dict(model="a", passed=True, float32=dict(output=0.00123456))]
    gpu.write(tmp_path, "card_x", dict(families=dict(passed=True, rows=rows, not_run=["b"], **done)), machine)
    assert json.loads((tmp_path / "gpu_card_x.json").read_text())["parts"].keys() == {"ops", "families"}
    text = (tmp_path / "gpu_card_x.md").read_text()
    assert text.startswith("# Card X\n")
    assert "## ops: failed" in text
    assert "1 failed" in text
    assert "| a | True | output 0.00123 |" in text
    assert "Not run, for time: b." in text


def test_parts_start_files_that_are_there(gpu, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu, "run", lambda *command, **env: commands.append(command) or dict(passed=True, tail=""))
    for part in ("ops", "operators", "models", "digits"):
        assert gpu.PARTS[part]()["passed"]
    assert len(commands) == 4
    for command in commands:
        files = [text for text in command if "/" in text and not text.startswith("runs/")]
        assert files
        assert all((ROOT / file).exists() for file in files)


def test_without_a_gpu_it_says_so(gpu, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main(["ops"])
    assert end.value.code == 2
    assert "this machine has no GPU that torch can use" in capsys.readouterr().err
