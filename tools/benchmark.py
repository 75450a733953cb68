"""Time models side by side: inference and training steps, interleaved, with peak memory.

    python tools/benchmark.py --models biformer_t --vs published
    python tools/benchmark.py --models davit_t halo_26t --vs davit_tiny halonet26t --dtypes float32 bfloat16
    python tools/benchmark.py --models sparsifiner_deit_t,token_keep_rate=0.7 patnet_t2,fuse --modes inference
    python tools/benchmark.py --models davit_t biformer_t --vs davit_tiny resnet50 --runtimes eager inductor openvino

A model is a name, optionally with comma-separated arguments, and `fuse` to call fuse() first (inference only).
`--vs published` uses the peer in tools/published/, which does the published arithmetic with our weights and is checked
against our model in float64 before it is timed. Any timm model works too: one for all models, or one per model.
Our model and the peer run alternately, and the ratio is the median of the ratios of consecutive runs. dtypes other than
float32 are also compared with our float32. --runtimes times inference, on a CPU, in several runtimes: the model and its
peer in each of them run in turn, after their outputs are compared with eager's in float32. --clock cpu takes the CPU
time of the process instead of the time that passes, for machines under load. Writes benchmark.json and, without
--runtimes, benchmark.png to --out.

Exit codes: 0 done, 1 or 2 an error to fix.
"""

import argparse
import ast
import importlib
import importlib.metadata
import json
import statistics
import sys
import time
from pathlib import Path

PUBLISHED = Path(__file__).with_name("published")
RUNTIMES = ["eager", "inductor", "onnxruntime", "openvino"]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["biformer_t"], help="NAME or NAME,argument=value,…,fuse")
    parser.add_argument(
        "--vs", nargs="+", default=["published"], help="'published' or a timm model; one, or one per model"
    )
    parser.add_argument("--modes", nargs="+", default=["inference", "training"], choices=["inference", "training"])
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32"],
        choices=["float32", "bfloat16", "float16"],
        help="dtypes other than float32 use autocast",
    )
    parser.add_argument("--runtimes", nargs="+", default=["eager"], choices=RUNTIMES, help="inference in each of them")
    parser.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="time that passes, or of the CPU")
    parser.add_argument("--batch", type=int, default=8, help="images per inference step")
    parser.add_argument("--train-batch", type=int, default=4, help="images per training step")
    parser.add_argument("--size", type=int, help="image size in pixels (default: the model's own)")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each model")
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--device", help="default: cuda if available, else cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from rich.console import Console
from rich.table import Table
from saccade.tools import runtimes
from saccade.train.runtime import measure
from saccade.train.runtime.distributed import choose_device
from saccade.train.runtime.errors import first_line, run, set_options
from torch import nn

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(spec: str) -> tuple[str, dict, bool]:
    """Parse a model on the command line into its name, arguments and whether to fuse it."""
    name, *parts = spec.split(",")
    arguments = dict(part.split("=", 1) for part in parts if part != "fuse")
    return name, {key: ast.literal_eval(value) for key, value in arguments.items()}, "fuse" in parts


def build_model(spec: str, peer_of: str | None, device: torch.device) -> nn.Module:
    """Build a timm model from its command line form, or for "published" the peer of `peer_of` with the same weights."""
    torch.manual_seed(0)
    name, arguments, fuse = parse(peer_of if spec == "published" else spec)
    ours = timm.create_model(name, **arguments).to(device)
    if spec == "published":
        module = importlib.import_module(f"published.{name.split('_')[0]}")
        return module.build(name, **arguments).to(device).load(ours)
    if fuse:
        ours.eval().fuse()
    return ours


