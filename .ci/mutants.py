"""Mutation testing of files by their own tests: python .ci/mutants.py train/runtime/checkpoint.py … tests/… …

mutmut changes the files in a copy of the tree (build/mutants), where it runs the tests on each mutant in a process that
is forked from one that has imported everything. Prints the share of mutants that a test fails on, and the others as
diffs. In the environment: SELECT, an expression of pytest's -k; ONLY, a pattern of the mutants' names, of which the
last digit makes a sample: '*[37]' is a fifth. Exit codes: 0 at least 85 % were found, 1 fewer, 2 bad arguments.
"""

import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build/mutants"
PACKAGES = ("backbones", "configs", "ops", "tools", "train")
GOAL = 85.0


def prepare(targets: list[str], tests: list[str]) -> None:
    """Copy the tree so that the folders are packages of `saccade`, as installed, as mutmut names mutants by module."""
    shutil.rmtree(COPY, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, COPY / "saccade" / name, ignore=ignored)
    shutil.copytree(ROOT / "tests", COPY / "tests", ignore=ignored)
    pytest_options = re.search(r"(?s)\[tool\.pytest\.ini_options\].*?(?=\n\[)", (ROOT / "pyproject.toml").read_text())
    assert pytest_options
    mutmut = f"""
[tool.mutmut]
source_paths = ["saccade"]
only_mutate = {[f"saccade/{target}" for target in targets]}
also_copy = ["configs", "tools"]
pytest_add_cli_args = {["-m", "not exhaustive", "-p", "no:cacheprovider", "-k", os.environ.get("SELECT", "")]}
pytest_add_cli_args_test_selection = {tests!r}
mutate_only_covered_lines = true
process_isolation = "forkserver"
use_git_change_detection = false
"""
    (COPY / "pyproject.toml").write_text(pytest_options[0] + "\n" + mutmut)
    for name in ("configs", "tools"):
        os.symlink(f"saccade/{name}", COPY / name)


def main() -> int:
    tests = [path for path in sys.argv[1:] if path.startswith("tests/")]
    targets = [path for path in sys.argv[1:] if path not in tests]
    if not tests or not targets or not all((ROOT / path).is_file() for path in sys.argv[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    prepare(targets, tests)
    command = [sys.executable, "-m", "mutmut"]
    only = os.environ.get("ONLY", "*")
    subprocess.run([*command, "run", "--max-children", os.environ.get("CHILDREN", "1"), only], cwd=COPY)
    listed = subprocess.run([*command, "results", "--all", "true"], cwd=COPY, capture_output=True, text=True).stdout
    states = re.findall(r"(?m)^\s*(\S+__mutmut_\d+): (.+?)\s*$", listed)
    states = [(name, state) for name, state in states if fnmatch(name, only)]
    found = [name for name, state in states if state in ("killed", "timeout", "segfault", "suspicious")]
    for name, state in states:
        if state != "killed":  # a timeout may be that of a busy machine
            shown = subprocess.run([*command, "show", name], cwd=COPY, capture_output=True, text=True).stdout
            print(f"{state}: {shown}")
    for target in targets:
        module = "saccade." + target.removesuffix(".py").replace("/", ".") + "."
        of_target = [name for name, _ in states if name.startswith(module)]
        print(f"{target}: {sum(name in found for name in of_target)} of {len(of_target)} mutants found")
    share = 100 * len(found) / max(len(states), 1)
    print(f"{len(found)} of {len(states)} mutants found, {share:.1f} % (goal: {GOAL:g} %)")
    return 0 if states and share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
