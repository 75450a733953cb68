"""Checkpoints in which each process writes its own shards: of models larger than the memory of one host.

They are written and read by torch.distributed.checkpoint, as safetensors files without pickled objects, and can be
read by any number of processes. A checkpoint is a folder with a file of each process, and meta.json: the metadata of
saccade.train.runtime.checkpoint and the SHA-256 of each file. It is written under a temporary name and renamed when all
processes are done. A run keeps `last`, the `previous` one, and the `best` (of hard links).
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from . import checkpoint
from .checkpoint import Unreadable, checksum, write_text
from .distributed import all_gather_object, rank, sync_errors, world_size
from .errors import UserError, from_os

LAST, PREVIOUS, BEST, META = "last", "previous", "best", "meta.json"

Like = Callable[[str], Tensor | None]


def save(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], best: bool, rotate: bool = True) -> None:
    """Write `last`; keep the one before it as `previous`, and where `best`, keep the new one under that name too.

    All processes must call it, on a file system that they share. tensors: of process 0 where they are not sharded.
    meta: values that JSON has. rotate: False where `last` is of the same step, so that `previous` stays. Raises
    UserError, earlier checkpoints untouched.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    temporary = folder / ".new"
    with sync_errors():
        if rank() == 0:
            _remove(temporary)
            try:
                temporary.mkdir(parents=True)
            except OSError as error:
                raise from_os(error, f"saving {folder / LAST}") from error
    with sync_errors():
        try:
            dcp.save(
                dict(tensors),
                storage_writer=dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True),
                no_dist=world_size() == 1,
            )
        except (CheckpointException, OSError) as error:
            raise from_os(_as_os_error(error), f"saving {folder / LAST}") from error
    written: dict[str, str] = {}
    for part in all_gather_object({file.name: checksum(file) for file in temporary.glob(f"shard-{rank() + 1:05d}-*")}):
        written |= part
    with sync_errors():
        if rank() == 0:
            write_text(temporary / META, json.dumps(dict(meta=meta, files=written), sort_keys=True))
            try:
                if best:
                    _link(temporary, folder / BEST)
                if rotate and (folder / LAST).exists():
                    _remove(folder / PREVIOUS)
                    (folder / LAST).rename(folder / PREVIOUS)
                _remove(folder / LAST)
                temporary.rename(folder / LAST)
            except OSError as error:
                raise from_os(error, f"saving {folder / LAST}") from error


def read(
    path: Path, like: Like | None = None, alone: bool = False, only: tuple[str, ...] = ("",)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a checkpoint. All processes must call it, unless one reads it `alone`.

    like: returns the tensor whose sharding an entry gets, by its name, or None for a full tensor on the CPU. only:
    beginnings of the names that are read. Raises Unreadable for a damaged checkpoint, in all processes.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    one = alone or world_size() == 1
    problem, text = "", ""
    try:
        text = (path / META).read_text(encoding="utf-8")
        known = json.loads(text)
        files = sorted(known["files"].items())
        for name, expected in files if one else files[rank() :: world_size()]:
            if checksum(path / name) != expected:
                raise ValueError(f"contents of {name} and checksum disagree")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{path} can't be read ({error})"
    for other in [problem] if one else all_gather_object(problem):
        if other:
            raise Unreadable(other)
    reader = dcp.HuggingFaceStorageReader(str(path))
    tensors = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not name.startswith(only):
            continue
        target = None if like is None else like(name)
        assert isinstance(entry, TensorStorageMetadata)  # what HuggingFaceStorageReader gives for every name
        kind = entry.properties.dtype
        if isinstance(target, DTensor) and target.shape == entry.size:
            tensors[name] = torch.empty_like(target, dtype=kind)
        else:
            tensors[name] = torch.empty(entry.size, dtype=kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=one)
    return tensors, known["meta"]


def load(folder: Path, like: Like) -> tuple[dict[str, Tensor], dict[str, Any], list[str]] | None:
    """Read a run's newest intact checkpoint: tensors, metadata, and a message for each newer one that is damaged.

    Returns None where there is none, or where the newest file of saccade.train.runtime.checkpoint is of a later step.
    All processes must call it. Raises UserError where there are only damaged ones.
    """
    if newest_step(folder) < max(checkpoint.step(folder / name) for name in (checkpoint.LAST, checkpoint.PREVIOUS)):
        return None
    messages: list[str] = []
    for name in (LAST, PREVIOUS):
        if (folder / name).exists():
            try:
                return *read(folder / name, like), messages
            except Unreadable as error:
                messages.append(str(error))
    if messages:
        raise UserError(f"every checkpoint is damaged ({'; '.join(messages)}): start again with --overwrite")
    return None


def newest_step(folder: Path, names: tuple[str, ...] = (LAST, PREVIOUS)) -> int:
    """Return the step of the newest checkpoint of the names in a folder, -1 if there is none."""
    steps = [-1]
    for name in names:
        with suppress(OSError, ValueError, KeyError, TypeError):
            steps.append(int(json.loads((folder / name / META).read_text(encoding="utf-8"))["meta"]["step"]))
    return max(steps)


def _as_os_error(error: BaseException) -> OSError:
    """Return the system's error among those of all processes that torch.distributed.checkpoint collects."""
    if isinstance(error, OSError):
        return error
    for inner, *_ in getattr(error, "failures", {}).values():
        if isinstance(inner, OSError):
            return inner
    return OSError(0, " ".join(str(error).split()))


def _link(source: Path, target: Path) -> None:
    """Make `target` a folder of the files of `source`, or of copies where the file system has no hard links."""
    temporary = target.with_name(f".{target.name}")
    _remove(temporary)
    temporary.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, temporary / file.name)
        except OSError:
            shutil.copyfile(file, temporary / file.name)
    _remove(target)
    temporary.rename(target)


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)
