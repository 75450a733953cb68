"""List every registered model with its size, cost, published accuracy, weights and what the tests compare it with.

    python tools/zoo.py            print the table and write docs/zoo.md and the tables of docs/models/
    python tools/zoo.py --check    write nothing, and fail if one of these is stale
    python tools/zoo.py --time     measure the CPU time of an image, first: docs/results/zoo_cpu.json

The models run on fake CUDA tensors, so nothing is computed. Multiply-accumulates are those of the algorithm, from each
kernel's FLOP formula; the CPU implementation may do more where that is faster. Published accuracy and weights are those
of saccade.backbones.catalog. What was compared is read from the tests in tests/backbones: the fixtures with which
`test_equals_published…` is parametrized as `fixture` for a `name`, the names of `test_parameter_counts`, and the tables
WHOLE, DENSE and COUNTS of the families' contract (tests/support/backbones.py). A new model appears by itself; a new
family gets a page in docs/models, whose text above the table is yours to write.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import re
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="fail if a page is stale; write nothing")
    parser.add_argument("--time", action="store_true", help="measure the models' CPU time, first (15 minutes)")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from saccade.backbones import catalog
from saccade.train.runtime import measure
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "zoo.md"
FAMILIES = ROOT / "docs" / "models"
TIMES = ROOT / "docs" / "results" / "zoo_cpu.json"
BEGIN, END = "<!-- Written by tools/zoo.py: begin -->", "<!-- end -->"
MOST_TIMED = 25e9  # multiply-accumulates of a model whose time is measured


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
    text = catalog.weights(name) or "none"
    return re.sub(r"(.+): (https://\S+)$", r"[\1](\2)", text)


def read_tests() -> tuple[dict[str, list[str]], set[str], float]:
    """Return the fixtures that each model equals, the models whose parameters are counted, and the tolerance."""
    sys.path.insert(0, str(ROOT / "tests"))  # for `support`
    from support import parity
    from support.backbones import Backbone

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
        for _, family in inspect.getmembers(module, inspect.isclass):
            if issubclass(family, Backbone) and family.__module__ == module.__name__:
                for case in (*family.WHOLE, *family.DENSE):
                    fixture, name, _ = getattr(case, "values", case)  # plain, or a pytest.param with a mark
                    fixtures[name].append(fixture)
                counted |= set(family.COUNTS)
    return fixtures, counted, inspect.signature(parity.assert_equal).parameters["rtol"].default


def read_parameters(test):
    """Yield the names and values of each parametrization of a test over several names."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names, cases = mark.args[:2]
            names = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
            if len(names) > 1:
                yield names, [case.values if hasattr(case, "marks") else case for case in cases]


def time_models(rows: list[Row]) -> None:
    """Measure the CPU time of one image through each model of moderate cost, on one thread; write TIMES.

    CPU time, not time on the clock: it hardly depends on what else runs. The least of two rounds over all models, of
    two runs each after one, so that a slow minute of the machine does not fall on one model alone.
    """
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    timed = [row for row in rows if row.macs is not None and row.macs <= MOST_TIMED]
    for last in (False, True):
        for row in timed:
            model = timm.create_model(row.name).eval()
            if hasattr(model, "fuse"):
                model.fuse()
            x = torch.randn(1, model.default_cfg["input_size"][0], *row.size)
            with torch.inference_mode():
                model(x)
                for _ in range(2):
                    start = time.process_time()
                    model(x)
                    elapsed = time.process_time() - start
                    seconds[row.name] = min(round(elapsed, 4), seconds.get(row.name, float("inf")))
            if last:
                print(f"{row.name}: {seconds[row.name]} s", flush=True)
    machine = measure.machine(torch.device("cpu"))
    text = json.dumps(dict(machine=machine, dtype="float32", batch=1, cpu_seconds=seconds), indent=1)
    TIMES.write_text(text + "\n")


