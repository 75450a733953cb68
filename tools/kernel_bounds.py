"""Bound the time of the kernels that models launch, without a GPU: instructions to issue against bytes to move.

    python tools/kernel_bounds.py                       # a model of each family, batch 128, 224 x 224, bfloat16
    python tools/kernel_bounds.py halo_h0 --batch 64 --operators halo_attention
    python tools/kernel_bounds.py --page                # writes docs/results/kernels.md

Every launch of a forward and a backward pass is recorded on fake tensors and compiled for sm_90. The instructions of
the machine code are counted, those of loops as often as the loops run with the launch's arguments, and divided by what
the card can issue. The floor is the time to read each argument and to write each result once. Both are bounds, not
measurements: a kernel takes longer than either, by latencies, bank conflicts, cache misses and busy units.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "kernels.md"
MODELS = ["agent_swin_t", "biformer_t", "davit_t", "ela_resnet50", "halo_h0", "nat_t", "patnet_t1"]
MODELS += ["sparsifiner_deit_s", "ulsam_mobilenet_v1"]
# Of an H100 or H200: multiprocessors, instructions that one issues per clock, clock at which its peak rates are stated;
# and the bytes per second that an H200 reaches of its 4.8e12.
ISSUE = 132 * 4 * 1.83e9
BANDWIDTH = 4.3e12
# Shares of tensors of which a kernel reads or writes a part: dq, and dk and dv, of a gradient dqkv.
PARTS = {("dq_kernel", "dqkv_ptr"): 1 / 3, ("dkdv_kernel", "dqkv_ptr"): 2 / 3}


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="names of models of this package")
    parser.add_argument("--operators", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--batch", type=int, default=128, help="images; default 128")
    parser.add_argument("--size", default="224x224", metavar="HxW", help="default 224x224")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--launches", action="store_true", help="one line per launch, not per kernel")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import kernels  # beside this file
import triton
from saccade.ops import aot
from saccade.ops.launches import Launch, Pointer, compile_launch
from triton.backends.compiler import GPUTarget

# --- Triton's intermediate representation: how often loops run, which arguments are read and written ---

NAME = r"%[\w$-]*[\w$]"  # such as %c-3_i32
OPERATION = re.compile(r"^\s*(?:%([\w$-]+)(?::\d+)? = )?\"?([\w.]+)\"?(.*?)(?: loc\((.*)\))?(?: \{)?$")
VALUE = re.compile(NAME)
FOR = re.compile(rf"({NAME}) = ({NAME}) to ({NAME}) step ({NAME})")
ARITHMETIC = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    "remsi": lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
    "divui": lambda a, b: a // b,
    "remui": lambda a, b: a % b,
    "minsi": min,
    "maxsi": max,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
    "shrui": lambda a, b: a >> b,
}
COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
}


class Loop(NamedTuple):
    """A loop of the source: mean iterations per entry, None if they depend on data; its step; its lines in files; the
    number of loops around it."""

    iterations: float | None
    step: int | None
    lines: frozenset[str]
    depth: int = 0


class Source(NamedTuple):
    loops: list[Loop]  # in the order of the text
    read: set[str]  # names of pointers
    written: set[str]


def read_source(text: str, arguments: dict[str, Any], programs: list[int]) -> Source:
    """Read a kernel's TTIR: its loops, in these programs of a launch with these arguments, and its pointers."""
    places = _places(text)
    body = text[text.index("tt.func public") :].splitlines()
    names = set(re.findall(r"%(\w+): ", body[0]))
    runs = [_run(body[1:], {f"%{n}": arguments.get(n) for n in names}, program, places) for program in programs]
    loops = []
    for same in zip(*runs):
        counts = [loop.iterations for loop in same if loop.iterations is not None]
        loops.append(same[0]._replace(iterations=sum(counts) / len(counts) if len(counts) == len(same) else None))
    return Source(loops, *_pointers(body[1:], names))


def _places(text: str) -> dict[str, str]:
    """Return file and line of each location; of inlined code, those within the function that is called."""
    raw = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))

    def resolve(name: str) -> str:
        seen = raw.get(name, "")
        if file := re.match(r'"([^"]*)":(\d+)', seen):
            return f"{file[1]}:{file[2]}"
        inner = re.search(r"#loc\d*", seen)
        return resolve(inner[0]) if inner else ""

    return {name: resolve(name) for name in raw}


