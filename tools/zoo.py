"""List every registered model with its size, cost, published accuracy, weights and what the tests compare it with.

    python tools/zoo.py            print the table and write docs/zoo.md
    python tools/zoo.py --check    write nothing, and fail if docs/zoo.md is stale

The models run on fake CUDA tensors, so nothing is computed. Multiply-accumulates are those of the algorithm, from each
kernel's FLOP formula; the CPU implementation may do more where that is faster. Published accuracy comes from the
backbone file's `PUBLISHED`, name -> (top-1, source), weights from the pretrained configuration and the file's
`WEIGHTS`. What was compared is read from the tests in tests/backbones: the fixtures with which
`test_equals_published…` is parametrized as `fixture` for a `name`, and the names of `test_parameter_counts`. A new
model appears by itself.
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


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if docs/zoo.md is stale; write nothing")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


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
    """Count the elements that convolutions and linear layers return."""

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
    macs: int | None = None  # of a lifter, not counted
    activations: int | None = None
    top1: str = ""
    source: str = ""
    fixtures: list[str] = field(default_factory=list)
    counted: bool = False  # whether a test compares the parameter count with the published one
    weights: str = "none"
    license: str = ""

    def figures(self) -> list[str]:
        size = f"{self.size[0]}" if self.size[0] == self.size[1] else "×".join(map(str, self.size))
        if self.macs is None or self.activations is None:
            return [size, f"{self.params / 1e6:.2f}", "", ""]
        return [size, f"{self.params / 1e6:.2f}", f"{self.macs / 1e9:.2f}", f"{self.activations / 1e6:.1f}"]


def measure_model(name: str, family: str = "") -> Row:
    """Count the parameters, MACs and activations of a model; of a lifter, which needs cameras too, the parameters."""
    if timm.get_pretrained_cfg(name).num_classes == 0:
        with torch.device("meta"):
            model = timm.create_model(name)
        return Row(name, family, model.default_cfg["input_size"][1:], sum(p.numel() for p in model.parameters()))
    model = timm.create_model(name, device="meta")
    channels, *size = model.default_cfg["input_size"]
    with FakeTensorMode(allow_non_fake_inputs=True), Activations() as activations:
        macs = measure.macs(model.to_empty(device="cuda"), torch.empty(1, channels, *size, device="cuda"))
    params = sum(p.numel() for p in model.parameters())
    return Row(name, family, tuple(size), params, macs, activations.total)


def describe_weights(name: str) -> str:
    """Say where a model's weights are: a hub id, or the link of the authors."""
    hub_id = timm.get_pretrained_cfg(name).hf_hub_id
    if hub_id:
        return f"[{hub_id}](https://huggingface.co/{hub_id})"
    text = getattr(sys.modules[timm.model_entrypoint(name).__module__], "WEIGHTS", {}).get(name, "none")
    return re.sub(r"(.+): (https://\S+)$", r"[\1](\2)", text)


