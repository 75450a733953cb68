"""Compare runs: their scores and what differs in their configs in one table, their curves in one figure.

  python tools/compare.py runs/a runs/b
  python tools/compare.py runs/* --out runs/comparison.png --json

Exit codes: 0 done, 2 an error to fix (one sentence says what), 74 the figure could not be written.
"""

import argparse
import json
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, finished or not")
    parser.add_argument("--out", type=Path, help="write the figure, a PNG, here (default: no figure)")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of tables")
    args = parser.parse_args()

    from rich.console import Console
    from rich.table import Table
    from saccade.train.runtime.errors import UserError
    from saccade.train.visual.comparison import differences, plot_runs, read_run

    if args.out is not None and args.out.suffix.lower() != ".png":
        raise UserError(f"--out must be a file that ends in .png, got {args.out}")
    runs = [read_run(folder.expanduser()) for folder in args.runs]
    changed = differences(runs)
    columns = ("name", "model", "score", "best", "step", "last", "seconds")
    if args.json:
        rows = [{column: run[column] for column in columns} for run in runs]
        text = json.dumps(dict(runs=rows, differences=changed), indent=2, default=str)
        print(text)
    else:
        console = Console(width=None if sys.stdout.isatty() else 200)
        table = Table("run", "model", "metric", "best %", "at step", "last %", "minutes", box=None)
        for run in runs:
            numbers = [f"{run[key]:.2f}" if run[key] is not None else "–" for key in ("best", "last")]
            minutes = f"{run['seconds'] / 60:.1f}" if run["seconds"] is not None else "–"
            step = "–" if run["step"] is None else str(run["step"])
            table.add_row(run["name"], run["model"], run["score"] or "–", numbers[0], step, numbers[1], minutes)
        console.print(table)
        if changed:
            table = Table("key", *[run["name"] for run in runs], box=None)
            for key, values in changed.items():
                table.add_row(key, *["–" if value is None else str(value) for value in values])
            console.print()
            console.print(table)
    if args.out is not None:
        plot_runs(runs, args.out)
        print(f"wrote {args.out}", file=sys.stderr)


if __name__ == "__main__":
    from saccade.train.runtime.errors import run

    sys.exit(run(main))
