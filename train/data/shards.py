"""Write webdataset shards: tar files of samples, each an image and a .cls file with its class index."""

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

from ..runtime.checkpoint import atomic_write, checksum, write_text
from ..runtime.errors import DATA, UserError, from_os
from .imagenet import INDEX, read_index
from .images import Source, Strings, decode, note_conversions
from .tar import IMAGE, index

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
    """Write a split's shards, out/SPLIT-000000.tar …, list them in out/index.json, and return their names.

    samples: images per shard; the last may have fewer. workers: number of processes. shuffle: a seed; None: keep the
    source's order. resize: downscale larger images to this shorter side in pixels; other images are copied unchanged.
    progress(done, total) is called with numbers of images.
    Complete shards, by their checksums, are not written again: after an interruption, the same call resumes. Raises
    UserError if the folder has other shards of this split, or if the data are incomplete.
    """
    if samples < 1 or workers < 1 or (resize is not None and resize < 1):
        raise UserError(f"samples={samples}, workers={workers} and resize={resize} must be 1 or more")
    files, labels = source.images(split)
    if resize:
        note_conversions(files.read, len(files), f"{split} images")
    for name, (reason, _) in source.bad.items():
        raise UserError(f"{name} {reason}: shards are only written from complete data", DATA)
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
    """Return a key for each image in its shard, CLASS/FILE without extension, made unique."""
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
    """Return a folder's index, and the entries of the shards of this split that earlier calls have finished."""
    known: dict[str, Any] = dict(classes=class_names, shards={}, plans={})
    if (out / INDEX).exists():
        known = dict(plans={}) | read_index(out / INDEX)
    partial = out / f".{split}.partial.json"
    started = json.loads(partial.read_text()) if partial.exists() else None
    theirs = started["plan"] if started else known["plans"].get(split)
    others = f"{out} has shards of other images or of other sizes: remove them or choose another folder"
    if (
        known["classes"] != class_names
        or theirs not in (plan, None)
        or (not theirs and list(out.glob(f"{split}-*.tar")))
    ):
        raise UserError(others)
    for stale in out.glob(f".*{split}-*.tmp"):  # left by a killed process
        stale.unlink()
    done = started["shards"] if started else {}
    return known, done or {name: entry for name, entry in known["shards"].items() if name.startswith(f"{split}-")}


class _Writer:
    """Write shards. Each worker process has its own writer."""

    def __init__(self, out: Path, files: Any, labels: Any, keys: Strings, resize: int | None, done: dict[str, Any]):
        self.out, self.files, self.labels, self.keys, self.resize = out, files, labels, keys, resize
        self.done = dict(done)

    def shard(self, name: str, indices: np.ndarray) -> dict[str, Any]:
        """Return the index entry of a shard; write the shard unless a complete one exists."""
        path = self.out / name
        entry = self.done.get(name)
        if entry and path.exists() and path.stat().st_size == entry["bytes"] and checksum(path) == entry["sha256"]:
            return entry
        with atomic_write(path) as temporary, tarfile.open(temporary, "w") as tar:
            for i in indices.tolist():
                ending, data = self._image(i)
                for member, content in ((ending, data), ("cls", str(int(self.labels[i])).encode())):
                    header = tarfile.TarInfo(f"{self.keys[i]}.{member}")  # no time or owner: reproducible bytes
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        (found,) = index([path], "shard")  # checks that the shard can be read, and caches its index for readers
        if found.truncated or found.labels.tolist() != [int(self.labels[i]) for i in indices]:
            raise UserError(f"{path} does not contain what was written: check the disk")
        return dict(samples=len(indices), bytes=path.stat().st_size, sha256=checksum(path))

    def _image(self, i: int) -> tuple[str, bytes]:
        """Return the extension and bytes of an image, original or downscaled."""
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
    """Initialise a worker process, which exits when its parent does, even if that was killed."""
    global _writer
    _writer = writer
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run(name: str, indices: np.ndarray) -> dict[str, Any]:
    return _writer.shard(name, indices)
