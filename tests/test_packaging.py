"""What is installed: the folders of the repository as saccade.*, and nothing generic at the top of site-packages."""

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
INSTALLED |= {"tools": "tools"}


def modules() -> set[str]:
    """Every Python file of the installed folders, as it is named in the wheel."""
    return {
        f"saccade/{name}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, name in INSTALLED.items()
        for file in (ROOT / folder).rglob("*.py")
        if folder in ("backbones/integrations", "tools/timm_scripts", "tools/cli")
        or not {"integrations", "timm_scripts", "cli"} & set(file.parts)
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
