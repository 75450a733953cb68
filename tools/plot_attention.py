"""Plot what a model attends to on images: for one region of each, the regions it attends to, by stage.

    python tools/plot_attention.py runs/demo photo.jpg --out attention.png

The model is a run's folder or a name that timm knows, of a family with `attended_regions` (BiFormer, Sparsifiner).
"""

import argparse
import sys
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder of a finished run, or the name of a model")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument(
        "--size", type=int, default=224, help="pixels per side that images are resized to (default 224)"
    )
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import saccade.backbones  # noqa: F401
import timm
import torch
from saccade.train.data.bad_images import BadImage
from saccade.train.data.images import read_image
from saccade.train.runtime.errors import UserError, run
from saccade.train.visual.attention import plot_attended_regions
from timm.data import create_transform, resolve_data_config


def main() -> None:
    args = make_parser().parse_args()
    is_run = Path(args.model).is_dir()
    name = f"local-dir:{args.model}" if is_run else args.model
    model = timm.create_model(name, pretrained=is_run).eval()
    if not hasattr(model, "attended_regions"):
        raise UserError(f"{args.model} has no attended_regions: give a BiFormer or a Sparsifiner")
    inputs = resolve_data_config(model=model) | dict(input_size=(3, args.size, args.size), crop_pct=1.0)
    transform = create_transform(**inputs)
    try:
        x = torch.stack([transform(read_image(path)) for path in args.images])
    except BadImage as error:
        raise UserError(str(error)) from error
    print(f"wrote {plot_attended_regions(model, x, [path.stem for path in args.images], args.out)}")


if __name__ == "__main__":
    sys.exit(run(main))
