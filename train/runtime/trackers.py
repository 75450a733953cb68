"""Trackers for a run's log: TensorBoard and Weights & Biases.

mmengine's visualisation backends do the same, but begin a new record when a run resumes; these continue the old one.

A wrong setting (an unknown tracker, a package that is missing, a WANDB_MODE that is none) is an error before training
begins. A tracker that can't start (no key, no network) or that fails later is reported once, and the run continues
without it.
"""

import importlib.util
import math
import os
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint import write_text
from .errors import UserError, closest, first_line

WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")


class TensorBoard:
    """Event files in FOLDER/tensorboard; `tensorboard --logdir RUNS` shows them."""

    def __init__(self, folder: Path, config: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # Events that an earlier process logged after the step at which this one resumes are hidden.
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        if not step:
            self._writer.add_text("config", f"```\n{_utf8(config)}\n```")

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def image(self, name: str, file: Path, step: int) -> None:
        import numpy as np

        with Image.open(file) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A wandb run in FOLDER/wandb: offline unless WANDB_MODE says otherwise; `wandb sync FOLDER/wandb/offline-run-*`.

    wandb's own variables (WANDB_PROJECT, WANDB_ENTITY, WANDB_NAME, …) work as they do elsewhere.
    """

    def __init__(self, folder: Path, config: str, step: int):
        import wandb

        note = folder / "wandb" / "run_id"
        note.parent.mkdir(exist_ok=True)
        if not (step and note.exists()):
            write_text(note, uuid.uuid4().hex[:8])
        self._run = wandb.init(
            dir=folder,
            id=note.read_text(),
            resume="allow" if step else None,
            mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]
            project=os.environ.get("WANDB_PROJECT", "saccade"),
            name=os.environ.get("WANDB_NAME", folder.name),
            config=dict(line.split(" = ", 1) for line in _utf8(config).splitlines() if " = " in line),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30.0),
        )
        self._wandb = wandb

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def image(self, name: str, file: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Any] = dict(tensorboard=TensorBoard, wandb=Wandb)


def _utf8(text: str) -> str:
    """Escape characters that UTF-8 can't encode: undecodable bytes of file names."""
    return text.encode("utf-8", "backslashreplace").decode()


class Guarded:
    """A tracker that reports its first failure with `message` and is then disabled."""

    def __init__(self, name: str, start: Callable[[], Any], message: Callable[[str], None]):
        self._name, self._message, self._tracker = name, message, None
        try:
            self._tracker = start()
        except Exception as error:  # each service has its own
            self._report("can't start", error)

    def _report(self, problem: str, error: Exception) -> None:
        self._message(f"{self._name} {problem} ({first_line(error)}): the run continues without it")
        self._tracker = None

    def _call(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:
            self._report("failed", error)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record a step's numbers; those that are undefined are left out."""
        self._call("scalars", {k: v for k, v in values.items() if v is not None and math.isfinite(v)}, step)

    def image(self, name: str, file: Path, step: int) -> None:
        """Record an image file."""
        self._call("image", name, file, step)

    def close(self) -> None:
        """Finish the record."""
        self._call("close")


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError for an unknown tracker, a package that is not installed, and a WANDB_MODE that is none."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker {name!r} in trackers={tuple(names)}{closest(str(name), TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"trackers={tuple(names)} needs the package {name}: install it")
    mode = os.environ.get("WANDB_MODE", "offline")
    if "wandb" in names and mode not in WANDB_MODES:
        raise UserError(f"the environment variable WANDB_MODE={mode} must be one of {', '.join(WANDB_MODES)}")


def start(
    names: Sequence[str], folder: Path, config: str, step: int, message: Callable[[str], None] = print
) -> list[Guarded]:
    """Start the trackers of these names for a run that begins, or resumes, at a step.

    config: as config.dump writes it. message: called with a sentence when a tracker fails.
    """
    return [Guarded(name, partial(TRACKERS[name], folder, config, step), message) for name in names]
