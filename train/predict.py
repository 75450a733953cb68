"""Predict on images, with the model of a finished run."""

import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import timm
import torch
from PIL import Image, PngImagePlugin
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from torch import nn

from .data.bad_images import BadImage, printable
from .data.files import Skipped, image_files
from .data.images import read_image
from .data.video import Frame, is_video, read_frames
from .models.build import create
from .models.weights import read_weights
from .runtime import config
from .runtime.checkpoint import atomic_write, label_names, to_json, write_text
from .runtime.distributed import choose_device
from .runtime.errors import DATA, UserError, closest, first_line
from .tasks.classify import Classify
from .tasks.task import Predictor, Task

AUTHOR = "saccade predict"  # the Software entry of the PNG files written here, which may be replaced
# What readers raise for files that are not as a run writes them.
UNFIT = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError, SafetensorError)
LACKING = dict(  # error messages for methods that a task's predictor does not have
    draw="--out needs a task that draws on images, such as detection or segmentation",
    label_map="--format png is for segmenters, which label each pixel",
    to_coco="--format coco is for detectors, which predict boxes",
)


class Prediction(NamedTuple):
    """The prediction on one image. size: (width, height). written: the image file made of it, if any. frame: of a
    video, whose path then ends in #NUMBER."""

    path: Path
    size: tuple[int, int]
    record: dict[str, Any]
    written: Path | None = None
    frame: Frame | None = None


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
    settings, task = _read_run(run_dir)
    for name in options:
        if name not in inspect.signature(task.predictor).parameters:
            raise UserError(f"--{name} does not apply to {run_dir}, whose task is {task.__name__}")
    chosen = choose_device(device)
    with _own_files(run_dir):
        return task.predictor(run_dir, settings, chosen, **options)


class Loaded(NamedTuple):
    """A model in evaluation mode. predictor: of a run, unless it is a lifter's. class_names: where they are known.
    inputs: how a run prepares images, as timm names it."""

    model: nn.Module
    predictor: Predictor | None = None
    class_names: list[str] | None = None
    inputs: dict[str, Any] | None = None


def load_model(
    spec: str | Path,
    checkpoint: Path | None = None,
    pretrained: bool = False,
    device: str | None = None,
    new_head: bool = False,
) -> Loaded:
    """Load the model of a finished run's folder, or one by a name that timm knows.

    checkpoint: weights for a name, with as many classes as the file names; pretrained: those that timm publishes;
    neither: untrained ones, always the same. new_head: a classifier in the file that does not fit is left out. Raises
    UserError with near names for a misspelt model, and for files that can't be read or don't fit.
    """
    if Path(spec).is_dir():
        run_dir = Path(spec)
        if checkpoint is not None or pretrained:
            option = "--checkpoint" if checkpoint is not None else "--pretrained"
            raise UserError(f"{option} goes with a model's name; {spec} is a run, with weights of its own")
        settings, task = _read_run(run_dir)
        if not task.of_lifters:
            loaded = predictor(run_dir, device)
            return Loaded(loaded.model, loaded, loaded.class_names)
        with _own_files(run_dir):
            names = label_names(run_dir)
            inputs = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["data_config"]
            arguments = {key: value for key, value in settings["task"].items() if key != "type"}
            net = task(SimpleNamespace(class_names=names), **arguments).restore(run_dir, settings["model"])
        return Loaded(net.to(choose_device(device)).eval(), None, names, inputs)
    check_model(spec)
    spec = str(spec)
    if checkpoint is not None and pretrained:
        raise UserError("--checkpoint and --pretrained exclude each other: give one of them")
    weights = None if checkpoint is None else read_weights(checkpoint)
    names = weights.class_names if weights else None
    num_classes = len(names) if names else timm.get_pretrained_cfg(spec).num_classes
    torch.manual_seed(0)
    net = create(spec, num_classes, checkpoint=weights, new_head=new_head, pretrained=pretrained)
    return Loaded(net.to(choose_device(device)).eval(), None, names)


def check_model(spec: str | Path) -> None:
    """Raise UserError, with near names, for what is neither a folder nor a model that timm knows."""
    spec = str(spec)
    if not Path(spec).is_dir() and not timm.is_model(spec.partition(".")[0]):
        raise UserError(f"there is no run and no model {spec}{closest(spec, timm.list_models())}")


