"""Where a run's numbers and pictures go besides its own folder: TensorBoard and Weights & Biases.

mmengine's visualisation backends do the same, but begin a new record when a run resumes; these go on with the old one.
"""

import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint import write_text
from .errors import UserError, closest


class TensorBoard:
    """Event files in FOLDER/tensorboard; `tensorboard --logdir RUNS` shows them."""

    def __init__(self, folder: Path, config: str, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process logged behind the step that the run goes on from is not shown.
        self._writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)
        if not step:
            self._writer.add_text("config", f"```\n{config}\n```")

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def picture(self, name: str, file: Path, step: int) -> None:
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
            mode=os.environ.get("WANDB_MODE", "offline"),
            project=os.environ.get("WANDB_PROJECT", "saccade"),
            name=os.environ.get("WANDB_NAME", folder.name),
            config=dict(line.split(" = ", 1) for line in config.splitlines() if " = " in line),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._wandb = wandb

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def picture(self, name: str, file: Path, step: int) -> None:
        self._run.log({name: self._wandb.Image(str(file))}, step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Any] = dict(tensorboard=TensorBoard, wandb=Wandb)


def start(names: Sequence[str], folder: Path, config: str, step: int) -> list:
    """The trackers of these names for a run that begins, or goes on, at a step.

    config: as config.dump writes it. Raises UserError for a name that is none, or whose package is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"unknown tracker {name!r} in trackers={tuple(names)}{closest(str(name), TRACKERS)}")
    try:
        return [TRACKERS[name](folder, config, step) for name in names]
    except ImportError as error:
        raise UserError(f"trackers={tuple(names)} needs a package that is missing ({error}): install it") from error
