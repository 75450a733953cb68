"""What a trained classifier makes of pictures: top classes with their probabilities."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from .checkpoint import write_text
from .data.images import read_image
from .distributed import choose_device
from .errors import UserError
from .model import create


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


@torch.inference_mode()
def predict(
    run_dir: Path, images: Sequence[Path], top: int = 5, batch: int = 32, device: str | None = None
) -> Iterator:
    """Yield (path, [(class name, probability), …]) for each image, the likeliest class first.

    run_dir: a finished run's folder (or any that timm's `local-dir:` reads). Raises UserError for a folder without a
    model and for a file that can't be read as an image.
    """
    if not (run_dir / "model.safetensors").is_file():
        raise UserError(f"{run_dir} has no model.safetensors: give the folder of a finished run")
    settings = json.loads((run_dir / "config.json").read_text())
    place = choose_device(device)
    model = create(f"local-dir:{run_dir}", settings["num_classes"], pretrained=True).to(place).eval()
    names = model.pretrained_cfg.get("label_names") or [str(i) for i in range(model.num_classes)]
    transform = create_transform(**resolve_data_config(model=model))
    for first in range(0, len(images), batch):
        part = images[first : first + batch]
        x = torch.stack([transform(read_image(path)) for path in part]).to(place)
        for path, p in zip(part, model(x).float().softmax(-1).cpu()):
            likeliest = p.topk(min(top, len(names)))
            yield path, [(names[i], v) for i, v in zip(likeliest.indices.tolist(), likeliest.values.tolist())]


def write(predictions: list[tuple[Path, list[tuple[str, float]]]], file: Path) -> None:
    """As JSON: [{"image": path, "classes": [{"name": …, "probability": …}, …]}, …]."""
    rows = [dict(image=str(p), classes=[dict(name=n, probability=v) for n, v in found]) for p, found in predictions]
    write_text(file, json.dumps(rows, indent=1) + "\n")
