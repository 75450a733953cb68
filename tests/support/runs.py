"""Training runs of the tests: in this process, and as processes of their own."""

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from saccade.train import engine
from saccade.train.runtime import checkpoint
from support.jobs import Job

# Plain SGD follows its gradients without magnifying their rounding, as Adam does where they are near zero.
SGD = ["optimizer.opt=sgd", "optimizer.lr=0.005", "schedule.warmup_epochs=0"]


@contextmanager
def own_signals() -> Iterator[None]:
    """Restore this process's signal handlers after the block, which a run changes."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def train(folder: Path, settings: dict) -> Path:
    """Train a whole run in this process; return its folder."""
    engine.prepare_folder(folder, False, False)
    with own_signals():
        engine.train(folder, False, **settings)
    return folder


def finish(process: Job | subprocess.Popen, code: int = 0) -> str:
    """Wait until a process, or every process of a job, ends with the exit code `code`; return what was printed."""
    out = process.communicate(timeout=200)[0]
    assert process.returncode == code, out
    assert not isinstance(process, Job) or set(process.codes) == {code}, (process.codes, out)
    return out


def state(folder: Path) -> tuple[dict, dict]:
    """Return the tensors and metadata of a run's last checkpoint."""
    return checkpoint.read(folder / "checkpoints" / checkpoint.LAST)


def records(folder: Path, kind: str) -> list[dict]:
    """Return the lines of a run's log.jsonl about training ("train") or evaluations ("val")."""
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def interrupt_and_resume(folder: Path, settings: dict, task: type, step: int, patch: pytest.MonkeyPatch) -> None:
    """Run `settings` (save_every=1), interrupted in the step after `step`, then resumed to its end."""
    loss, count = task.loss, iter(range(10**6))

    def interrupted(*arguments):
        if next(count) == step:
            raise KeyboardInterrupt
        return loss(*arguments)

    patch.setattr(task, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(folder, settings)
    patch.setattr(task, "loss", loss)
    assert state(folder)[1]["step"] == step
    with own_signals():
        engine.train(folder, True, **settings)


def assert_same_end(one: Path, other: Path) -> None:
    """Check that the last checkpoints and the logged losses of two runs are equal to the bit."""
    whole, again = state(one)[0], state(other)[0]
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    losses = [[line["loss"] for line in records(folder, "train")] for folder in (one, other)]
    assert losses[0] == losses[1]
