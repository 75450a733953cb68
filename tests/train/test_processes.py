"""Processes: groups of them on the CPU, by themselves and under torchrun, and runs that are killed."""

import contextlib
import os
import pty
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from saccade.train.data.folder import ImageFolder
from saccade.train.runtime import config
from support.jobs import Job
from support.levels import exhaustive
from support.runs import SGD, finish, state, train

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs/digits/resnet18.py"
TINY = ["model.name=test_resnet", "data.img_size=16", "log_every=1", "eval_every=1", "device=cpu"]
EPOCH = ["batch_size=120", "epochs=1"]


def assert_same_end(a, b):
    (tensors, meta), (others, other_meta) = state(a), state(b)
    assert meta == other_meta and tensors.keys() == others.keys()
    assert all(torch.equal(tensors[k], others[k]) for k in tensors)


@pytest.fixture
def one(once):
    """The folder of an epoch of digits in one process."""
    return once("sgd", lambda folder: train(folder, config.load(DIGITS, [*TINY, *SGD, *EPOCH])))


def assert_as_one(run: Path, one: Path, records) -> None:
    expected = records(one)
    assert len(expected) == 11
    for mine, line in zip(records(run), expected, strict=True):
        assert mine.keys() == line.keys()
        assert mine["loss"] == pytest.approx(line["loss"], rel=1e-4), line["step"]
        assert mine.get("images") == line.get("images")
    tensors, others = state(run)[0], state(one)[0]
    for key in ("model.bn1.running_mean", "model.layer4.0.bn1.running_var"):
        assert torch.allclose(tensors[key], others[key], rtol=1e-3, atol=1e-5), key


def test_two_processes_equal_one(start, tmp_path, records, one):
    """BatchNorm and evaluation included."""
    finish(start(2, *SGD, *EPOCH, "workers=1", "--run-dir", tmp_path))
    assert_as_one(tmp_path, one, records)


@pytest.mark.exhaustive
def test_two_agents_equal_one(start, tmp_path, records, one):
    """Two of two torchrun agents, as on two nodes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test")
    agents = [start(1, *SGD, *EPOCH, "--run-dir", tmp_path, torchrun=meet) for _ in range(2)]
    for agent in agents:
        finish(agent)
    assert_as_one(tmp_path, one, records)


@pytest.mark.parametrize("processes", [exhaustive(0), exhaustive(3)])
def test_killed_run_resumes_to_the_same_end(start, tmp_path, records, wait_for, children, processes):
    """SIGKILL in the middle of an epoch: weights, averages, optimiser and log end bit-identical."""
    arguments = ["ema.decay=0.9", "save_every=2", "model.drop_path_rate=0.1", "batch_size=120"]
    arguments += [f"sync_bn={processes == 0}"]  # the buffers of process 0 count, then
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(processes, *arguments, "--run-dir", whole))
    run = start(processes, *arguments, "--run-dir", killed)
    wait_for(lambda: (killed / "log.jsonl").exists() and len(records(killed)) >= 7, run)
    victims = children(run) if processes else [run.pid]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    run.communicate(timeout=60)
    step = state(killed)[1]["step"]
    assert 4 <= step < 20, "killed too late"
    out = finish(start(processes, *arguments, "--run-dir", killed, "--resume"))
    assert f"resuming after step {step}" in out
    assert_same_end(whole, killed)
    assert records(whole) == records(killed)
    assert not list((killed / "checkpoints").glob(".*"))


def test_terminal(start, tmp_path):
    """On a terminal there is a progress bar, and the lines on evaluations above it; log.txt has all."""
    terminal, there = pty.openpty()
    run = start(0, *SGD, "epochs=1", "--run-dir", tmp_path, stdout=there, stderr=there)
    os.close(there)
    shown = b""
    with contextlib.suppress(OSError):  # at the end
        while piece := os.read(terminal, 10_000):
            shown += piece
    assert run.wait(60) == 0
    assert "━" in shown.decode() and b"9/9" in shown and b"step 9/9 val top1" in shown and b"timm.create_model" in shown
    assert b"step 3/9 epoch" not in shown and "step 3/9 epoch" in (tmp_path / "log.txt").read_text()


def test_nobody_reads_the_output(start, tmp_path):
    run = start(0, *SGD, "--run-dir", tmp_path, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.wait(60) == 141 and run.stderr.read() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop(start, tmp_path, records, wait_for, number):
    arguments = [*SGD, "epochs=1000", "--run-dir", tmp_path]
    run = start(0, *arguments)
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(records(tmp_path)) > 3, run)
    run.send_signal(number)
    out = finish(run, 75)
    step = state(tmp_path)[1]["step"]
    assert f"stopped: step {step} of 9000 is saved in" in out and "--resume continues" in out and "Traceback" not in out
    assert records(tmp_path)[-1]["step"] == step


@pytest.mark.parametrize("target", ["torchrun", "one process"])
def test_processes_agree_to_stop(start, tmp_path, records, wait_for, children, target):
    """torchrun passes SIGTERM on to its processes; one process that is asked alone stops all, at the same step."""
    torchrun = () if target == "torchrun" else None
    run = start(2, *SGD, "epochs=1000", "--run-dir", tmp_path, torchrun=torchrun)
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(records(tmp_path)) > 3, run)
    os.kill(run.pid if target == "torchrun" else children(run)[1], signal.SIGTERM)
    out = finish(run, 1 if target == "torchrun" else 75)
    step = state(tmp_path)[1]["step"]
    assert out.count(f"stopped: step {step} of 9000 is saved in") == 1
    assert records(tmp_path)[-1]["step"] == step


def test_torchrun_restarts_resume(start, tmp_path, records, wait_for, children):
    """With --max-restarts, a process that torchrun starts again after it has died resumes without being told."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    arguments = [*SGD, "save_every=1", "epochs=2"]
    finish(start(1, *arguments, "--run-dir", whole))
    process = start(1, *arguments, "--run-dir", run, torchrun=("--max-restarts=1",))
    wait_for(lambda: (run / "log.jsonl").exists() and len(records(run)) > 3, process)
    os.kill(children(process)[0], signal.SIGKILL)
    assert "resuming after step" in finish(process)
    assert records(run) == records(whole)
    assert_same_end(run, whole)


