"""The environment of processes, requests to stop, trackers that fail, and what is printed."""

import io
import os
import signal

import pytest
import torch
from rich.console import Console
from saccade.train.models.batchnorm import check_batch_statistics
from saccade.train.runtime import distributed, log, run_folder, trackers
from saccade.train.runtime.distributed import StopRequest, is_distributed
from saccade.train.runtime.errors import INTERRUPTED, PREEMPTED, UserError
from support.runs import own_signals
from torch import nn

NAMES = (*distributed.TORCHRUN, "LOCAL_RANK", "TORCHELASTIC_RUN_ID", *distributed.LAUNCHERS)
MEETING = dict(MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.fixture
def environment(monkeypatch):
    """environment(NAME=value, …): these variables, and no others that launchers set."""

    def call(**variables: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return call


@pytest.mark.parametrize(
    "variables",
    [
        {},
        dict(WORLD_SIZE="1"),
        dict(WORLD_SIZE="1", RANK="0"),
        dict(WORLD_SIZE="1", RANK="0", **MEETING),
        dict(RANK="0"),
        dict(LOCAL_RANK="3"),
        dict(WORLD_SIZE=""),
        dict(SLURM_STEP_NUM_TASKS="1"),
    ],
    ids=str,
)
def test_one_process(environment, variables):
    """What an earlier export or a job system leaves behind does not matter."""
    environment(**variables)
    assert not is_distributed()


def test_several_processes(environment):
    environment(WORLD_SIZE="2", RANK="1", **MEETING)
    assert is_distributed()
    environment(WORLD_SIZE="1", RANK="0", TORCHELASTIC_RUN_ID="none", **MEETING)
    assert is_distributed()
    environment(WORLD_SIZE="2", RANK="1", SLURM_STEP_NUM_TASKS="2", **MEETING)  # torchrun, started by srun
    assert is_distributed()


@pytest.mark.parametrize(
    "variables, sentence",
    [
        (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 but not RANK, MASTER_ADDR, MASTER_PORT: start several .* with torchrun"),
        (dict(RANK="1"), "RANK=1 but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE="2", RANK="0"), "but not MASTER_ADDR, MASTER_PORT"),
        (dict(WORLD_SIZE="two"), "WORLD_SIZE=two must be a whole number"),
        (dict(WORLD_SIZE="2", RANK="2", **MEETING), "RANK=2 must be less than WORLD_SIZE=2"),
        (dict(SLURM_STEP_NUM_TASKS="8"), "srun has started 8 processes that would each train alone"),
        (dict(OMPI_COMM_WORLD_SIZE="4"), "mpirun has started 4 processes"),
    ],
    ids=str,
)
def test_environment_of_no_launcher(environment, variables, sentence):
    environment(**variables)
    with pytest.raises(UserError, match=sentence) as error:
        is_distributed()
    assert "\n" not in str(error.value)


class NothingBad:
    new = ()


def test_first_interrupt_asks_and_second_stops_at_once(capfd):
    with own_signals():
        stop = StopRequest()
        stop.catch_interrupts()
        stop.saved = "--resume continues after step 7"
        assert not stop.agreed(NothingBad)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agreed(NothingBad) and stop.code == INTERRUPTED
        assert "stopping after this step with a checkpoint" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)  # within half a second: the same key, passed on by torchrun
        stop._interrupted_at -= 1
        with pytest.raises(KeyboardInterrupt, match="interrupted twice by Ctrl-C"):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()


def test_interrupts_after_training_are_pythons():
    with own_signals():
        stop = StopRequest()
        stop.catch_interrupts()
        stop.catch_interrupts(False)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed(NothingBad) and stop.code == PREEMPTED


class Failing:
    """A tracker that fails at its second step."""

    def __init__(self, folder, config, step):
        self.calls = []

    def scalars(self, values, step):
        self.calls.append((values, step))
        if step == 2:
            raise OSError("the disk is full\nand more")

    def close(self):
        self.calls.append("closed")


def test_tracker_that_fails_is_reported_once(monkeypatch, tmp_path):
    monkeypatch.setitem(trackers.TRACKERS, "failing", Failing)
    messages = []
    (tracker,) = trackers.start(["failing"], tmp_path, "", 0, messages.append)
    calls = tracker._tracker.calls
    for step in range(1, 5):
        tracker.scalars(dict(loss=1.0, ap=float("nan"), top1=None), step)
    tracker.close()
    assert calls == [(dict(loss=1.0), 1), (dict(loss=1.0), 2)]
    assert messages == ["failing failed (the disk is full): the run continues without it"]


def test_wandb_without_a_key(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    messages = []
    (tracker,) = trackers.start(["wandb"], tmp_path, "epochs = 1", 0, messages.append)
    tracker.scalars(dict(loss=1.0), 1)
    assert len(messages) == 1 and messages[0].startswith("wandb can't start (") and "API key" in messages[0]


def test_wandb_mode_that_is_none(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "bogus")
    trackers.check_trackers(["tensorboard"])
    with pytest.raises(UserError, match="WANDB_MODE=bogus must be one of online, offline"):
        trackers.check_trackers(["wandb"])


def test_durations_and_metrics():
    assert [log.format_seconds(s) for s in (5, 65.9, 3600, 86399, 86400, 3 * 86400 + 3723)] == [
        "0:05",
        "1:05",
        "1:00:00",
        "23:59:59",
        "1 d 00:00:00",
        "3 d 01:02:03",
    ]
    values = dict(loss=0.12345, top1=float("nan"), ap=None, images=3)
    assert log.format_metrics(values) == "loss 0.1235 top1 - ap -"


def test_progress_at_80_columns(monkeypatch, tmp_path):
    """Bar, steps, time left and loss fit; nothing else is shown."""
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(log, "Console", lambda: Console(file=terminal, width=80, force_terminal=True))
    run = log.Log(tmp_path, 375_300, 1251, 1024, torch.device("cpu"))
    run.start(0, 0)
    run._start_time -= 5000
    run.stepped(10)
    run.training(10, dict(loss=6.91234, top1=0.1), 1e-3)
    run._bar.refresh()
    run.stop()
    line = [line for line in terminal.getvalue().splitlines() if "━" in line][-1]
    assert "━" in line and "10/375300" in line and " d " in line and "loss 6.9123" in line and "images/s" not in line
    assert "images/s" in (tmp_path / "log.txt").read_text()


def test_log_of_names_that_are_no_text(tmp_path):
    run = log.Log(tmp_path, 2, 1, 1, torch.device("cpu"))
    run.message("caf\udce9", show=False)
    assert (tmp_path / "log.txt").read_text().endswith("caf\\udce9\n")


def test_one_value_per_channel():
    """Of one image, a BatchNorm on a map of 1x1 is refused, unless it is frozen or other images are there."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4))

    def probe(model):
        model.eval()(torch.zeros(1, 3, 2, 2))

    with pytest.raises(UserError, match=r"^3 is a BatchNorm that would train on one value per channel"):
        check_batch_statistics(model, [], 1, probe)
    check_batch_statistics(model, [model[3]], 1, probe)
    check_batch_statistics(model, [], 2, probe)
    check_batch_statistics(model[:2], [], 1, probe)


def test_empty_folder_is_removed(tmp_path):
    """A run that fails before anything is written leaves no folder behind, and touches none that was there."""
    (tmp_path / "old").mkdir()
    for name in ("old", "new", "runs/finetune/folder"):
        with pytest.raises(UserError), run_folder.removed_if_empty(tmp_path / name):
            run_folder.prepare_folder(tmp_path / name, False, False)
            raise UserError("no data")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
