"""`python -m saccade.timm SCRIPT`: a script that knows timm only meets our models."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import argparse, helper, timm, timm.models

parser = argparse.ArgumentParser()
parser.add_argument("--model")
model = timm.create_model(parser.parse_args().model, num_classes=3, device="meta")
print(__name__, type(model).__name__, model.num_classes, helper.here)
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "saccade.timm", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_runs_a_script_with_our_models(tmp_path):
    """From another folder, with a module beside the script and its own arguments."""
    folder, elsewhere = tmp_path / "scripts", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    (folder / "script.py").write_text(SCRIPT)
    (folder / "helper.py").write_text("here = 'beside'")
    done = run(folder / "script.py", "--model", "patnet_t0", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "__main__ PATNet 3 beside\n"


def test_says_what_is_missing(tmp_path):
    done = run("train.py", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr == (
        "error: script train.py does not exist: give the path of timm's train.py, validate.py, benchmark.py, …\n"
    )
    done = run(cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("Run one of timm's own scripts")
