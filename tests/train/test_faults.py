"""Process groups in trouble: a process that is killed, stopped or slow, or started with something else than others."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from PIL import Image
from saccade.train.runtime.distributed import DISCONNECTED, TIMED_OUT, _lost
from support.jobs import Job
from support.levels import exhaustive
from support.runs import SGD, finish, records, state

ROOT = Path(__file__).parents[2]
FAULTY = ROOT / "tests/support/faulty.py"
DIGITS = ROOT / "configs/digits/resnet18.py"
TINY = ["model.name=test_resnet", "data.img_size=16", "epochs=1", "batch_size=120", "log_every=1", "device=cpu", *SGD]
TINY += ["save_every=2"]


def job(folder: Path, *arguments, config: Path = DIGITS, settings=TINY, processes: int = 2) -> Job:
    return Job(FAULTY, config, *settings, "--run-dir", folder, *arguments, processes=processes)


KILLED = "process{} of 3 was killed, or has not answered within `timeout`"


@pytest.mark.parametrize(
    "reports, named, prints",
    [
        ({0: DISCONNECTED, 1: DISCONNECTED}, KILLED.format(" 2"), 0),
        ({0: TIMED_OUT}, KILLED.format("es 1, 2"), 0),
        ({1: TIMED_OUT, 2: DISCONNECTED}, KILLED.format(" 0"), 1),
        ({0: DISCONNECTED, 1: TIMED_OUT, 2: TIMED_OUT}, KILLED.format(" 0"), 1),  # it was slow
        ({0: DISCONNECTED, 1: "KeyError: 'x'", 2: TIMED_OUT}, "process 1 ended with KeyError: 'x'", 0),
        ({0: DISCONNECTED, 1: "KeyError: 'x'"}, "process 1 ended with KeyError: 'x'", 0),
        (dict.fromkeys(range(3), DISCONNECTED), "the connection between the processes broke", 0),
    ],
)
def test_who_is_named(reports, named, prints):
    """By all processes that are left; the first of them prints it."""
    for number in (number for number, report in reports.items() if report in (TIMED_OUT, DISCONNECTED)):
        error = _lost(number, 3, reports)
        assert str(error).startswith(f"{named}: the others end too") and error.code == 69
        assert error.quiet == (number != prints)
    assert str(_lost(1, 3, {})).startswith(KILLED.format(" 0"))  # where the processes meet


@pytest.mark.parametrize("victim", [1, exhaustive(0)])
def test_a_killed_process_is_named(tmp_path, monkeypatch, victim):
    """Also process 0, in which the processes meet. The others end at once, whatever the timeout."""
    monkeypatch.setenv("FAULT_KILL", f"{victim}:6:SIGKILL")
    run = job(tmp_path)
    run.wait(60)
    codes = [-signal.SIGKILL, 69] if victim == 0 else [69, -signal.SIGKILL]
    assert run.codes == codes, run.text()
    named = f"error: process {victim} of 2 was killed, or has not answered within `timeout`: the others end too"
    assert run.text().count(named) == 1 and "Traceback" not in run.text(), run.text()
    assert state(tmp_path)[1]["step"] == 4


@pytest.mark.parametrize("victim", [1, exhaustive(0)])
def test_a_stopped_process_is_named_within_the_timeout(tmp_path, monkeypatch, victim):
    """It ends, too, once it resumes."""
    monkeypatch.setenv("FAULT_KILL", f"{victim}:4:SIGSTOP")
    run = job(tmp_path, "timeout=3")
    end = time.monotonic() + 60
    while run.codes[1 - victim] is None and time.monotonic() < end:
        time.sleep(0.05)
    try:
        assert run.codes[1 - victim] == 69 and run.codes[victim] is None, run.text()
        assert f"process {victim} of 2 was killed, or has not answered within `timeout`" in run.text()
        os.kill(run.pids[victim], signal.SIGCONT)
        run.wait(30)
        assert run.codes[victim] in (69, 1), run.text()
    finally:
        run.kill()


@pytest.mark.exhaustive
@pytest.mark.parametrize("timeout", [20, 1])
def test_a_slow_process(tmp_path, monkeypatch, timeout):
    """Slower than the timeout it ends the job, else it is waited for."""
    monkeypatch.setenv("FAULT_SLEEP", "1:4:4")
    run = job(tmp_path, f"timeout={timeout}")
    run.wait(60)
    if timeout == 20:
        assert run.codes == [0, 0] and state(tmp_path)[1]["step"] == 10
    else:
        assert run.codes == [69, 69], run.text()
        assert "process 1 of 2 was killed, or has not answered" in run.text()


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_torchrun_restarts_and_leaves_no_orphan(start, tmp_path, wait_for, children, number):
    """torchrun ends all processes of an attempt, the stopped one too, and those of the next resume."""
    arguments = [*SGD, "save_every=1", "epochs=2", "timeout=5", "--run-dir", tmp_path]
    run = start(2, *arguments, torchrun=("--max-restarts=1",))
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(records(tmp_path, "train")) > 3, run, 300)
    first = children(run)
    os.kill(first[1], number)
    out = run.communicate(timeout=300)[0]
    assert run.returncode == 0 and "resuming after step" in out, out
    assert "process 1 of 2 was killed, or has not answered" in out
    assert not [pid for pid in first if Path(f"/proc/{pid}").exists()]
    assert state(tmp_path)[1]["step"] == 18


def test_ctrl_c_ends_all_processes(tmp_path, wait_for):
    """The terminal sends it to all of them: one message, code 130, everything saved."""
    run = job(tmp_path, "epochs=1000")
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(records(tmp_path, "train")) > 3, run)
    for pid in run.pids:
        os.kill(pid, signal.SIGINT)
    out = finish(run, 130)
    step = state(tmp_path)[1]["step"]
    assert out.count(f"stopped: step {step} of 10000 is saved in") == 1 and "Traceback" not in out


@pytest.mark.parametrize("fact", ["seed=3", exhaustive("optimizer.lr=0.5"), exhaustive("model.name=test_vit")])
def test_another_config_is_refused(tmp_path, monkeypatch, fact):
    monkeypatch.setenv("FAULT_FACT", f"1:{fact}")
    out = finish(job(tmp_path / "run"), 2)
    key, value = fact.split("=")
    old = {"seed": "0", "optimizer.lr": "0.005", "model.name": "'test_resnet'"}[key]
    value = repr(value) if key == "model.name" else value
    assert out.count(f"error: {key} is {value} in process 1 and {old} in process 0: start all processes with") == 1, out
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.exhaustive
def test_another_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FAULT_VERSION", "1:timm=0.9")
    out = finish(job(tmp_path / "run"), 2)
    assert len(re.findall(r"error: timm is 0\.9 in process 1 and 1\.\S+ in process 0: start all", out)) == 1, out


def pictures(folder: Path, train: int, val: int) -> Path:
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            path = folder / split / ("cat" if i % 2 else "dog") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, 0, 200 * (i % 2))).save(path)
    return folder


@pytest.mark.exhaustive
def test_another_number_of_images_is_refused(tmp_path, monkeypatch):
    """data.root may be another folder on each machine, as long as it holds the same."""
    here, there = pictures(tmp_path / "a", 24, 4), pictures(tmp_path / "b", 22, 4)
    monkeypatch.setenv("FAULT_FACT", f"1:data.root={there}")
    settings = [f"data.root={here}", "batch_size=8", "epochs=1", "model={'name': 'test_resnet'}", "data.img_size=16"]
    out = finish(job(tmp_path / "run", config=ROOT / "configs/finetune/folder.py", settings=settings), 2)
    assert out.count("error: number of training images is 22 in process 1 and 24 in process 0: start all") == 1, out


@pytest.mark.exhaustive
def test_uneven_data_do_not_hang(tmp_path):
    """Three training images are left over, and two val images go to one process, none to the other."""
    root = pictures(tmp_path / "a", 19, 2)
    settings = [f"data.root={root}", "batch_size=8", "epochs=2", "model={'name': 'test_resnet'}", "data.img_size=16"]
    finish(job(tmp_path / "run", "timeout=30", config=ROOT / "configs/finetune/folder.py", settings=settings))
    assert state(tmp_path / "run")[1]["step"] == 4
    assert [line["images"] for line in records(tmp_path / "run", "val")] == [2, 2]
