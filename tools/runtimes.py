"""Models in the runtimes that tools/benchmark.py times: PyTorch, its compiler, onnxruntime and OpenVINO."""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from saccade.train.export import list_missing
from torch import Tensor, nn

FORMATS = {"onnxruntime": "onnx", "openvino": "openvino"}  # what `saccade export` calls the files of a runtime
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}  # of the largest output


def missing(runtime: str) -> str | None:
    """Return what is missing for a runtime, and how to install it; None if nothing is."""
    return list_missing(FORMATS[runtime]) if runtime in FORMATS else None


def prepare(runtime: str, model: nn.Module, x: Tensor, dtype: str, threads: int) -> Callable[[], Any]:
    """Return a function that runs a model in evaluation mode on the images x (B, 3, H, W).

    dtype: "float32" or "bfloat16": by autocast in PyTorch, by OpenVINO's hint; onnxruntime has none on CPUs. Raises
    ValueError for that, and where the outputs are not those of PyTorch in float32: more than TOLERANCE apart.
    """
    with torch.inference_mode():
        expected = model(x)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # converters print a lot
        warnings.simplefilter("ignore")
        run, output = MAKERS[runtime](model, x, dtype, threads)
    difference = float((output() - expected).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE[dtype]:
        raise ValueError(f"its outputs differ from eager's by {difference:.1e} of the largest")
    return run


def _torch(model: nn.Module, x: Tensor, dtype: str, threads: int) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    def run() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return model(x).float()

    return run, run


def _inductor(model: nn.Module, x: Tensor, dtype: str, threads: int) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    torch._dynamo.reset()
    return _torch(torch.compile(model, fullgraph=True), x, dtype, threads)


def _onnxruntime(
    model: nn.Module, x: Tensor, dtype: str, threads: int
) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    import onnxruntime

    if dtype != "float32":
        raise ValueError(f"onnxruntime computes in float32 on CPUs, not in {dtype}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        file = str(Path(folder) / "model.onnx")
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}

    def run() -> np.ndarray:
        return session.run(None, given)[0]

    return run, lambda: torch.from_numpy(run())


def _openvino(model: nn.Module, x: Tensor, dtype: str, threads: int) -> tuple[Callable[[], Any], Callable[[], Tensor]]:
    import openvino

    with torch.no_grad():
        converted = openvino.convert_model(torch.export.export(model, (x,)))
    hints = {"INFERENCE_PRECISION_HINT": "f32" if dtype == "float32" else "bf16", "INFERENCE_NUM_THREADS": threads}
    request = openvino.Core().compile_model(converted, "CPU", hints).create_infer_request()
    given = {0: x.numpy()}

    def run() -> np.ndarray:
        return next(iter(request.infer(given).values()))

    return run, lambda: torch.from_numpy(run().astype(np.float32))


MAKERS = dict(eager=_torch, inductor=_inductor, onnxruntime=_onnxruntime, openvino=_openvino)
