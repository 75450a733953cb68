"""Running the command lines: in this process where an error is expected, as real processes where processes matter."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from saccade.train import engine
from saccade.train.data import scenes as made_scenes
from saccade.train.runtime import config
from support.jobs import Job
from support.runs import train

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "configs/digits/resnet18.py"
TRAIN = ROOT / "tools/train.py"
# Seconds a run: 0.1 M parameters, BatchNorm, images of 16x16.
TINY = ["model.name=test_resnet", "data.img_size=16", "epochs=2", "batch_size=128"]
TINY += ["log_every=1", "eval_every=1", "device=cpu"]


@pytest.fixture
def tiny(command):
    """tiny(folder, *arguments) -> (exit code, stdout, stderr) of a run of seconds on digits."""
    return lambda folder, *arguments: command("train", DIGITS, *TINY, "--run-dir", folder, *arguments)


@pytest.fixture
def start():
    """start(processes, *arguments) -> a run as of `tiny`, in a process group if processes > 0; ended after the test.

    With torchrun=(its options) or options of subprocess.Popen it is the real command, else a `Job`. For another config
    give its `settings` too, instead of those that make digits a matter of seconds."""
    started = []

    def call(
        processes: int, *arguments, torchrun=None, config: Path = DIGITS, settings=TINY, file_size=None, **options
    ) -> Job | subprocess.Popen:
        line = [str(TRAIN), str(config), *settings, *map(str, arguments)]
        if torchrun is None and not options:
            started.append(Job(*line, processes=processes, file_size=file_size))
            return started[-1]
        prefix = [sys.executable]
        if processes:
            # Each on a port of its own, unless the test has them meet.
            meet = () if any("rdzv" in argument for argument in torchrun) else ("--standalone",)
            prefix += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *meet, *torchrun]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        started.append(subprocess.Popen([*prefix, *line], **pipes | options))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:
            for child in children(process):
                os.kill(child, signal.SIGKILL)
            process.kill()
        if isinstance(process, subprocess.Popen) and process.stdout:
            process.stdout.close()


def children(process: Job | subprocess.Popen) -> list[int]:
    if isinstance(process, Job):
        return process.pids
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


@pytest.fixture(name="children")
def _children():
    """children(run) -> the numbers of a job's processes, or of those that torchrun has started."""
    return children


@pytest.fixture
def records():
    """records(folder, kind=None) -> the lines of a run's log.jsonl, without what depends on the machine's speed."""

    def read(folder: Path, kind: str | None = None) -> list[dict]:
        lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        timing = {"images_per_s", "data_share", "memory_gib", "seconds"}
        return [{k: v for k, v in line.items() if k not in timing} for line in lines if kind in (None, line["kind"])]

    return read


@pytest.fixture
def wait_for():
    """wait_for(condition, process=None, seconds=60): until the condition holds; fails when the process ends before."""

    def wait(condition, process: Job | subprocess.Popen | None = None, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited too long"
            assert process is None or process.poll() is None, process.communicate()[0]
            time.sleep(0.02)

    return wait


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make) -> a folder that make(folder) fills once, for all tests of all of pytest's processes."""

    def call(name: str, make) -> Path:
        base = tmp_path_factory.getbasetemp()
        folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                make(folder)
        return folder

    return call


@pytest.fixture(scope="session")
def classifier_run(once):
    """The folder of a run that has seen four epochs of digits, enough to be right and wrong. Only to be read."""
    arguments = ["model.name=test_resnet", "data.img_size=16", "epochs=4", "batch_size=128", "device=cpu"]
    return once("classifier", lambda folder: train(folder, config.load(DIGITS, arguments)))


@pytest.fixture(scope="session")
def scenes(once):
    """A folder with coco/ and ade20k/: 8, 3 and 4 scenes of 64 pixels a side. Only to be read."""
    counts = dict(train=8, val=3, test=4)
    return once("scenes", lambda folder: made_scenes.write(folder, counts=counts, size=64))


@pytest.fixture(scope="session")
def detector_arguments(scenes):
    """A config, and overrides for a run of four steps of four images: a detector of seconds."""
    arguments = ["model.name=test_resnet", "task.channels=16", "task.hidden=32", "task.rois=16", "task.proposals=30"]
    arguments += [f"data.root={scenes / 'coco'}", "data.short=64", "data.long=64", "task.test_size=(64, 64)"]
    arguments += ["task.score_thresh=0.0", "iterations=4", "eval_every=2", "batch_size=4", "log_every=1", "device=cpu"]
    return ROOT / "configs/scenes/mask_rcnn_resnet18.py", [*arguments, "schedule.warmup_epochs=0"]


@pytest.fixture(scope="session")
def segmenter_arguments(scenes):
    """A config, and overrides for a run of four steps of four crops: a segmenter of seconds."""
    arguments = [f"data.root={scenes / 'ade20k'}", "data.crop=48", "task.channels=8", "model={'name': 'test_resnet'}"]
    arguments += ["iterations=4", "eval_every=2", "batch_size=4", "log_every=1", "device=cpu"]
    return ROOT / "configs/scenes/upernet_biformer_t.py", [*arguments, "schedule.warmup_epochs=0"]


def _run(file: Path, arguments: list[str]):
    def make(folder: Path) -> None:
        settings = config.load(file, arguments)
        engine.validate(settings)
        train(folder, settings)

    return make


@pytest.fixture(scope="session")
def detector_run(once, detector_arguments):
    """The folder of a finished run of a Mask R-CNN. Only to be read."""
    return once("detector", _run(*detector_arguments))


@pytest.fixture(scope="session")
def segmenter_run(once, segmenter_arguments):
    """The folder of a finished run of a UPerNet. Only to be read."""
    return once("segmenter", _run(*segmenter_arguments))
