"""Every model that saccade registers: its size, its arithmetic, its published accuracy and what the tests hold it to.

    python tools/zoo.py            print the table and write docs/zoo.md
    python tools/zoo.py --check    write nothing, and fail where docs/zoo.md is stale

Nothing is computed: the models run on fake CUDA tensors, where each operator is its kernel, and multiply-accumulates
are the kernel's own formula, those of the algorithm. (What runs on a CPU may do more, where more is faster.) The
published accuracy is the backbone file's `PUBLISHED`, name -> (top-1, source). What was checked is read off the tests
in tests/backbones themselves: the fixtures with which a `test_equals_published…` is parametrised as `fixture` for a
`name`, and the names of `test_parameter_counts`. A new model appears by itself.
"""

import argparse
import importlib
import importlib.util
import inspect
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import saccade.backbones
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from saccade.train.runtime import measure
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "zoo.md"


class Activations(TorchFunctionMode):
    """Elements that convolutions and linear layers put out."""

    COUNTED = (F.linear, F.conv1d, F.conv2d, F.conv3d)

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.COUNTED:
            self.total += out.numel()
        return out


@dataclass
class Row:
    name: str
    family: str
    size: tuple[int, int]
    params: int
    macs: int
    activations: int
    top1: str = ""
    source: str = ""
    fixtures: list[str] = field(default_factory=list)
    counted: bool = False  # whether a test compares the parameter count with the published one

    def figures(self) -> list[str]:
        size = f"{self.size[0]}" if self.size[0] == self.size[1] else "×".join(map(str, self.size))
        return [size, f"{self.params / 1e6:.2f}", f"{self.macs / 1e9:.2f}", f"{self.activations / 1e6:.1f}"]


def measured(name: str, family: str = "") -> Row:
    model = timm.create_model(name, device="meta")
    channels, *size = model.default_cfg["input_size"]
    with FakeTensorMode(allow_non_fake_inputs=True), Activations() as activations:
        macs = measure.macs(model.to_empty(device="cuda"), torch.empty(1, channels, *size, device="cuda"))
    params = sum(p.numel() for p in model.parameters())
    return Row(name, family, tuple(size), params, macs, activations.total)


def checks() -> tuple[dict[str, list[str]], set[str], float]:
    """(fixtures that a model equals, models whose parameters are counted, the relative tolerance), from the tests."""
    sys.path.insert(0, str(ROOT / "tests"))  # for `support`
    from support import parity

    fixtures, counted = defaultdict(list), set()
    for file in sorted((ROOT / "tests" / "backbones").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"zoo_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for test, function in inspect.getmembers(module, inspect.isfunction):
            for names, cases in parameters(function):
                if test.startswith("test_equals_published") and {"fixture", "name"} <= set(names):
                    for case in cases:
                        fixtures[case[names.index("name")]].append(case[names.index("fixture")])
                elif test == "test_parameter_counts" and "name" in names:
                    counted |= {case[names.index("name")] for case in cases}
    return fixtures, counted, inspect.signature(parity.assert_equal).parameters["rtol"].default


def parameters(test):
    """(names, values) of each parametrisation of a test over several names."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, cases = mark.args[:2]
            names = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
            if len(names) > 1:
                yield names, [case.values if hasattr(case, "marks") else case for case in cases]


def families() -> dict[str, list[str]]:
    """Module name -> names of its models. A lifter takes cameras beside its images and has no classes: docs/bev.md."""
    found = defaultdict(list)
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module.startswith(saccade.backbones.__name__ + ".") and timm.get_pretrained_cfg(name).num_classes:
            found[module].append(name)
    return found


def rows() -> tuple[list[Row], float]:
    for file in sorted((ROOT / "ops").glob("*/op.py")):
        importlib.import_module(f"saccade.ops.{file.parent.name}.op")  # a FLOP counter knows the formulas of its birth
    fixtures, counted, rtol = checks()
    found = []
    for module, names in families().items():
        published = getattr(sys.modules[module], "PUBLISHED", {})
        for row in sorted((measured(name, module) for name in names), key=lambda row: (row.params, row.name)):
            row.fixtures, row.counted = sorted(fixtures[row.name]), row.name in counted
            if row.name in published:
                row.top1, row.source = f"{published[row.name][0]:.1f}", published[row.name][1]
            found.append(row)
    return found, rtol


HEADS = ["model", "input", "params, M", "MACs, G", "activations, M", "published top-1", "source", "equal to published"]


def status(row: Row, quote: str = "") -> str:
    return ", ".join(quote + f + quote for f in row.fixtures) or ("parameter count" if row.counted else "")


def page(found: list[Row], rtol: float) -> str:
    """docs/zoo.md."""
    intro = f"""\
# Models

Written by `python tools/zoo.py`; a test fails when it is stale. After `import saccade.backbones`,
`timm.create_model(name)` builds any of these.

*MACs* are multiply-accumulates of matrix products, convolutions and the operators of saccade.ops, *activations* what
convolutions and linear layers put out, both for one image of the input size. *Published top-1* is what the source
reports for ImageNet-1K, **not** measured here. *Equal to published* names the golden fixtures of the published model
(tests/fixtures) whose outputs and gradients the tests reproduce in float64, the outputs to {rtol:.0e} of their root
mean square; `parameter count` means that of the whole model only this was compared.
"""
    lines = intro.replace("e-0", "e-").splitlines()
    for family in dict.fromkeys(row.family for row in found):
        own = [row for row in found if row.family == family]
        cfg = timm.get_pretrained_cfg(own[0].name)
        title = sys.modules[family].__doc__.split(":")[0].strip()
        paper = re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", cfg.paper_ids or "")
        lines += ["", f"## {title}", "", f"{cfg.paper_name}, {paper}. Code: <{cfg.origin_url}>.", ""]
        lines += ["| " + " | ".join(HEADS) + " |", "|---|" + "---:|" * 5 + "---|---|"]
        for row in own:
            cells = [f"`{row.name}`", *row.figures(), row.top1, row.source, status(row, "`")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(found: list[Row]) -> Table:
    drawn = Table(title="Models of saccade")
    for head in HEADS:
        drawn.add_column(head, justify="left" if head in ("model", "source", HEADS[-1]) else "right")
    for row, after in zip(found, [*found[1:], None]):
        last = after is None or after.family != row.family
        drawn.add_row(row.name, *row.figures(), row.top1, row.source, status(row), end_section=last)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail where docs/zoo.md is stale; write nothing")
    args = parser.parse_args()
    found, rtol = rows()
    text = page(found, rtol)
    if args.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit(f"{PAGE.relative_to(ROOT)} is stale: `python tools/zoo.py` writes it anew")
        return
    Console(width=None if sys.stdout.isatty() else 160).print(table(found))
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
