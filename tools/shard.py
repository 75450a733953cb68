"""Write ImageNet, or a folder of class folders, as webdataset shards.

  python tools/shard.py /data/imagenet /data/shards --split train --samples 8192 --shuffle 0 --workers 8
  python tools/shard.py /data/imagenet /data/shards --split val --workers 8

SOURCE is a folder with train and val, a folder with ILSVRC2012's original tar files, or a folder of class folders,
which is split randomly. OUT gets SPLIT-000000.tar …, and index.json with the contents and checksums. After an
interruption, the same command resumes. Exit codes: 0 done, 2 an error to fix (one sentence says what), 65 damaged data,
74 a file could not be written.
"""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the images")
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    parser.add_argument("--samples", type=int, default=8192, help="images per shard (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="number of processes (default: one per core)"
    )
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the images, for sequential readers")
    parser.add_argument("--resize", type=int, metavar="PIXELS", help="downscale larger images to this shorter side")
    args = parser.parse_args()
    # Imported here, so that --help is fast.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from saccade.train.data import shards
    from saccade.train.data.imagenet import ImageNet

    bar = Progress(BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), expand=True)
    with bar:
        task = bar.add_task("", total=None)
        names = shards.write(
            ImageNet(str(args.source)),
            args.split,
            args.out,
            args.samples,
            args.workers,
            args.shuffle,
            args.resize,
            lambda images, total: bar.update(task, completed=images, total=total),
        )
    print(f"{args.out}: {names[0]} … {names[-1]}, listed in index.json")


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
