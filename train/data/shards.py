"""Writing webdataset shards: tar files of samples, each an image and, in a .cls file, the number of its class."""

import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from ..runtime.checkpoint import atomic_write, write_text
from ..runtime.errors import DATA, UserError, from_os
from .imagenet import INDEX, read_index
from .images import Source, Strings, decode, note_conversions
from .tar import IMAGE, checksum, index

Progress = Callable[[int, int], None]


def write(
    source: Source,
    split: str,
    out: Path,
    samples: int,
    workers: int = 1,
    shuffle: int | None = None,
    resize: int | None = None,
    progress: Progress = lambda images, total: None,
) -> list[str]:
    """Write a split's shards, out/SPLIT-000000.tar …, and list them in out/index.json; returns their names.

    samples: of a shard; the last may have fewer. workers: processes. shuffle: a seed; None: in the source's order.
    resize: pixels of the shorter side, of images that are larger; others are copied byte by byte. progress: is told how
    many images are done, and of how many.
    A shard that is whole, by its checksum, is not written again: after a kill, the same call goes on. Raises UserError
    for a folder that has other shards of this split, and for data that are not whole.
    """
    if samples < 1 or workers < 1 or (resize is not None and resize < 1):
        raise UserError(f"samples={samples}, workers={workers} and resize={resize} must be 1 or more")
    files, labels = source.images(split)
    if resize:
        note_conversions(files.read, len(files), f"{split} images")
    for name, (reason, _) in source.bad.items():
        raise UserError(f"{name} {reason}: shards are written of whole data only", DATA)
    order = np.arange(len(files))
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(order)
    shards = {f"{split}-{i // samples:06d}.tar": order[i : i + samples] for i in range(0, len(order), samples)}
    keys = _keys(files, labels, source.class_names)
    made_of = repr([samples, shuffle, resize]).encode(), keys.text.tobytes(), np.asarray(labels, np.int64).tobytes()
    plan = hashlib.sha256(b"".join(made_of)).hexdigest()
    try:
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock", timeout=0):
            known, done = _resume(out, split, plan, source.class_names)
            writer = _Writer(out, files, labels, keys, resize, done)
            context = dict(initializer=_start, initargs=(writer,))
            images = 0
            with ProcessPoolExecutor(workers, **context) as pool:
                waiting = {pool.submit(_run, name, indices): name for name, indices in shards.items()}
                try:
                    for finished in as_completed(waiting):
                        done[waiting[finished]] = finished.result()
                        write_text(out / f".{split}.partial.json", json.dumps(dict(plan=plan, shards=done)) + "\n")
                        images += len(shards[waiting[finished]])
                        progress(images, len(order))
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            plans = known["plans"] | {split: plan}
            listed = known["shards"] | {name: done[name] for name in shards}
            said = dict(classes=source.class_names, plans=plans, shards=dict(sorted(listed.items())))
            write_text(out / INDEX, json.dumps(said, indent=1) + "\n")
            (out / f".{split}.partial.json").unlink()
    except Timeout:
        raise UserError(f"another process is writing to {out}: wait for it, or choose another folder") from None
    except OSError as error:
        raise from_os(error, f"writing to {out}") from error
    return list(shards)


def _keys(files: Any, labels: Any, class_names: list[str]) -> Strings:
    """A name in its shard for each image, without an ending: CLASS/FILE, told apart where several are equal."""
    seen: set[str] = set()
    keys = []
    for i, label in enumerate(labels):
        stem = os.path.splitext(files.base(i).rpartition("/")[2])[0].replace(".", "_")
        key, n = f"{class_names[label]}/{stem}", 1
        while key in seen:
            key, n = f"{class_names[label]}/{stem}_{n}", n + 1
        seen.add(key)
        keys.append(key)
    return Strings(keys)


def _resume(out: Path, split: str, plan: str, class_names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of a folder: its index, and what earlier calls finished of this split."""
    known: dict[str, Any] = dict(classes=class_names, shards={}, plans={})
    if (out / INDEX).exists():
        known = dict(plans={}) | read_index(out / INDEX)
    partial = out / f".{split}.partial.json"
    started = json.loads(partial.read_text()) if partial.exists() else None
    theirs = started["plan"] if started else known["plans"].get(split)
    others = f"{out} has shards of other images or of another division: remove them or choose another folder"
    if (
        known["classes"] != class_names
        or theirs not in (plan, None)
        or (not theirs and list(out.glob(f"{split}-*.tar")))
    ):
        raise UserError(others)
    for stale in out.glob(f".*{split}-*.tmp"):  # of a process that was killed
        stale.unlink()
    done = started["shards"] if started else {}
    return known, done or {name: entry for name, entry in known["shards"].items() if name.startswith(f"{split}-")}


class _Writer:
    """Writes shards; each worker process has one."""

    def __init__(self, out: Path, files: Any, labels: Any, keys: Strings, resize: int | None, done: dict[str, Any]):
        self.out, self.files, self.labels, self.keys, self.resize = out, files, labels, keys, resize
        self.done = dict(done)

    def shard(self, name: str, indices: np.ndarray) -> dict[str, Any]:
        """What the index says of the shard, written unless it is there and whole."""
        path = self.out / name
        entry = self.done.get(name)
        if entry and path.exists() and path.stat().st_size == entry["bytes"] and checksum(path) == entry["sha256"]:
            return entry
        with atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
            for i in indices.tolist():
                ending, data = self._image(i)
                for member, content in ((ending, data), ("cls", str(int(self.labels[i])).encode())):
                    header = tarfile.TarInfo(f"{self.keys[i]}.{member}")  # of no time and no owner: the same each time
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        (found,) = index([path], "shard")  # kept for who reads the shard, and a check that it can be read
        if found.torn or found.labels.tolist() != [int(self.labels[i]) for i in indices]:
            raise UserError(f"{path} is not as it was written: is the disk in order?")
        return dict(samples=len(indices), bytes=path.stat().st_size, sha256=checksum(path))

    def _image(self, i: int) -> tuple[str, bytes]:
        """The ending and the bytes of an image, as they were or made smaller."""
        name = self.files.name(i)
        try:
            data = self.files.read(i)
        except OSError as error:
            raise from_os(error, f"reading {name}") from error
        ending = os.path.splitext(name)[1].lower().removeprefix(".")
        if ending in IMAGE and not self.resize:
            return "jpg" if ending == "jpeg" else ending, data
        image = decode(data, lambda: name)
        shorter = min(image.size)
        if ending in IMAGE and shorter <= self.resize:
            return "jpg" if ending == "jpeg" else ending, data
        if self.resize and shorter > self.resize:
            size = [round(side * self.resize / shorter) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        lossy = ending in ("jpg", "jpeg", "webp")
        file = io.BytesIO()
        image.save(file, **(dict(format="JPEG", quality=95) if lossy else dict(format="PNG")))
        return "jpg" if lossy else "png", file.getvalue()


_writer: _Writer


def _start(writer: _Writer) -> None:
    """Begin a worker process, which ends when the one that started it does, however that ended."""
    global _writer
    _writer = writer
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run(name: str, indices: np.ndarray) -> dict[str, Any]:
    return _writer.shard(name, indices)
