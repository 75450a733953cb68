"""What is divided over processes, compiled or in lower precision trains to the same."""

import json
import os
import signal
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from saccade.train.runtime import sharded
from safetensors.torch import load_file
from support.jobs import Job
from support.runs import SGD, finish, state


def test_fsdp_trains_as_ddp(start, tmp_path, records):
    """Losses, evaluations (of processes with unequal numbers of images), averages and the names of all that is kept."""
    arguments = ["ema.decay=0.9", "clip_grad=1.0", "accumulate=2", "epochs=1", "batch_size=120", "optimizer.lr=1e-4"]
    for strategy in ("ddp", "fsdp"):
        folder = tmp_path / strategy
        finish(start(2, *arguments, f"strategy={strategy}", "--run-dir", folder))
    for mine, theirs in zip(records(tmp_path / "fsdp"), records(tmp_path / "ddp"), strict=True):
        assert mine.keys() == theirs.keys()
        for key in set(mine) & {"loss", "ema_loss", "images"}:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-3), (key, mine["step"])
    mine, theirs = (state(tmp_path / strategy)[0] for strategy in ("fsdp", "ddp"))
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    for key in ("model.fc.weight", "ema.fc.weight", "model.conv1.0.weight"):
        assert torch.allclose(mine[key], theirs[key], rtol=1e-2, atol=3e-4), key


def test_fsdp_killed_resumes_to_the_same_end(start, tmp_path, records, wait_for, children):
    arguments = [*SGD, "optimizer.momentum=0.9", "strategy=fsdp", "ema.decay=0.9", "save_every=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(2, *arguments, "--run-dir", whole))
    run = start(2, *arguments, "--run-dir", killed)
    wait_for(lambda: (killed / "log.jsonl").exists() and len(records(killed)) >= 7, run)
    for victim in children(run):
        os.kill(victim, signal.SIGKILL)
    run.communicate(timeout=60)
    assert 4 <= state(killed)[1]["step"] < 20, "killed too late"
    finish(start(2, *arguments, "--run-dir", killed, "--resume"))
    (tensors, meta), (others, other_meta) = state(whole), state(killed)
    assert meta == other_meta and tensors.keys() == others.keys()
    assert all(torch.equal(tensors[k], others[k]) for k in tensors)
    assert records(whole) == records(killed)


def test_sharded_state():
    """What two processes save, one, two and three read to the same bits, and damage is noticed by all."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).with_name("sharded_state.py")
        for processes, mode in ((2, "save"), (2, "load"), (3, "load"), (0, "load"), (2, "damaged")):
            finish(Job(script, folder, mode, processes=processes))


def test_sharded_checkpoints(start, tiny, tmp_path, records):
    """A run of two processes resumes in one, without the key too, and exports its best weights."""
    arguments = ["strategy=fsdp", "ema.decay=0.9", "save_every=4", "epochs=1"]
    finish(start(2, *arguments, "sharded_checkpoints=True", "--run-dir", tmp_path))
    folder = tmp_path / "checkpoints"
    assert sorted(file.name for file in folder.iterdir()) == ["best", "last", "previous"]
    assert sharded.newest_step(folder, ("previous",)) == 8 and sharded.newest_step(folder) == 9
    tensors, meta = sharded.read(folder / "best", alone=True)
    exported = load_file(tmp_path / "model.safetensors")
    kind = meta["best"]["weights"]
    assert all(torch.equal(tensors[f"{kind}.{name}"], tensor) for name, tensor in exported.items())
    (folder / "last" / "shard-00002-model-00001-of-00001.safetensors").unlink()
    code, out, err = tiny(tmp_path, *arguments, "epochs=2", "--resume")
    assert code == 0 and "resuming after step 8" in out and "last can't be read" in out, err
    assert state(tmp_path)[1]["step"] == 18 and [line["step"] for line in records(tmp_path, "val")] == [9, 18]
    code, _, err = tiny(tmp_path / "ddp", "sharded_checkpoints=True")
    assert code == 2 and "sharded_checkpoints=True needs strategy=fsdp" in err


@pytest.mark.exhaustive
def test_sharded_killed_resumes_to_the_same_end(start, tmp_path, records, wait_for, children):
    """To the same bits as a run that gathers its checkpoints."""
    arguments = [*SGD, "optimizer.momentum=0.9", "strategy=fsdp", "ema.decay=0.9", "save_every=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start(2, *arguments, "--run-dir", whole))
    arguments += ["sharded_checkpoints=True"]
    run = start(2, *arguments, "--run-dir", killed)
    wait_for(lambda: (killed / "log.jsonl").exists() and len(records(killed)) >= 7, run)
    for victim in children(run):
        os.kill(victim, signal.SIGKILL)
    run.communicate(timeout=60)
    assert 4 <= sharded.newest_step(killed / "checkpoints") < 20, "killed too late"
    finish(start(2, *arguments, "--run-dir", killed, "--resume"))
    tensors, others = state(whole)[0], sharded.read(killed / "checkpoints/last", alone=True)[0]
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in tensors)
    assert records(whole) == records(killed)


def test_trackers_get_what_the_log_gets(tiny, tmp_path, records, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = "trackers=('tensorboard', 'wandb')"
    code, _, err = tiny(tmp_path, trackers, "epochs=1")
    assert code == 0, err
    code, out, err = tiny(tmp_path, trackers, "epochs=2", "--resume")
    assert code == 0 and "resuming after step 9" in out, err
    lines = {line["step"]: line for line in records(tmp_path, "train")}
    assert sorted(lines) == list(range(1, 19))

    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = {event.step: event.value for event in shown.Scalars("train/loss")}
    assert losses == pytest.approx({step: line["loss"] for step, line in lines.items()})
    assert {"batch", "curves"} <= set(shown.Tags()["images"])

    kept = {}
    for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        for record in history(file):
            if "train/loss" in record:
                kept[int(record["_step"])] = record["train/loss"]
    assert kept == pytest.approx({step: line["loss"] for step, line in lines.items()})
    assert len({file.stem.removeprefix("run-") for file in tmp_path.glob("wandb/*/*.wandb")}) == 1  # one run for wandb


def history(file):
    """The lines that an offline run of wandb holds: a log of records in LevelDB's format, blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: the block ends in zeros
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            if record.WhichOneof("record_type") == "history":
                yield {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}


def test_unknown_tracker_is_one_sentence(tiny, tmp_path):
    code, _, err = tiny(tmp_path, "trackers=['tensorbord']")
    assert code == 2 and "unknown tracker 'tensorbord'" in err and "did you mean tensorboard" in err


def test_fsdp_refuses_channels_last(tiny, tmp_path):
    code, _, err = tiny(tmp_path / "run", "strategy=fsdp", "channels_last=True")
    assert code == 2 and "channels_last=True can't be combined with strategy=fsdp" in err
    assert not (tmp_path / "run").exists()
