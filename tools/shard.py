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
    from saccade.train.runtime.errors import UserError

    if not args.source.is_dir():
        raise UserError(f"{args.source} is not a folder: give the folder of the images")
    for option in ("samples", "workers", "resize"):
        if (number := getattr(args, option)) is not None and number < 1:
            raise UserError(f"--{option} must be 1 or more, got {number}")
    source = ImageNet(str(args.source))
    columns = BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, expand=True, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task("", total=None)
        names = shards.write(
            source,
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
