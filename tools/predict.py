"""Predict on images, with a model that tools/train.py made.

  python tools/predict.py runs/demo image.png
  python tools/predict.py runs/pets photos/ --top 3 --json photos.json
  python tools/predict.py runs/detector photos/ --threshold 0.5 --out drawings/
  python tools/predict.py runs/detector photos/ --json detections.json --format coco
  python tools/predict.py runs/segmenter photos/ --out maps/ --format png

Images that can't be read are listed at the end, after all others are done. Inputs and other people's files are never
replaced. Exit codes as of tools/train.py: 0 done, 2 an argument is wrong, 65 some images could not be read.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("images", type=Path, nargs="+", help="images, or folders of them")
    parser.add_argument("--top", type=int, help="of a classifier: classes to name for each image (default: 3)")
    parser.add_argument("--threshold", type=float, help="of a detector: the lowest score, from 0 to 1 (default: 0.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions here, too")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the images with their predictions drawn here")
    parser.add_argument(
        "--format",
        choices=["json", "coco", "png"],
        default="json",
        help="coco: --json in COCO's format, of a detector; png: --out gets label maps, of a segmenter",
    )
    parser.add_argument("--max-drawn", type=int, default=50, help="objects drawn on an image (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args()

    from saccade.train import predict

    options = {name: value for name in ("top", "threshold") if (value := getattr(args, name)) is not None}
    predict.run(args.run, args.images, args.json, args.out, args.format, args.device, args.max_drawn, **options)


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
