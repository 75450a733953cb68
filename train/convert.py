"""Write a finished run's model as a file that other programs read."""

from pathlib import Path

import torch

from .models.build import create_features
from .models.openmmlab import to_openmmlab
from .predict import predictor
from .runtime import config
from .runtime.checkpoint import atomic_write, write_text
from .runtime.errors import UserError
from .tasks.classify import Classify
from .tasks.detect import Detect
from .tasks.segment import Segment


def convert(run: Path, out: Path, to: str = "openmmlab") -> list[Path]:
    """Write the model of a run's folder as OpenMMLab's checkpoint `out` (.pth), and its config beside it (.py).

    A detector's or segmenter's is the whole model; a classifier's is its backbone. Returns the two files. Raises
    UserError for a folder without a model, a task that has no such model there, and files that exist.
    """
    if to != "openmmlab":
        raise UserError(f"--to must be openmmlab, got {to}")
    if out.suffix != ".pth":
        raise UserError(f"the output must be a file that ends in .pth, got {out}: give {out.with_suffix('.pth')}")
    files = [out, out.with_suffix(".py")]
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists: give another name, or remove it first")
    if not (run / "config.py").is_file() or not (run / "model.safetensors").is_file():
        raise UserError(f"{run} has no config.py and model.safetensors: give the folder of a finished run")
    settings = config.load(run / "config.py")
    task, names = settings["task"]["type"], []
    if issubclass(task, (Detect, Segment)):
        loaded = predictor(run, "cpu")
        model, names = loaded.model, loaded.class_names
    elif issubclass(task, Classify):
        arguments = {key: value for key, value in settings["model"].items() if key != "pretrained"}
        model = create_features(**arguments, checkpoint=run)
    else:
        raise UserError(f"{run} is of {task.__name__}, which OpenMMLab's libraries have no model for")
    content = to_openmmlab(model, names)
    with atomic_write(out) as temporary:
        torch.save(content, temporary)
    write_text(files[1], content["meta"]["cfg"])
    return files
