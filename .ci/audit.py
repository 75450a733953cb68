"""Compare pinned packages with known vulnerabilities, without a network: python .ci/audit.py constraints.txt all.zip

all.zip: OSV's database for PyPI (https://osv-vulnerabilities.storage.googleapis.com/PyPI/all.zip), one JSON file an
advisory. `make audit` without a database asks PyPI through pip-audit. Exit codes: 0 none known, 1 some, 2 bad input.
"""

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version


def pins(file: Path) -> set[tuple[str, str]]:
    """Return the names and versions of a constraints file; a name may have several, for several Pythons."""
    return {(canonicalize_name(m[1]), m[2]) for m in re.finditer(r"(?m)^([\w.\-]+)==([^\s;]+)", file.read_text())}


def affects(entry: dict, version: str) -> bool:
    """Tell whether one of an advisory's `affected` entries is about a version."""
    if version in entry.get("versions", ()):
        return True
    for span in entry.get("ranges", ()):
        if span.get("type") != "ECOSYSTEM":
            continue
        inside = False
        for event in span["events"]:  # in the order of versions
            kind, bound = next(iter(event.items()))
            try:
                after = bound == "0" or Version(version) >= Version(bound)
            except InvalidVersion:
                continue
            if kind == "introduced" and after:
                inside = True
            elif (kind == "fixed" and after) or (kind == "last_affected" and after and version != bound):
                inside = False
        if inside:
            return True
    return False


def audit(constraints: Path, database: Path) -> Iterator[str]:
    """Yield a line for each pin that an advisory is about."""
    pinned = pins(constraints)
    names = {name for name, _ in pinned}
    with zipfile.ZipFile(database) as archive:
        for file in archive.namelist():
            advisory = json.loads(archive.read(file))
            if "withdrawn" in advisory:
                continue
            for entry in advisory.get("affected", ()):
                name = canonicalize_name(entry["package"]["name"])
                if name in names:
                    for version in sorted(version for other, version in pinned if other == name):
                        if affects(entry, version):
                            yield f"{name} {version}: {advisory['id']} {advisory.get('summary', '')}".rstrip()


def main() -> int:
    if len(sys.argv) != 3 or not all(Path(path).is_file() for path in sys.argv[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    found = sorted(set(audit(Path(sys.argv[1]), Path(sys.argv[2]))))
    print("\n".join(found) or f"no known vulnerabilities in {len(pins(Path(sys.argv[1])))} pins")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
