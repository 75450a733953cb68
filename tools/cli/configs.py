"""List the configs that come with saccade, each with its first line; a word lists those whose name has it."""

import argparse
import json
import sys
from pathlib import Path

from . import first_line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="a part of the name, such as biformer or coco/")
    parser.add_argument("--json", action="store_true", help="print a JSON object: name -> first line")
    args = parser.parse_args()

    import saccade.configs

    folder = Path(saccade.configs.__file__).parent
    files = sorted(file for file in folder.glob("*/*.py") if file.parent.name != "_base_" and file.stem != "__init__")
    names = {f"{file.parent.name}/{file.stem}": file for file in files}
    chosen = {name: first_line(file) for name, file in names.items() if args.word in name}
    if not chosen:
        groups = ", ".join(sorted({name.partition("/")[0] for name in names}))
        print(f"error: no config's name has {args.word!r}: there are those of {groups}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(chosen, indent=2))
        return 0
    width = max(map(len, chosen))
    for name, line in chosen.items():
        print(f"{name:<{width}}  {line}")
    return 0
