"""Processes that work together, forked from the test's own: nothing is imported again. None can compute gradients."""

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def forked(processes: int, tool: str, *arguments) -> list[int]:
    """The exit codes of a tool's command line in that many processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def run(rank: int) -> None:
        from saccade.train.errors import run

        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = [tool, *map(str, arguments)]
        os._exit(run(runpy.run_path(str(TOOLS / f"{tool}.py"))["main"]))

    started = [multiprocessing.get_context("fork").Process(target=run, args=(rank,)) for rank in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    return [process.exitcode for process in started]
