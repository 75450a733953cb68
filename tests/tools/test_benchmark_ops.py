"""tools/benchmark_ops.py compares equals, measures nothing whose tests fail, and has a file for every operator."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from saccade.ops.aot import OPERATORS
from support.levels import exhaustive

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("benchmark_ops")


@pytest.fixture
def run(tool, monkeypatch, tmp_path):
    def run(*arguments: str, green: bool = True) -> tuple[int, dict]:
        monkeypatch.setattr(tool, "tested", lambda operator: green)
        monkeypatch.setattr(tool.measure, "copy_rate", lambda *_: 1e10)  # seconds each, and nobody's business here
        monkeypatch.setattr(tool.measure, "gemm_rate", lambda *_: 1e11)
        monkeypatch.setattr(tool, "MOST_SETS", 1)
        monkeypatch.setattr(sys, "argv", ["benchmark_ops.py", "--runs", "1", "--out", str(tmp_path), *arguments])
        status = tool.main()
        return status, json.loads((tmp_path / "operators.json").read_text())

    return run


def test_every_operator_with_kernels_is_compared(tool):
    assert set(OPERATORS) <= set(tool.OPERATORS)


@pytest.mark.parametrize("most", [1, exhaustive(None)])
def test_published_forms_compute_the_same(run, tool, monkeypatch, most):
    """Forward and gradients of every operator at its models' shapes (in make test: the first) on a small image."""
    for name in tool.OPERATORS:
        module = importlib.import_module(f"operators.{name}")
        monkeypatch.setattr(module, "cases", lambda *image, cases=module.cases: cases(*image)[:most])
    modes = ["forward+backward"] if most else list(tool.MODES)
    status, result = run("--images", "1x64x96", "--threads", str(torch.get_num_threads()), "--modes", *modes)
    assert status == 0
    assert {r["operator"] for r in result["rows"]} == set(tool.OPERATORS)
    for row in result["rows"]:
        assert not row["failed"], row
        assert row["ms"] > 0 and row["over_published"] > 0 and row["bytes"] > 0
        assert row["floor_ms"] == 1e3 * max(row["bytes"] / 1e10, row["flops"] / 1e11)


def test_no_time_is_taken_of_what_fails_its_tests(run):
    status, result = run("--operators", "strip_gate", "--images", "1x32x32", green=False)
    assert status == 1
    assert result["rows"] == [] and result["red"] == ["strip_gate"]


def test_one_form_that_computes_something_else_is_left_out(tool):
    case = importlib.import_module("operators.strip_gate").cases(1, 32, 32)[0]
    wrong = case.__class__(**vars(case) | dict(published=lambda *args: 2 * case.published(*args)))
    rates = dict(bytes=1e10, flops=1e11)
    row = tool.compare(wrong, "forward", torch.float32, torch.device("cpu"), 1, rates)
    assert row["over_published"] is None
    assert row["failed"] == {"published": "computes something else"}


def test_an_image_is_three_numbers(run, capsys):
    with pytest.raises(SystemExit):
        run("--images", "224")
    assert "must be BATCHxHEIGHTxWIDTH, as in 8x224x224, got '224'" in capsys.readouterr().err
