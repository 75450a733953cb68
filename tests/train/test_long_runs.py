"""Long runs: memory and open files stay flat."""

import gc
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from saccade.train.data.folder import ImageFolder
from saccade.train.data.loader import TrainingOrder, batches
from saccade.train.predict import predict, predictor
from saccade.train.runtime.errors import UserError
from support.jobs import Job
from support.runs import finish

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs/digits/resnet18.py"
GROWTH = 8 << 20  # bytes that a run may grow by after its start: allocators keep a little


def usage(pid: int | str = "self") -> tuple[int, int]:
    """Return a process's resident bytes and open files."""
    resident = int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) << 10
    return resident, len(os.listdir(f"/proc/{pid}/fd"))


def report(name: str, seen: list[tuple[int, int]], steps: float) -> None:
    """Fit lines through samples of `usage`, print their slopes, and check what they add up to over the samples."""
    memory, files = np.array(seen).T
    at = np.linspace(0, steps, len(seen))
    slopes = [np.polyfit(at, values, 1)[0] for values in (memory, files)]
    print(f"\n{name}: {slopes[0] / 1024:.2f} KiB and {slopes[1]:.5f} files a step over {steps:.0f} steps")
    print(f"{name}: {memory[0] >> 20} MiB at first, {memory[-1] >> 20} MiB at last, {len(seen)} samples")
    assert slopes[0] * steps < GROWTH, memory.tolist()
    assert slopes[1] * steps < 1, files.tolist()


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_training(tmp_path):
    """2,000 steps with everything on: averaging, mixup, clipping, accumulation, trackers, evaluations each 50 steps."""
    arguments = ["model.name=test_resnet", "data.img_size=16", "iterations=2000", "eval_every=50", "save_every=50"]
    arguments += ["batch_size=32", "accumulate=2", "clip_grad=1.0", "ema.decay=0.99", "task.mixup=0.2", "device=cpu"]
    arguments += ["trackers=('tensorboard', 'wandb')", "log_every=10", "workers=1", "model.drop_path_rate=0.1"]
    job = Job(ROOT / "tools/train.py", DIGITS, *arguments, "--run-dir", tmp_path)
    seen: list[tuple[int, int]] = []
    log, step = tmp_path / "log.txt", 0
    while job.poll() is None:
        found = re.findall(r"step (\d+)/2000 epoch", log.read_text()) if log.exists() else []
        if found and int(found[-1]) >= max(200, step + 20) and int(found[-1]) < 2000:
            step = int(found[-1])
            seen.append(usage(job.pid))
        time.sleep(0.05)
    finish(job)
    assert len(seen) > 20
    report("training", seen, 1800)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_predictions(classifier_run, tmp_path):
    """10,000 predictions of one process."""
    paths = []
    for i in range(20):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)).save(paths[-1])
    model, seen = predictor(classifier_run, "cpu"), []
    for i in range(500):
        assert len(list(predict(model, paths))) == 20
        if i >= 50 and i % 10 == 0:
            seen.append(usage())
    report("predictions", seen, 9000)


def children() -> set[int]:
    """Return this process's own processes."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_loader(tmp_path):
    """A loader with four workers, one of which is killed: 20 times, made anew each time."""
    for i in range(64):
        path = tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (i, i, i)).save(path)
    data = ImageFolder(str(tmp_path), img_size=16)
    inputs = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", crop_pct=1.0)
    dataset, seen, before = data.dataset("train", inputs, training=True), [], children()  # of other tests
    for round in range(23):
        order = TrainingOrder(len(dataset), 8, 0, 0, 400)
        loader = batches(dataset, order, 0, 4, torch.device("cpu"))
        taken = iter(loader)
        next(taken)
        os.kill(max(children() - before), signal.SIGKILL)
        with pytest.raises(UserError, match="a loader process was killed"):
            for _ in taken:
                pass
        del taken, loader
        gc.collect()  # the traceback of the error refers to the iterator
        if round >= 3:
            seen.append(usage())
    report("loader", seen, 20)
    time.sleep(0.5)
    left = children() - before
    states = [Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in left]
    assert len([state for state in states if state != "Z"]) <= 1  # multiprocessing's resource tracker
