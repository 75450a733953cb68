"""Sphinx's configuration: `make docs` builds this folder's pages, and the reference from docstrings, as a site.

Sphinx with MyST: both are maintained, while mkdocs-material is in maintenance mode, and pages stay plain Markdown.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
project, author, copyright = "saccade", "the saccade authors", "the saccade authors, Apache-2.0"
release = metadata.version("saccade")
extensions = ["myst_parser", "sphinx_copybutton"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme, html_title = "furo", f"saccade {release}"
html_show_sphinx = False

PROJECT = "CONTRIBUTING", "CHANGELOG", "SECURITY"
# Pages of the reference: module, what it is, and its names (None: its __all__).
REFERENCE = {
    "ops": ("saccade.ops", "Operators, each a function of tensors: [operators](../operators.md) has equations.", None),
    "backbones": ("saccade.backbones", "Importing it registers every model with timm.", None),
    "training": ("saccade.train.engine", "The training loop; a config's keys are the arguments of `train`.", ["train"]),
    "models": ("saccade.train.models", "Whole models from the authors' files.", ["load_published"]),
    "export": ("saccade.train.export", "Files for other runtimes.", ["export"]),
    "converting": (
        "saccade.train.convert",
        "Weights under the authors' names, ours, and OpenMMLab's: [converting](../share.md).",
        ["from_published", "to_published", "convert"],
    ),
    "publishing": ("saccade.train.publish", "Runs as folders of the Hugging Face Hub.", ["publish"]),
    "catalog": (
        "saccade.backbones.catalog",
        "What is known of each model: [the zoo](../zoo.md).",
        ["families", "published", "weights"],
    ),
    "prediction": ("saccade.train.predict", "Predictions of finished runs.", ["predictor", "predict"]),
}


def _entry(name: str, value: Callable) -> str:
    """Return a function's header and docstring as Markdown; the docstring as it is written, for it is aligned."""
    source = textwrap.dedent(inspect.getsource(value))
    (node,) = ast.parse(source).body
    first = node.lineno - 1
    header = "\n".join(source.splitlines()[first : node.body[0].lineno - 1]).rstrip(":")
    return f"## {name}\n\n```python\n{header}\n```\n\n```text\n{inspect.getdoc(value)}\n```"


def _write_reference(app) -> None:
    folder = HERE / "reference"
    folder.mkdir(exist_ok=True)
    pages = []
    for page, (module_name, line, names) in REFERENCE.items():
        module = importlib.import_module(module_name)
        names = names or [name for name in module.__all__ if callable(getattr(module, name))]
        entries = [_entry(name, getattr(module, name)) for name in names]
        text = "\n\n".join([f"# {module_name}", line, *entries]) + "\n"
        file = folder / f"{page}.md"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        pages.append(page)
    toc = "\n".join(pages)
    (folder / "index.md").write_text(f"# Reference\n\nMade from the docstrings.\n\n```{{toctree}}\n{toc}\n```\n")


def _write_project(app) -> None:
    """Copy the pages that stand at the root of the repository."""
    folder = HERE / "project"
    folder.mkdir(exist_ok=True)
    for name in PROJECT:
        text = (HERE.parent / f"{name}.md").read_text()
        text = re.sub(r"\]\(docs/", "](../", text)
        (folder / f"{name.lower()}.md").write_text(re.sub(r"\[([^\]]+)\]\((?!https?:|\.\./|#)[^)]*\)", r"\1", text))


def _keep_links_inside(app, docname: str, source: list[str]) -> None:
    """Replace links to files of the repository that are no pages by their text."""
    source[0] = re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:tests|tools|backbones|ops|train)/[^)]*\)", r"\1", source[0])


def setup(app) -> None:
    sys.path.insert(0, str(HERE.parent))
    app.connect("builder-inited", _write_reference)
    app.connect("builder-inited", _write_project)
    app.connect("source-read", _keep_links_inside)
