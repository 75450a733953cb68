"""Report the resource usage of every kernel on every supported GPU, without one: `python -m saccade.ops.aot [--json]`.

Kernels are compiled ahead of time. Registers and spilled bytes per thread and shared memory per program are read from
the cubin on NVIDIA, with the cuobjdump that Triton ships, and from the assembly on AMD. The exit status is 1 if a
kernel spills on sm_90 or needs more shared memory than a GPU has.

An operator is included if OPERATORS has its name and its kernel.py a function

    def aot(dtype: str, hip: bool) -> Iterator[tuple[JITFunction, dict, dict]]

that yields, for each tile it may launch on tensors of dtype ("fp32", "fp16" or "bf16"): the kernel, the types of the
pointers to other dtypes ({"lse_ptr": "*fp32"}), and the keyword arguments of the launch (constexprs, num_warps, …).
Of the other arguments, stride_* are taken to be divisible by 16 where the kernel specializes on them; magic_* are
int64, scale is fp32, the rest are int32.
"""

import argparse
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

OPERATORS = [
    "agent_attention",
    "bilevel_routing",
    "channel_attention",
    "dfa3d",
    "gaussian_gate",
    "halo_attention",
    "neighborhood_attention",
    "sparse_attention",
    "spatial_gate",
    "strip_gate",
    "subspace_gate",
    "window_attention",
]
DTYPES = ["fp32", "fp16", "bf16"]


class Card(NamedTuple):
    backend: str
    arch: int | str
    warp: int
    shared: int  # limit per program in bytes; on CUDA, 1 KB less than a multiprocessor has
    warps: int = 64  # limit per multiprocessor


CARDS = {
    "sm_80": Card("cuda", 80, 32, 163 << 10),
    "sm_89": Card("cuda", 89, 32, 99 << 10, 48),
    "sm_90": Card("cuda", 90, 32, 227 << 10),
    "sm_100": Card("cuda", 100, 32, 227 << 10),
    "gfx942": Card("hip", "gfx942", 64, 64 << 10),
}
REGISTERS = 65536  # per multiprocessor of these CUDA GPUs


class Usage(NamedTuple):
    operator: str
    kernel: str
    dtype: str
    card: str
    tile: str
    registers: int
    spills: int  # bytes per thread
    shared: int  # bytes per program
    warps: int  # per program

    @property
    def problem(self) -> str:
        if self.shared > CARDS[self.card].shared:
            return f"more than the {CARDS[self.card].shared} bytes of shared memory per program"
        return "spills" if self.spills and self.card == "sm_90" else ""

    @property
    def occupancy(self) -> float | None:
        """Estimate the occupancy of a CUDA multiprocessor: resident warps over their maximum."""
        card = CARDS[self.card]
        if card.backend != "cuda":
            return None
        registers = -(-self.registers // 8) * 8 * 32 * self.warps  # allocated 8 per thread at a time
        shared = (card.shared + 1024) // (self.shared + 1024)  # the system reserves 1024 per program
        programs = min(REGISTERS // registers, shared, card.warps // self.warps, card.warps // 2)
        return programs * self.warps / card.warps

    def describe(self) -> str:
        """Return one line for people."""
        occupancy = "" if self.occupancy is None else f"{self.occupancy:5.0%} of warps"
        return (
            f"{self.card:7} {self.kernel:12} {self.dtype:5} {self.registers:4} registers {self.spills:5} bytes spilled "
            f"{self.shared:7} shared {occupancy}  {self.tile}{'  ! ' if self.problem else ''}{self.problem}"
        )


def build(kernel, dtype: str, pointers: dict, options: dict, card: str):
    """Compile a kernel for a GPU, as it would be launched with these options on tensors of dtype."""
    import triton
    from triton.backends.compiler import GPUTarget

    if not isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it and use a new process")
    defaults = {param.name: param.default for param in kernel.params if param.is_constexpr and param.has_default}
    const = {name: value for name, value in (defaults | options).items() if name in kernel.arg_names}

    def typed(name: str) -> str:
        if name in const:
            return "constexpr"
        if name in pointers:
            return pointers[name]
        if name.endswith("_ptr"):
            return f"*{dtype}"
        return "i64" if name.startswith("magic_") else "fp32" if name == "scale" else "i32"

    aligned = [
        i
        for i, (name, param) in enumerate(zip(kernel.arg_names, kernel.params))
        if (name.endswith("_ptr") or name.startswith("stride_")) and not param.do_not_specialize
    ]
    source = triton.compiler.ASTSource(
        kernel,
        signature={name: typed(name) for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): value for name, value in const.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    launch = {name: value for name, value in options.items() if name not in const}
    return triton.compile(source, target=GPUTarget(*CARDS[card][:3]), options=launch)


@functools.cache
def _cuobjdump() -> str:
    import triton

    return triton.knobs.nvidia.cuobjdump.path


def measure(compiled) -> tuple[int, int, int]:
    """Return registers and spilled bytes per thread, and bytes of shared memory per program."""
    if "cubin" not in compiled.asm:
        counts = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)$", compiled.asm["amdgcn"], re.MULTILINE)}
        return counts["vgpr_count"], counts["private_segment_fixed_size"], compiled.metadata.shared
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(compiled.asm["cubin"])

        def dump(flag: str) -> str:
            return subprocess.run([_cuobjdump(), flag, path], check=True, capture_output=True, text=True).stdout

        counts = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", dump("--dump-resource-usage"))}
        spilled = counts["STACK"] + counts["LOCAL"]  # kernels have no local arrays of their own
        # Triton 3.8 reserves 8 bytes that no instruction touches.
        if spilled and not re.search(r"\b(STL|LDL)\b", dump("-sass")):
            spilled = 0
    return counts["REG"], spilled, compiled.metadata.shared


def usage(operators=tuple(OPERATORS), cards=tuple(CARDS), dtypes=tuple(DTYPES), quick=False) -> Iterator[Usage]:
    """Compile every tile of the operators' kernels, or only the first tile of each kernel if quick."""
    for operator in operators:
        module = importlib.import_module(f"{__package__}.{operator}.kernel")
        for card in cards:
            for dtype in dtypes:
                seen = set()
                for kernel, pointers, options in module.aot(dtype, CARDS[card].backend == "hip"):
                    if quick and kernel in seen:
                        continue
                    seen.add(kernel)
                    tile = " ".join(f"{name}={value}" for name, value in options.items())
                    compiled = build(kernel, dtype, pointers, options, card)
                    warps = compiled.metadata.num_warps
                    yield Usage(operator, kernel.__name__, dtype, card, tile, *measure(compiled), warps)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m saccade.ops.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--quick", action="store_true", help="compile only the first tile of each kernel")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    args = parser.parse_args(argv)
    problems = 0
    for row in usage(args.operators, args.cards, args.dtypes, args.quick):
        if args.json:
            print(json.dumps(row._asdict() | dict(occupancy=row.occupancy, problem=row.problem)), flush=True)
        else:
            print(row.describe(), flush=True)
        problems += bool(row.problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
