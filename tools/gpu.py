"""Gather on the GPU of this machine the evidence that everything works there, and what it costs.

    python tools/gpu.py                    # everything
    python tools/gpu.py ops families       # or parts of it; each takes at most 10 minutes

    ops          every operator's tests, in float32, float16 and bfloat16
    families     a model of every family, forward and backward, against float64 on the CPU
    tune         launch configurations of the kernels, timed on this card (python -m saccade.ops.tune)
    operators    operators timed against the published arithmetic and the best library call (tools/benchmark_ops.py)
    models       models timed against the published form (tools/benchmark.py)
    compiled     images per second and peak memory, eager and compiled, inference and training, bfloat16, channels-last
    graphs       inference as a CUDA graph: the same output, and its time
    distributed  training on all cards, replicated and sharded
    digits       a real training run to its accuracy

Needs nothing that `make setup` did not install. After each part, docs/results/gpu_CARD.json and .md are written; parts
that did not run keep what they had. The exit status is 1 if a part failed.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
LIMIT = 540  # seconds of a part that chooses how much it does; 600 end any other
FAMILIES = ["agent_swin_t", "agent_deit_t", "biformer_t", "davit_t", "ela_resnet50", "halo_h0", "nat_t", "patnet_t1"]
FAMILIES += ["sparsifiner_deit_s", "ulsam_mobilenet_v1"]
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of relative errors: a wrong kernel errs by 1


def run(*command: str, **env: str) -> dict[str, Any]:
    """Run a Python command in the repository; return whether it passed and the end of what it printed."""
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=600
        )
    except subprocess.TimeoutExpired:
        return dict(passed=False, tail="stopped after 600 seconds")
    return dict(passed=done.returncode == 0, tail=(done.stdout + done.stderr)[-2000:])


def within(names: Iterable[str], step: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """Run step on names until LIMIT is over; rows of what ran, and whether all of them passed. A name that fails is a
    row with the error."""
    rows, left, start = [], [], time.monotonic()
    for name in names:
        if time.monotonic() - start > LIMIT:
            left.append(name)
            continue
        try:
            row = step(name)
        except Exception as error:
            row = dict(passed=False, error=f"{type(error).__name__}: {error}"[:500])
        rows.append(dict(model=name) | row)
    return dict(passed=all(row["passed"] for row in rows) and not left, rows=rows, not_run=left)


def relative(ours, exact) -> float:
    """Return the error of tensors relative to the norm of the exact ones."""
    error = sum((x.double().cpu() - y).square().sum().item() for x, y in zip(ours, exact, strict=True))
    return (error / max(1e-300, sum(y.square().sum().item() for y in exact))) ** 0.5


def accuracy(name: str, device: str, **kwargs) -> dict[str, Any]:
    """Compare a model's output and gradients in float32, and under bfloat16 autocast, with float64 on the CPU."""
    import timm
    import torch

    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).eval().double()
    size = kwargs.get("img_size", 224)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)

    def results(model, x):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        out = out[0] if isinstance(out, tuple) else out
        loss = (out if out.dtype == torch.float64 else out.float()).square().mean()
        grads = torch.autograd.grad(loss, [leaf, *model.parameters()], allow_unused=True)
        return [out.detach()], [g for g in grads if g is not None]

    exact = results(model, x)
    model, x, row = model.to(device, torch.float32), x.to(device, torch.float32), {}
    for dtype in TOLERANCE:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            ours = results(model, x)
        row[dtype] = dict(output=relative(ours[0], exact[0]), gradients=relative(ours[1], exact[1]))
    row["passed"] = all(error <= TOLERANCE[dtype] for dtype in TOLERANCE for error in row[dtype].values())
    return row


