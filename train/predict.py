"""Predict on images, with the model of a finished run."""

import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.progress import track

from .data.bad_images import BadImage, printable
from .data.files import Skipped, image_files
from .data.images import read_image
from safetensors import SafetensorError
from .runtime import config
from .runtime.checkpoint import atomic_write, to_json, write_text
from .runtime.distributed import choose_device
from .runtime.errors import DATA, UserError
from .tasks.classify import Classify
from .tasks.task import Predictor

AUTHOR = "saccade predict"  # the Software entry of the PNG files written here, which may be replaced
LACKING = dict(  # error messages for methods that a task's predictor does not have
    draw="--out needs a task that draws on images, such as detection or segmentation",
    label_map="--format png is for segmenters, which label each pixel",
    to_coco="--format coco is for detectors, which predict boxes",
)
# What readers raise for files that are not as a run writes them.
UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError)


class Prediction(NamedTuple):
    """The prediction on one image. size: (width, height). written: the image file made of it, if any."""

    path: Path
    size: tuple[int, int]
    record: dict[str, Any]
    written: Path | None = None


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths` and, sorted, the image files below its folders, each once.

    The path `-` means the paths in standard input, one per line. Missing files are kept, and reported when they are
    read. Raises UserError if there are no files.
    """
    files: dict[Path, None] = {}
    given: list[Path] = []
    for path in paths:
        given += [Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip()] if str(path) == "-" else [path]
    for path in given:
        if path.is_dir():
            skipped = Skipped()
            files |= dict.fromkeys(map(Path, image_files(path, skipped)))
            skipped.report(path)
        else:
            files[path] = None
    if not files:
        what = "standard input" if [str(path) for path in paths] == ["-"] else ", ".join(map(str, paths))
        raise UserError(f"{what} holds no images: give image files or folders of them")
    if not any(map(os.path.exists, files)):
        raise UserError(f"the image {next(iter(files))} does not exist")
    return list(files)


def predictor(run_dir: Path, device: str | None = None, **options: Any) -> Predictor:
    """Load the model of a finished run's folder, or a classifier that timm's `local-dir:` reads.

    options: of the task's predictor. Raises UserError for a folder without a model, and for an option that its task
    does not have.
    """
    if not (run_dir / "model.safetensors").is_file():
        raise UserError(f"{run_dir} has no model.safetensors: give the folder of a finished run")
    settings = config.load(run_dir / "config.py") if (run_dir / "config.py").exists() else {}
    task = settings["task"]["type"] if settings else Classify
    for name in options:
        if name not in inspect.signature(task.predictor).parameters:
            raise UserError(f"--{name} does not apply to {run_dir}, whose task is {task.__name__}")
    chosen = choose_device(device)
    try:
        return task.predictor(run_dir, settings, chosen, **options)
    except UNFIT as error:
        # A run's files are data, and may be another's: whatever is wrong with them is no fault of the program.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{run_dir} does not hold what a run writes ({reason}): train it again") from error


@torch.inference_mode()
def predict(
    model: Predictor,
    images: Sequence[Path],
    batch_size: int = 8,
    out: Path | None = None,
    maps: bool = False,
    max_drawn: int = 50,
) -> Iterator[Prediction | BadImage]:
    """Yield the prediction of each image, or the error of one that can't be read or predicted on.

    out: a folder where each image is written as a PNG with its prediction drawn on it or, with `maps`, as its label
    map; only files written by this function are replaced. max_drawn: objects drawn on an image.
    """
    names = OutputNames(out, images) if out is not None else None
    for first in range(0, len(images), batch_size):
        opened: list[tuple[Path, Image.Image]] = []
        for path in images[first : first + batch_size]:
            try:
                opened.append((path, read_image(path)))
            except BadImage as error:
                yield error
        for (path, image), record in zip(opened, _predict_each(model, opened)):
            if isinstance(record, BadImage):
                yield record
                continue
            written = None
            if names is not None:
                drawn = model.label_map(record) if maps else model.draw(image, record, max_drawn)
                written = names.choose(path)
                information = PngImagePlugin.PngInfo()
                information.add_text("Software", AUTHOR)
                with atomic_write(written) as temporary:
                    drawn.save(temporary, "PNG", pnginfo=information)
            yield Prediction(path, image.size, record, written)


def _predict_each(model: Predictor, opened: Sequence[tuple[Path, Image.Image]]) -> list[dict[str, Any] | BadImage]:
    """Return the record of each image, or its error if the model can't process it."""
    if not opened:
        return []
    try:
        return model.predict([image for _, image in opened])
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError, MemoryError) as error:
        if len(opened) > 1:  # one image, or the batch as a whole, is too large
            return [result for one in opened for result in _predict_each(model, [one])]
        (path, image), reason = opened[0], (str(error).strip().splitlines() or [type(error).__name__])[0]
        return [BadImage(str(path), f"of {image.width}x{image.height} pixels can't be predicted on ({reason})")]


class OutputNames:
    """Chooses a file name in `folder` for the output of each image, never that of an input or of a user's own file.

    Names that differ in case only count as equal, as in some file systems.
    """

    def __init__(self, folder: Path, images: Sequence[Path]):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {folder} is a file: give a folder")
        self.folder = folder
        inputs = {os.path.realpath(path) for path in images}
        own = (path for path in (folder.iterdir() if folder.is_dir() else ()) if not _may_replace(path, inputs))
        self.taken = {path.name.casefold() for path in own}

    def choose(self, image: Path) -> Path:
        """Return IMAGE'S NAME.png or, where that is taken, IMAGE'S NAME_1.png and so on."""
        number, name = 0, f"{image.stem}.png"
        while name.casefold() in self.taken:
            number += 1
            name = f"{image.stem}_{number}.png"
        self.taken.add(name.casefold())
        return self.folder / name


def _may_replace(path: Path, inputs: set[str]) -> bool:
    """Whether a file is an output of an earlier prediction and no input of this one."""
    if path.is_symlink() or os.path.realpath(path) in inputs or path.suffix.lower() != ".png":
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == AUTHOR
    except (OSError, ValueError, SyntaxError):
        return False


def run(
    run_dir: Path,
    paths: Sequence[Path],
    json_file: Path | None = None,
    out: Path | None = None,
    form: str = "json",
    device: str | None = None,
    max_drawn: int = 50,
    batch_size: int = 8,
    **options: Any,
) -> None:
    """Print the predictions on images, and a summary; write them as JSON or images.

    json_file, out: see tools/predict.py, whose --format is `form`. batch_size: images per batch.
    options: of the task's predictor. Raises UserError (code 65) at the end where images could not be read or predicted
    on, which are listed.
    """
    if form == "coco" and json_file is None:
        raise UserError("--format coco needs --json FILE, the file to write")
    if form == "png" and out is None:
        raise UserError("--format png needs --out FOLDER, where the label maps are written")
    if max_drawn < 1:
        raise UserError(f"--max-drawn must be 1 or more objects, got {max_drawn}")
    if batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more images, got {batch_size}")
    images = find_images(paths)
    if json_file is not None:
        check_json(json_file, images)
    model = predictor(run_dir, device, **options)
    asked = dict(to_coco=form == "coco", label_map=form == "png", draw=out is not None and form != "png")
    for method, sentence in LACKING.items():
        if asked[method] and getattr(type(model), method) is getattr(Predictor, method):
            raise UserError(sentence)
    done: list[Prediction] = []
    bad: list[BadImage] = []
    results = predict(model, images, batch_size, out, form == "png", max_drawn)
    # A bar on a terminal, unless the lines go there: then they show the progress.
    hidden = not sys.stderr.isatty() or sys.stdout.isatty()
    for result in track(results, "predicting", len(images), console=Console(stderr=True), disable=hidden):
        if isinstance(result, BadImage):
            bad.append(result)
            continue
        done.append(result)
        if form == "jsonl":
            print(to_json(_entry(result)), flush=True)
            continue
        written = f" -> {printable(str(result.written))}" if result.written else ""
        print(f"{printable(str(result.path))}: {model.describe(result.record)}{written}")
    if len(images) > 1:
        summary = f"{len(done)} images: {model.summarize([one.record for one in done])}"
        print(summary, file=sys.stderr if form == "jsonl" else sys.stdout)
    if json_file is not None:
        write(done, json_file, model if form == "coco" else None)
    if bad:
        listed = "; ".join(f"{error.name} {error.reason}" for error in bad)
        raise UserError(f"{len(bad)} of {len(images)} images are left out: {listed}", DATA)


def check_json(file: Path, images: Sequence[Path]) -> None:
    """Raise UserError where --json would replace something else than earlier predictions."""
    if file.is_dir():
        raise UserError(f"--json {file} is a folder: give a file")
    if file.exists() and (os.path.realpath(file) in map(os.path.realpath, images) or not _holds_predictions(file)):
        raise UserError(f"--json {file} exists and holds no predictions: choose another name")


def _holds_predictions(file: Path) -> bool:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if isinstance(content, dict):
        return isinstance(content.get("info"), dict) and content["info"].get("description") == AUTHOR
    return isinstance(content, list) and all(isinstance(one, dict) and "image" in one for one in content)


def write(predictions: Sequence[Prediction], file: Path, coco: Predictor | None = None) -> None:
    """Write predictions as JSON: [{"image": path, … the record}, …], or in COCO's format as the predictor has it."""
    if coco is not None:
        text = to_json(coco.to_coco([one[:3] for one in predictions]) | dict(info=dict(description=AUTHOR)))
    else:
        text = "[\n" + ",\n".join(to_json(_entry(one)) for one in predictions) + "\n]"  # a line for each image
    write_text(file, text + "\n")


def _entry(one: Prediction) -> dict[str, Any]:
    return dict(image=str(one.path), **(dict(written=str(one.written)) if one.written else {}), **one.record)
