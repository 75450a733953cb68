"""Time operators and compare them with the published code, the best library call and the machine's limits.

    python tools/benchmark_ops.py
    python tools/benchmark_ops.py --operators window_attention --images 1x224x224 1x800x1333 --dtypes float32

For every operator at the shapes of its models, forward and forward+backward, a table lists: our time; the time of (a)
the published arithmetic in plain PyTorch and (b) the best library call as multiples of ours; the lower bound, as a
fraction of our time, from the unavoidable bytes and FLOPs at the copy bandwidth and matmul rate measured in the same
run; and our peak memory compared with (a). tools/operators/ defines what is compared. Inputs are random, with several
sets so that none stays in cache; times are medians of interleaved runs.

The operators' tests run first; operators with failing tests are not timed. Writes operators.json and operators.png
(roofline) to --out.
"""

import argparse
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

OPERATORS = sorted(file.stem for file in Path(__file__).with_name("operators").glob("[!_]*.py"))
MODES = ("forward", "forward+backward")


def image(text: str) -> tuple[int, int, int]:
    try:
        batch, height, width = (int(n) for n in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be BATCHxHEIGHTxWIDTH, as in 8x224x224, got {text!r}") from None
    return batch, height, width


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", default=OPERATORS, choices=OPERATORS, metavar="NAME")
    parser.add_argument(
        "--images", nargs="+", type=image, metavar="BxHxW", help="batches of images that determine the shapes"
    )
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--runs", type=int, default=11, help="timed runs of each")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_ops"))
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import operators
import torch
from rich.console import Console
from rich.table import Table
from saccade.train.runtime import measure

ROOT = Path(__file__).parents[1]
MOST_SETS = 16


def tested(operator: str) -> bool:
    """Run the operator's tests on this machine; return whether all pass."""
    file = ROOT / "tests" / "ops" / f"test_{operator}.py"
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", str(file)], cwd=ROOT).returncode == 0


def grads(outputs, args: tuple, seeds: list) -> tuple:
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)


def run(f: Callable, args: tuple, mode: str, seeds: list) -> tuple:
    if mode == "forward":
        with torch.no_grad():
            return f(*args)
    return grads(f(*args), args, seeds)


def agree(ours, theirs, dtype: torch.dtype) -> bool:
    """Return whether most elements agree to about 0.001 of the root mean square.

    This guards against comparing different computations; it is not a test. Not all elements must agree, since rounding
    can change a choice (the position of a maximum, a key's rank) and with it a few gradients.
    """
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    pairs = [(a, b) for a, b in zip(_tensors(ours), _tensors(theirs)) if not (a is None and b is None)]
    # A missing gradient counts as zero, for example that of an unused padding value.
    pairs = [(_double(a, like=b), _double(b, like=a)) for a, b in pairs]
    rms = [b.square().mean().sqrt() for _, b in pairs]
    # Gradients that cancel (such as that of a bias before a norm) are noise: compared with the largest of the others.
    least = 1e-3 * max(rms)
    return all((a - b).abs().median() <= tolerance * max(r, least) for (a, b), r in zip(pairs, rms))


def _double(x, like) -> torch.Tensor:
    return torch.zeros_like(like, dtype=torch.float64) if x is None else x.double()


