"""Predict on images with a model trained by tools/train.py.

  python tools/predict.py runs/demo image.png
  python tools/predict.py runs/pets photos/ --top 3 --json photos.json
  python tools/predict.py runs/detector photos/ --threshold 0.5 --out drawings/
  python tools/predict.py runs/detector photos/ --json detections.json --format coco
  python tools/predict.py runs/segmenter photos/ --out maps/ --format png
  python tools/predict.py runs/detector clip.mp4 --every 10 --out drawings/      each tenth frame of a video
  python tools/predict.py runs/pets --watch inbox/ --format jsonl                new images, until Ctrl-C
  find . -name '*.jpg' | python tools/predict.py runs/pets - --format jsonl > predictions.jsonl

Videos (.mp4, .mov, .avi, .mkv, .webm, …) need PyAV: pip install 'saccade[video]'. Files in a watched folder are waited
for until they are complete.

Images that can't be read are listed at the end, after all others are done. Input files and files that saccade did not
write are never overwritten. Exit codes: 0 done, 2 an argument is wrong, 65 some images could not be read, others as in
tools/train.py.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument(
        "images",
        type=Path,
        nargs="*",
        help="images, videos, or folders of images; -: a list of files on standard input, by line",
    )
    parser.add_argument("--top", type=int, help="classifiers: classes to list per image (default: 3)")
    parser.add_argument("--threshold", type=float, help="detectors: the lowest score, from 0 to 1 (default: 0.5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the predictions to this file")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write images with the predictions drawn on them")
    parser.add_argument(
        "--format",
        choices=["json", "jsonl", "coco", "png"],
        default="json",
        help="jsonl: print a JSON object per image as soon as it is predicted; coco: write --json in COCO's format "
        "(detectors); png: write label maps to --out (segmenters)",
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of a video, each N-th frame (default: 1)")
    parser.add_argument(
        "--watch", type=Path, metavar="FOLDER", help="predict on a folder's images, and new ones, until Ctrl-C"
    )
    parser.add_argument(
        "--interval", type=float, default=1.0, help="seconds between looks at the watched folder (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="images at once (default: %(default)s)")
    parser.add_argument(
        "--max-drawn", type=int, default=50, help="most objects drawn on an image (default: %(default)s)"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available)")
    args = parser.parse_args()

    if not args.images and args.watch is None:
        parser.error("give images or folders of them, or --watch FOLDER")

    from saccade.train import predict
    from saccade.train.runtime.errors import set_options

    set_options(device="--device cpu")
    options = {name: value for name in ("top", "threshold") if (value := getattr(args, name)) is not None}
    predict.run(
        args.run,
        args.images,
        args.json,
        args.out,
        args.format,
        args.device,
        args.max_drawn,
        args.batch_size,
        args.every,
        args.watch,
        args.interval,
        **options,
    )


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
