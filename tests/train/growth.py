"""Start training on 10**9 images in 10**6 shards, of which only the index exists; print seconds and memory as JSON.

The files of the index are sparse: every image is empty, at the beginning of one tar, and of class 0.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from saccade.train.data.combined import Combined
from saccade.train.data.images import Images, Strings
from saccade.train.data.loader import EvaluationOrder, TrainingOrder, batches
from saccade.train.data.mapped import Mapped

IMAGES, SHARDS = 10**9, 10**6


def empty(data: bytes, name) -> torch.Tensor:
    assert data == b""
    return torch.zeros(1)


def memory() -> dict[str, float]:
    """Return the process's memory in GB: now and at most, and what is no file's."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(lines[key].split()[0]) / 1e6 for key in ("VmRSS", "VmHWM", "RssAnon")}


def main() -> None:
    folder = Path(sys.argv[1])
    for name, dtype, count in (("offsets", "<i8", IMAGES), ("sizes", "<u4", IMAGES), ("labels", "<i4", IMAGES)):
        with open(folder / name, "wb") as file:
            file.truncate(count * np.dtype(dtype).itemsize)
    np.arange(0, IMAGES + 1, IMAGES // SHARDS).astype("<i8").tofile(folder / "ends")
    (folder / "train.tar").touch()

    before, wall, cpu = memory(), time.perf_counter(), time.process_time()
    arrays = [Mapped(folder / name, dtype) for name, dtype in (("ends", "<i8"), ("offsets", "<i8"), ("sizes", "<u4"))]
    labels = Mapped(folder / "labels", "<i4")
    tars = Strings([str(folder / "train.tar")] * SHARDS)
    index = Combined(tars, "shard", *arrays, labels, {0: IMAGES}, {}, {})
    data = Images(index.members(), labels, {0: empty}, (0.0,) * 3, (1.0,) * 3)
    data.finish = lambda batch: batch
    steps = IMAGES // 1024
    seen = []
    for start in (0, steps // 2, 3 * steps - 2):  # the start, the middle of an epoch, and into the fourth
        order = TrainingOrder(len(data), 1024, 0, start, start + 4)
        first = list(order)
        seen += [index for keys in first for _, index in keys]
        loaded = list(batches(data, order, 0, 2 * (start == 0), torch.device("cpu")))
        assert len(loaded) == 4 and all(not labels.any() and len(labels) == 1024 for _, labels in loaded)
    evaluation = EvaluationOrder(len(data), 1024)
    assert len(evaluation) == -(-IMAGES // 1024) and next(iter(evaluation))[0] == (0, 0)
    found = dict(cpu_seconds=time.process_time() - cpu, seconds=time.perf_counter() - wall)
    print(json.dumps(found | dict(before=before, after=memory(), images=len(data), seen=len(set(seen)))))
