"""torch.hub builds the models from a checkout, whether saccade is installed or not."""

import subprocess
import sys
from pathlib import Path

import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from torch.hub import _import_module

ROOT = Path(__file__).parents[1]


def test_models_by_torch_hub():
    entries = vars(_import_module("hubconf", str(ROOT / "hubconf.py")))
    ours = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("saccade.")}
    assert ours == {name for name, entry in entries.items() if callable(entry) and not name.startswith("_")}
    torch.manual_seed(0)
    model = torch.hub.load(str(ROOT), "biformer_t", source="local", num_classes=5, depths=(1, 1, 1, 1))
    torch.manual_seed(0)
    expected = timm.create_model("biformer_t", num_classes=5, depths=(1, 1, 1, 1))
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model.eval()(x), expected.eval()(x))


def test_without_an_installed_package(tmp_path):
    program = f"""
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
sys.path = [path for path in sys.path if path and "editable" not in path]
assert importlib.util.find_spec("saccade") is None
import torch
model = torch.hub.load({str(ROOT)!r}, "patnet_t0", source="local", num_classes=2, device="meta")
print(type(model).__module__, model.num_classes)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == ["saccade.backbones.patnet", "2"], done.stderr
