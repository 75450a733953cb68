"""tools/benchmark.py runs, compares equals, and writes what it says (its figures are nobody's business here)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from saccade.train import export

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_compares_with_the_published_form(tmp_path):
    small = ["--size", "112", "--batch", "1", "--train-batch", "1", "--runs", "1", "--out", str(tmp_path)]
    done = benchmark("--models", "biformer_t", "--vs", "published", "--dtypes", "bfloat16", *small)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "benchmark.json").read_text())
    kinds = [(r["mode"], r["dtype"]) for r in result["rows"]]
    assert kinds == [("inference", "bfloat16"), ("training", "bfloat16")]
    for row in result["rows"]:
        assert row["ms"] > 0 and row["peer_ms"] > 0 and row["speedup"] > 0
        assert row["peak_mib"] > 0 and row["peer_peak_mib"] > 0
    assert result["machine"]["torch"] and result["gemm_flops_per_second"] > 1e8
    assert (tmp_path / "benchmark.png").stat().st_size > 10_000


def test_unknown_model_is_one_sentence(command):
    code, _, err = command("benchmark", "--models", "biformer_x")
    assert code == 2 and "unknown model 'biformer_x'" in err


def test_mistakes_are_one_sentence(command, tmp_path):
    """Before anything is timed."""
    file = tmp_path / "file"
    file.touch()
    for arguments, sentence in [
        (("--batch", 0), "--batch must be 1 or more, got 0"),
        (("--runs", 0), "--runs must be 1 or more, got 0"),
        (("--device", "tpu"), "'tpu' is not a device: use cpu or cuda"),
        (("--models", "biformer_t,foo=1"), "biformer_t,foo=1 can't be built: BiFormer.__init__() got an unexpected"),
        (("--models", "test_resnet"), "there is no published form of test_resnet here: give a model of timm with --vs"),
        (("--out", file), f"--out {file} is a file: give a folder"),
    ]:
        code, out, err = command("benchmark", *arguments)
        assert code == 2 and out == "" and sentence in err, err


def test_a_peer_of_one_size_is_one_sentence(command):
    message, out, _ = command("benchmark", "--models", "test_resnet", "--vs", "deit_tiny_patch16_224", "--size", 64)
    assert out == "" and "the peer 'deit_tiny_patch16_224' does not run at 64x64, leave out --size: " in message


@pytest.mark.exhaustive
def test_compares_a_fused_model_with_the_form_it_came_from(tmp_path):
    small = ["--size", "64", "--batch", "1", "--runs", "1", "--out", str(tmp_path)]
    done = benchmark("--models", "patnet_t0,spatial_attn=False,fuse", "--vs", "patnet_t0", *small)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert [(r["model"], r["mode"]) for r in rows] == [("patnet_t0,spatial_attn=False,fuse", "inference")]


def test_arguments_that_are_not_literals_are_one_sentence(command):
    code, _, err = command("benchmark", "--models", "biformer_t,img_size=large")
    assert code == 2 and "must be NAME or NAME,argument=value" in err


@pytest.mark.exhaustive
def test_runtimes(tmp_path):
    """Each is compared with eager first; what a runtime can't do is a note in its row."""
    small = ["--size", "64", "--batch", "1", "--runs", "1", "--clock", "cpu", "--out", str(tmp_path)]
    given = ["--runtimes", "eager", "onnxruntime", "openvino", "--dtypes", "float32", "bfloat16"]
    done = benchmark("--models", "ela_resnet18", "--vs", "resnet18", *given, *small)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    assert len(rows) == 12 and {row["model"] for row in rows} == {"ela_resnet18", "resnet18"}
    for row in rows:
        if row["runtime"] == "onnxruntime" and row["dtype"] == "bfloat16":
            assert row["note"] == "onnxruntime computes in float32 on CPUs, not in bfloat16" and "ms" not in row
        else:
            assert row["ms"] > 0 and row["speedup_over_eager"] > 0 and row["speedup_over_other"] > 0, row
            assert row["runtime"] != "eager" or row["speedup_over_eager"] == 1


def test_missing_runtime_is_one_sentence(command, monkeypatch):
    monkeypatch.setitem(export.NEEDS, "openvino", ("no_such_package",))
    code, _, err = command("benchmark", "--models", "biformer_t", "--runtimes", "eager", "openvino")
    assert code == 2 and "--runtimes openvino needs no_such_package (pip install 'saccade[openvino]')" in err
