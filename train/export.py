"""Exports a model to a file for another runtime, kept only if that runtime's outputs agree with PyTorch's."""

import contextlib
import importlib.util
import io
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import saccade.backbones  # noqa: F401  (registers the models)
import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from .models.detectors import Detector, of_one_image, to_onnx
from .models.segmenter import Segmenter
from .predict import load_model
from .quantize import Accuracy, list_images, quantize
from .runtime.checkpoint import as_os_error, write_json
from .runtime.compilers import find_cpp_compiler
from .runtime.errors import UserError, closest, from_os

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "aoti": ".pt2", "torchscript": ".pt"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
EXTRAS = {"onnx": "export", "openvino": "openvino"}  # of pip install 'saccade[…]', with these packages
QUANTIZERS = {"onnx": ("onnxruntime",), "openvino": ("nncf",)}
DETECTORS = "onnx", "openvino", "torchscript"  # the formats of detectors, whose outputs have no fixed size
BATCHES = 1, 2, 5  # that an exported model is compared at; it is made from the second
GROWTH = (0, 0), (64, 0), (32, 96)  # pixels by which images are higher and wider where the size is dynamic


class Exported(NamedTuple):
    """files: what was written. difference: the largest between the file's outputs and the model's, over the largest
    output; compared: at which batches and sizes, or how many objects of a detector. accuracy: of int8, before and
    after."""

    files: list[Path]
    difference: float
    compared: str
    accuracy: Accuracy | None = None


def export(
    model: str | Path,
    out: Path,
    to: str,
    size: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    dynamic_size: bool = False,
    int8: Path | None = None,
    max_drop: float = 5.0,
) -> Exported:
    """Export a model to `out`, for any batch size; OUT.json says how to prepare images.

    model: the folder of a finished run, or a name that timm knows, whose weights are in `checkpoint` (None: untrained).
    to: onnx, openvino, torch-export, aoti or torchscript. size: (height, width) of the images; None: the model's own.
    dynamic_size: the file takes images of other sizes too, where the model does. int8: a folder of images, in folders
    by class, on which the ranges of the quantised tensors are calibrated and the accuracy is measured before and after;
    max_drop: percentage points by which it may fall.
    A classifier's input is (B, 3, H, W), normalised by OUT.json's mean and std, its output logits (B, num_classes). A
    segmenter's is from 0 to 1, its output logits (B, num_classes, H / s, W / s). A detector's is one image (3, H, W)
    from 0 to 1, its outputs are boxes (n, 4), scores (n,), labels (n,) and masks (n, 1, H, W), see
    saccade.train.models.detectors.to_onnx.

    Raises UserError for a model or format that is not supported, files that exist, packages or compilers that are
    missing, and a file whose results are not the model's, which is removed.
    """
    if to not in SUFFIXES:
        raise UserError(f"--to must be one of {', '.join(SUFFIXES)}, got {to}{closest(to, SUFFIXES)}")
    if out.suffix != SUFFIXES[to]:
        raise UserError(f"the output of --to {to} must end in {SUFFIXES[to]}, got {out}")
    if int8 is not None and to not in QUANTIZERS:
        raise UserError(f"--int8 is for {' and '.join(QUANTIZERS)}, got --to {to}")
    if missing := list_missing(to, int8 is not None):
        raise UserError(f"--to {to} needs {missing}")
    if to == "aoti" and find_cpp_compiler() is None:
        raise UserError("--to aoti needs a C++ compiler, g++ or clang++ (apt install g++), or $CXX")
    sidecar = out.with_suffix(".json")
    for file in (out, sidecar, *([out.with_suffix(".bin")] if to == "openvino" else [])):
        if file.exists():
            raise UserError(f"{file} exists: give another name, or remove it first")
    net, facts = _load(model, checkpoint)
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"--size must be two numbers of pixels, height and width, 1 or more, got {list(size)}")
    shape = tuple(size) if size is not None else tuple(facts["input_size"][1:])
    facts |= dict(input_size=[3, *shape], format=to, dynamic_size=dynamic_size, int8=int8 is not None)
    if isinstance(net, Detector) and to not in DETECTORS:
        raise UserError(
            f"a detector is exported as {', '.join(DETECTORS)}, got --to {to}: its outputs have no fixed size"
        )
    if isinstance(net, Detector) and dynamic_size:
        raise UserError("a detector is exported for one image size: leave out --dynamic-size, and give it with --size")
    if isinstance(net, (Detector, Segmenter)) and int8 is not None:
        raise UserError("--int8 is for classifiers, whose accuracy it measures before and after")
    if int8 is not None:
        list_images(int8)  # raises before the export, which takes long
    accuracy = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            made = Path(folder) / out.name
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # exporters print a lot
                warnings.simplefilter("ignore")
                if isinstance(net, Detector):
                    found = _export_detector(net, made, to, shape)
                else:
                    found = _export(net, made, to, shape, dynamic_size)
                if int8 is not None:
                    accuracy = quantize(made, to, int8, facts, _runner, max_drop)
            written = []
            for file in sorted(Path(folder).iterdir()):
                os.replace(file, out.with_name(file.name))
                written.append(out.with_name(file.name))
        if accuracy is not None:
            facts["accuracy"] = accuracy._asdict()
        write_json(sidecar, facts)
    except OSError as error:
        raise from_os(as_os_error(error), f"writing {out}") from error
    return Exported([*written, sidecar], *found, accuracy)