def _read_run(run_dir: Path) -> tuple[dict[str, Any], type[Task]]:
    """Return a run's config, {} for a classifier of timm's, and its task."""
    if not run_dir.is_dir():
        raise UserError(f"there is no run {run_dir}: give the folder of a finished run")
    if not (run_dir / "model.safetensors").is_file():
        raise UserError(f"{run_dir} has no model.safetensors: give the folder of a finished run")
    settings = config.load(run_dir / "config.py") if (run_dir / "config.py").exists() else {}
    return settings, settings["task"]["type"] if settings else Classify


@contextmanager
def _own_files(run_dir: Path) -> Iterator[None]:
    """Raise UserError for what goes wrong in the block because a run's files are not as a run writes them."""
    try:
        yield
    except UNFIT as error:
        # A run's files are data, and may be another's: whatever is wrong with them is no fault of the program.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"{run_dir} does not hold what a run writes ({reason}): train it again") from error


@torch.inference_mode()
def predict(
    model: Predictor,
    images: Sequence[Path],
    batch_size: int = 8,
    out: "Path | OutputNames | None" = None,
    maps: bool = False,
    max_drawn: int = 50,
    every: int = 1,
) -> Iterator[Prediction | BadImage]:
    """Yield the prediction of each image or frame of a video, or the error of one that can't be read or predicted on.

    out: a folder where each image is written as a PNG with its prediction drawn on it or, with `maps`, as its label
    map; only files written by this function are replaced. max_drawn: objects drawn on an image. every: of a video,
    each so many-th frame, from the first.
    """
    names = OutputNames(out, images) if isinstance(out, Path) else out
    batch: list[tuple[Path, Image.Image, Frame | None]] = []

    def finish() -> Iterator[Prediction | BadImage]:
        for (path, image, frame), record in zip(batch, _predict_each(model, [one[:2] for one in batch])):
            if isinstance(record, BadImage):
                yield record
                continue
            written = None
            if names is not None:
                drawn = model.label_map(record) if maps else model.draw(image, record, max_drawn)
                written = names.choose(path if frame is None else Path(str(path).rpartition("#")[0]), frame)
                information = PngImagePlugin.PngInfo()
                information.add_text("Software", AUTHOR)
                with atomic_write(written) as temporary:
                    drawn.save(temporary, "PNG", pnginfo=information)
            yield Prediction(path, image.size, record, written, frame)
        batch.clear()

    for opened in _open(images, every):
        if isinstance(opened, BadImage):
            yield opened
            continue
        batch.append(opened)
        if len(batch) == batch_size:
            yield from finish()
    yield from finish()


def _open(images: Sequence[Path], every: int) -> Iterator[tuple[Path, Image.Image, Frame | None] | BadImage]:
    """Yield each image and each frame of a video with its name, or the error of one that can't be read."""
    for path in images:
        try:
            if is_video(path):
                for frame in read_frames(path, every):
                    yield Path(f"{path}#{frame.number:06}"), frame.image, frame
            else:
                yield path, read_image(path), None
        except BadImage as error:
            yield error


