"""Command lines as processes of their own, forked from one that has imported everything, so that each starts at once.

That process computes nothing, so that its copies can compute gradients. Tests whose subject is the real command or
torchrun itself start those.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import time
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
# What the commands import at their start, and what takes seconds to import later.
PRELOAD = ["torch", "torchvision", "timm", "saccade.backbones", "saccade.train.engine", "saccade.train.test"]
PRELOAD += ["saccade.train.models.build", "saccade.train.tasks", "torch.distributed.run", "torch.nn.parallel"]
PRELOAD += ["saccade.train.visual.curves", "saccade.train.visual.contact_sheet", "saccade.train.data.digits"]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)


def _main(script: str, arguments: list[str], environment: dict[str, str], output: str, file_size: int | None) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a process of its own; a loader's workers end with it
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(environment)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from saccade.train.runtime.errors import run

    sys.argv = [script, *arguments]
    main = runpy.run_path(script)
    code = run(main["main"]) if "main" in main else 0
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)  # as an interpreter exits, without the exit handlers of the process that was forked


class Job:
    """A command line in one or more processes, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, script: Path, *arguments: object, processes: int = 0, file_size: int | None = None):
        """processes: if more than 0, a group as torchrun starts it; file_size: the largest file in bytes."""
        handle, self.output = tempfile.mkstemp(suffix=".out")
        os.close(handle)  # a file that stays open until the collector finds the job is a warning in some later test
        weakref.finalize(self, os.unlink, self.output)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        if processes:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            environment |= dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE=str(processes))
        self.processes = []
        for rank in range(max(processes, 1)):
            own = dict(RANK=str(rank), LOCAL_RANK=str(rank)) if processes else {}
            line = (str(script), list(map(str, arguments)), environment | own, self.output, file_size)
            self.processes.append(_context.Process(target=_main, args=line))
            self.processes[-1].start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    @property
    def pid(self) -> int:
        return self.pids[0]

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    @property
    def returncode(self) -> int | None:
        return None if None in self.codes else next((code for code in self.codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        if None in self.codes:
            self.kill()
            raise TimeoutError(f"the job took longer than {timeout} s:\n{self.text()}")
        return self.returncode

    def communicate(self, timeout: float = 60) -> tuple[str, None]:
        self.wait(timeout)
        return self.text(), None

    def text(self) -> str:
        """Return what all processes have printed so far, on stdout and stderr."""
        return Path(self.output).read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
                process.join()
