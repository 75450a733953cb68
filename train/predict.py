"""What a trained model finds on pictures."""

import inspect
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .data.images import read_image
from .runtime import config
from .runtime.checkpoint import atomic_write, write_text
from .runtime.distributed import choose_device
from .runtime.errors import UserError
from .tasks.classify import Classify
from .tasks.task import Predictor


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths` and, sorted, the image files below its folders. Raises UserError where one has none."""
    extensions = set(Image.registered_extensions())
    found = []
    for path in paths:
        if path.is_dir():
            below = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
            images = sorted(p for p in below if p.suffix.lower() in extensions and not p.name.startswith("."))
            if not images:
                raise UserError(f"{path} holds no images")
            found += images
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"there is no picture {path}")
    return found


def predictor(run_dir: Path, device: str | None = None, **options: Any) -> Predictor:
    """The model of a finished run's folder, or a classifier's that timm's `local-dir:` reads; options are the task's.

    Raises UserError for a folder without a model and for an option that its task does not have.
    """
    if not (run_dir / "model.safetensors").is_file():
        raise UserError(f"{run_dir} has no model.safetensors: give the folder of a finished run")
    settings = config.load(run_dir / "config.py") if (run_dir / "config.py").exists() else {}
    task = settings["task"]["type"] if settings else Classify
    for name in options:
        if name not in inspect.signature(task.predictor).parameters:
            raise UserError(f"--{name} does not go with {run_dir}, whose task is {task.__name__}")
    return task.predictor(run_dir, settings, choose_device(device), **options)


@torch.inference_mode()
def predict(
    run_dir: Path,
    images: Sequence[Path],
    batch: int = 8,
    device: str | None = None,
    drawings: Path | None = None,
    **options: Any,
) -> Iterator[tuple[Path, dict[str, Any], str]]:
    """Yield (path, what was found as JSON can hold it, the same in a line) for each image.

    drawings: a folder where each image is written as a PNG with what was found on it. options: of the task, such as
    `top` of a classifier. Raises UserError for a folder without a model and for a file that can't be read as an image.
    """
    model = predictor(run_dir, device, **options)
    names: set[str] = set()
    for first in range(0, len(images), batch):
        part = images[first : first + batch]
        pictures = [read_image(path) for path in part]
        for path, picture, record in zip(part, pictures, model.batch(pictures)):
            if drawings is not None:
                drawn = model.draw(picture, record)
                drawings.mkdir(parents=True, exist_ok=True)
                name = next(
                    n for i in range(len(names) + 1) if (n := f"{path.stem}{f'_{i}' if i else ''}") not in names
                )
                names.add(name)
                with atomic_write(drawings / f"{name}.png") as temporary:
                    drawn.save(temporary, "PNG")
            yield path, record, model.say(record)


def write(predictions: Sequence[tuple[Path, dict[str, Any]]], file: Path) -> None:
    """As JSON: [{"image": path, … what was found}, …]."""
    write_text(file, json.dumps([dict(image=str(path), **record) for path, record in predictions], indent=1) + "\n")
