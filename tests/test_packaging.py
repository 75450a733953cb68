"""What is installed: the folders of the repository as saccade.*, and nothing generic at the top of site-packages."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).parents[1]
INSTALLED = {folder: folder for folder in ("backbones", "configs", "ops", "train")}
INSTALLED |= {"tools/timm_scripts": "timm", "tools/cli": "cli", "backbones/integrations": "integrations"}
INSTALLED |= {"tools/explainer": "explain"}
INSTALLED |= {"tools": "tools"}


def modules() -> set[str]:
    """Every Python file of the installed folders, as it is named in the wheel."""
    return {
        f"saccade/{name}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, name in INSTALLED.items()
        for file in (ROOT / folder).rglob("*.py")
        if folder in ("backbones/integrations", "tools/timm_scripts", "tools/cli", "tools/explainer")
        or not {"integrations", "timm_scripts", "cli", "explainer"} & set(file.parts)
    }


def test_wheel_holds_the_folders_as_saccade(tmp_path):
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = tmp_path.glob("saccade-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {n for n in names if n.endswith(".py")} == modules()
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"saccade"}
    assert "saccade/__init__.py" not in names  # a namespace: the root of the repository is no package
    assert {n for n in names if n.endswith("py.typed")} == {"saccade/backbones/py.typed", "saccade/ops/py.typed"}
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.exhaustive
def test_installed_from_the_wheel(tmp_path):
    """The wheel, built from the sdist, in a fresh environment and outside the checkout, as a new user has it."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)  # the sdist, and the wheel from it
    assert done.returncode == 0, done.stderr[-3000:]
    (sdist,), (wheel,) = (tmp_path / "dist").glob("*.tar.gz"), (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size < 2e6 and sdist.stat().st_size < 5e6
    with zipfile.ZipFile(wheel) as archive:
        assert {n for n in archive.namelist() if n.endswith(".py")} == modules()
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    python, saccade = str(venv / "bin/python"), str(venv / "bin/saccade")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (venv / "lib").glob("python*/site-packages")
    # torch and the others from here; .pth files in that folder, such as the editable saccade's, are not read
    (site / "borrowed.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    away = tmp_path / "away"
    away.mkdir()

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=away, env=environment)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-3000:])
        return done.stdout

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = run(python, "-c", "import saccade.ops, saccade.configs; print(saccade.ops.__file__)")
    assert where.startswith(str(venv))
    facts = json.loads(run(saccade, "doctor", "--json"))["facts"]
    assert facts["saccade"] == "0.1.0" and facts["torch"] != "not installed"
    assert "digits/biformer_t" in run(saccade, "configs", "digits")
    run(saccade, "train", "digits/biformer_t", "epochs=1", "--run-dir", "run")
    assert json.loads(run(saccade, "test", "run", "--json"))["images"] == 360
    assert "equal to PyTorch" in run(saccade, "export", "run", "model.pt", "--to", "torchscript")
    operator = (
        "import torch; from saccade.ops import channel_attention as f; print(f(torch.ones(1, 4, 4, 24), heads=1).shape)"
    )
    assert run(python, "-c", operator) == "torch.Size([1, 4, 4, 8])\n"
    assert run(python, "-m", "saccade.cli", "zoo", "biformer_t").count("biformer_t") == 1


def test_declared_packages_are_the_folders():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {Path(m).parent.as_posix().replace("/", ".") for m in modules()}
    assert sorted(declared) == sorted(folders)


@pytest.mark.parametrize("package", ["saccade.ops", "saccade.backbones"])
def test_imports_without_the_training_extra(package):
    """Who wants a backbone or an operator needs torch, timm and triton only; and importing prints nothing."""
    extras = ["mmengine", "rich", "matplotlib", "sklearn", "tensorboard", "wandb", "webdataset"]
    code = "import sys, timm; before = set(sys.modules)\n"  # timm imports wandb wherever it finds it
    code += (
        f"import {package}; found = [m for m in {extras} if m in set(sys.modules) - before]; assert not found, found"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr
