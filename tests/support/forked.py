"""Process groups forked from the test's own process: nothing is imported again. They cannot compute gradients."""

import multiprocessing
import os
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import torch

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def in_processes(count: int, function: Callable[[int], int]) -> list[int]:
    """Run function(rank) in `count` processes with torchrun's environment; return what it returns, as exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        torch.set_num_threads(1)  # the parent's threads do not exist in a forked process
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(count))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        os._exit(function(rank))

    started = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(count)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def forked(processes: int, tool: str, *arguments) -> list[int]:
    """Run a tool's command line in `processes` processes; return their exit codes."""

    def run(rank: int) -> int:
        from saccade.train.runtime.errors import run

        sys.argv = [tool, *map(str, arguments)]
        return run(runpy.run_path(str(TOOLS / f"{tool}.py"))["main"])

    return in_processes(processes, run)
