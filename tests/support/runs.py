"""Training runs of the tests: in this process, and as processes of their own."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saccade.train import checkpoint, engine

# Plain SGD follows its gradients without magnifying their rounding, as Adam does where they are near zero.
SGD = ["optimizer.opt=sgd", "optimizer.lr=0.005", "schedule.warmup_epochs=0"]


@contextmanager
def own_signals() -> Iterator[None]:
    """What a run does to this process's signal handlers ends with the block."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(folder: Path, settings: dict) -> Path:
    """A whole run in this process; returns its folder."""
    engine.prepare_folder(folder, False, False)
    with own_signals():
        engine.train(folder, False, **settings)
    return folder


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What a process printed, once it has ended with this exit code."""
    out = process.communicate(timeout=200)[0]
    assert process.returncode == code, out
    return out


def state(folder: Path) -> tuple[dict, dict]:
    """Tensors and metadata of a run's last checkpoint."""
    return checkpoint.read(folder / "checkpoints" / checkpoint.LAST)
