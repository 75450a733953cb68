"""Compute how training scales: bytes and collectives a step, checkpoints, expected efficiency on 8 to 1,024 GPUs.

    python tools/scaling.py
    python tools/scaling.py --models biformer_b davit_b --batch 256 --network 25 --jitter 0.02
    python tools/scaling.py --write docs/scaling.md

Nothing is measured here: parameters, multiplications and FSDP's blocks are counted from the models, the rest follows
from the formulas in docs/scaling.md and from the options, which are the assumptions. --write replaces the tables of a
page between its markers.
"""

import argparse
import math
import sys
from pathlib import Path

MODELS = ["biformer_b", "davit_b", "agent_swin_b", "agent_pvt_t", "halo_h4", "nat_b", "sparsifiner_deit_s", "patnet_l"]
COUNTS = (8, 16, 64, 256, 1024)
BEGIN, END = "<!-- Written by tools/scaling.py: begin -->", "<!-- end -->"


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=128, help="images per GPU and step")
    parser.add_argument("--flops", type=float, default=200, help="TFLOP/s that a GPU reaches in a step")
    parser.add_argument("--network", type=float, default=40, help="GB/s per GPU and direction between machines")
    parser.add_argument("--nvlink", type=float, default=250, help="GB/s per GPU and direction within a machine of 8")
    parser.add_argument("--latency", type=float, default=10, help="µs for each hop of a collective operation")
    parser.add_argument("--jitter", type=float, default=0.01, help="standard deviation of a GPU's step, of its length")
    parser.add_argument("--disk", type=float, default=1, help="GB/s at which a process writes a checkpoint")
    parser.add_argument("--sha", type=float, default=1.5, help="GB/s of SHA-256")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables of this page")
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from saccade.train.runtime import measure
from saccade.train.runtime.distributed import fsdp_blocks


def count(name: str) -> dict[str, int]:
    """Count a model's parameters, multiplications and additions of an image, FSDP's units, and its largest unit."""
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        size = timm.get_pretrained_cfg(name).input_size
        macs = measure.macs(model, torch.empty(1, *size))
    parameters = sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in fsdp_blocks(model)]
    rest = parameters - sum(blocks)
    return dict(parameters=parameters, macs=macs, units=len(blocks) + 1, largest=max([*blocks, rest]))


def buckets(parameters: int) -> int:
    """Return the number of all-reduces of gradients that DDP makes: a first one of 1 MiB, then 25 MiB each."""
    return 1 + math.ceil(max(4 * parameters - 2**20, 0) / 2**20 / 25)


def efficiency(args: argparse.Namespace, model: dict[str, int], gpus: int, strategy: str) -> float:
    """Return images/s per GPU divided by those of one GPU, by the formula of docs/scaling.md."""
    step = 6 * model["macs"] * args.batch / (args.flops * 1e12)  # forward 2, backward 4 per multiplication
    rate = (args.nvlink if gpus <= 8 else args.network) * 1e9
    share = 4 * model["parameters"] * (gpus - 1) / gpus / rate  # seconds for all weights once, in one direction
    hops = args.latency * 1e-6 * math.ceil(math.log2(gpus))
    if strategy == "ddp":
        number = buckets(model["parameters"])
        last = min(25 * 2**20, 4 * model["parameters"]) / (4 * model["parameters"])
        sent = 2 * share + number * hops
        exposed = max(sent - step * 2 / 3, 0) + last * 2 * share + hops
    else:
        part = model["largest"] / model["parameters"]
        forward = share + model["units"] * hops
        backward = 2 * (share + model["units"] * hops)
        exposed = max(forward - step / 3, 0) + max(backward - step * 2 / 3, 0) + part * 2 * share + 2 * hops
    waiting = args.jitter * step * math.sqrt(2 * math.log(gpus))  # for the slowest of `gpus` normal variables
    return step / (step + exposed + waiting + hops)  # the last: the values of the step


def tables(args: argparse.Namespace) -> str:
    """Return the tables as Markdown."""
    counted = {name: count(name) for name in args.models}
    traffic = [
        "| model | parameters | GMACs an image | DDP: sent a step | DDP: all-reduces | FSDP2: sent a step | FSDP2: "
        "collectives | checkpoint, with EMA | written by process 0 | written by 64 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, model in counted.items():
        gradients, units = 4 * model["parameters"], model["units"]
        held = 4 * gradients  # weights, averaged weights, two moments
        alone = held / args.disk / 1e9 + held / args.sha / 1e9
        size = f"{model['parameters'] / 1e6:.1f} M | {model['macs'] / 1e9:.1f}"
        ddp = f"{2 * gradients / 1e6:.0f} MB | {buckets(model['parameters'])} + 1"
        fsdp = f"{3 * gradients / 1e6:.0f} MB | {3 * units - 1} + 1"
        traffic.append(
            f"| `{name}` | {size} | {ddp} | {fsdp} | {held / 1e6:.0f} MB | {alone:.1f} s | {alone / 64:.2f} s |"
        )
    heads = "".join(f" {gpus:,} |" for gpus in COUNTS)
    shares = [f"| model | strategy | step, ms |{heads}", f"|---|---|---:|{'---:|' * len(COUNTS)}"]
    for name, model in counted.items():
        step = 6 * model["macs"] * args.batch / args.flops / 1e9
        for strategy in ("ddp", "fsdp"):
            cells = "".join(f" {efficiency(args, model, gpus, strategy):.0%} |" for gpus in COUNTS)
            shares.append(f"| `{name}` | {strategy} | {step:.0f} |{cells}")
    return "\n".join([*traffic, "", *shares])


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    for name in args.models:
        if not timm.is_model(name):
            parser.error(f"unknown model {name!r}; timm.list_models() lists all")
    text = tables(args)
    if args.write is None:
        print(text)
        return
    page = args.write.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        parser.error(f"--write {args.write} has no lines {BEGIN} and {END}")
    before, _, rest = page.partition(BEGIN)
    args.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
    print(f"wrote {args.write}")


if __name__ == "__main__":
    main()
