"""What a run says while it goes: a progress bar or plain lines, log.txt, and log.jsonl for machines.

log.jsonl has one object a line: {"kind": "train", "step", "epoch", "loss", "top1", "lr", "images_per_s", "data_share",
"memory_gib", "seconds"} each log_every steps (means since the line before; images/s over all processes; data_share of
the time was spent waiting for data; seconds since the process started), and {"kind": "val", "step", "epoch", "top1",
"top5", "loss", "images", …}, with "ema_" before the same of the averaged weights, at each evaluation.
"""

import atexit
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .checkpoint import write_text
from .distributed import rank, world_size


class Log:
    """The log of one run, written by process 0 and silent in the others.

    folder: of the run. steps, steps_per_epoch, batch_size: of the whole run, batch_size over all processes.
    """

    def __init__(self, folder: Path, steps: int, steps_per_epoch: int, batch_size: int, device: torch.device):
        self._folder, self._steps, self._per_epoch, self._batch_size = folder, steps, steps_per_epoch, batch_size
        self._device, self._writes = device, rank() == 0
        self._bar = None
        if self._writes and sys.stdout.isatty():
            columns = TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn()
            self._bar = Progress(*columns, console=Console(), expand=True)
            self._task = self._bar.add_task("", total=steps)
        self._began = self._line_began = time.perf_counter()
        self._aside = self._waited = 0.0
        self._first_step = self._line_step = 0
        self._trackers: Sequence = ()

    def start(self, step: int, evaluated: int, trackers: Sequence = ()) -> None:
        """Begin at a step: what an earlier process logged after its last checkpoint is taken out of log.jsonl.

        trackers: of saccade.train.runtime.trackers; they get every line of log.jsonl too.
        """
        self._trackers = trackers
        self._first_step = self._line_step = step
        path = self._folder / "log.jsonl"
        if self._writes and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = (line for line in lines if _belongs(line, step, evaluated))
            write_text(path, "".join(f"{line}\n" for line in kept))
        if self._bar:
            self._bar.update(self._task, completed=step)
            self._bar.start()
            atexit.register(self._bar.stop)  # however the run ends, the terminal gets its cursor back
        self._line_began = time.perf_counter()

    def stop(self) -> None:
        """Take the progress bar away, and close the trackers."""
        if self._bar:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.close()

    def picture(self, file: Path, step: int) -> None:
        """Give the trackers a picture."""
        for tracker in self._trackers:
            tracker.picture(file.stem, file, step)

    def say(self, text: str, show: bool = True) -> None:
        """A line for people, in log.txt and (unless not to `show`) on the terminal."""
        if not self._writes:
            return
        with open(self._folder / "log.txt", "a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if show:
            if self._bar:
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The block is no training (evaluation, a checkpoint): it does not count in images/s."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def training(self, step: int, means: dict[str, float], lr: float) -> None:
        """A line on training, `means` being those since the line before."""
        now = time.perf_counter()
        seconds = max(now - self._line_began - self._aside, 1e-9)
        record = dict(
            kind="train",
            step=step,
            epoch=round(step / self._per_epoch, 3),
            **means,
            lr=lr,
            images_per_s=round((step - self._line_step) * self._batch_size / seconds, 1),
            data_share=round(self._waited / seconds, 3),
            memory_gib=round(_memory_gib(self._device), 2),
            seconds=round(now - self._began, 1),
        )
        left = (now - self._began) / (step - self._first_step) * (self._steps - step)
        self._line_began, self._line_step, self._aside, self._waited = now, step, 0.0, 0.0
        text = (
            f"step {step}/{self._steps} epoch {record['epoch']:.1f} {format_metrics(means)} lr {lr:.1e} "
            f"{record['images_per_s']:.0f} images/s data {record['data_share']:.0%} "
            f"memory {record['memory_gib']:.1f} GiB left {int(left) // 60}:{int(left) % 60:02d}"
        )
        self._record(record)
        self.say(text, show=not self._bar)
        if self._bar:
            self._bar.update(self._task, description=text.partition(" ")[2].partition(" ")[2])

    def evaluation(self, step: int, metrics: dict[str, float], best: bool) -> None:
        """A line on an evaluation of the val split."""
        record = dict(kind="val", step=step, epoch=round(step / self._per_epoch, 3), **metrics)
        self._record(record)
        self.say(f"step {step}/{self._steps} val {format_metrics(metrics)}{' *best*' if best else ''}")

    def _record(self, record: dict[str, Any]) -> None:
        if self._writes:
            with open(self._folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            values = {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
            for tracker in self._trackers:
                tracker.scalars(values, record["step"])


def _belongs(line: str, step: int, evaluated: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # torn by what ended the process
        return False
    return record["step"] <= (step if record["kind"] == "train" else evaluated)


def format_metrics(values: dict[str, float]) -> str:
    """loss 0.1234 top1 98.76 …"""
    return " ".join(f"{k} {v:.4f}" if "loss" in k else f"{k} {v:.2f}" for k, v in values.items() if k != "images")


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # getrusage counts what the process held that this one was forked from.
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made: versions, machine, threads, commit, command line."""
    return dict(
        command=sys.argv,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        python=platform.python_version(),
        versions={name: version(name) for name in ("saccade", "torch", "torchvision", "timm", "mmengine", "numpy")},
        machine=f"{platform.system()} {platform.machine()}",
        host=platform.node(),
        cpu=cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        processes=world_size(),
        commit=_commit(),
    )


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit of the repository that this file belongs to, "+" after it where files were changed since."""
    home = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", home, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != home:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
