"""Say what is on pictures, with a model that tools/train.py made.

  python tools/predict.py runs/demo picture.png
  python tools/predict.py runs/pets photos/ --top 3 --json photos.json

Exit codes as of tools/train.py.
"""

import argparse
import sys
from pathlib import Path

from saccade.train import predict
from saccade.train.errors import run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="classes to name for each (default: 3)")
    parser.add_argument("--json", type=Path, help="write the predictions here, too")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    args = parser.parse_args()
    found = []
    for path, classes in predict.predict(args.run, predict.find_images(args.images), args.top, device=args.device):
        print(f"{path}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in classes))
        found.append((path, classes))
    if args.json:
        predict.write(found, args.json)


if __name__ == "__main__":
    sys.exit(run(main))
