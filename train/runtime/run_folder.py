"""The folder of a run: made, recognised, emptied."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .distributed import rank, sync_errors
from .errors import UserError, from_os

HEADER = '"""The configuration of this run."""'  # the first line of config.py, by which a run's folder is recognised
RUN_FILES: tuple[str, ...] = ("checkpoints", "pictures", "profile", "config.json", "environment.json")
RUN_FILES += ("log.jsonl", "log.txt", "tensorboard", "wandb", "metrics.json", "classes.csv", "model.safetensors")
RUN_FILES += ("config.py", "bad_images.txt")


def is_run(folder: Path) -> bool:
    """Tell whether a folder is a run's: whether its config.py was written by a run."""
    config = folder / "config.py"
    return config.is_file() and HEADER in config.read_text(encoding="utf-8", errors="replace")


def prepare_folder(run_dir: Path, resume: bool, overwrite: bool) -> None:
    """Make the run's folder, or use it as it is to resume, or remove an earlier run's files to overwrite.

    Raises UserError for a folder that holds something else, and for one that can't be written.
    """
    with sync_errors():
        if rank() > 0:
            return
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            patterns = (".*.*.tmp", "checkpoints/.*.tmp", "checkpoints/.tmp*")
            stale = [path for pattern in patterns for path in run_dir.glob(pattern)]  # of a process that was killed
            if any(path not in stale for path in run_dir.iterdir()):
                if not is_run(run_dir):
                    raise UserError(f"{run_dir} is not empty and not a run's folder: choose another with --run-dir")
                if not resume and not overwrite:
                    raise UserError(
                        f"{run_dir} holds a run: continue it with --resume, or start again with --overwrite"
                    )
            for path in [*stale, *(map(run_dir.joinpath, RUN_FILES) if overwrite else ())]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except OSError as error:
            raise from_os(error, f"making {run_dir}") from error


@contextmanager
def removed_if_empty(run_dir: Path) -> Iterator[None]:
    """Remove the folder and its parents, where the block made them and raises before anything is in them."""
    absent = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]  # inner ones first
    try:
        yield
    except BaseException:
        if rank() == 0:
            with suppress(OSError):  # not empty, or not there
                for folder in absent:
                    folder.rmdir()
        raise


def check_finished(run: Path) -> None:
    """Raise UserError unless `run` is the folder of a finished run."""
    if not (run / "config.py").is_file() or not (run / "model.safetensors").is_file():
        raise UserError(f"{run} has no config.py and model.safetensors: give the folder of a finished run")


def list_outputs(run_dir: Path, paths: list[Path]) -> str:
    """Return a text with the files and, if timm can build the run's model, the line of Python that loads it."""
    lines = [f"  {path}" for path in paths]
    file = run_dir / "config.json"
    if file.exists() and "architecture" in json.loads(file.read_text(encoding="utf-8")):
        lines.append(f'  import saccade.backbones, timm; timm.create_model("local-dir:{run_dir}", pretrained=True)')
    return "\n".join(lines)
