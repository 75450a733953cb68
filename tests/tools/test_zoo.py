"""docs/zoo.md is what tools/zoo.py writes, and its figures are those that others count."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "zoo.py"


@pytest.fixture(scope="module")
def zoo():
    spec = importlib.util.spec_from_file_location("zoo", TOOL)
    module = sys.modules["zoo"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.exhaustive
def test_page_is_fresh():
    done = subprocess.run([sys.executable, str(TOOL), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_stale_page_is_one_sentence(zoo, tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "zoo.md"
    row = zoo.Row("biformer_t", "saccade.backbones.biformer", (224, 224), 1, 2, 3, counted=True, top1="81.4")
    places = dict(ROOT=tmp_path, PAGE=page, FAMILIES=tmp_path / "docs" / "models")
    for name, value in (places | dict(measure_all=lambda: ([row], 1e-9))).items():
        monkeypatch.setattr(zoo, name, value)
    monkeypatch.setattr(sys, "argv", ["zoo.py"])
    zoo.main()
    monkeypatch.setattr(sys, "argv", ["zoo.py", "--check"])
    zoo.main()
    page.write_text(page.read_text().replace("parameter count |", "davit_tiny |"))
    with pytest.raises(SystemExit, match=r"docs/zoo\.md is stale: run `python tools/zoo\.py`"):
        zoo.main()
    page.write_text(page.read_text().replace("davit_tiny |", "parameter count |"))
    family = tmp_path / "docs" / "models" / "biformer.md"
    assert family.read_text().startswith("# BiFormer\n\nA four-stage pyramid whose tokens attend")
    family.write_text("# BiFormer\n\nMy text.\n\n" + family.read_text().partition("routed to.\n\n")[2] + "More.\n")
    zoo.main()
    family.write_text(family.read_text().replace("81.4", "99.9"))
    with pytest.raises(SystemExit, match=r"docs/models/biformer\.md is stale"):
        zoo.main()
    monkeypatch.setattr(sys, "argv", ["zoo.py"])
    zoo.main()
    text = family.read_text()
    assert "My text." in text and text.endswith("More.\n") and "| `biformer_t` |" in text and "99.9" not in text


@pytest.mark.parametrize(
    ("name", "params", "macs", "activations"),
    [("resnet50", 25.56, 4.09, 11.11), ("convnext_tiny", 28.59, 4.47, 13.44)],
)
def test_counts_are_those_of_timms_tables(zoo, name, params, macs, activations):
    row = zoo.measure_model(name)
    got = row.params / 1e6, row.macs / 1e9, row.activations / 1e6
    assert got == pytest.approx((params, macs, activations), rel=4e-3)  # a norm is no matrix product


@pytest.mark.parametrize(("name", "giga"), [("biformer_t", 2.228), ("davit_t", 4.540)])
def test_macs_are_the_algorithms(zoo, monkeypatch, name, giga):
    """Those counted on the published code, not of what runs on a CPU: BiFormer's third stage is dense there."""
    monkeypatch.setattr(zoo.catalog, "families", dict)
    zoo.measure_all()  # registers the FLOP formulas
    assert zoo.measure_model(name).macs / 1e9 == pytest.approx(giga, rel=0.01)


def test_checks_are_what_the_tests_run(zoo):
    fixtures, counted, rtol = zoo.read_tests()
    assert rtol == 1e-9
    assert {"davit_tiny", "davit_tiny_150x198", "davit_tiny_dense_192x256"} == set(fixtures["davit_t"])
    assert not fixtures["davit_b"] and {"davit_b", "biformer_s"} <= counted
    for names in fixtures.values():
        assert all(list((ROOT / "tests" / "fixtures").glob(f"*/{name}.json")) for name in names)
