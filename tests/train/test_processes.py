"""Real processes: torchrun on the CPU, and runs that are killed."""

import contextlib
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from saccade.train.data.folder import ImageFolder
from support.runs import SGD, finish, state

pytestmark = pytest.mark.both_cores


def assert_same_end(a, b):
    (tensors, meta), (others, other_meta) = state(a), state(b)
    assert meta == other_meta and tensors.keys() == others.keys()
    assert all(torch.equal(tensors[k], others[k]) for k in tensors)


def test_processes_equal_one(start, tmp_path, records):
    """Two, and two of two torchrun agents: as one, BatchNorm and evaluation included."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meet = ("--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test")
    sizes = ["batch_size=120", "epochs=1"]
    runs = {name: tmp_path / name for name in ("one", "two", "agents")}
    finish(start(0, *SGD, *sizes, "--run-dir", runs["one"]))
    finish(start(2, *SGD, *sizes, "workers=1", "--run-dir", runs["two"]))
    agents = [start(1, *SGD, *sizes, "--run-dir", runs["agents"], torchrun=meet) for _ in range(2)]
    for agent in agents:
        finish(agent)
    expected = records(runs["one"])
    assert len(expected) == 11
    for name, run in runs.items():
        for mine, line in zip(records(run), expected):
            assert mine.keys() == line.keys()
            assert mine["loss"] == pytest.approx(line["loss"], rel=1e-4), (name, line["step"])
            assert mine.get("images") == line.get("images")
        tensors, others = state(run)[0], state(runs["one"])[0]
        for key in ("model.bn1.running_mean", "model.layer4.0.bn1.running_var"):
            assert torch.allclose(tensors[key], others[key], rtol=1e-3, atol=1e-5), (name, key)
    for name, tensor in state(runs["two"])[0].items():
        assert torch.equal(state(runs["agents"])[0][name], tensor)


@pytest.mark.parametrize("processes", [0, 3])
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
    run = start(2, *SGD, "epochs=1000", "--run-dir", tmp_path)
    wait_for(lambda: (tmp_path / "log.jsonl").exists() and len(records(tmp_path)) > 3, run)
    os.kill(run.pid if target == "torchrun" else children(run)[1], signal.SIGTERM)
    out = finish(run, 1)  # torchrun's own exit code
    step = state(tmp_path)[1]["step"]
    assert out.count(f"stopped: step {step} of 9000 is saved in") == 1
    assert records(tmp_path)[-1]["step"] == step
    if target != "torchrun":
        assert re.search(r"exitcode *: 75 ", out)


def test_torchrun_restarts_resume(start, tmp_path, records, wait_for, children):
    """With --max-restarts, processes that torchrun starts again, as one of them has died, go on without being told."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    arguments = [*SGD, "save_every=1", "epochs=3"]
    finish(start(2, *arguments, "--run-dir", whole))
    process = start(2, *arguments, "--run-dir", run, torchrun=("--max-restarts=1",))
    wait_for(lambda: (run / "log.jsonl").exists() and len(records(run)) > 3, process)
    os.kill(children(process)[1], signal.SIGKILL)
    assert "resuming after step" in finish(process)
    assert records(run) == records(whole)
    assert_same_end(run, whole)


def test_disk_full_for_one_of_two(start, tmp_path):
    """The process that writes says so, the other does not hang, and nothing is half-written."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    run = start(2, *SGD, "--run-dir", tmp_path, preexec_fn=limit)
    out = finish(run, 1)  # torchrun's own exit code
    assert out.count("error: saving ") == 1 and "File too large" in out and "free some space" in out
    assert re.search(r"exitcode *: 74 ", out) and "engine.py" not in out
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("processes", [2, 3])
def test_synchronised_batchnorm(processes):
    """In float64, training steps over processes are those of one process to the last digits."""
    script = Path(__file__).with_name("sync_batchnorm.py")
    line = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", str(script)]
    done = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


def test_broken_images(start, tmp_path):
    """Two where one is allowed: both processes stop at the same step, whoever met them, and it is said once."""
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
        torchrun=("--standalone",),
    )
    out = finish(run, 1)
    assert all(out.count(f"{path} can't be read as an image") == 1 for path in broken)
    assert "repair or remove them" in out and "data.max_bad=1 is less than 2" in out
    assert re.search(r"exitcode *: 65 ", out) and "engine.py" not in out


def test_mistakes_are_said_once(start, tmp_path):
    out = finish(start(2, "epoch=3", "--run-dir", tmp_path / "run"), 1)
    assert out.count("error: unknown key epoch, did you mean epochs") == 1
    assert re.search(r"exitcode *: 2 ", out)
    assert not (tmp_path / "run").exists()
