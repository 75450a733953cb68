"""Which form of an operator runs, and the message when the requested one cannot."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import saccade.backbones
import saccade.ops
import torch
from saccade.ops import backend, dispatch
from saccade.ops.dispatch import use_triton
from support.ops import DEVICE, refuses
from torch._subclasses import FakeTensorMode


def python(code: str, **env) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SACCADE_", "TRITON_"))}
    return subprocess.run([sys.executable, "-c", code], env=clean | env, capture_output=True, text=True)


def test_auto_runs_kernels_on_a_gpu_alone():
    x = torch.ones(2, device=DEVICE)
    assert use_triton(x) == (DEVICE == "cuda")
    assert not use_triton(torch.ones(2))
    assert not use_triton(x.double())
    assert not use_triton(x, torch.ones(2))
    assert not use_triton(x, cannot=["a head dimension of 136"])


def test_asked_for_by_name():
    x = torch.ones(2, device=DEVICE)
    with backend("triton"):
        assert use_triton(x, torch.ones(2, dtype=torch.int64, device=DEVICE))
        with backend("torch"):
            assert not use_triton(x)
        assert use_triton(x)
    assert dispatch._backend == "auto"


def test_the_previous_one_returns_after_an_error():
    with pytest.raises(KeyError), backend("torch"):
        raise KeyError
    assert dispatch._backend == "auto"


def test_a_refusal_names_all_in_one_sentence():
    bad = torch.ones(2, device=DEVICE, dtype=torch.float64)
    with backend("triton"), pytest.raises(RuntimeError) as error:
        use_triton(bad, bad, torch.ones(2, device="meta"), cannot=["a head dimension of 136"])
    assert str(error.value) == (
        "backend 'triton' is set, but the kernels cannot run: a head dimension of 136; "
        "a tensor of torch.float64; kernels take float32, float16 and bfloat16; "
        "a tensor on meta, where kernels do not run"
    )


@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True), ((9, 0), True), ((12, 0), True)])
def test_old_gpus_take_pytorch(capability, runs, monkeypatch):
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert use_triton(x) == runs
    with backend("triton"):
        if runs:
            assert use_triton(x)
        else:
            refuses(use_triton, "cannot run: a GPU older than compute capability 8.0$", x, error=RuntimeError)


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None])
def test_a_wrong_name_is_refused_at_once(name):
    with pytest.raises(ValueError, match=r"^backend must be one of 'triton', 'torch', 'auto', got"):
        backend(name)


def test_environment_sets_the_first_choice():
    code = "import saccade.ops.dispatch as d; print(d._backend)"
    assert python(code, SACCADE_BACKEND="torch").stdout == "torch\n"
    wrong = python(code, SACCADE_BACKEND="cuda").stderr.strip().splitlines()[-1]
    assert wrong == "ValueError: SACCADE_BACKEND must be one of 'triton', 'torch', 'auto', got 'cuda'"


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch, saccade.ops as ops
x = torch.ones(1, 4, 4, 24)
print(ops.bilevel_routing_attention(x, ops.region_routing(x, (2, 2), 1), 1, (2, 2)).shape)
with ops.backend("triton"):
    ops.bilevel_routing_attention(x, ops.region_routing(x, (2, 2), 1), 1, (2, 2))
"""
    run = python(code)
    assert run.stdout == "torch.Size([1, 4, 4, 8])\n", run.stderr
    assert "RuntimeError: backend 'triton'" in run.stderr
    assert "Triton is not installed; a tensor on cpu, where kernels do not run" in run.stderr


def test_operators_set_no_process_wide_flags():
    """They would change other threads' arithmetic, and PyTorch refuses the older ones once the newer ones are used."""
    folders = [Path(package.__file__).parent for package in (saccade.ops, saccade.backbones)]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert len(files) > 50
    flags = re.compile(r"backends[\w.]* *=[^=]|backends[\w.]*flags\(|set_float32_matmul|use_deterministic_algorithms")
    assert flags.search("with torch.backends.cudnn.flags(allow_tf32=False):")
    assert flags.search("torch.backends.cuda.matmul.allow_tf32 = True")
    assert not [str(file) for file in files if flags.search(file.read_text())]


def test_products_in_float32_follow_pytorch(monkeypatch):
    from saccade.ops.tiles import precision

    assert precision(torch.ones(2)) == "ieee"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert precision(torch.ones(2)) == "tf32"
        assert precision(torch.ones(2, dtype=torch.float16)) == "ieee"
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert precision(torch.ones(2)) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


def test_operators_run_with_the_newer_precision_flags():
    code = """
import torch
torch.backends.cudnn.conv.fp32_precision = torch.backends.fp32_precision = "ieee"
from saccade.ops import strip_gate
x = torch.ones(2, 4, 3, 5, requires_grad=True)
strip_gate(x, torch.ones(4, 1, 3), torch.ones(4), torch.ones(4), 2).sum().backward()
print(x.grad.shape)
"""
    run = python(code)
    assert run.stdout == "torch.Size([2, 4, 3, 5])\n", run.stderr


def test_importing_brings_no_kernel():
    code = "import sys, torch; before = set(sys.modules); import saccade.ops; print(sorted(set(sys.modules) - before))"
    run = python(code)
    assert "saccade.ops.bilevel_routing" in run.stdout, run.stderr
    assert "'triton'" not in run.stdout
    assert "saccade.ops.bilevel_routing.kernel" not in run.stdout


def test_the_gpu_is_a_constant_of_compiled_code():
    seen = []

    def f(x):
        return x + 1 if dispatch._is_below_sm_80(None) else x - 1

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    x = torch.ones(2)
    assert torch.equal(torch.compile(f, fullgraph=True, backend=backend)(x), f(x))
    assert len(seen) == 1


def test_both_forms_under_compile():
    def f(x):
        return x + 1 if use_triton(x) else x - 1

    x = torch.ones(2, device=DEVICE)
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    for name in ("torch", "triton", "torch"):
        with backend(name):
            assert torch.equal(compiled(x), f(x))

    def g(x):
        with backend("torch"):
            return f(x)

    assert torch.equal(torch.compile(g, fullgraph=True, backend="eager")(x), x - 1)
    assert dispatch._backend == "auto"


class Saved(torch.nn.Module):
    def forward(self, x):
        return x + (2 if dispatch.is_saved_graph() else 1)


def test_compiled_code_is_no_saved_graph():
    """torch.compile takes torch.compiler.is_exporting() for True, which would keep compiled models from the kernels."""
    x = torch.zeros(2)
    for module in (Saved(), torch.compile(Saved(), fullgraph=True, backend="eager")):
        assert module(x).tolist() == [1, 1]
    for strict in (False, True):
        assert torch.export.export(Saved(), (x,), strict=strict).module()(x).tolist() == [2, 2]
    assert torch.jit.trace(Saved(), x, check_trace=False)(x).tolist() == [2, 2]
