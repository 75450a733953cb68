"""The log of a run: a progress bar or plain lines on the terminal, log.txt, and log.jsonl for programs.

log.jsonl has one object per line: {"kind": "train", "step", "epoch", "loss", "top1", "lr", "images_per_s",
"data_share", "memory_gib", "seconds"} every log_every steps (means since the line before; images/s over all processes;
data_share: the share of the time spent waiting for data; seconds since the process started), and {"kind": "val",
"step", "epoch", "top1", "top5", "loss", "images", …} at each evaluation, with "ema_" before the metrics of the averaged
weights. A metric that is undefined is null.
"""

import atexit
import contextlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from .checkpoint import to_json, write_text
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
            columns = BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[left]} left")
            self._bar = Progress(*columns, TextColumn("{task.fields[loss]}"), console=Console(), expand=True)
            self._task = self._bar.add_task("", total=steps, left="-", loss="")
        self._start_time = self._line_time = time.perf_counter()
        self._paused = self._waited = 0.0
        self._first_step = self._line_step = 0
        self._trackers: Sequence = ()

    def start(self, step: int, evaluated: int, trackers: Sequence = ()) -> None:
        """Begin at a step; remove from log.jsonl what an earlier process logged after its last checkpoint.

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
        self._line_time = time.perf_counter()

    def stop(self) -> None:
        """Remove the progress bar, and close the trackers."""
        if self._bar:
            self._bar.stop()
        for tracker in self._trackers:
            tracker.close()

    def image(self, file: Path, step: int) -> None:
        """Give the trackers an image file."""
        for tracker in self._trackers:
            tracker.image(file.stem, file, step)

    def message(self, text: str, show: bool = True, keep: bool = True) -> None:
        """Write a line for people to log.txt, with `keep`, and to the terminal, with `show`."""
        if not self._writes:
            return
        if keep:
            with open(self._folder / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        if show:
            if self._bar:
                self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        start_time = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start_time

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block (an evaluation, a checkpoint) out of images/s."""
        start_time = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start_time

    def stepped(self, step: int) -> None:
        """Move the progress bar to `step` steps done."""
        if self._bar:
            self._bar.update(self._task, completed=step, left=format_seconds(self._seconds_left(step)))

    def _seconds_left(self, step: int) -> float:
        return (time.perf_counter() - self._start_time) / (step - self._first_step) * (self._steps - step)

    def training(self, step: int, means: dict[str, float], lr: float) -> None:
        """Log a line on training; `means` are those since the line before."""
        now = time.perf_counter()
        seconds = max(now - self._line_time - self._paused, 1e-9)
        record = dict(
            kind="train",
            step=step,
            epoch=round(step / self._per_epoch, 3),
            **means,
            lr=lr,
            images_per_s=round((step - self._line_step) * self._batch_size / seconds, 1),
            data_share=round(self._waited / seconds, 3),
            memory_gib=round(_memory_gib(self._device), 2),
            seconds=round(now - self._start_time, 1),
        )
        self._line_time, self._line_step, self._paused, self._waited = now, step, 0.0, 0.0
        text = (
            f"step {step}/{self._steps} epoch {record['epoch']:.1f} {format_metrics(means)} lr {lr:.1e} "
            f"{record['images_per_s']:.0f} images/s data {record['data_share']:.0%} "
            f"memory {record['memory_gib']:.1f} GiB left {format_seconds(self._seconds_left(step))}"
        )
        self._record(record)
        self.message(text, show=not self._bar)
        if self._bar:
            self._bar.update(self._task, loss=f"loss {means['loss']:.4f}")

    def evaluation(self, step: int, metrics: dict[str, float], best: bool) -> None:
        """Log a line on an evaluation of the val split."""
        record = dict(kind="val", step=step, epoch=round(step / self._per_epoch, 3), **metrics)
        self._record(record)
        self.message(f"step {step}/{self._steps} val {format_metrics(metrics)}{' *best*' if best else ''}")

    def _record(self, record: dict[str, Any]) -> None:
        if self._writes:
            with open(self._folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(to_json(record) + "\n")
            values = {f"{record['kind']}/{k}": v for k, v in record.items() if k not in ("kind", "step")}
            for tracker in self._trackers:
                tracker.scalars(values, record["step"])


def _belongs(line: str, step: int, evaluated: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:  # cut off by what ended the process
        return False
    return record["step"] <= (step if record["kind"] == "train" else evaluated)


def format_metrics(values: Mapping[str, float | None]) -> str:
    """Return "loss 0.1234 top1 98.76 …", with a dash for a metric that is undefined."""

    def text(name: str, value: float | None) -> str:
        if value is None or not math.isfinite(value):
            return "-"
        return f"{value:.4f}" if "loss" in name else f"{value:.2f}"

    return " ".join(f"{name} {text(name, value)}" for name, value in values.items() if name != "images")


def format_seconds(seconds: float) -> str:
    """Return a duration as "2 d 03:04:05", "3:04:05" or "4:05"."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minute:02d}:{second:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # getrusage counts what the process held that this one was forked from.
    with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def environment(device: torch.device) -> dict[str, Any]:
    """Return what a run was made with: versions, machine, threads, commit, command line."""
    return dict(
        command=sys.argv,
        started=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        python=platform.python_version(),
        versions=versions(),
        machine=f"{platform.system()} {platform.machine()}",
        host=platform.node(),
        cpu=cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        processes=world_size(),
        commit=_commit(),
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run's numbers depend on."""
    return {name: version(name) for name in ("saccade", "torch", "torchvision", "timm", "mmengine", "numpy")}


def cpu_name() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """Return the commit of the repository that this file belongs to, with "+" where files have changed since."""
    home = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", home, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != home:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
