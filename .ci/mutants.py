"""Mutation testing of files by their own tests: python .ci/mutants.py train/runtime/checkpoint.py … tests/… …

mutmut makes the mutants, in a copy of the tree (build/mutants). pytest collects the tests once; for each mutant a
forked process runs those that reach its function, until one fails. Prints the mutants that no test fails on as diffs,
and the share of the others. In the environment: SELECT, an expression of pytest's -k; SAMPLE, how many mutants are
drawn (seed 0; default: all). Exit codes: 0 at least 85 % were found, 1 fewer, 2 bad arguments.
"""

import ast
import difflib
import os
import pickle
import random
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPY = ROOT / "build/mutants"
PACKAGES = ("backbones", "configs", "ops", "tools", "train")
GOAL = 85.0
PATIENCE = 10, 20  # a mutant times out after so many times its tests' time, and so many seconds more


def prepare() -> None:
    """Copy the tree so that the folders are packages of `saccade`, as installed."""
    shutil.rmtree(COPY, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, COPY / "saccade" / name, ignore=ignored)
    shutil.copytree(ROOT / "tests", COPY / "tests", ignore=ignored)
    options = re.search(r"(?s)\[tool\.pytest\.ini_options\].*?(?=\n\[)", (ROOT / "pyproject.toml").read_text())
    assert options
    (COPY / "pyproject.toml").write_text(options[0] + '\n[tool.mutmut]\nsource_paths = ["saccade"]\n')
    for name in ("configs", "tools"):
        os.symlink(f"saccade/{name}", COPY / name)


def mutate(target: str) -> tuple[str, list[str]]:
    """Replace a file of the copy by one that holds all its mutants; return its text and the mutants' names."""
    from mutmut.mutation.file_mutation import mutate_file_contents

    file = COPY / "saccade" / target
    mutated = mutate_file_contents(str(file), file.read_text())
    file.write_text(mutated.code)
    return mutated.code, list(mutated.mutant_names)


def difference(code: str, name: str) -> str:
    """Return the lines of a mutant that differ from the original function."""
    wanted = (name.rpartition("__mutmut_")[0] + "__mutmut_orig", name)
    found = {node.name: node for node in ast.walk(ast.parse(code)) if getattr(node, "name", None) in wanted}
    texts = [ast.unparse(found[each]).replace(each, "f").splitlines() for each in wanted]
    return "\n".join(line for line in difflib.unified_diff(*texts, n=0, lineterm="") if line[:3] not in ("---", "+++"))


def forked(function: Callable[[], Any], seconds: float) -> Any:
    """Return what a function returns in a forked process, silently; None if it takes longer or does not end well."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.setpgid(0, 0)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1), os.dup2(silent, 2)
        with os.fdopen(write, "wb") as file:
            pickle.dump(function(), file)
        os._exit(0)
    os.close(write)
    # Killed from here: an alarm in the process would be replaced by that of pytest-timeout.
    alarm = threading.Timer(seconds, lambda: os.killpg(pid, signal.SIGKILL))
    alarm.start()
    with os.fdopen(read, "rb") as file:
        text = file.read()
    alarm.cancel()
    os.waitpid(pid, 0)
    return pickle.loads(text) if text else None


class Mutants:
    """A plugin of pytest that runs the tests on each mutant instead of once. names: "saccade.train.….x_f__mutmut_1"."""

    def __init__(self, names: list[str]):
        self.names, self.states = names, dict[str, str]()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        reached = forked(lambda: self.reach(session), 3600)
        failing = [test for test, (_, failed, _) in (reached or {}).items() if failed]
        if not reached or len(failing) == len(reached):
            raise pytest.UsageError("no test passes without a mutant")
        for test in failing:
            print(f"left out, as it fails without a mutant: {test}")
            del reached[test]
        for number, name in enumerate(self.names, 1):
            function = name.rpartition("__mutmut_")[0]
            tests = [item for item in session.items if function in reached.get(item.nodeid, ((),))[0]]
            tests.sort(key=lambda item: reached[item.nodeid][2])
            expected = sum(reached[item.nodeid][2] for item in tests)
            failed = forked(lambda: self.fails(session, name, tests), PATIENCE[0] * expected + PATIENCE[1])  # noqa: B023
            self.states[name] = {True: "killed", False: "survived", None: "ended or timed out"}[failed]
            if not tests:
                self.states[name] = "not tested"
            if number % 10 == 0:
                print(f"{number} of {len(self.names)}", file=sys.stderr, flush=True)
        return True

    def reach(self, session: pytest.Session) -> dict[str, tuple[set[str], bool, float]]:
        """Run the tests; return for each the functions that it reaches, whether it failed, and its seconds."""
        from mutmut.mutation import trampoline

        hits: set[str] = set()
        trampoline.record_trampoline_hit = lambda name, caller=None: hits.add(name)
        trampoline.set_mutant_under_test("stats")
        reached = {}
        for item, following in zip(session.items, [*session.items[1:], None]):
            before, start = session.testsfailed, time.monotonic()
            hits.clear()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            reached[item.nodeid] = (set(hits), session.testsfailed > before, time.monotonic() - start)
        return reached

    def fails(self, session: pytest.Session, name: str, tests: list[pytest.Item]) -> bool:
        from mutmut.mutation import trampoline

        trampoline.set_mutant_under_test(name)
        for item, following in zip(tests, [*tests[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return True
        return False


def main() -> int:
    tests = [path for path in sys.argv[1:] if path.startswith("tests/")]
    targets = [path for path in sys.argv[1:] if path not in tests]
    if not tests or not targets or not all((ROOT / path).is_file() for path in sys.argv[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    prepare()
    os.chdir(COPY)  # where mutmut reads its settings
    codes: dict[str, str] = {}  # of a mutant: the text of its file
    for target in targets:
        code, names = mutate(target)
        module = "saccade." + target.removesuffix(".py").replace("/", ".")
        codes |= {f"{module}.{name}": code for name in names}
    drawn = list(codes)
    if "SAMPLE" in os.environ:
        drawn = sorted(random.Random(0).sample(drawn, min(len(drawn), int(os.environ["SAMPLE"]))), key=drawn.index)
    sys.path.insert(0, str(COPY))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    run = Mutants(drawn)
    options = [
        "-q",
        "-s",
        "--assert=plain",
        "--tb=native",
        "-m",
        "not exhaustive",
        "-k",
        os.environ.get("SELECT", ""),
        "-p",
        "no:cacheprovider",
    ]
    pytest.main([*options, *tests], plugins=[run])
    for name, state in run.states.items():
        if state != "killed":
            print(f"{state}: {name}\n{difference(codes[name], name.rpartition('.')[2])}")
    found = [name for name, state in run.states.items() if state in ("killed", "ended or timed out")]
    for target in targets:
        module = "saccade." + target.removesuffix(".py").replace("/", ".") + "."
        own = [name for name in run.states if name.startswith(module)]
        print(f"{target}: {sum(name in found for name in own)} of {len(own)} mutants found")
    share = 100 * len(found) / max(len(drawn), 1)
    print(f"{len(found)} of {len(drawn)} mutants found, {share:.1f} % (goal: {GOAL:g} %)")
    return 0 if found and share >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
