"""Print the versions, the device and what is missing, with what each absence costs."""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

# Package -> the extra that brings it, and what is missed without it.
OPTIONAL = {
    "mmengine": ("train", "no training, evaluation or prediction"),
    "webdataset": ("train", "no training from tar shards"),
    "matplotlib": ("train", "no figures of runs"),
    "tensorboard": ("train", "no trackers='tensorboard'"),
    "wandb": ("train", "no trackers='wandb'"),
    "pycocotools": ("coco", "no metric and no masks of COCO"),
    "faster_coco_eval": ("coco", "COCO's metric takes eight times as long"),
    "onnx": ("export", "no export to ONNX"),
    "onnxruntime": ("export", "exported models are not run"),
    "nuscenes": ("bev", "not nuScenes' own metric, but ours"),
    "mmdet": ("mm", "no use in MMDetection"),
    "mmseg": ("mm", "no use in MMSegmentation"),
}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _torchvision_fault() -> str | None:
    """Return the fault of torchvision's compiled operators, or None; another process tries, as a mismatch can crash."""
    code = "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it crashes"])[-1]


def examine() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Return the facts of this machine, and what is missing: (what, what that costs)."""
    import torch

    facts = {"python": f"{platform.python_version()} on {platform.platform()}"}
    facts |= {name: _version(name) or "not installed" for name in ("saccade", "torch", "torchvision", "timm", "triton")}
    missing: list[tuple[str, str]] = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            facts[f"device {i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    else:
        facts["device"] = f"CPU only, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        missing.append(("a GPU that PyTorch sees", "operators run as plain PyTorch, not as Triton's kernels"))
    if (fault := _torchvision_fault()) is not None:
        missing.append(
            (f"a torchvision that fits torch ({fault})", "no detection (NMS, RoIAlign), and JPEG is read slowly")
        )
    if importlib.util.find_spec("triton") is None:
        missing.append(("triton", "on a GPU too, operators run as plain PyTorch"))
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        missing.append(("a C++ compiler", "no torch.compile on a CPU"))
    if torch.cuda.is_available() and not torch.distributed.is_nccl_available():
        missing.append(("NCCL", "no training on several GPUs"))
    for package, (extra, cost) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            missing.append((f"{package} (pip install 'saccade[{extra}]')", cost))
    return facts, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    args = parser.parse_args()
    facts, missing = examine()
    if args.json:
        print(json.dumps(dict(facts=facts, missing=[dict(what=what, cost=cost) for what, cost in missing]), indent=2))
        return 0
    for name, fact in facts.items():
        print(f"{name:<12} {fact}")
    print("\nmissing:" if missing else "\nnothing is missing")
    for what, cost in missing:
        print(f"  {what}\n      without it: {cost}")
    return 0
