"""Training is ended at random moments, in every way, and resumes to the end of a run that was not.

The moments are drawn from a fixed seed. `make test` has the first few, `make test-all` all of them.
"""

import random
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from saccade.train.runtime import checkpoint
from support.jobs import Job
from support.runs import SGD, finish, records, state

ROOT = Path(__file__).parents[2]
FAULTY = ROOT / "tests/support/faulty.py"
MOMENTS, FAST = 50, 2
STEPS = dict(classifier=10, detector=4, segmenter=4)
SETTINGS = [
    "model.name=test_resnet",
    "data.img_size=16",
    "epochs=1",
    "batch_size=120",
    "log_every=1",
    "device=cpu",
    *SGD,
]
SETTINGS += ["model.drop_path_rate=0.1", "ema.decay=0.9"]
# Name -> exit code of the process that meets it.
FAULTS = dict(SIGKILL=-9, SIGTERM=75, SIGUSR1=75, quota=74, ENOSPC=74, EIO=74, kill=-9, later=-9)


class Moment(NamedTuple):
    """task. processes: 0 for a single one. fault: a signal before a step; quota: files are limited in size, so that no
    checkpoint fits; ENOSPC, EIO: writing a checkpoint fails; kill: SIGKILL while one is written; later: SIGKILL after
    `wait`, whatever the process does then. step, rank: where it happens."""

    task: str
    processes: int
    fault: str
    step: int
    rank: int
    wait: float


def draw() -> list[Moment]:
    chance = random.Random(23)
    moments = [Moment("classifier", 0, "kill", 4, 0, 0), Moment("classifier", 2, "SIGKILL", 7, 1, 0)]
    moments += [Moment("detector", 0, "later", 2, 0, 0.3), Moment("classifier", 0, "ENOSPC", 6, 0, 0)]
    moments += [Moment("segmenter", 0, "kill", 2, 0, 0), Moment("detector", 2, "SIGTERM", 3, 1, 0)]
    while len(moments) < MOMENTS:
        task = chance.choice(["classifier"] * 8 + ["detector", "segmenter"])
        fault, processes = chance.choice(list(FAULTS)), chance.choice([0, 0, 2])
        step = chance.randrange(2, STEPS[task] + 1)
        if fault in ("ENOSPC", "EIO", "kill"):  # a step that is saved
            step -= step % 2
        rank = chance.randrange(processes) if processes and fault[:3] == "SIG" else 0
        moments.append(Moment(task, processes, fault, step, rank, chance.uniform(0, 2)))
    return moments


@pytest.fixture
def job(request):
    """job(moment, folder, *arguments, **options) -> a run of the moment's task."""

    def call(moment: Moment, folder: Path, *arguments, **options) -> Job:
        config, settings = ROOT / "configs/digits/resnet18.py", SETTINGS
        if moment.task != "classifier":
            config, settings = request.getfixturevalue(f"{moment.task}_arguments")
        line = [config, *settings, "save_every=2", "timeout=60", "--run-dir", folder, *arguments]
        return Job(FAULTY, *line, processes=moment.processes, **options)

    return call


@pytest.fixture
def whole(once, job):
    """whole(moment) -> the folder of the same run, which nothing ended."""
    return lambda moment: once(f"whole {moment.task} {moment.processes}", lambda folder: finish(job(moment, folder)))


def end(run: Job, moment: Moment, folder: Path) -> None:
    """Wait until the fault has ended every process of a run, as it should."""
    if moment.fault == "later":
        limit = time.monotonic() + 60
        while not (folder / "log.jsonl").exists() and time.monotonic() < limit:
            time.sleep(0.02)
        time.sleep(moment.wait)
        run.processes[moment.rank].kill()
    run.wait(120)
    code = FAULTS[moment.fault]
    if moment.fault == "later" and set(run.codes) == {0}:  # it was faster
        return
    assert run.codes[moment.rank] == code, run.text()
    others = {code} if code > 0 else {69}
    assert {other for rank, other in enumerate(run.codes) if rank != moment.rank} <= others, (run.codes, run.text())


def lines(folder: Path) -> list[dict]:
    """Return the lines of a run's log.jsonl without what depends on the machine's speed."""
    timing = {"images_per_s", "data_share", "memory_gib", "seconds"}
    found = records(folder, "train") + records(folder, "val")
    return [{key: value for key, value in line.items() if key not in timing} for line in found]


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, id=f"{i}-{'-'.join(map(str, moment[:4]))}", marks=[pytest.mark.exhaustive] * (i >= FAST))
        for i, moment in enumerate(draw())
    ],
)
def test_ended_and_resumed(tmp_path, monkeypatch, job, whole, moment):
    expected, folder = whole(moment), tmp_path / "run"
    if moment.fault in ("ENOSPC", "EIO", "kill"):
        monkeypatch.setenv("FAULT_WRITE", f"{moment.step}:{moment.fault}")
    elif moment.fault.startswith("SIG"):
        monkeypatch.setenv("FAULT_KILL", f"{moment.rank}:{moment.step}:{moment.fault}")
    run = job(moment, folder, file_size=100_000 if moment.fault == "quota" else None)
    try:
        end(run, moment, folder)
    finally:
        run.kill()
    for name in ("FAULT_WRITE", "FAULT_KILL"):
        monkeypatch.delenv(name, raising=False)
    for name in (checkpoint.LAST, checkpoint.PREVIOUS, checkpoint.BEST):  # what has its final name is intact
        if (folder / "checkpoints" / name).exists():
            checkpoint.read(folder / "checkpoints" / name)
    if (folder / "checkpoints" / checkpoint.LAST).exists():
        assert moment.fault != "quota" and state(folder)[1]["step"] <= STEPS[moment.task]
    finish(job(moment, folder, "--resume"))
    (tensors, meta), (others, other_meta) = state(expected), state(folder)
    assert meta == other_meta and tensors.keys() == others.keys()
    assert not [name for name, value in tensors.items() if not torch.equal(value, others[name])]
    assert lines(expected) == lines(folder)
    assert not list(folder.rglob(".*.tmp"))


def test_the_draw_has_every_fault():
    moments = draw()
    assert {moment.fault for moment in moments} == FAULTS.keys() and len(moments) == MOMENTS
    kinds = {(moment.task, bool(moment.processes)) for moment in moments}
    assert kinds == {(task, several) for task in STEPS for several in (True, False)}
