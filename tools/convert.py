"""Write the model of a finished run as a file that other programs read.

  python tools/convert.py runs/scenes/mask_rcnn_biformer_t --to openmmlab detector.pth
  python tools/convert.py runs/ade20k/upernet_biformer_s_160k --to openmmlab segmenter.pth

openmmlab: a checkpoint of mmdet or mmseg and, beside it, its config (detector.py), for their tools as they are:
init_detector("detector.py", "detector.pth"). A classifier's file has its backbone, for load_from= in their configs. The
backbone is the SaccadeBackbone of saccade.integrations.mmdet, so saccade must be installed there, too.

Files are never replaced. Exit codes: 0 done, 2 an error to fix (one sentence says what), 74 a file could not be
written.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("out", type=Path, help="the file to write, which ends in .pth")
    parser.add_argument("--to", choices=["openmmlab"], required=True, help="the kind of file")
    args = parser.parse_args()

    from saccade.train.convert import convert  # here, so that --help answers at once

    print(f"reading {args.run} …", flush=True)
    for file in convert(args.run, args.out, args.to):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
