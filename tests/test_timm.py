"""timm's own model suite passes on our models; `make setup` fetches it, timm's source archive."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from support.timm_suite import SMALLEST

HERE = Path(__file__).parent
SUITE = Path(sys.prefix) / "src" / f"timm-{version('timm')}"


@pytest.mark.both_cores
@pytest.mark.timeout(1200)
def test_timms_own_suite():
    if not (SUITE / "tests" / "test_models.py").exists():
        pytest.skip(f"timm's source archive is not unpacked at {SUITE}: `make setup` fetches it")
    command = [sys.executable, "-m", "pytest", "-p", "support.timm_suite", "-p", "no:cacheprovider", "-q", "-n", "2"]
    command += ["--import-mode=importlib", f"--rootdir={SUITE}", "-c", str(SUITE / "pyproject.toml")]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(SUITE / "tests" / "test_models.py")], capture_output=True, text=True, env=env)
    summary = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, done.stdout[-6000:]
    # timm's suite has at least 9 tests for every model; fewer means that it no longer finds ours.
    import saccade.backbones  # noqa: F401
    import timm

    patterns = os.environ.get("SACCADE_TIMM_SUITE", SMALLEST).split()
    models = {name for pattern in patterns for name in timm.list_models(pattern)}
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) >= 9 * len(models), summary
    assert "skipped" not in summary, summary
