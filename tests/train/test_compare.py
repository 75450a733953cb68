"""tools/compare.py puts runs side by side, finished or not, and says what is no run."""

import json

import pytest
from matplotlib import pyplot as plt
from support.runs import records


@pytest.fixture
def runs(tiny, tmp_path):
    folders = [tmp_path / "slow", tmp_path / "fast"]
    for folder, lr in zip(folders, ("1e-4", "5e-3")):
        assert tiny(folder, f"optimizer.lr={lr}", "ema.decay=0.5")[0] == 0
    return folders


def test_scores_and_differences(command, runs, tmp_path):
    code, out, err = command("compare", *runs, "--json", "--out", tmp_path / "comparison.png")
    assert code == 0 and err.strip() == f"wrote {tmp_path / 'comparison.png'}"
    found = json.loads(out)
    assert found["differences"] == {"optimizer.lr": [1e-4, 5e-3]}
    for row, folder in zip(found["runs"], runs, strict=True):
        values = [(max(line["top1"], line["ema_top1"]), line["step"]) for line in records(folder, "val")]
        best = max(value for value, _ in values)
        assert (row["name"], row["score"], row["best"], row["last"]) == (folder.name, "top1", best, values[-1][0])
        assert row["step"] == next(step for value, step in values if value == best)
    assert plt.imread(tmp_path / "comparison.png").std() > 0.02
    code, out, _ = command("compare", *runs)
    assert code == 0 and "optimizer.lr" in out and f"{found['runs'][1]['best']:.2f}" in out


def test_a_run_without_evaluations(command, runs):
    (runs[0] / "log.jsonl").unlink()
    code, out, _ = command("compare", runs[0], "--json")
    (row,) = json.loads(out)["runs"]
    assert code == 0 and row["best"] is None and row["model"] == "test_resnet"
    assert "–" in command("compare", runs[0])[1]


def test_no_run(command, tmp_path):
    code, out, err = command("compare", tmp_path)
    assert (code, out) == (2, "") and f"{tmp_path} is not a run's folder" in err
    code, out, err = command("compare", tmp_path, "--out", tmp_path / "figure.txt")
    assert (code, out) == (2, "") and "--out must be a file that ends in .png" in err
