"""Quantise an exported classifier to int8, by onnxruntime's or OpenVINO's own quantiser (NNCF)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import create_transform
from torch import Tensor

from .data.bad_images import BadImage
from .data.files import image_files
from .data.images import read_image, to_rgb
from .runtime.errors import UserError

MOST = 300  # images that the ranges are calibrated on


class Accuracy(NamedTuple):
    """metric: "top-1", or "agreement" of the likeliest class with the float model's where classes are not known.
    before, after: percent. images: on which. calibrated: number of images for the ranges."""

    metric: str
    before: float
    after: float
    images: int
    calibrated: int


def list_images(folder: Path) -> list[Path]:
    """Return the images in a folder. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"--int8 {folder} is not a folder: give a folder of images")
    images = [Path(name) for name in image_files(folder)]
    if not images:
        raise UserError(f"--int8 {folder} holds no images")
    return images


def quantize(
    file: Path,
    to: str,
    folder: Path,
    facts: dict[str, Any],
    runner: Callable[[Path, str], Callable[[Tensor], Tensor]],
    max_drop: float,
) -> Accuracy:
    """Replace the exported model in `file` by one in int8, and compare their accuracy.

    folder: images; in folders by class where the accuracy is to be measured, else the agreement is. Every fourth image
    or more, at most 300, calibrates; all others are tested on (all where there are fewer than four). facts: OUT.json's.
    runner: opens an exported file. max_drop: percentage points that may be lost.

    Raises UserError for a folder without images, and where more is lost.
    """
    images = list_images(folder)
    every = max(4, -(-len(images) // MOST))
    chosen = images[::every]
    tested = [path for path in images if path not in set(chosen)] or images
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform = create_transform(**{key: facts[key] for key in keys if key in facts})

    def load(paths: list[Path]) -> Iterator[Tensor]:
        for path in paths:
            try:
                yield transform(to_rgb(read_image(path)))[None]
            except BadImage:
                continue

    before = _logits(runner(file, to), load(tested))
    if not len(before):
        raise UserError(f"--int8 {folder} holds no image that can be read")
    made = file.with_name(f"int8{file.suffix}")
    calibrated = (_by_onnxruntime if to == "onnx" else _by_nncf)(file, made, load(chosen))
    after = _logits(runner(made, to), load(tested))
    labels = _labels(tested, facts.get("classes")) if len(before) == len(tested) else None
    if labels is None:
        accuracy = Accuracy("agreement", 100.0, _share(before.argmax(1) == after.argmax(1)), len(before), calibrated)
    else:
        shares = [_share(logits.argmax(1) == labels) for logits in (before, after)]
        accuracy = Accuracy("top-1", *shares, len(before), calibrated)
    if not accuracy.after >= accuracy.before - max_drop:
        raise UserError(
            f"int8 takes the {accuracy.metric} from {accuracy.before:.2f} to {accuracy.after:.2f} %, more than "
            f"--max-drop {max_drop:g} points, so it is not kept: calibrate on more images, or stay with float"
        )
    for path in file.parent.glob(f"{file.stem}.*"):
        path.unlink()
    for path in file.parent.glob("int8.*"):
        path.rename(path.with_stem(file.stem))
    return accuracy


def _logits(model: Callable[[Tensor], Tensor], images: Iterator[Tensor]) -> Tensor:
    outputs = [model(x) for x in images]
    return torch.cat(outputs) if outputs else torch.empty(0, 0)


def _share(correct: Tensor) -> float:
    return 100 * correct.double().mean().item()


def _labels(paths: list[Path], names: list[str] | None) -> Tensor | None:
    """Return the images' classes by their folders' names; None where these are not the model's classes."""
    if not names or not {path.parent.name for path in paths} <= set(names):
        return None
    return torch.tensor([names.index(path.parent.name) for path in paths])


def _by_onnxruntime(file: Path, made: Path, images: Iterator[Tensor]) -> int:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        count = 0

        def get_next(self) -> dict[str, Any] | None:
            for x in images:
                self.count += 1
                return {name: x.numpy()}
            return None

    name = onnx.load(str(file), load_external_data=False).graph.input[0].name
    prepared, reader = file.with_name("prepared.onnx"), Reader()
    quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
    types = dict(activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
    quantize_static(str(prepared), str(made), reader, quant_format=QuantFormat.QDQ, per_channel=True, **types)
    for path in file.parent.glob("prepared.*"):
        path.unlink()
    return reader.count


def _by_nncf(file: Path, made: Path, images: Iterator[Tensor]) -> int:
    import nncf
    import openvino

    samples = [x.numpy() for x in images]
    model = openvino.Core().read_model(file)
    kind = nncf.ModelType.TRANSFORMER
    quantized = nncf.quantize(model, nncf.Dataset(samples), model_type=kind, subset_size=len(samples))
    openvino.save_model(quantized, made, compress_to_fp16=False)
    return len(samples)
