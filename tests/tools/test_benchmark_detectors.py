"""tools/benchmark_detectors.py runs, and writes what it says (its figures are nobody's business here)."""

import json

import pytest


@pytest.mark.exhaustive
def test_times_a_detector_beside_torchvision_s(command, tmp_path):
    small = ["--size", "64", "96", "--runs", "1", "--out", tmp_path, "--vs", "torchvision"]
    code, out, _ = command("benchmark_detectors", *small)
    assert code == 0 and "Mask R-CNN" in out
    result = json.loads((tmp_path / "benchmark_detectors.json").read_text())
    kinds = [(row["mode"], row["model"]) for row in result["rows"]]
    assert kinds == [(mode, name) for mode in ("inference", "training") for name in ("saccade", "torchvision")]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in result["rows"])
    assert all(row["speedup"] == row["cpu_speedup"] == 1 for row in result["rows"] if row["model"] == "saccade")


def test_wrong_arguments_are_one_sentence(command):
    code, _, err = command("benchmark_detectors", "--size", "16", "96")
    assert code == 2 and "--size must be two sides of 64 pixels or more, got [16, 96]" in err
    code, _, err = command("benchmark_detectors", "--runs", "0")
    assert code == 2 and "--runs must be 1 or more, got 0" in err
