"""Checks of `make setup` after the installation.

python tools/setup_check.py torchvision    exit 0 if torchvision's compiled operators load with the installed torch
python tools/setup_check.py timm-tests     unpack timm's own test-suite (from its source archive) into the environment
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


def torchvision_loads() -> bool:
    """Return whether torchvision's operators load: they do not with a torch build that it was not compiled for."""
    code = "import torch, torchvision; torchvision.ops.nms(torch.tensor([[0., 0, 1, 1]]), torch.ones(1), 0.5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"torchvision {version('torchvision')} does not work with torch {version('torch')}: {last}")
    return done.returncode == 0


def fetch_timm_tests() -> Path:
    """Unpack timm's source archive in the environment; tests/test_timm.py runs timm's test suite from there."""
    release = version("timm")
    target = Path(sys.prefix) / "src" / f"timm-{release}"
    if (target / "tests" / "test_models.py").exists():
        return target
    with tempfile.TemporaryDirectory() as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "-d", tmp]
        subprocess.run([*pip, f"timm=={release}"], check=True)
        (archive,) = Path(tmp).glob("timm-*.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
            tar.extractall(target.parent, filter="data")
    return target


if __name__ == "__main__":
    if sys.argv[1:] == ["torchvision"]:
        sys.exit(0 if torchvision_loads() else 1)
    if sys.argv[1:] == ["timm-tests"]:
        sys.exit(0 if fetch_timm_tests() else 1)
    sys.exit(__doc__)
