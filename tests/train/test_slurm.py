"""tools/slurm.sh with fake Slurm commands: when its time is up it saves, queues again and resumes."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from saccade.train.runtime import checkpoint

ROOT = Path(__file__).resolve().parents[2]
RUN = ["configs/digits/resnet18.py", "model.name=test_resnet", "data.img_size=16", "device=cpu", "log_every=1"]
STAND_INS = {
    "srun": 'shift; exec "$@"',  # an option of its own, then the command
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$*" >> "$CALLS"; fi',
}


@pytest.fixture
def submit(tmp_path):
    """submit(*arguments) -> the job, with the stand-ins before everything else on the path."""
    for name, does in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    job = dict(SLURM_JOB_NODELIST="here", SLURM_JOB_ID="7", SLURM_NNODES="1", SLURM_GPUS_PER_NODE="1")
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | job | dict(SLURM_CPUS_PER_TASK="2", PORT=port, CALLS=str(tmp_path / "calls"), PATH=path)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env)
    return lambda *arguments: subprocess.Popen(["bash", "tools/slurm.sh", *RUN, *arguments], **pipes)


def test_time_is_up(submit, tmp_path, records, wait_for):
    run, calls = tmp_path / "run", tmp_path / "calls"
    arguments = ["batch_size=120", "epochs=1000", f"--run-dir={run}"]
    job = submit(*arguments)
    wait_for(lambda: (run / "log.jsonl").exists() and len(records(run)) > 3, job)
    job.send_signal(signal.SIGTERM)
    out = job.communicate(timeout=60)[0]
    step = checkpoint.read(run / "checkpoints" / checkpoint.LAST)[1]["step"]
    assert f"stopped: step {step} of 10000 is saved" in out
    assert job.returncode != 0 and calls.read_text() == "requeue 7\n"

    job = submit(*arguments[:1], f"epochs={step // 10 + 1}", arguments[2])
    out = job.communicate(timeout=120)[0]
    assert job.returncode == 0 and f"resuming after step {step}" in out
    assert calls.read_text() == "requeue 7\n"  # it ended of itself