def measure_all() -> tuple[list[Row], float]:
    for file in sorted((ROOT / "ops").glob("*/op.py")):
        importlib.import_module(f"saccade.ops.{file.parent.name}.op")  # registers FLOP formulas
    fixtures, counted, rtol = read_tests()
    rows = []
    for module, names in catalog.families().items():
        for row in sorted((measure_model(name, module) for name in names), key=lambda row: (row.params, row.name)):
            row.fixtures, row.counted = sorted(fixtures[row.name]), row.name in counted
            row.weights = describe_weights(row.name)
            row.license = timm.get_pretrained_cfg(row.name).license or ""
            if published := catalog.published(row.name):
                row.top1, row.source = f"{published.top1:.1f}", published.source
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
        lines += ["", f"## {title(family)}", "", f"{cite(cfg)}. Code: <{cfg.origin_url}>.", ""]
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


def cite(cfg) -> str:
    """Return the paper of a pretrained configuration, with a link."""
    link = re.sub(r"arXiv:(\S+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", cfg.paper_ids or "")
    return f"{cfg.paper_name}, {link}"


def title(family: str) -> str:
    return sys.modules[family].__doc__.split(":")[0].strip()


def family_table(own: list[Row]) -> str:
    """Return the generated part of a family's page: paper, code, licence, a table with the CPU time of each model."""
    cfg = timm.get_pretrained_cfg(own[0].name)
    times = json.loads(TIMES.read_text())["cpu_seconds"] if TIMES.exists() else {}
    licenses = ", ".join(dict.fromkeys(row.license or "none stated" for row in own))
    compared = sum(bool(row.fixtures) for row in own)
    counted = sum(row.counted and not row.fixtures for row in own)
    checks = [f"outputs and gradients of {compared} models against golden values of the published code"] * (
        compared > 0
    )
    checks += [f"parameter counts of {counted} others"] * (counted > 0)
    lines = [
        f"- Paper: {cite(cfg)}",
        f"- Published code: <{cfg.origin_url}>",
        f"- Licence of the published weights or code: {licenses}",
        f"- Compared in the tests: {', '.join(checks) or 'see the tests of the family'}",
        f"- Source: `backbones/{own[0].family.rpartition('.')[2]}.py`; tests: `tests/backbones`",
        "",
        "| model | input | params, M | MACs, G | published top-1 | CPU, ms an image | equal to published | weights |",
        "|---|---:|---:|---:|---:|---:|---|---|",
    ]
    for row in own:
        size, params, macs, _ = row.figures()
        cost = f"{1000 * times[row.name]:,.0f}" if row.name in times else ""
        cells = [f"`{row.name}`", size, params, macs, row.top1, cost, format_checks(row, "`"), row.weights]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def family_pages(rows: list[Row]) -> dict[Path, str]:
    """Return the text of each family's page, and of their index: what is there, with a new table."""
    pages = {}
    for family in dict.fromkeys(row.family for row in rows):
        file = FAMILIES / f"{family.rpartition('.')[2]}.md"
        about = sys.modules[family].__doc__.split("\n\n")[0].partition(":")[2].strip()
        text = (
            file.read_text()
            if file.exists()
            else f"# {title(family)}\n\n{about[:1].upper()}{about[1:]}\n\n{BEGIN}\n{END}\n"
        )
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        table = family_table([row for row in rows if row.family == family])
        pages[file] = f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"
    names = "\n".join(file.stem for file in pages)
    index = """\
# Families

What the attention of each does, its cost, accuracy, and how it was verified. The tables are written by
`python tools/zoo.py`; a test fails when they are stale. *CPU* is the CPU time of one image in fp32 on one thread
(`--time`), of models up to 25 G multiply-accumulates, fused where a model can be; it does not depend on the weights.
"""
    pages[FAMILIES / "index.md"] = f"{index}\n```{{toctree}}\n:maxdepth: 1\n\n{names}\n```\n"
    return pages


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
    if args.time:
        time_models(rows)
    pages = {PAGE: format_page(rows, rtol), **family_pages(rows)}
    stale = [file for file, text in pages.items() if not file.exists() or file.read_text() != text]
    if args.check:
        if stale:
            names = ", ".join(str(file.relative_to(ROOT)) for file in stale)
            sys.exit(f"{names} {'is' if len(stale) == 1 else 'are'} stale: run `python tools/zoo.py`")
        return
    Console(width=None if sys.stdout.isatty() else 160).print(make_table(rows))
    for file in stale:
        file.parent.mkdir(exist_ok=True)
        file.write_text(pages[file])
        print(f"wrote {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
