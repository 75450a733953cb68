"""Say what is on pictures, with a model that tools/train.py made.

  python tools/predict.py runs/demo picture.png
  python tools/predict.py runs/pets photos/ --top 3 --json photos.json
  python tools/predict.py runs/detector photos/ --threshold 0.5 --out found/

Exit codes as of tools/train.py.
"""

import argparse
import sys
from pathlib import Path

from saccade.train import predict
from saccade.train.runtime.errors import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--top", type=int, help="of a classifier: classes to name for each (default: 3)")
    parser.add_argument("--threshold", type=float, help="of a detector: least score of what is shown (default: 0.5)")
    parser.add_argument("--json", type=Path, help="write the predictions here, too")
    parser.add_argument("--out", type=Path, help="a folder for the pictures with what was found drawn on them")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args()
    options = {name: value for name in ("top", "threshold") if (value := getattr(args, name)) is not None}
    images = predict.find_images(args.images)
    found = []
    for path, record, line in predict.predict(args.run, images, device=args.device, drawings=args.out, **options):
        print(f"{path}: {line}")
        found.append((path, record))
    if args.json:
        predict.write(found, args.json)


if __name__ == "__main__":
    sys.exit(run(main))
