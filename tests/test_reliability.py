"""docs/reliability.md: every promise names a test that exists."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/reliability.md").read_text().partition("## What was run whole")[0]


@cache
def functions_in(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def promises() -> list[tuple[str, str]]:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise |")]
    return [tuple(cell.strip() for cell in row.strip("|").rsplit("|", 1)) for row in rows]


def test_every_promise_has_a_test():
    assert len(promises()) > 40
    for promise, test in promises():
        named = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
        assert named, f"{promise}: {test} is not the name of a test"
        assert (ROOT / named[1]).is_file() and named[2] in functions_in(named[1]), f"{promise}: there is no {test}"


def test_only_long_tests_are_left_to_test_all():
    """What the page does not mark as *all* has cases that `make test` runs."""
    for promise, test in promises():
        file, name = test.strip("`").split("::")
        marks = [ast.unparse(decorator) for decorator in functions_in(file)[name].decorator_list]
        assert any(mark.endswith("mark.exhaustive") for mark in marks) <= ("*all*" in promise), promise