def list_missing(to: str, quantized: bool = False) -> str | None:
    """Return the packages that a format needs and that are not installed, and how to install them; None if all are."""
    needed = [*NEEDS.get(to, ()), *(QUANTIZERS[to] if quantized else ())]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    what = f"'saccade[{EXTRAS[to]}]'" if to in EXTRAS else " ".join(missing)
    return f"{', '.join(missing)} (pip install {what})" if missing else None


def _load(model: str | Path, checkpoint: Path | None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model in evaluation mode, and the content of OUT.json: how to prepare its images."""
    loaded = load_model(model, checkpoint, device="cpu")
    net, names = loaded.model, loaded.class_names
    if hasattr(net, "lift") or hasattr(net, "lifter"):
        raise UserError(f"{model} is a lifter of several cameras, which is not exported")
    facts = (
        resolve_data_config(model=net)
        if not hasattr(net, "backbone")
        else dict(resolve_data_config(pretrained_cfg=net.pretrained_cfg))
    )
    facts = {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}
    if isinstance(net, (Detector, Segmenter)):  # which normalise images themselves
        facts |= dict(mean=[0.0, 0.0, 0.0], std=[1.0, 1.0, 1.0])
    if names:
        facts["classes"] = list(names)
    return net, facts


def _export(
    net: nn.Module, file: Path, to: str, size: tuple[int, ...], dynamic_size: bool = False
) -> tuple[float, str]:
    sizes = [tuple(n + more for n, more in zip(size, growth)) for growth in (GROWTH if dynamic_size else GROWTH[:1])]
    inputs = [
        torch.randn(batch, 3, *each, generator=torch.Generator().manual_seed(batch))
        for each in sizes
        for batch in (BATCHES if each == size else BATCHES[:1])
    ]
    x = inputs[1]
    dynamic: dict[int, Any] = {0: torch.export.Dim("batch", min=1, max=4096)}
    if dynamic_size:
        dynamic |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    try:
        with torch.no_grad():
            if to == "torchscript":
                torch.jit.save(torch.jit.trace(net, x, check_trace=False), str(file))
            elif to == "onnx":
                names = dict(input_names=["images"], output_names=["logits"])
                shapes = dict(dynamic_shapes=(dynamic,))
                torch.onnx.export(net, (x,), dynamo=True, verbose=False, **shapes, **names).save(str(file))
            else:
                program = torch.export.export(net, (x,), dynamic_shapes=(dynamic,))
                if to == "torch-export":
                    torch.export.save(program, file)
                elif to == "aoti":
                    torch._inductor.aoti_compile_and_package(program, package_path=str(file))
                else:
                    import openvino

                    openvino.save_model(openvino.convert_model(program), file, compress_to_fp16=False)
        return _compare(net, _runner(file, to), inputs), _describe(sizes)
    except Exception as error:  # each converter and runtime has its own
        if not dynamic_size:
            if isinstance(error, UserError):
                raise
            shape, reason = f"{size[0]}x{size[1]}", _reason(error)
        else:
            own = isinstance(error, (UserError, ValueError))  # ValueError: the model refuses a size
            reason = _reason(error) if own else "its program depends on the size"
            reason += f"; leave out --dynamic-size, and all images have one size, now {size[0]}x{size[1]} (see --size)"
            shape = "images of any size"
        raise UserError(f"{type(net).__name__} cannot be written as {to} for {shape}: {reason}") from error


def _reason(error: Exception) -> str:
    """Return the line of an error that says what is wrong, without colours; OpenVINO's first lines are places in its
    source."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    line = next((line for line in lines if not line.startswith("Exception from ")), lines[0])
    return re.sub(r"\x1b\[[0-9;]*m", "", line)


def _describe(sizes: Sequence[tuple[int, ...]]) -> str:
    batches = f"at batches of {', '.join(map(str, BATCHES))}"
    return batches + (f" and sizes of {', '.join(f'{h}x{w}' for h, w in sizes)}" if len(sizes) > 1 else "")


def _runner(file: Path, to: str) -> Callable[[Tensor], Any]:
    """Return the file's model as a function, in its own runtime; a detector's returns a tuple of its outputs."""
    if to == "torchscript":
        return torch.jit.load(str(file))
    if to == "torch-export":
        return torch.export.load(file).module()
    if to == "aoti":
        return torch._inductor.aoti_load_package(str(file))
    if to == "openvino":
        import openvino

        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # processors with bf16 or AMX use it by default
        compiled = openvino.Core().compile_model(file, "CPU", exact)
        return lambda x: _one_or_all([torch.from_numpy(y.copy()) for y in compiled(x.numpy()).values()])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    return lambda x: _one_or_all([torch.from_numpy(y) for y in session.run(None, {argument.name: x.numpy()})])


def _one_or_all(outputs: list[Tensor]) -> Any:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _compare(net: nn.Module, theirs: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> float:
    """Return the largest difference over the largest output. Raises UserError where that is more than rounding's."""
    worst, made_from = 0.0, inputs[0].shape[2:]
    for x in inputs:
        with torch.no_grad():
            expected = net(x)
            try:
                found = theirs(x)
            except Exception as error:  # each runtime has its own
                if x.shape[2:] == made_from:
                    raise
                made, given = (f"{h}x{w}" for h, w in (made_from, x.shape[2:]))
                raise UserError(f"the file made from images of {made} does not run on images of {given}") from error
        if found.shape != expected.shape:
            raise UserError(f"the exported model gives {tuple(found.shape)} where {tuple(expected.shape)} is expected")
        difference = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
        if not difference <= 1e-3:
            raise UserError(
                f"the exported model computes something else at a batch of {len(x)} of {x.shape[2]}x{x.shape[3]} (it "
                f"differs by {difference:.1e} of the largest output), so it is not kept"
            )
        worst = max(worst, difference)
    return worst


def _export_detector(net: Detector, file: Path, to: str, size: tuple[int, ...]) -> tuple[float, str]:
    """Write a detector for one image of this size; compare its objects on a photograph and on noise."""
    height, width = size
    try:
        if to == "torchscript":
            with torch.no_grad():
                trace = torch.jit.trace(of_one_image(net), torch.rand(3, height, width), check_trace=False)
            torch.jit.save(trace, str(file))
        elif to == "onnx":
            to_onnx(net, (height, width), file)
        else:
            import openvino

            to_onnx(net, (height, width), file.with_suffix(".onnx"))
            openvino.save_model(openvino.convert_model(file.with_suffix(".onnx")), file, compress_to_fp16=False)
            file.with_suffix(".onnx").unlink()
        theirs = _runner(file, to)
        return compare_objects(net, theirs, (height, width))
    except UserError:
        raise
    except Exception as error:  # each converter and runtime has its own
        reason = _reason(error)
        raise UserError(f"{type(net).__name__} cannot be written as {to} for {height}x{width}: {reason}") from error


def compare_objects(
    net: Detector, theirs: Callable[[Tensor], tuple[Tensor, ...]], size: tuple[int, int]
) -> tuple[float, str]:
    """Compare all that a detector finds: scores, labels, boxes (over the image's longer side) and masks.

    Objects whose scores are nearly equal may come in another order: each is compared with the one of the same label
    whose box is closest. Returns the largest difference and what was compared. Raises UserError where it is more than
    rounding's.
    """
    from scipy.optimize import linear_sum_assignment
    from skimage.data import astronaut

    photograph = torch.from_numpy(astronaut()).permute(2, 0, 1)[None] / 255
    images = [torch.nn.functional.interpolate(photograph, size, mode="bilinear", antialias=True)[0]]
    images.append(torch.rand(3, *size, generator=torch.Generator().manual_seed(0)))
    worst, count = 0.0, 0
    for image in images:
        with torch.no_grad():
            (expected,) = net([image])
            found = dict(zip(expected, theirs(image)))
        if found["scores"].shape != expected["scores"].shape:
            count, right = len(found["scores"]), len(expected["scores"])
            raise UserError(f"the exported detector finds {count} objects where {right} are expected")
        if not len(expected["scores"]):
            continue
        distances = torch.cdist(found["boxes"].double(), expected["boxes"].double(), p=1) / max(size)
        unlike = found["labels"][:, None] != expected["labels"][None]
        differ = (found["scores"][:, None] - expected["scores"][None]).abs() > 1e-3
        rows, order = linear_sum_assignment((distances + 1e3 * (unlike | differ)).numpy())
        if (unlike | differ)[rows, order].any():
            raise UserError("the exported detector gives other labels or scores, so it is not kept")
        count += len(order)
        for key in ("scores", "boxes", "masks"):
            if key in expected:
                scale, limit = (max(size), 1e-3) if key == "boxes" else (1, 1e-3 if key == "scores" else 1e-2)
                difference = ((found[key] - expected[key][order]).abs().max() / scale).item()
                if not difference <= limit:
                    raise UserError(f"the exported detector's {key} differ by {difference:.1e}, so it is not kept")
                worst = max(worst, difference)
    what = ", ".join(key for key in ("boxes", "scores", "labels", "masks") if key in expected)
    return worst, f"{what} of {count} objects in two pictures"
