"""List the kernels that models launch, compiled without a GPU for any kind of it: registers, spills, shared memory.

    python tools/kernels.py biformer_t
    python tools/kernels.py 'agent_*' --cards sm_80 gfx942 --dtypes float16 --sizes 224x224 800x1344
    python tools/kernels.py 'halo_*' --compilations

The launches of a forward and a backward pass are recorded on fake tensors (saccade.ops.launches), so that every
combination of tile, flags and alignment that the models need is there. --compilations only counts the kernels that each
image size adds. The exit status is 1 if a kernel spills on sm_90 or needs more shared memory than a card has.
"""

import argparse
import json
import sys

DTYPES = dict(float32="fp32", float16="fp16", bfloat16="bf16")


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names or patterns of models, quoted: 'agent_*'")
    parser.add_argument("--operators", nargs="+", metavar="NAME", help="only these; default: all")
    parser.add_argument("--cards", nargs="+", default=["sm_90"], metavar="CARD", help="of saccade.ops.aot, as sm_90")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--sizes", nargs="+", default=["224x224"], metavar="HxW")
    parser.add_argument("--compilations", action="store_true", help="count kernels by image size, compile none")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import saccade.backbones  # noqa: F401  registers the models
import timm
import torch
from saccade.ops import aot
from saccade.ops.launches import Launch, compile_launch, record_model
from timm.models import _registry
from triton.backends.compiler import GPUTarget


def registered() -> list[str]:
    """Return the names of this package's models."""
    models = _registry._model_entrypoints.items()
    return sorted(name for name, entry in models if entry.__module__.startswith("saccade."))


def launches_of(name: str, size: tuple[int, int], dtype: str, hip: bool = False, batch: int = 2) -> list[Launch]:
    """Record what a model launches on images of a size, forward and backward."""
    sized = name.startswith(("agent_", "sparsifiner")) and size != (224, 224)  # made for one size

    def inputs() -> list[torch.Tensor]:
        if name.startswith("dfa3d"):
            return [torch.randn(1, 6, 3, *size), torch.randn(1, 6, 4, 4)]
        return [torch.randn(batch, 3, *size)]

    create = dict(img_size=size) if sized else {}
    return record_model(lambda: timm.create_model(name, **create), inputs, getattr(torch, dtype), hip)


def distinct(launches: list[Launch], card: str, operators: list[str]) -> dict[str, list[Launch]]:
    """Return the launches of these operators by what Triton compiles for them."""
    target, groups = GPUTarget(*aot.CARDS[card][:3]), {}
    for launch in launches:
        if launch.name.split(".")[0] in operators:
            groups.setdefault(launch.specialize(target)[0], []).append(launch)
    return groups


def usage(launch: Launch, dtype: str, card: str) -> aot.Usage:
    """Compile a launch for a kind of GPU and return the registers and shared memory that its kernel uses."""
    compiled = compile_launch(launch, GPUTarget(*aot.CARDS[card][:3]))
    tile = " ".join(f"{name}={value}" for name, value in launch.kwargs.items())
    operator, kernel = launch.name.split(".")
    return aot.Usage(operator, kernel, DTYPES[dtype], card, tile, *aot.measure(compiled), compiled.metadata.num_warps)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.operators = args.operators or aot.OPERATORS
    for name, given, known in (("--cards", args.cards, aot.CARDS), ("--operators", args.operators, aot.OPERATORS)):
        if not set(given) <= set(known):
            parser.error(f"{name} must be of {', '.join(known)}, got {' '.join(given)}")
    patterns = [name for pattern in args.models for name in timm.list_models(pattern) if name in registered()]
    if not patterns:
        parser.error(f"no model of this package matches {' '.join(args.models)}")
    problems = 0
    for card in args.cards:
        for dtype in args.dtypes:
            seen: set[str] = set()
            for name in dict.fromkeys(patterns):
                for text in args.sizes:
                    size = tuple(int(n) for n in text.split("x"))
                    launches = launches_of(name, size, dtype, aot.CARDS[card].backend == "hip")
                    groups = distinct(launches, card, args.operators)
                    new = [key for key in groups if key not in seen]
                    seen |= groups.keys()
                    if args.compilations:
                        row = dict(model=name, size=text, card=card, dtype=dtype, kernels=len(groups), new=len(new))
                        print(
                            json.dumps(row) if args.json else " ".join(f"{k} {v}" for k, v in row.items()), flush=True
                        )
                        continue
                    for key in new:
                        launch = groups[key][0]
                        try:
                            row = usage(launch, dtype, card)
                        except Exception as error:  # of the compiler: the other kernels are still worth knowing
                            print(f"{name} {launch.name} does not compile for {card}: {error}", file=sys.stderr)
                            problems += 1
                            continue
                        problems += bool(row.problem)
                        described = json.dumps(row._asdict() | dict(model=name, problem=row.problem))
                        print(described if args.json else f"{name:16} {row.describe()}", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
