"""What saccade is built with and depends on: pins, hashes, lowest versions, known vulnerabilities."""

import json
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AUDIT = runpy.run_path(str(ROOT / ".ci/audit.py"))
LOWEST = runpy.run_path(str(ROOT / ".ci/lowest.py"))


def advisory(name: str, number: str, **affected) -> dict:
    return dict(id=number, summary="bad", affected=[dict(package=dict(ecosystem="PyPI", name=name), **affected)])


def span(*events: dict) -> dict:
    return dict(ranges=[dict(type="ECOSYSTEM", events=list(events))])


@pytest.fixture
def database(tmp_path):
    advisories = [
        advisory("One_Package", "OPEN", **span(dict(introduced="0"))),
        advisory("one-package", "FIXED", **span(dict(introduced="0"), dict(fixed="1.5"))),
        advisory("one-package", "LATER", **span(dict(introduced="1.6"), dict(fixed="1.7"))),
        advisory("one-package", "UNTIL", **span(dict(introduced="1.0"), dict(last_affected="1.5"))),
        advisory("two", "LISTED", versions=["2.0", "2.1"]),
        advisory("two", "AGAIN", **span(dict(introduced="0"), dict(fixed="1"), dict(introduced="2"))),
        advisory("three", "OTHER", **span(dict(introduced="0"))),
        advisory("two", "WITHDRAWN", **span(dict(introduced="0"))) | dict(withdrawn="2026-01-01T00:00:00Z"),
    ]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for one in advisories:
            archive.writestr(f"{one['id']}.json", json.dumps(one))
    return tmp_path / "all.zip"


def test_audit_without_a_network(tmp_path, database):
    """Ranges of versions, lists of them, names in any spelling; withdrawn advisories are left out."""
    pins = tmp_path / "constraints.txt"
    pins.write_text("# a comment\none-package==1.5; python_version < '3.11'\ntwo==2.1\nfour==4\n")
    found = sorted(line.split(": ")[1].split()[0] for line in AUDIT["audit"](pins, database))
    assert found == ["AGAIN", "LISTED", "OPEN", "UNTIL"]
    done = subprocess.run([sys.executable, ROOT / ".ci/audit.py", pins, database], capture_output=True, text=True)
    assert done.returncode == 1 and "two 2.1: LISTED bad" in done.stdout
    pins.write_text("four==4\n")
    assert list(AUDIT["audit"](pins, database)) == []


def test_the_release_is_built_with_pinned_hashes():
    """Every package is pinned with a hash, at the version that constraints.txt has."""
    pinned = AUDIT["pins"](ROOT / "constraints.txt")
    lines = [line for line in (ROOT / ".ci/release.txt").read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        name, version = re.fullmatch(r"([\w\-]+)==([\d.]+)( --hash=sha256:[0-9a-f]{64})+", line).group(1, 2)
        assert (name.replace("_", "-"), version) in pinned, line
    assert {line.partition("==")[0] for line in lines} == {"build", "packaging", "pyproject_hooks", "setuptools"}


def test_every_requirement_has_a_lowest_version():
    text = (ROOT / "pyproject.toml").read_text()
    found = LOWEST["lowest"](text)
    assert (
        "torch==2.11" in found and "timm==1.0.31" in found and any(line.startswith("pycocotools==") for line in found)
    )
    with pytest.raises(ValueError, match="torch has no lowest version"):
        LOWEST["lowest"](text.replace('"torch>=2.11"', '"torch"'))


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("which", ["lowest", "newest"])
def test_the_lowest_and_the_newest_versions_work(which):
    """An environment of the lowest versions, and one of the newest, imports the package and trains on digits."""
    done = subprocess.run(["make", f"try-{which}"], cwd=ROOT, capture_output=True, text=True)
    if re.search("Could not fetch|No matching distribution|network is unreachable", done.stderr):
        pytest.skip(f"no package index has the {which} versions")
    assert done.returncode == 0 and "done: the best on val" in done.stdout, done.stdout + done.stderr


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_the_simulator_finds_no_race_and_no_access_out_of_bounds():
    """Triton kernels on a simulated GPU, in an environment of its own: Triton's interpreter sees neither."""
    done = subprocess.run(["make", "test-sim"], cwd=ROOT, capture_output=True, text=True)
    if re.search(
        "needs Python 3.12|Could not fetch|No matching distribution|network is unreachable", done.stdout + done.stderr
    ):
        pytest.skip("no Python 3.12 or 3.13, or no package index has the simulator")
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
