"""What the documentation shows runs as it is printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SECTIONS = re.split(r"(?m)^## ", (DOCS / "operators.md").read_text())[1:]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.splitlines()[0])
def test_examples_of_operators(section):
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert examples, "every operator is shown in a model of one's own"
    for example in examples:
        exec(compile(example, "docs/operators.md", "exec"), {"__name__": "example"})


def test_examples_of_backbones():
    section = re.search(r"(?ms)^## \d+\. A backbone in your own code$(.*?)^## ", (DOCS / "start.md").read_text())[1]
    shared: dict = {}
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "docs/start.md", "exec"), shared)
    assert shared["m"].shape == (1, 512, 16, 11)  # as the comment says


def test_every_operator_is_described():
    import saccade.ops

    described = "\n".join(SECTIONS)
    assert not [name for name in saccade.ops.__all__ if name != "backend" and name not in described]


@pytest.mark.exhaustive
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("myst_parser", reason="the packages of `make docs` are not installed")
    pytest.importorskip("furo", reason="the packages of `make docs` are not installed")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bilevel_routing_attention" in (tmp_path / "reference" / "ops.html").read_text()


def test_every_page_is_on_the_site():
    listed = set(re.findall(r"(?m)^([\w/]+)$", (DOCS / "index.md").read_text()))
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.glob("*.md")}
    pages |= {f"results/{page.stem}" for page in (DOCS / "results").glob("*.md")}
    assert pages - {"index"} <= listed
    listed = set(re.findall(r"(?m)^(\w+)$", (DOCS / "models/index.md").read_text()))
    assert {page.stem for page in (DOCS / "models").glob("*.md")} - {"index"} == listed


def test_every_family_has_a_page():
    import saccade.backbones  # noqa: F401  (registers the models)
    from saccade.backbones import catalog

    for family, names in catalog.families().items():
        text = (DOCS / "models" / f"{family.rpartition('.')[2]}.md").read_text()
        assert len(text.partition("## Models")[0]) > 500, "what its attention does"
        assert not [name for name in names if f"| `{name}` |" not in text]
