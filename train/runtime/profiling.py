"""A profile of some training steps, by torch.profiler."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from .checkpoint import atomic_write, write_text
from .distributed import rank

SKIPPED = 2  # first steps, which allocate memory and may compile


class Profile:
    """Record training steps into FOLDER: trace.json for https://ui.perfetto.dev, operators.txt, a table by time.

    steps: how many are recorded, after the first two; None: none. message: is told where they are. Process 0 records.
    `step` is called after each training step; `stop` ends the recording, also where steps are missing.
    """

    def __init__(self, folder: Path, steps: int | None, message: Callable[[str], None]):
        self._folder, self._message = folder, message
        self._profiler: torch.profiler.profile | None = None
        if steps is None or rank() > 0:
            return
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler = torch.profiler.profile(
            activities=kinds,
            schedule=torch.profiler.schedule(wait=SKIPPED - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
            acc_events=True,
        )
        self._profiler.start()

    def step(self) -> None:
        if self._profiler is not None:
            self._profiler.step()

    def stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()

    def _write(self, profiler: torch.profiler.profile) -> None:
        table = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=50)
        write_text(self._folder / "operators.txt", f"{table}\n")
        with atomic_write(self._folder / "trace.json") as temporary:
            profiler.export_chrome_trace(str(temporary))
        self._message(f"profile of the steps: {self._folder / 'operators.txt'}, {self._folder / 'trace.json'}")
