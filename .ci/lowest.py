"""Print the lowest versions that pyproject.toml allows, as constraints: python .ci/lowest.py > lowest.txt"""

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXTRAS = ("train", "coco")  # what the main job needs, with the core


def lowest(text: str) -> list[str]:
    """Return "name==version" for every requirement of the core and EXTRAS in the text of a pyproject.toml."""
    project = tomllib.loads(text)["project"]
    listed = [*project["dependencies"], *(one for extra in EXTRAS for one in project["optional-dependencies"][extra])]
    found = []
    for requirement in map(Requirement, listed):
        bounds = [spec.version for spec in requirement.specifier if spec.operator in (">=", "==")]
        if len(bounds) != 1:
            raise ValueError(f"{requirement} has no lowest version")
        found.append(f"{requirement.name}=={re.sub(r'[.]0$', '', bounds[0])}")
    return found


if __name__ == "__main__":
    print("\n".join(lowest((Path(__file__).parents[1] / "pyproject.toml").read_text())))