def read_tests() -> tuple[dict[str, list[str]], set[str], float]:
    """Return the fixtures that each model equals, the models whose parameters are counted, and the tolerance."""
    sys.path.insert(0, str(ROOT / "tests"))  # for `support`
    from support import parity

    fixtures, counted = defaultdict(list), set()
    for file in sorted((ROOT / "tests" / "backbones").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"zoo_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for test, function in inspect.getmembers(module, inspect.isfunction):
            for names, cases in read_parameters(function):
                if test.startswith("test_equals_published") and {"fixture", "name"} <= set(names):
                    for case in cases:
                        fixtures[case[names.index("name")]].append(case[names.index("fixture")])
                elif test == "test_parameter_counts" and "name" in names:
                    counted |= {case[names.index("name")] for case in cases}
    return fixtures, counted, inspect.signature(parity.assert_equal).parameters["rtol"].default


def read_parameters(test):
    """Yield the names and values of each parametrization of a test over several names."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, cases = mark.args[:2]
            names = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
            if len(names) > 1:
                yield names, [case.values if hasattr(case, "marks") else case for case in cases]


def families() -> dict[str, list[str]]:
    """Return the names of the models of each module."""
    names = defaultdict(list)
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if module.startswith(saccade.backbones.__name__ + "."):
            names[module].append(name)
    return names


def measure_all() -> tuple[list[Row], float]:
    for file in sorted((ROOT / "ops").glob("*/op.py")):
        importlib.import_module(f"saccade.ops.{file.parent.name}.op")  # registers FLOP formulas
    fixtures, counted, rtol = read_tests()
    rows = []
    for module, names in families().items():
        published = getattr(sys.modules[module], "PUBLISHED", {})
        for row in sorted((measure_model(name, module) for name in names), key=lambda row: (row.params, row.name)):
            row.fixtures, row.counted = sorted(fixtures[row.name]), row.name in counted
            row.weights = describe_weights(row.name)
            row.license = timm.get_pretrained_cfg(row.name).license or ""
            if row.name in published:
                row.top1, row.source = f"{published[row.name][0]:.1f}", published[row.name][1]
            rows.append(row)
    return rows, rtol


HEADS = ["model", "input", "params, M", "MACs, G", "activations, M", "published top-1", "source", "equal to published"]
MORE = ["weights", "license"]  # on the page alone


def format_checks(row: Row, quote: str = "") -> str:
    return ", ".join(quote + f + quote for f in row.fixtures) or ("parameter count" if row.counted else "")


def format_page(rows: list[Row], rtol: float) -> str:
    """Return the text of docs/zoo.md."""
    intro = f"""\
# Models

Written by `python tools/zoo.py`; a test fails when it is stale. After `import saccade.backbones`,
`timm.create_model(name)` builds any of these.

- *MACs* are the multiply-accumulates of matrix products, convolutions and the operators of saccade.ops, *activations*
  the elements that convolutions and linear layers return, both for one image of the input size.
- *Published top-1* is what the source reports for ImageNet-1K. It is **not** measured here.
- *Equal to published* names the golden fixtures of the published model (tests/fixtures) whose outputs and gradients the
  tests reproduce in float64, the outputs to {rtol:.0e} of their root mean square. `parameter count` means that only the
  parameter count of the whole model was compared.
- *Weights*: a hub id loads with `timm.create_model(name, pretrained=True)`. A file behind the authors' links loads with
  `timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=PATH))`.
- *License* is that of the published weights, or of the published code where there are none; blank: none is stated.
"""
    lines = intro.replace("e-0", "e-").splitlines()
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        cfg = timm.get_pretrained_cfg(own[0].name)
        title = sys.modules[family].__doc__.split(":")[0].strip()
        paper = re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", cfg.paper_ids or "")
        lines += ["", f"## {title}", "", f"{cfg.paper_name}, {paper}. Code: <{cfg.origin_url}>.", ""]
        if cfg.num_classes == 0:
            lines += [
                "A lifter takes the images of several cameras (*input* is the size of each): [bev.md](bev.md).",
                "",
            ]
        lines += ["| " + " | ".join(HEADS + MORE) + " |", "|---|" + "---:|" * 5 + "---|---|---|---|"]
        for row in own:
            cells = [f"`{row.name}`", *row.figures(), row.top1, row.source, format_checks(row, "`")]
            lines.append("| " + " | ".join([*cells, row.weights, row.license]) + " |")
    return "\n".join(lines) + "\n"


def make_table(rows: list[Row]) -> Table:
    """Return the table that the command prints."""
    table = Table(title="Models of saccade")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("model", "source", HEADS[-1]) else "right")
    for row, after in zip(rows, [*rows[1:], None]):
        last = after is None or after.family != row.family
        table.add_row(row.name, *row.figures(), row.top1, row.source, format_checks(row), end_section=last)
    return table


def main() -> None:
    args = make_parser().parse_args()
    rows, rtol = measure_all()
    text = format_page(rows, rtol)
    if args.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit(f"{PAGE.relative_to(ROOT)} is stale: run `python tools/zoo.py`")
        return
    Console(width=None if sys.stdout.isatty() else 160).print(make_table(rows))
    PAGE.write_text(text)
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