def test_disk_full_for_one_of_two(start, tmp_path):
    """The process that writes says so, the other does not hang, and nothing is half-written."""

    run = start(2, *SGD, "--run-dir", tmp_path, file_size=100_000)
    out = finish(run, 74)
    assert out.count("error: saving ") == 1 and "File too large" in out and "free some space" in out
    assert "engine.py" not in out
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("processes", [2, 3])
def test_synchronised_batchnorm(processes):
    """In float64, training steps over processes are those of one process to the last digits."""
    finish(Job(Path(__file__).with_name("sync_batchnorm.py"), processes=processes))


def test_broken_images(start, tmp_path):
    """Two bad images where one is allowed: both processes stop at the same step and print one message."""
    for name in ("cat", "dog"):
        for i in range(20):
            path = tmp_path / "images" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (i, 0, 0)).save(path)
    images = [f"data.root={tmp_path / 'images'}", "batch_size=28", "epochs=30", "data.max_bad=1"]
    broken = [path for path, _ in ImageFolder(str(tmp_path / "images"))._splits["train"][:2]]
    for path in broken:
        Path(path).write_bytes(b"no image")
    folder = Path(__file__).parents[2] / "configs/finetune/folder.py"
    run = start(
        2,
        *images,
        "model={'name': 'test_resnet'}",
        "--run-dir",
        tmp_path / "run",
        config=folder,
        settings=[],
    )
    out = finish(run, 65)
    assert all(out.count(f"{path} can't be read as an image") == 1 for path in broken)
    assert "repair or remove them" in out and "data.max_bad=1 is less than 2" in out
    assert "engine.py" not in out


def test_mistakes_are_said_once(start, tmp_path):
    out = finish(start(2, "epoch=3", "--run-dir", tmp_path / "run"), 2)
    assert out.count("error: unknown key epoch, did you mean epochs") == 1
    assert not (tmp_path / "run").exists()
