"""Measure what the messages of a training step cost beside the gradients: values of the step, and requests to stop.

    python tools/benchmark_steps.py
    python tools/benchmark_steps.py --processes 2 4 8 --step-ms 20 --steps 200

Processes of this machine exchange them with gloo, as a run on CPUs does; instead of computing, a step waits --step-ms,
and ends with the message of the gradients, which is short here: the processes wait for the slowest of them there, with
or without other messages. "two" messages exchange the values and the requests one after the other, as saccade did up to
0.1; "one" has both, as it does now. Blocks of both, and of steps without, alternate. The overhead is the median of the
time that a step takes beyond that of a step without them. CPU time is that of all threads of a process. Writes
benchmark_steps.json to --out.
"""

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--step-ms", type=float, default=100, help="length of a step in milliseconds")
    parser.add_argument("--steps", type=int, default=60, help="steps of each kind")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_steps"))
    return parser


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv[1:]):
    make_parser().parse_args()  # before the imports below, which take seconds


import torch
from saccade.train.runtime import measure
from saccade.train.runtime.distributed import StopRequest, all_reduce_sum, process_group

BLOCK = 5  # steps of a kind before the next kind


class NothingBad:
    """No unreadable images."""

    new = ()


def step(kind: str, stop: StopRequest, values: torch.Tensor, seconds: float) -> None:
    """Wait as long as a step takes, with the messages of a kind."""
    time.sleep(seconds)
    all_reduce_sum(values)  # the gradients
    if kind == "two":
        all_reduce_sum(values).tolist()
        stop.agreed(NothingBad, wait=True)
    elif kind == "one":
        sums = all_reduce_sum(torch.cat([values, torch.tensor(stop.flags(NothingBad))])).tolist()
        stop.heard(sums[len(values) :])
        stop.agreed(NothingBad)


def work(rank: int, processes: int, port: int, seconds: float, steps: int, send) -> None:
    """Run the steps in one of the processes; process 0 sends wall and CPU seconds of each step, by kind."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(processes), CUDA_VISIBLE_DEVICES="")
    os.environ["TORCHELASTIC_RUN_ID"] = "benchmark"  # started together, as torchrun does
    kinds = ("none", "two", "one")
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    with process_group():
        stop, values = StopRequest(), torch.rand(4)
        for block in range(steps // BLOCK + 1):  # the first is not counted
            for kind in kinds:
                all_reduce_sum(values)  # together
                for _ in range(BLOCK):
                    wall, cpu = time.perf_counter(), time.process_time()
                    step(kind, stop, values, seconds)
                    if block:
                        times[kind].append((time.perf_counter() - wall, time.process_time() - cpu))
    if rank == 0:
        send.send(times)


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.step_ms <= 0 or args.steps < BLOCK or min(args.processes) < 1:
        parser.error(f"--step-ms and --processes must be more than 0, --steps {BLOCK} or more")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saccade.train.runtime.distributed"])
    rows = []
    for processes in args.processes:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        receive, send = context.Pipe(duplex=False)
        given = processes, port, args.step_ms / 1e3, args.steps, send
        group = [context.Process(target=work, args=(rank, *given)) for rank in range(processes)]
        for process in group:
            process.start()
        send.close()
        try:
            times = receive.recv()
        except EOFError:
            sys.exit(f"error: one of {processes} processes has failed")
        for process in group:
            process.join()
        wall, cpu = ({kind: statistics.median(t[i] for t in each) for kind, each in times.items()} for i in (0, 1))
        for kind in ("two", "one"):
            extra, own = wall[kind] - wall["none"], cpu[kind] - cpu["none"]
            share = extra / (args.step_ms / 1e3)
            rows.append(dict(processes=processes, messages=kind, ms=1e3 * extra, share=share, cpu_ms=1e3 * own))
            print(
                f"{processes} processes, {kind}: {1e3 * extra:.2f} ms a step ({share:.2%}), CPU time {1e3 * own:.2f} ms"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    facts = dict(machine=measure.machine(torch.device("cpu")), step_ms=args.step_ms, steps=args.steps, rows=rows)
    (args.out / "benchmark_steps.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"wrote {args.out / 'benchmark_steps.json'}")


if __name__ == "__main__":
    main()