def assert_equal(name: str, size: tuple[int, int], device: torch.device) -> None:
    """Check that a model and its published peer compute the same outputs.

    In float64, since rounding could change a selection of keys; fused models are fused here too.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.randn(2, 3, *size, device=device)
        with torch.inference_mode():
            a = build_model(name, None, device).eval()(x)
            b = run_peer("published", build_model("published", name, device).eval(), x)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    finally:
        torch.set_default_dtype(before)


def run_peer(name: str, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Run a peer, or exit with one sentence where it does not take images of this size."""
    try:
        return model(x)
    except (RuntimeError, AssertionError, ValueError) as error:
        size = "x".join(map(str, x.shape[2:]))
        sys.exit(f"benchmark.py: the peer {name!r} does not run at {size}, leave out --size: {first_line(error)}")


def build_step(name, peer_of, shape, mode, amp, device):
    """Build a step function. For the memory measurement this runs in a new process."""
    device = torch.device(device)
    x = torch.randn(shape, device=device)
    return measure.step_of(build_model(name, peer_of, device), x, mode, amp)


def peak(name, peer_of, shape, mode, amp, device: torch.device) -> int:
    if device.type == "cpu":
        return measure.peak_memory(build_step, name, peer_of, shape, mode, amp, "cpu")
    step = build_step(name, peer_of, shape, mode, amp, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def compare(args, device: torch.device, console: Console) -> list[dict]:
    rows = []
    sizes = [
        (args.size,) * 2 if args.size else timm.get_pretrained_cfg(parse(n)[0]).input_size[1:] for n in args.models
    ]
    for name, vs, size in zip(args.models, args.vs, sizes):
        if vs == "published":
            assert_equal(name, size, device)
    for name, vs, (height, width) in zip(args.models, args.vs, sizes):
        for mode in args.modes:
            if mode == "training" and parse(name)[2]:
                continue
            batch = args.batch if mode == "inference" else args.train_batch
            shape = (batch, 3, height, width)
            x = torch.randn(shape, device=device)
            ours, peer = build_model(name, None, device), build_model(vs, name, device)
            with torch.inference_mode():
                run_peer(vs, peer.eval(), x[:1])
            steps, facts = {}, {}
            for dtype in args.dtypes:
                for label, model, built in ((name, ours, name), (vs, peer, vs)):
                    key = f"{label} {dtype}"
                    steps[key] = measure.step_of(model, x, mode, DTYPES[dtype])
                    console.print(f"[dim]memory of {key}, {mode}[/dim]")
                    facts[key] = dict(peak_bytes=peak(built, name, shape, mode, DTYPES[dtype], device))
            console.print(f"[dim]timing {', '.join(steps)}, {mode}, batch {batch}[/dim]")
            times = measure.interleaved(steps, args.runs, device, CLOCKS[args.clock])
            work = measure.macs(ours, x) * 2 * (1 if mode == "inference" else 3)
            for dtype in args.dtypes:
                mine, theirs = f"{name} {dtype}", f"{vs} {dtype}"
                seconds = statistics.median(times[mine])
                rows.append(
                    dict(
                        model=name,
                        peer=vs,
                        mode=mode,
                        dtype=dtype,
                        batch=batch,
                        size=[height, width],
                        ms=1e3 * seconds,
                        peer_ms=1e3 * statistics.median(times[theirs]),
                        speedup=measure.ratio(times[theirs], times[mine]),
                        speedup_over_float32=measure.ratio(times.get(f"{name} float32", times[mine]), times[mine]),
                        peak_mib=facts[mine]["peak_bytes"] / 2**20,
                        peer_peak_mib=facts[theirs]["peak_bytes"] / 2**20,
                        flops_per_second=work / seconds,
                    )
                )
    return rows


def compare_runtimes(args, console: Console) -> list[dict]:
    """Time each model and its peer in each runtime; a row for each, with a note where a runtime can't run it."""
    cpu, rows = torch.device("cpu"), []
    for name, vs in zip(args.models, args.vs):
        height, width = (args.size,) * 2 if args.size else timm.get_pretrained_cfg(parse(name)[0]).input_size[1:]
        x = torch.randn(args.batch, 3, height, width)
        models = {name: build_model(name, None, cpu).eval(), vs: build_model(vs, name, cpu).eval()}
        with torch.inference_mode():
            run_peer(vs, models[vs], x[:1])
        work = {label: measure.macs(model, x) for label, model in models.items()}
        for dtype in args.dtypes:
            steps, notes = {}, {}
            for runtime in args.runtimes:
                for label, model in models.items():
                    console.print(f"[dim]{label} in {runtime}, {dtype}[/dim]")
                    began = CLOCKS[args.clock]()
                    try:
                        steps[label, runtime] = runtimes.prepare(runtime, model, x, dtype, args.threads)
                        notes[label, runtime] = dict(warm_up_seconds=CLOCKS[args.clock]() - began)
                    except Exception as error:  # each converter has its own
                        notes[label, runtime] = dict(note=first_line(error))
            times = measure.interleaved(steps, args.runs, cpu, CLOCKS[args.clock])
            for (label, runtime), facts in notes.items():
                row = dict(model=label, runtime=runtime, dtype=dtype, batch=args.batch, size=[height, width], **facts)
                if own := times.get((label, runtime)):
                    other = times.get((vs if label == name else name, runtime))
                    eager = times.get((label, "eager"))
                    row |= dict(
                        ms=1e3 * statistics.median(own),
                        gmacs_per_second=work[label] / statistics.median(own) / 1e9,
                        speedup_over_eager=measure.ratio(eager, own) if eager else None,
                        speedup_over_other=measure.ratio(other, own) if other else None,
                        other=vs if label == name else name,
                    )
                rows.append(row)
    return rows


def report_runtimes(args, rows: list[dict], console: Console) -> None:
    """Print a table of the runtimes, and write benchmark.json."""
    facts = measure.machine(torch.device("cpu"))
    table = Table(title=f"{facts['device']}, {args.threads} threads, {args.clock} time, torch {facts['torch']}")
    for head in ("model", "runtime", "dtype", "ms", "over eager", "over the other model", "GMAC/s", "warm-up"):
        table.add_column(head, justify="left" if head in ("model", "runtime", "dtype") else "right")
    for r in rows:
        if "ms" not in r:
            table.add_row(r["model"], r["runtime"], r["dtype"], "-", "-", "-", "-", r["note"])
            continue
        ratios = [f"{r[key]:.2f}×" if r[key] else "-" for key in ("speedup_over_eager", "speedup_over_other")]
        cells = f"{r['ms']:.0f}", *ratios, f"{r['gmacs_per_second']:.0f}", f"{r['warm_up_seconds']:.0f} s"
        table.add_row(r["model"], r["runtime"], r["dtype"], *cells)
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {runtime: importlib.metadata.version(runtime) for runtime in args.runtimes if runtime in runtimes.FORMATS}
    result = dict(machine=facts | found, clock=args.clock, threads=args.threads, runs=args.runs, rows=rows)
    (args.out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"wrote {args.out / 'benchmark.json'}")


def draw(rows: list[dict], file: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    size = (13, 1.6 + 0.55 * len(rows))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    y = range(len(rows))
    labels = [f"{r['model']} / {r['peer']}\n{r['mode']}, {r['dtype']}, batch {r['batch']}" for r in rows]
    for axis, ours, theirs, unit in ((axes[0], "ms", "peer_ms", "ms"), (axes[1], "peak_mib", "peer_peak_mib", "MiB")):
        less = [r["speedup"] if unit == "ms" else r[theirs] / r[ours] for r in rows]
        axis.barh([i + 0.2 for i in y], [r[theirs] for r in rows], 0.38, color="#b8bec8", label="peer")
        bars = axis.barh([i - 0.2 for i in y], [r[ours] for r in rows], 0.38, color="#2a6fbb", label="saccade")
        axis.bar_label(bars, [f" {ratio:.2f}× less" for ratio in less], fontsize=9)
        axis.set_xlabel(unit)
        axis.margins(x=0.3, y=0.02)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(list(y), labels, fontsize=9)
    axes[0].invert_yaxis()
    axes[0].set_title("time of a step")
    axes[1].set_title("peak memory of a step")
    axes[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=9, color="#555555")
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    set_options(device="--device cpu", folder="--out")
    for option in ("batch", "train_batch", "size", "runs", "threads"):
        if (number := getattr(args, option)) is not None and number < 1:
            parser.error(f"--{option.replace('_', '-')} must be 1 or more, got {number}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out} is a file: give a folder")
    args.threads = args.threads or torch.get_num_threads()
    device = choose_device(args.device)
    args.device = str(device)
    torch.set_num_threads(args.threads)
    console = Console(width=None if sys.stdout.isatty() else 130)
    known = set(timm.list_models())
    if len(args.vs) not in (1, len(args.models)):
        parser.error(f"--vs must name one peer, or one for each of the {len(args.models)} models, got {len(args.vs)}")
    args.vs = args.vs * len(args.models) if len(args.vs) == 1 else args.vs
    for name in [*args.models, *args.vs]:
        try:
            plain = parse(name)[0]
        except ValueError:
            parser.error(f"{name!r} must be NAME or NAME,argument=value,… with Python's literals for values")
        if plain not in known and name != "published":
            parser.error(f"unknown model {plain!r}; timm.list_models('*{plain.split('_')[0]}*') lists similar ones")
    for name, vs in zip(args.models, args.vs):
        for each in {name, vs} - {"published"}:
            try:
                with torch.device("meta"):  # errors in the arguments
                    timm.create_model(parse(each)[0], **parse(each)[1])
            except (TypeError, ValueError, AssertionError, RuntimeError) as error:
                parser.error(f"{each} can't be built: {first_line(error)}")
        if vs == "published" and not (PUBLISHED / f"{parse(name)[0].split('_')[0]}.py").is_file():
            parser.error(f"there is no published form of {parse(name)[0]} here: give a model of timm with --vs")
    if args.runtimes != ["eager"]:
        for runtime in args.runtimes:
            if (absent := runtimes.missing(runtime)) is not None:
                parser.error(f"--runtimes {runtime} needs {absent}")
        if device.type != "cpu" or "float16" in args.dtypes:
            parser.error("--runtimes compares on the CPU, in float32 and bfloat16: leave out --device and float16")
        report_runtimes(args, compare_runtimes(args, console), console)
        return
    rows = compare(args, device, console)
    rate = measure.gemm_rate(device)
    facts = measure.machine(device)
    table = Table(title=f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}")
    heads = [
        "model",
        "peer",
        "mode",
        "dtype",
        "batch",
        "ms",
        "peer ms",
        "speed-up",
        "vs our fp32",
        "memory",
        "of fp32 GEMM",
    ]
    for head in heads:
        table.add_column(head, justify="left" if head in ("model", "peer", "mode", "dtype") else "right")
    for r in rows:
        r["share_of_gemm"] = r["flops_per_second"] / rate
        memory = f"{r['peak_mib']:.0f} / {r['peer_peak_mib']:.0f} MiB"
        figures = [f"{r['ms']:.0f}", f"{r['peer_ms']:.0f}", f"{r['speedup']:.2f}×", f"{r['speedup_over_float32']:.2f}×"]
        row = [
            r["model"],
            r["peer"],
            r["mode"],
            r["dtype"],
            str(r["batch"]),
            *figures,
            memory,
            f"{r['share_of_gemm']:.0%}",
        ]
        table.add_row(*row)
    console.print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    result = dict(machine=facts, gemm_flops_per_second=rate, runs=args.runs, rows=rows)
    (args.out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n")
    title = f"{table.title}; medians of {args.runs} interleaved runs"
    draw(rows, args.out / "benchmark.png", title)
    console.print(f"wrote {args.out / 'benchmark.json'} and {args.out / 'benchmark.png'}")


if __name__ == "__main__":
    sys.exit(run(main))