def _predict_each(model: Predictor, opened: Sequence[tuple[Path, Image.Image]]) -> list[dict[str, Any] | BadImage]:
    """Return the record of each image, or its error if the model can't process it."""
    if not opened:
        return []
    try:
        return model.predict([image for _, image in opened])
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError, MemoryError) as error:
        if len(opened) > 1:  # one image, or the batch as a whole, is too large
            return [result for one in opened for result in _predict_each(model, [one])]
        path, image = opened[0]
        reason = f"of {image.width}x{image.height} pixels can't be predicted on ({first_line(error)})"
        return [BadImage(str(path), reason)]


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

    def choose(self, image: Path, frame: Frame | None = None) -> Path:
        """Return IMAGE'S NAME.png or, where that is taken, IMAGE'S NAME_1.png and so on; of a video NAME_000012.png."""
        stem = image.stem if frame is None else f"{image.stem}_{frame.number:06}"
        number, name = 0, f"{stem}.png"
        while name.casefold() in self.taken:
            number += 1
            name = f"{stem}_{number}.png"
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
    every: int = 1,
    watch: Path | None = None,
    interval: float = 1.0,
    **options: Any,
) -> None:
    """Print the predictions on images, and a summary; write them as JSON or images.

    json_file, out: see tools/predict.py, whose --format is `form`. batch_size: images per batch. every: of a video,
    each so many-th frame. watch: a folder whose new images are predicted until SIGINT or SIGTERM; it is searched each
    `interval` seconds. options: of the task's predictor. Raises UserError (code 65) at the end where images could not
    be read or predicted on, which are listed.
    """
    if form == "coco" and json_file is None:
        raise UserError("--format coco needs --json FILE, the file to write")
    if form == "png" and out is None:
        raise UserError("--format png needs --out FOLDER, where the label maps are written")
    if max_drawn < 1:
        raise UserError(f"--max-drawn must be 1 or more objects, got {max_drawn}")
    if batch_size < 1:
        raise UserError(f"--batch-size must be 1 or more images, got {batch_size}")
    if every < 1:
        raise UserError(f"--every must be 1 or more frames, got {every}")
    if watch is not None:
        check_watch(watch, paths, out, interval)
    images = find_images(paths) if watch is None else []
    if json_file is not None:
        check_json(json_file, images)
    model = predictor(run_dir, device, **options)
    asked = dict(to_coco=form == "coco", label_map=form == "png", draw=out is not None and form != "png")
    for method, sentence in LACKING.items():
        if asked[method] and getattr(type(model), method) is getattr(Predictor, method):
            raise UserError(sentence)
    names = OutputNames(out, images) if out is not None else None
    done: list[Prediction] = []
    bad: list[BadImage] = []

    def show(results: Iterator[Prediction | BadImage]) -> None:
        for result in results:
            if isinstance(result, BadImage):
                bad.append(result)
                continue
            done.append(result)
            if form == "jsonl":
                print(to_json(_entry(result)), flush=True)
                continue
            written = f" -> {printable(str(result.written))}" if result.written else ""
            print(f"{printable(str(result.path))}: {model.describe(result.record)}{written}", flush=watch is not None)

    predict_on = partial(predict, model, batch_size=batch_size, out=names, maps=form == "png", max_drawn=max_drawn)
    if watch is not None:
        for group in new_images(watch, interval):
            show(predict_on(group))
    else:
        # A bar on a terminal, unless the lines go there: then they show the progress.
        hidden = not sys.stderr.isatty() or sys.stdout.isatty()
        total = None if any(map(is_video, images)) else len(images)
        bar = dict(console=Console(stderr=True), disable=hidden)
        show(track(predict_on(images, every=every), "predicting", total, **bar))
    if len(images) > 1 or watch is not None or any(one.frame for one in done):
        summary = f"{len(done)} images: {model.summarize([one.record for one in done])}"
        print(summary, file=sys.stderr if form == "jsonl" else sys.stdout)
    if json_file is not None:
        write(done, json_file, model if form == "coco" else None)
    if bad:
        listed = "; ".join(f"{error.name} {error.reason}" for error in bad)
        raise UserError(f"{len(bad)} of {len(done) + len(bad)} images are left out: {listed}", DATA)


def check_watch(folder: Path, paths: Sequence[Path], out: Path | None, interval: float) -> None:
    """Raise UserError for a folder that can't be watched."""
    if paths:
        raise UserError(f"--watch {folder} takes the place of images: leave out {paths[0]}")
    if not folder.is_dir():
        raise UserError(f"--watch {folder} is not a folder")
    if out is not None and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(folder)):
        raise UserError(f"--out {out} is inside the watched folder, whose images are predicted on: give one elsewhere")
    if not 0 < interval < float("inf"):
        raise UserError(f"--interval must be more than 0 seconds, got {interval:g}")


def new_images(folder: Path, interval: float, patience: float = 10.0) -> Iterator[list[Path]]:
    """Yield groups of image files below a folder: those that are there, then new and changed ones, until a signal.

    A file is yielded when its size and time have stayed the same for an interval and it can be opened as an image, or
    after `patience` seconds of no change. SIGINT and SIGTERM end the generator after the current group.
    """
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    seen: dict[Path, tuple[float, int]] = {}  # as predicted on
    waiting: dict[Path, tuple[tuple[float, int], float]] = {}  # as last looked at, and since when it is unchanged
    try:
        while not stop.is_set():
            ready = []
            for path in map(Path, image_files(folder)):
                try:
                    stat = path.stat()
                except OSError:  # gone again
                    continue
                version, now = (stat.st_mtime, stat.st_size), time.monotonic()
                if seen.get(path) == version:
                    continue
                if path not in waiting or waiting[path][0] != version:
                    waiting[path] = version, now
                    continue
                if _is_complete(path) or now - waiting[path][1] > patience:
                    seen[path] = waiting.pop(path)[0]
                    ready.append(path)
            if ready:
                yield ready
            stop.wait(interval)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _is_complete(path: Path) -> bool:
    try:
        read_image(path)
    except BadImage:
        return False
    return True


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
    entry: dict[str, Any] = dict(image=str(one.path))
    if one.frame is not None:
        entry |= dict(frame=one.frame.number, seconds=one.frame.seconds)
    return entry | (dict(written=str(one.written)) if one.written else {}) | one.record