def compare(case: operators.Case, mode: str, dtype: torch.dtype, device: torch.device, runs: int, rates: dict) -> dict:
    """Time all implementations of a case alternately on the same inputs; return a row of the table."""
    torch.manual_seed(0)
    sets = [case.args(device, dtype)]
    nbytes = sum(t.nbytes for t in sets[0] if isinstance(t, torch.Tensor))
    while len(sets) < min(MOST_SETS, 1 + 2 * measure.cache_bytes(device) // max(1, nbytes)):
        sets.append(case.args(device, dtype))
    with torch.no_grad():
        seeds = [torch.randn_like(y) for y in _tensors(case.ours(*sets[0]))]
    peers = {"published": case.published} | dict(case.library)
    forms, failed = {"ours": case.ours}, {}
    mine = run(case.ours, sets[0], mode, seeds)
    for name, f in peers.items():
        try:
            same = agree(mine, run(f, sets[0], mode, seeds), dtype)
        except (RuntimeError, ImportError) as e:  # out of memory, or not supported on this machine
            failed[name] = str(e).split("\n")[0]
            continue
        if same:
            forms[name] = f
        else:
            failed[name] = "computes something else"
    del mine
    peak = {name: measure.peak_allocated(lambda f=f: run(f, sets[0], mode, seeds), device) for name, f in forms.items()}
    steps = {name: lambda f=f: [run(f, args, mode, seeds) for args in sets] for name, f in forms.items()}
    times = measure.interleaved(steps, runs, device)
    seconds = {name: statistics.median(t) / len(sets) for name, t in times.items()}
    elements, flops = ((n[0] if mode == "forward" else sum(n)) for n in (case.elements, case.flops))
    floor = max(elements * dtype.itemsize / rates["bytes"], flops / rates["flops"])
    library = min((name for name in forms if name not in ("ours", "published")), key=seconds.get, default=None)
    return dict(
        where=case.where,
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
        ms=1e3 * seconds["ours"],
        published_ms=1e3 * seconds["published"] if "published" in seconds else None,
        over_published=measure.ratio(times["published"], times["ours"]) if "published" in times else None,
        library=library,
        over_library=measure.ratio(times[library], times["ours"]) if library else None,
        floor_ms=1e3 * floor,
        of_floor=floor / seconds["ours"],
        peak_mib=peak["ours"] / 2**20,
        published_peak_mib=peak["published"] / 2**20 if "published" in peak else None,
        library_peak_mib=peak[library] / 2**20 if library else None,
        bytes=elements * dtype.itemsize,
        flops=flops,
        failed=failed,
    )


def _tensors(outputs) -> tuple:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def draw(rows: list[dict], rates: dict[str, dict], file: Path, title: str) -> None:
    """Plot a roofline: FLOP/s over FLOPs per unavoidable byte; the published code is the hollow end of each line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(MODES), figsize=(13, 5.5), layout="constrained", sharey=True, squeeze=False)
    names = sorted({r["operator"] for r in rows})
    colours = {name: plt.get_cmap("tab20")(i % 20) for i, name in enumerate(names)}
    for axis, mode in zip(axes[0], MODES):
        chosen = [r for r in rows if r["mode"] == mode]
        x = [r["flops"] / r["bytes"] for r in chosen]
        span = [min(x, default=1) / 2, max(x, default=1) * 2]
        for dtype, rate in rates.items():
            knee = rate["flops"] / rate["bytes"]
            xs = sorted({*span, min(max(knee, span[0]), span[1])})
            roof = [min(rate["bytes"] * at, rate["flops"]) for at in xs]
            axis.plot(xs, roof, color="#444444", linewidth=1)
            axis.annotate(dtype, (xs[0], roof[0]), textcoords="offset points", xytext=(2, 6), fontsize=8)
        for at, r in zip(x, chosen):
            ours = r["flops"] / r["ms"] * 1e3
            if r["published_ms"]:
                theirs = r["flops"] / r["published_ms"] * 1e3
                axis.plot([at, at], [theirs, ours], color=colours[r["operator"]], linewidth=0.8)
                axis.scatter([at], [theirs], s=22, facecolors="white", edgecolors=colours[r["operator"]], zorder=3)
            axis.scatter([at], [ours], s=26, color=colours[r["operator"]], zorder=4)
        axis.set(xscale="log", yscale="log", title=mode, xlabel="FLOPs per unavoidable byte")
        axis.grid(which="major", color="#eeeeee")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("FLOP/s")
    marks = [plt.Line2D([], [], marker="o", linestyle="", color=colours[name], label=name) for name in names]
    marks.append(
        plt.Line2D([], [], marker="o", linestyle="", color="#888888", markerfacecolor="white", label="published")
    )
    figure.legend(handles=marks, loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=9, color="#555555")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = make_parser()
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    sizes = ("1x224x224", "32x224x224", "128x224x224") if cuda else ("1x224x224", "8x224x224")
    sizes += ("1x800x1333", "1x512x2048") if cuda else ()
    args.images = args.images or [image(text) for text in sizes]
    args.dtypes = args.dtypes or ["bfloat16" if cuda else "float32"]
    args.threads = args.threads or torch.get_num_threads()
    args.device = args.device or ("cuda" if cuda else "cpu")
    torch.set_num_threads(args.threads)
    device, console = torch.device(args.device), Console(width=None if sys.stdout.isatty() else 170)

    green, red = [], []
    for operator in args.operators:
        console.print(f"[dim]testing {operator}[/dim]")
        (green if tested(operator) else red).append(operator)
    if red:
        console.print(f"[red]not timed, since tests fail: {', '.join(red)}[/red]")
    rates = {
        name: dict(
            bytes=measure.copy_rate(device, getattr(torch, name)), flops=measure.gemm_rate(device, getattr(torch, name))
        )
        for name in args.dtypes
    }
    rows = []
    for operator in green:
        module = importlib.import_module(f"operators.{operator}")
        for batch, height, width in args.images:
            for case in module.cases(batch, height, width):
                console.print(f"[dim]timing {operator}, {case.where}, {batch} x {height} x {width}[/dim]")
                for name in args.dtypes:
                    for mode in args.modes:
                        row = compare(case, mode, getattr(torch, name), device, args.runs, rates[name])
                        rows.append(dict(operator=operator, image=f"{batch}x{height}x{width}") | row)

    facts = measure.machine(device)
    machine = f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}"
    title = f"{machine}, medians of {args.runs} interleaved runs"
    table = Table(title=title)
    for head in ("operator", "where", "images", "dtype", "mode"):
        table.add_column(head)
    for head in ("ms", "published", "best library call", "of floor", "memory"):
        table.add_column(head, justify="right")
    for r in rows:
        published = f"{r['over_published']:.2f}×" if r["over_published"] else r["failed"].get("published", "")
        library = f"{r['over_library']:.2f}× {r['library']}" if r["library"] else ", ".join(r["failed"]) or "–"
        memory = f"{r['peak_mib'] / r['published_peak_mib']:.2f}×" if r["published_peak_mib"] else "–"
        figures = f"{r['ms']:.2f}", published, library, f"{r['of_floor']:.0%}", memory
        table.add_row(r["operator"], r["where"], r["image"], r["dtype"], r["mode"], *figures)
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    result = dict(machine=facts, rates=rates, runs=args.runs, red=red, rows=rows)
    (args.out / "operators.json").write_text(json.dumps(result, indent=1) + "\n")
    if rows:
        draw(rows, rates, args.out / "operators.png", title)
    console.print(f"wrote {args.out / 'operators.json'}" + (f" and {args.out / 'operators.png'}" if rows else ""))
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
