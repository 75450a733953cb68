"""List the configs that come with saccade, each with its first line; a word lists those whose name has it.

  saccade configs
  saccade configs biformer
  saccade configs coco/ --json        a JSON object: name -> first line

Exit codes: 0 done, 2 no config's name has the word.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from . import first_line


def list_configs() -> dict[str, Path]:
    """Return the files of the configs by name, such as digits/biformer_t, sorted."""
    spec = importlib.util.find_spec("saccade.configs")
    assert spec is not None and spec.submodule_search_locations
    files = Path(spec.submodule_search_locations[0]).glob("*/*.py")
    chosen = sorted(file for file in files if file.parent.name != "_base_" and file.stem != "__init__")
    return {f"{file.parent.name}/{file.stem}": file for file in chosen}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="a part of the name, such as biformer or coco/")
    parser.add_argument("--json", action="store_true", help="print a JSON object: name -> first line")
    args = parser.parse_args()

    names = list_configs()
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
