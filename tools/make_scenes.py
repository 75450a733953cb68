"""Write scenes for detection and segmentation, from images that ship with scikit-learn and scikit-image.

  python tools/make_scenes.py runs/data/scenes                   digits on photographs: 600 train, 60 val, 150 test
  python tools/make_scenes.py runs/data/coins --coins            24 coins: train on the left half, test on the right
  python tools/make_scenes.py runs/data/coloured --ink any       overlapping digits in any colour: a harder task
  python tools/make_scenes.py runs/data/large --size 320 --train 5000 --seed 1

OUT gets coco/ and ade20k/ in these layouts, or one of them with --format. The same command does not write existing
scenes again. Exit codes: 0 done, 2 an error to fix (one sentence says what), 74 a file could not be written.
"""

import argparse
import json
import sys
from pathlib import Path

COUNTS = dict(train=600, val=60, test=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="an empty or new folder")
    parser.add_argument("--format", choices=["coco", "ade20k", "both"], default="both")
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"{split} scenes (default: {count})")
    parser.add_argument("--size", type=int, default=160, help="image size in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the scenes (default: %(default)s)")
    parser.add_argument(
        "--ink", choices=["light", "any"], default="light", help="colours of digits (default: %(default)s)"
    )
    parser.add_argument("--coins", action="store_true", help="write scikit-image's coins instead of digits")
    args = parser.parse_args()
    for name, least in dict(train=1, val=1, test=1, size=32, seed=0).items():
        if getattr(args, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(args, name)}")
    # Imported here, so that --help is fast.
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    from saccade.train.data import scenes
    from saccade.train.runtime.errors import UserError

    if args.coins:  # a single photograph in two halves, without options
        unused = [name for name in (*COUNTS, "size", "seed", "ink") if getattr(args, name) != parser.get_default(name)]
        if unused:
            raise UserError(f"--{unused[0]} applies to scenes of digits and has no effect with --coins")
    arguments = json.dumps({key: value for key, value in vars(args).items() if key != "out"})
    file = args.out / scenes.ARGUMENTS_FILE
    if file.is_file() and file.read_text(encoding="utf-8") == arguments:
        print(f"{args.out} already exists")
        return
    formats = scenes.FORMATS if args.format == "both" else (args.format,)
    if args.coins:
        scenes.write_coins(args.out, formats, arguments)
    else:
        counts = {split: getattr(args, split) for split in COUNTS}
        columns = BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, expand=True, disable=not sys.stdout.isatty()) as bar:
            task = bar.add_task("", total=None)
            scenes.write(
                args.out,
                formats,
                counts,
                args.size,
                args.seed,
                args.ink,
                arguments,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
    print(f"{args.out}: " + ", ".join(f"{name}/" for name in formats))


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