def _run(lines: list[str], values: dict[str, Any], program: int, places: dict[str, str]) -> list[Loop]:
    """Compute the integers of one program, loop bodies once, for the middle iteration; return its loops."""
    loops: list[Loop] = []
    open_loops: list[tuple[int, int, set[str]]] = []  # index in loops, indentation, lines
    unused: list[int] = []  # indentations of branches that are not taken
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if line.lstrip().startswith("}") and "} do {" not in line:
            while open_loops and open_loops[-1][1] >= indent:
                index, _, at = open_loops.pop()
                loops[index] = loops[index]._replace(lines=frozenset(at - {""}))
            while unused and unused[-1] >= indent:
                unused.pop()
            continue
        match = OPERATION.match(line)
        if not match:
            continue
        result, operation, rest, place = match.groups()
        for _, _, at in open_loops:
            at.add(places.get(place or "", ""))
        if operation == "scf.for":
            count = step = None
            if bounds := FOR.search(rest):
                index, first, last, step = bounds[1], *(values.get(name) for name in bounds.groups()[1:])
                if first is not None and last is not None and step:
                    count = max(0, -(-(last - first) // step))
                    values[index] = first + count // 2 * step
            loops.append(Loop(0 if unused else count, step, frozenset(), len(open_loops)))
            open_loops.append((len(loops) - 1, indent, set()))
        elif operation == "scf.while":
            loops.append(Loop(0 if unused else None, None, frozenset(), len(open_loops)))
            open_loops.append((len(loops) - 1, indent, set()))
        elif operation == "scf.if":
            if values.get((VALUE.search(rest) or [""])[0]) is False:
                unused.append(indent)
        elif result:
            values["%" + result] = _compute(operation, rest, values, program)
    return loops


def _compute(operation: str, rest: str, values: dict[str, Any], program: int) -> Any:
    """Return the integer or truth value of an operation, None if it is a tensor or depends on data."""
    kind, _, name = operation.partition(".")
    if operation == "tt.get_program_id":
        return program if rest.split()[0] == "x" else 0
    if kind != "arith" or "tensor<" in rest:
        return None
    if name == "constant":
        constant = re.match(r"\s*(-?\d+|true|false)\b(?!\.)", rest)
        return None if not constant else json.loads(constant[1])
    given = VALUE.findall(rest)
    if name == "cmpf" and "une" in rest and given[0] == given[1]:
        return False  # x != x: a branch for NaN
    operands = [values.get(one) for one in given]
    if any(one is None for one in operands):
        return None
    if name in ("extsi", "extui", "trunci", "index_cast"):
        return operands[0]
    if name == "cmpi":
        compare = COMPARISONS.get(rest.split(",")[0].strip())
        return compare(*operands) if compare else None
    if name == "select":
        return operands[1] if operands[0] else operands[2]
    return ARITHMETIC[name](*operands) if name in ARITHMETIC else None


def _pointers(lines: list[str], names: set[str]) -> tuple[set[str], set[str]]:
    """Return which arguments are read and which are written: those whose pointers reach a load or a store."""
    roots = {f"%{name}": {name} for name in names if name.endswith("_ptr")}
    read: set[str] = set()
    written: set[str] = set()
    for line in lines:
        match = OPERATION.match(line)
        if not match:
            continue
        result, operation, rest, _ = match.groups()
        given = [roots.get(one, set()) for one in VALUE.findall(rest)]
        if operation == "tt.load":
            read |= given[0]
        elif operation == "tt.store":
            written |= given[0]
        elif operation.startswith("tt.atomic"):
            read, written = read | given[0], written | given[0]
        else:
            every = set().union(*given)
            for name in [result] if result else []:
                roots["%" + name] = every
            for name, first in re.findall(rf"({NAME}) = ({NAME})", rest):  # iter_args
                roots[name] = roots.get(first, set())
    return read, written


# --- Machine code: instructions, and the loops they are in ---


class Instruction(NamedTuple):
    text: str
    line: str  # file:line of its source


class Cycle(NamedTuple):
    """Instructions [start, stop] that a backward branch repeats."""

    start: int
    stop: int


def read_sass(text: str) -> tuple[list[Instruction], list[Cycle]]:
    """Read what nvdisasm -g prints: the instructions up to the padding behind the kernel, and their loops."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    line = ""
    for row in text.splitlines():
        if place := re.match(r'\s*//## File "([^"]*)", line (\d+)', row):
            line = f"{place[1]}:{place[2]}"
        elif label := re.match(r"(\.L_\w+):", row):
            labels[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s*(.*?)\s*;", row):
            instructions.append(Instruction(code[1], line))
    cycles = []
    for i, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA(?:\.\w+)* .*`\((\.L_\w+)\)", instruction.text)
        if branch and labels.get(branch[1], i + 1) < i:
            cycles.append(Cycle(labels[branch[1]], i))
    end = next((i for i, one in enumerate(instructions) if _is_padding(one, labels, i)), len(instructions))
    return instructions[:end], sorted(cycles, key=lambda cycle: (cycle.start, -cycle.stop))


def _is_padding(instruction: Instruction, labels: dict[str, int], i: int) -> bool:
    branch = re.match(r"BRA `\((\.L_\w+)\)", instruction.text)
    return bool(branch) and labels.get(branch[1]) == i


def unrolled(instructions: list[Instruction], cycle: Cycle, step: int | None) -> int:
    """Return how many iterations of the source one of the machine code has, by what its counter is increased by. Loops
    with barriers or products of matrices are not unrolled; they also count what they load in advance."""
    body = instructions[cycle.start : cycle.stop + 1]
    guard = re.match(r"@!?(U?P\d)", body[-1].text)
    if not guard or not step or any(re.search(r"\b(BAR|HMMA|HGMMA)\b", one.text) for one in body):
        return 1
    tests = [one.text for one in body if re.search(rf"SETP\S* {guard[1]},", one.text)]
    counters = set(re.findall(r"\bU?R\d+\b", tests[-1])) if tests else set()
    for one in body:
        add = re.match(r"U?(?:IADD3|VIADD|IADD) (U?R\d+), (U?R\d+)(?:\.reuse)?, (-?0x[0-9a-f]+)\b", one.text)
        if add and add[1] in counters:
            times, rest = divmod(abs(int(add[3], 16)), step)
            if rest == 0 and times in (1, 2, 3, 4, 8, 16):
                return times
    return 1


def weights(instructions: list[Instruction], cycles: list[Cycle], loops: list[Loop]) -> tuple[list[float], bool]:
    """Return how often a warp executes each instruction, and whether the iterations of all loops are known."""

    def likeness(cycle: Cycle, loop: Loop) -> float:
        lines = {one.line for one in instructions[cycle.start : cycle.stop + 1]}
        return len(lines & loop.lines) / len(lines | loop.lines)

    of: dict[Cycle, int] = {}  # the loop of the source that a cycle is
    depths = [sum(c.start <= cycle.start and cycle.stop <= c.stop for c in cycles) - 1 for cycle in cycles]
    if depths == [loop.depth for loop in loops]:
        of = {cycle: i for i, cycle in enumerate(cycles)}
    for cycle in cycles:
        if loops and cycle not in of:
            best = max(likeness(cycle, loop) for loop in loops)
            if best == 0:  # of the compiler, such as an exact division: counted once
                continue
            like = [i for i, loop in enumerate(loops) if likeness(cycle, loop) > 0.98 * best]
            free = [i for i in like if i not in of.values()]  # the same function, inlined again
            of[cycle] = (free or like)[0]
    known, times = True, {}
    for loop in set(of.values()):
        same = [cycle for cycle in cycles if of.get(cycle) == loop]
        total, factors = loops[loop].iterations, {c: unrolled(instructions, c, loops[loop].step) for c in same}
        known = known and total is not None
        left = 1.0 if total is None else total
        for cycle in sorted(same, key=lambda c: -factors[c]):  # the unrolled loop, then what remains
            runs = left // factors[cycle] if factors[cycle] > 1 and len(same) > 1 else left / factors[cycle]
            times[cycle], left = runs, left - runs * factors[cycle]
    executed = [1.0] * len(instructions)
    for cycle in cycles:
        for i in range(cycle.start, cycle.stop + 1):
            executed[i] *= times.get(cycle, 1.0)
    return executed, known


# --- Launches ---


class Bound(NamedTuple):
    kernel: str
    launches: int
    instructions: float  # per warp
    issue: float  # µs
    floor: float  # µs
    registers: int
    spills: int
    shared: int
    warps: int
    known: bool  # False if a loop depends on data: then one iteration of it is counted


def moved_bytes(launch: Launch, source: Source) -> float:
    """Return the bytes of the arguments that the kernel reads and of those it writes, each once."""
    arguments, total = launch.arguments(), 0.0
    for names in (source.read, source.written):
        seen: dict[Any, float] = {}
        for name in names:
            x = arguments[name]
            if isinstance(x, Pointer):
                part = PARTS.get((launch.kernel.__name__, name), 1.0)
                size = min(x.numel * x.dtype.itemsize, x.storage) * part
                seen[x.key] = max(size, seen.get(x.key, 0.0))
        total += sum(seen.values())
    return total


def sampled(programs: int) -> list[int]:
    """Return up to 64 programs, drawn at random: at even distances they might all be in one corner of their maps."""
    return sorted(random.Random(0).sample(range(programs), min(programs, 64)))


def listed_iterations(launch: Launch) -> float | None:
    """Return the mean iterations of a loop whose number depends on data, where the data's mean is known."""
    given = launch.arguments()
    if launch.name == "bilevel_routing.dkdv_kernel":  # a region is routed to as many as are routed to it
        return -(-given["K"] * given["h"] * given["w"] // given["BLOCK_N"])
    # Bisections until the four rows of a program have their budgets: the mean over 512 programs of random coefficients,
    # with the budget of DeiT-S, 50 of 197 keys.
    if launch.name == "sparse_attention.mask_kernel":
        return 11
    return None


def bound(launch: Launch, launches: int) -> Bound:
    """Compile a launch for sm_90 and return its bounds."""
    compiled = compile_launch(launch, GPUTarget(*aot.CARDS["sm_90"][:3]))
    source = read_source(compiled.asm["ttir"], launch.arguments(), sampled(launch.programs))
    default = listed_iterations(launch)
    loops = [one._replace(iterations=default) if one.iterations is None else one for one in source.loops]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-g", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    executed, known = weights(*read_sass(text), loops)
    instructions = sum(executed)
    warps = compiled.metadata.num_warps
    issue = launch.programs * warps * instructions / ISSUE
    floor = moved_bytes(launch, source) / BANDWIDTH
    usage = aot.measure(compiled)
    return Bound(launch.name, launches, instructions, 1e6 * issue, 1e6 * floor, *usage, warps, known)


def bounds(model: str, size: tuple[int, int], dtype: str, batch: int, operators: list[str]) -> Iterator[Bound]:
    """Return the bounds of a model's different launches."""
    launches = kernels.launches_of(model, size, dtype, batch=batch)
    for group in kernels.distinct(launches, "sm_90", operators).values():
        same: dict[Any, list[Launch]] = {}
        for launch in group:
            numbers = tuple((k, v) for k, v in launch.arguments().items() if not isinstance(v, Pointer))
            same.setdefault((launch.grid, numbers), []).append(launch)
        for equal in same.values():
            yield bound(equal[0], len(equal))


def by_kernel(rows: list[Bound]) -> list[Bound]:
    """Sum the times over a model's launches of each kernel; of registers and the like keep the most."""
    merged: dict[str, Bound] = {}
    for row in rows:
        total = row._replace(issue=row.issue * row.launches, floor=row.floor * row.launches)
        if before := merged.get(row.kernel):
            most = {name: max(getattr(before, name), getattr(row, name)) for name in Bound._fields[5:9]}
            sums = {name: getattr(before, name) + getattr(total, name) for name in ("launches", "issue", "floor")}
            total = before._replace(**most, **sums, known=before.known and row.known)
        merged[row.kernel] = total
    return sorted(merged.values(), key=lambda row: row.floor - row.issue)


def describe(row: Bound) -> str:
    """Return one line for people."""
    return (
        f"{row.kernel:36} {row.launches:4} launches {row.issue:9.1f} µs to issue {row.floor:8.1f} µs to move "
        f"{row.issue / max(row.floor, 1e-9):5.1f}x {row.registers:4} registers {row.spills:3} bytes spilled "
        f"{row.shared:7} shared {row.warps:2} warps{'' if row.known else '  loops by data'}"
    )


def page(models: dict[str, list[Bound]], command: str, settings: str) -> str:
    """Return the page docs/results/kernels.md."""
    lines = ["# Bounds of the Triton kernels", ""]
    lines += [
        "**No GPU has run the kernels. These are bounds, not measurements**, computed from the code that Triton",
        f"{triton.__version__} compiles for sm_90, for every kernel that a model launches in a forward and a backward",
        f"pass ({settings}):",
        "",
        "```",
        command,
        "```",
        "",
        "- *Issue*: the instructions of all warps, those of loops as often as the loops run, over what an H100 or H200",
        "  can issue (132 multiprocessors, 4 instructions per clock, 1.83 GHz).",
        "- *Floor*: the bytes of the arguments that the kernel reads and of the results that it writes, each once, at",
        "  4.3 TB/s.",
        "- *Ratio*: issue over floor. At 1 or less the instructions do not keep a kernel from running at the speed of",
        "  memory; the goal is 2 at most. Times are sums over the launches.",
        "- Of two loops the iterations depend on data: dk/dv of routed regions takes the mean, as many as regions are",
        "  routed to; the mask of sparse attention 11 bisections, the mean for random scores; at most it takes 32.",
        "  Its code for equal scores is counted, although it only runs where there are some.",
        "- Registers and spilled bytes per thread and KiB of shared memory per program are the most of any launch.",
    ]
    if any(not row.known for rows in models.values() for row in rows):
        lines.append("- *: a loop depends on data; one iteration of it is counted.")
    for model, rows in models.items():
        lines += ["", f"## {model}", ""]
        lines.append("| kernel | launches | issue, µs | floor, µs | ratio | registers | spills | shared, KiB | warps |")
        lines.append("|---|" + "---:|" * 8)
        for row in rows:
            lines.append(
                f"| {row.kernel}{'' if row.known else ' *'} | {row.launches} | {row.issue:.0f} | {row.floor:.0f} "
                f"| {row.issue / max(row.floor, 1e-9):.1f} | {row.registers} | {row.spills} "
                f"| {row.shared / 1024:.1f} | {row.warps} |"
            )
        issue, floor = sum(row.issue for row in rows), sum(row.floor for row in rows)
        lines.append(
            f"| all | {sum(row.launches for row in rows)} | {issue:.0f} | {floor:.0f} | {issue / floor:.1f} |||||"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if unknown := [name for name in args.models if name not in kernels.registered()]:
        parser.error(f"MODEL must be a model of this package, got {' '.join(unknown)}")
    if unknown := [name for name in args.operators or [] if name not in aot.OPERATORS]:
        parser.error(f"--operators must be of {', '.join(aot.OPERATORS)}, got {' '.join(unknown)}")
    if args.batch < 1 or not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.size):
        parser.error(f"--batch and --size must be positive, as 128 and 224x224, got {args.batch} and {args.size}")
    size = tuple(int(n) for n in args.size.split("x"))
    models = {}
    for model in args.models:
        rows = list(bounds(model, size, args.dtype, args.batch, args.operators or aot.OPERATORS))
        models[model] = by_kernel(rows)
        for row in rows if args.launches else models[model]:
            text = json.dumps(dict(model=model) | row._asdict()) if args.json else f"{model:18} {describe(row)}"
            print(text, flush=True)
    if args.page:
        settings = f"batch {args.batch}, {size[0]} x {size[1]}, {args.dtype}"
        given = [text for text in sys.argv[1:] if argv is None] or list(argv or [])
        PAGE.write_text(page(models, " ".join(["python tools/kernel_bounds.py", *given]), settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
