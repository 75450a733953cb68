"""The worked examples of CONTRIBUTING.md run in a folder of their own; every fixture has a source and a licence."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The files of the examples come behind those of the project: saccade.ops.bias_softmax, saccade.backbones.windownet.
CONFTEST = """
import importlib
from pathlib import Path
from support.ops import interpret

interpret()
for name in ("ops", "backbones"):
    importlib.import_module(f"saccade.{name}").__path__.append(str(Path(__file__).parent / name))
importlib.import_module("saccade.backbones.windownet")
"""
RUN = """
import runpy, sys, pytest
sys.path.insert(0, ".")
import conftest
assert pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "tests"]) == 0
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def files_of(page: str) -> dict[str, str]:
    """Return the code blocks that follow the name of their file."""
    return dict(re.findall(r"(?ms)^`([\w/]+\.py)`\n\n```python\n(.*?)^```$", page))


def test_every_fixture_has_its_source():
    folders = {folder.name for folder in (ROOT / "tests" / "fixtures").iterdir() if folder.is_dir()}
    rows = re.findall(
        r"(?m)^\| `(\w+)` \| .*\w.* \| .*\w.* \|$", (ROOT / "tests" / "fixtures" / "README.md").read_text()
    )
    assert set(rows) == folders


def test_examples(tmp_path):
    page = (ROOT / "CONTRIBUTING.md").read_text()
    files = files_of(page)
    assert len(files) == len(re.findall(r"(?m)^```python$", page)) == 8
    for name, code in files.items():
        assert not (ROOT / name).exists()
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    lint = ["--config", str(ROOT / "pyproject.toml"), "--no-cache", "."]
    for command in (["check"], ["format", "--check"]):
        ruff = [Path(sys.executable).with_name("ruff"), *command, *lint]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    (tmp_path / "configs" / "_base_").symlink_to(ROOT / "configs" / "_base_")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (command,) = re.findall(r"(?m)^python (tools/train.py configs/digits/windownet_tiny.py --run-dir .*)$", page)
    train = command.replace("tools/", f"{ROOT}/tools/").split()
    environment = os.environ | dict(PYTHONPATH=str(ROOT / "tests"), OMP_NUM_THREADS="1")
    done = subprocess.run(
        [sys.executable, "-c", RUN, *train], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert (tmp_path / "runs" / "windownet" / "model.safetensors").is_file()
