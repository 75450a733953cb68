"""Exports a model to a file for another runtime, kept only if that runtime's outputs agree with PyTorch's."""

import contextlib
import importlib.util
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from .models.detectors import Detector, to_onnx
from .models.segmenter import Segmenter
from .predict import predictor
from .runtime.checkpoint import as_os_error, write_json
from .runtime.errors import UserError, closest, from_os

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
BATCHES = 1, 2, 5  # that an exported model is compared at; it is made from the second


class Exported(NamedTuple):
    """files: what was written. difference: the largest between the file's outputs and the model's, over the largest
    output; batches: at which they were compared."""

    files: list[Path]
    difference: float
    batches: tuple[int, ...]


def export(
    model: str | Path, out: Path, to: str, size: Sequence[int] | None = None, checkpoint: Path | None = None
) -> Exported:
    """Export a model to `out`, for images of one size and any batch size; OUT.json says how to prepare images.

    model: the folder of a finished run, or a name that timm knows, whose weights are in `checkpoint` (None: untrained).
    to: onnx, torch-export, torchscript or openvino. size: (height, width) of the images; None: the model's own.
    A classifier's input is (B, 3, H, W), normalised by OUT.json's mean and std, its output logits (B, num_classes). A
    segmenter's is from 0 to 1, its output logits (B, num_classes, H / s, W / s). A detector is written as ONNX only, of
    one image: see saccade.train.models.detectors.to_onnx.

    Raises UserError for a model or format that is not supported, files that exist, packages that are missing, and a
    file whose results are not the model's, which is removed.
    """
    if to not in SUFFIXES:
        raise UserError(f"--to must be one of {', '.join(SUFFIXES)}, got {to}{closest(to, SUFFIXES)}")
    if out.suffix != SUFFIXES[to]:
        raise UserError(f"the output of --to {to} must end in {SUFFIXES[to]}, got {out}")
    missing = [package for package in NEEDS.get(to, ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"--to {to} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    sidecar = out.with_suffix(".json")
    for file in (out, sidecar, *([out.with_suffix(".bin")] if to == "openvino" else [])):
        if file.exists():
            raise UserError(f"{file} exists: give another name, or remove it first")
    net, facts = _load(model, checkpoint)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"--size must be two numbers of pixels, height and width, 1 or more, got {list(size)}")
    shape = tuple(size) if size is not None else tuple(facts["input_size"][1:])
    facts["input_size"] = [3, *shape]
    if isinstance(net, Detector) and to != "onnx":
        raise UserError(f"a detector is exported as onnx only, got --to {to}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            made = Path(folder) / out.name
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # exporters print a lot
                warnings.simplefilter("ignore")
                if isinstance(net, Detector):
                    found = _export_detector(net, made, shape)
                else:
                    found = _export(net, made, to, shape)
            written = []
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, out.with_name(file.name))
                written.append(out.with_name(file.name))
        write_json(sidecar, facts)
    except OSError as error:
        raise from_os(as_os_error(error), f"writing {out}") from error
    return Exported([*written, sidecar], *found)


def _load(model: str | Path, checkpoint: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model in evaluation mode, and the content of OUT.json: how to prepare its images."""
    names: Sequence[str] | None = None
    if Path(model).is_dir():
        if checkpoint is not None:
            raise UserError(f"--checkpoint goes with a model's name; {model} is a run, with weights of its own")
        loaded = predictor(Path(model), "cpu")
        net, names = loaded.model, loaded.class_names
    else:
        if not timm.is_model(str(model).partition(".")[0]):
            raise UserError(f"there is no run and no model {model}{closest(str(model), timm.list_models())}")
        file = {} if checkpoint is None else dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(checkpoint)))
        net = timm.create_model(str(model), **file)
    facts = (
        resolve_data_config(model=net)
        if not hasattr(net, "backbone")
        else dict(resolve_data_config(pretrained_cfg=net.pretrained_cfg))
    )
    facts = {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}
    if isinstance(net, (Detector, Segmenter)):  # which normalise images themselves
        facts |= dict(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    elif hasattr(net, "lift"):
        raise UserError(f"{model} is a lifter of several cameras, which is not exported")
    if names:
        facts["classes"] = list(names)
    return net.eval(), facts


def _export(net: nn.Module, file: Path, to: str, size: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    inputs = [torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch)) for batch in BATCHES]
    x = inputs[1]
    dynamic = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    try:
        with torch.no_grad():
            if to == "torchscript":
                torch.jit.save(torch.jit.trace(net, x, check_trace=False), str(file))
            elif to == "torch-export":
                torch.export.save(torch.export.export(net, (x,), dynamic_shapes=dynamic), file)
            elif to == "openvino":
                import openvino

                program = torch.export.export(net, (x,), dynamic_shapes=dynamic)
                openvino.save_model(openvino.convert_model(program), file, compress_to_fp16=False)
            else:
                names = dict(input_names=["images"], output_names=["logits"])
                program = torch.onnx.export(net, (x,), dynamo=True, dynamic_shapes=dynamic, verbose=False, **names)
                program.save(str(file))
    except (RuntimeError, ValueError, TypeError, NotImplementedError, torch.onnx.OnnxExporterError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{type(net).__name__} cannot be written as {to} for {size[0]}x{size[1]}: {reason}") from error
    return _compare(net, _runner(file, to), inputs), BATCHES


def _runner(file: Path, to: str) -> Callable[[Tensor], Tensor]:
    """Return the file's model as a function, in its own runtime."""
    if to == "torchscript":
        return torch.jit.load(str(file))
    if to == "torch-export":
        return torch.export.load(file).module()
    if to == "openvino":
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # processors with bf16 or AMX use it by default
        compiled = openvino.Core().compile_model(file, "CPU", exact)
        return lambda x: torch.from_numpy(compiled(x.numpy())[0])
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {argument.name: x.numpy()})[0])


def _compare(net: nn.Module, theirs: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest output. Raises UserError where that is more than rounding's."""
    worst = 0.0
    for x in inputs:
        with torch.no_grad():
            expected, found = net(x), theirs(x)
        if found.shape != expected.shape:
            raise UserError(f"the exported model gives {tuple(found.shape)} where {tuple(expected.shape)} is expected")
        difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
        if not difference <= 1e-3:
            raise UserError(
                f"the exported model computes something else at a batch of {len(x)} (it differs by {difference:.1e} of "
                "the largest output), so it is not kept"
            )
        worst = max(worst, difference)
    return worst


def _export_detector(net: Detector, file: Path, size: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
    """Write a detector as ONNX; compare boxes and scores, whose order is the same if no two scores are equal."""
    import onnxruntime

    to_onnx(net, (size[0], size[1]), file)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    image = torch.rand(3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (expected,) = net([image])
    scores = torch.from_numpy(session.run(["scores"], {"image": image.numpy()})[0])
    if scores.shape != expected["scores"].shape:
        raise UserError(
            f"the exported detector finds {len(scores)} objects where {len(expected['scores'])} are expected"
        )
    difference = (scores - expected["scores"]).abs().max().item() if len(scores) else 0.0
    if not difference <= 1e-3:
        raise UserError(f"the exported detector's scores differ by {difference:.1e}, so it is not kept")
    return difference, (1,)