def rates(name: str, device: str, batches=(64, 128), modes=("inference", "training"), runs=10, **kwargs):
    """Return images per second and peak memory, eager and compiled, at batches of images."""
    import timm
    import torch
    from saccade.train.runtime.measure import interleaved, peak_allocated, step_of

    row: dict[str, Any] = dict(passed=True)
    size, place = kwargs.get("img_size", 224), torch.device(device)
    for batch in batches:
        x = torch.randn(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
        for mode in modes:
            model = timm.create_model(name, **kwargs).to(device).to(memory_format=torch.channels_last)
            model.train(mode == "training")
            forms = dict(eager=model, compiled=torch.compile(model))
            steps = {form: step_of(m, x, mode, torch.bfloat16) for form, m in forms.items()}
            for form, times in interleaved(steps, runs, place).items():
                row[f"{form} {mode} {batch}"] = dict(
                    images_per_second=round(batch / sorted(times)[len(times) // 2], 1),
                    peak_bytes=peak_allocated(steps[form], place),
                )
    return row


def graph(name: str) -> dict[str, Any]:
    """Record inference as a CUDA graph, and compare its output and time with eager."""
    import timm
    import torch
    from saccade.train.runtime.measure import interleaved

    model = timm.create_model(name).cuda().eval()
    x = torch.randn(8, 3, 224, 224, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                model(x)
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            out = model(x)
        x.copy_(torch.randn_like(x))
        recorded.replay()
        same = torch.equal(out, model(x))
        times = interleaved(dict(graph=recorded.replay, eager=lambda: model(x)), 11, torch.device("cuda"))
    return dict(passed=same, milliseconds={form: round(1e3 * sorted(t)[len(t) // 2], 3) for form, t in times.items()})


def distributed() -> dict[str, Any]:
    import torch

    cards = str(torch.cuda.device_count())
    common = ["configs/digits/biformer_t.py", "--overwrite", "epochs=1"]
    rows = []
    for strategy in ("ddp", "fsdp"):
        arguments = [*common, "--run-dir", f"runs/gpu-{strategy}", f"strategy={strategy}"]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cards}", "tools/train.py"]
        rows.append(dict(model=strategy, cards=int(cards)) | run(*launch, *arguments))
    return dict(passed=all(row["passed"] for row in rows), rows=rows)


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "ops": lambda: run("-m", "pytest", "-q", "-m", "not exhaustive", "tests/ops"),
    "families": lambda: within(FAMILIES, lambda name: accuracy(name, "cuda")),
    "tune": lambda: run("-m", "saccade.ops.tune"),
    "operators": lambda: run("tools/benchmark_ops.py", "--images", "64x224x224", "--out", "runs/gpu-operators"),
    "models": lambda: run(
        "tools/benchmark.py", "--models", "biformer_s", "davit_t", "halo_26t",
        "--vs", "published", "davit_tiny", "halonet26t",
        "--dtypes", "bfloat16", "--batch", "64", "--train-batch", "64", "--out", "runs/gpu-models",
    ),
    "compiled": lambda: within(FAMILIES, lambda name: rates(name, "cuda")),
    "graphs": lambda: within(FAMILIES, graph),
    "distributed": distributed,
    "digits": lambda: run(
        "tools/train.py", "configs/digits/biformer_t.py", "--run-dir", "runs/gpu-digits", "--overwrite"
    ),
}  # fmt: skip


def card() -> str:
    """Return the GPU's name as part of a file's name."""
    import torch

    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")


def write(folder: Path, name: str, parts: dict[str, dict[str, Any]], machine: dict[str, Any]) -> None:
    """Merge the results of parts into gpu_NAME.json, and write gpu_NAME.md from them."""
    file = folder / f"gpu_{name}.json"
    known = json.loads(file.read_text())["parts"] if file.exists() else {}
    known |= parts
    file.write_text(json.dumps(dict(machine=machine, parts=known), indent=1) + "\n")
    lines = [f"# {machine.get('gpu', name)}", "", "Written by `make gpu`.", ""]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    for part, result in known.items():
        state = "passed" if result["passed"] else "failed"
        lines += ["", f"## {part}: {state}", "", f"On {result['date']}, {result['seconds']} seconds."]
        if result.get("not_run"):
            lines += ["", "Not run, for time: " + ", ".join(result["not_run"]) + "."]
        rows = result.get("rows", [])
        if rows:
            columns = list(dict.fromkeys(key for row in rows for key in row if key != "tail"))
            lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
            lines += ["| " + " | ".join(cell(row.get(key, "")) for key in columns) + " |" for row in rows]
        if "tail" in result and not result["passed"]:
            lines += ["", "```", result["tail"].strip(), "```"]
    (folder / f"gpu_{name}.md").write_text("\n".join(lines) + "\n")


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["all"], choices=["all", *PARTS], metavar="PART")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)

    import saccade.backbones  # noqa: F401  registers the models
    import torch
    from saccade.train.runtime.measure import machine

    if not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use")
    names, failed = list(PARTS) if "all" in args.parts else args.parts, 0
    for name in names:
        start = time.monotonic()
        print(f"{name} ...", flush=True)
        result = PARTS[name]()
        result |= dict(date=time.strftime("%Y-%m-%d"), seconds=round(time.monotonic() - start))
        described = dict(gpu=torch.cuda.get_device_name(), cards=torch.cuda.device_count())
        write(args.out, card(), {name: result}, described | machine(torch.device("cuda")))
        print(f"{name} {'passed' if result['passed'] else 'failed'} in {result['seconds']} s", flush=True)
        failed += not result["passed"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
