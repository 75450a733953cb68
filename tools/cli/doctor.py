"""Print the versions, the device and what is missing, with what each absence costs.

  saccade doctor
  saccade doctor --json | jq .missing

Exit codes: 0 always, also where something is missing.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from saccade.train.runtime.compilers import find_cpp_compiler

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
    "onnxscript": ("export", "no export to ONNX"),
    "onnxruntime": ("export", "no export to ONNX, whose files it runs and quantises"),
    "openvino": ("openvino", "no export to OpenVINO"),
    "nncf": ("openvino", "no int8 for OpenVINO"),
    "av": ("video", "no predictions on videos"),
    "shtab": ("completion", "no completion by the tab key"),
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
    if facts["triton"] == "not installed":
        missing.append(("triton", "on a GPU too, operators run as plain PyTorch"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            facts[f"device {i}"] = f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}"
    else:
        facts["device"] = f"CPU only, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        missing.append(("a GPU that PyTorch sees", "operators run as plain PyTorch, not as Triton's kernels"))
    fault = _torchvision_fault()
    facts["torchvision's operators"] = "work" if fault is None else fault
    if fault is not None:
        missing.append(
            (f"a torchvision that fits torch ({fault})", "no detection (NMS, RoIAlign), and JPEG is read slowly")
        )
    facts["C++ compiler"] = compiler = find_cpp_compiler() or "none"
    if compiler == "none":
        missing.append(("a C++ compiler (apt install g++)", "no torch.compile on a CPU, no export to aoti"))
    facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    if facts["NCCL"] == "none":
        missing.append(("NCCL (in PyTorch's builds for CUDA)", "no training on several GPUs; on CPUs gloo is used"))
    with open("/proc/meminfo") if os.path.exists("/proc/meminfo") else contextlib.nullcontext([]) as lines:
        free = [int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable:")]
    facts |= dict(memory=f"{free[0]:.1f} GiB available") if free else {}
    for package, (extra, cost) in OPTIONAL.items():
        if importlib.util.find_spec(package) is None:
            missing.append((f"{package} (pip install 'saccade[{extra}]')", cost))
    return facts, missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print a JSON object: facts, missing")
    args = parser.parse_args()
    facts, missing = examine()
    if args.json:
        print(json.dumps(dict(facts=facts, missing=[dict(what=what, cost=cost) for what, cost in missing]), indent=2))
        return 0
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    print("\nmissing:" if missing else "\nnothing is missing")
    for what, cost in missing:
        print(f"  {what}\n      without it: {cost}")
    return 0
