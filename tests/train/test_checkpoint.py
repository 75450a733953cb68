"""Checkpoints survive what happens to files."""

import errno
import json
import os
import random
import resource

import pytest
import torch
from saccade.train.runtime import checkpoint
from saccade.train.runtime.errors import UserError
from timm.optim import create_optimizer_v2


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(3, 5, generator=g),
        "model.b": torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last),
        "optimizer.a.step": torch.tensor(3.0),
        "half": torch.randn(7, generator=g).bfloat16(),
        "count": torch.tensor(5),
        "empty": torch.zeros(0, 3),
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_round_trip_and_rotation(tmp_path):
    for step in range(3):
        checkpoint.save(tmp_path, tensors(step), dict(step=step, best=0.1 + 0.2), best=step == 1)
    for name, step in ((checkpoint.LAST, 2), (checkpoint.PREVIOUS, 1), (checkpoint.BEST, 1)):
        read, meta = checkpoint.read(tmp_path / name)
        assert same(read, tensors(step)) and meta == dict(step=step, best=0.1 + 0.2)
    assert sorted(os.listdir(tmp_path)) == ["best.safetensors", "last.safetensors", "previous.safetensors"]
    (tmp_path / "other").touch()
    assert (tmp_path / checkpoint.LAST).stat().st_mode == (tmp_path / "other").stat().st_mode  # not private


def test_no_damage_is_silent(tmp_path):
    """Whatever bytes are lost or changed: the file is refused, or reads as it was (padding is all that may differ)."""
    checkpoint.save(tmp_path, tensors(), dict(step=1), best=False)
    whole = (tmp_path / checkpoint.LAST).read_bytes()
    chance, damaged = random.Random(0), tmp_path / "damaged.safetensors"
    refused = 0
    for trial in range(1000):
        content = bytearray(whole)
        if trial % 2:
            content = content[: chance.randrange(len(whole))]
        else:
            content[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        damaged.write_bytes(content)
        try:
            read, meta = checkpoint.read(damaged)
        except checkpoint.Unreadable:
            refused += 1
        else:
            assert same(read, tensors()) and meta == dict(step=1)
    assert refused > 950


def test_falls_back_to_the_previous(tmp_path):
    for step in range(2):
        checkpoint.save(tmp_path, tensors(step), dict(step=step), best=False)
    last = tmp_path / checkpoint.LAST
    last.write_bytes(last.read_bytes()[:-3])
    read, meta, said = checkpoint.load(tmp_path)
    assert meta["step"] == 0 and same(read, tensors(0))
    assert len(said) == 1 and "last.safetensors" in said[0]
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(UserError, match=r"every checkpoint is damaged .*--overwrite"):
        checkpoint.load(tmp_path)


def test_second_save_of_a_step_keeps_the_previous(tmp_path):
    for step in range(2):
        checkpoint.save(tmp_path, tensors(step), dict(step=step), best=False)
    checkpoint.save(tmp_path, tensors(1), dict(step=1, best=True), best=True, rotate=False)
    assert checkpoint.read(tmp_path / checkpoint.LAST)[1] == dict(step=1, best=True)
    assert checkpoint.read(tmp_path / checkpoint.PREVIOUS)[1] == dict(step=0)


def test_strict_json(tmp_path):
    """Undefined metrics are null; names of files that are no text are escaped."""
    value = dict(ap=float("nan"), loss=float("inf"), rows=[1.5, (None, float("-inf"))], name="caf\udce9")
    checkpoint.write_json(tmp_path / "m.json", value)
    text = (tmp_path / "m.json").read_text()
    read = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert read == dict(ap=None, loss=None, rows=[1.5, [None, None]], name="caf\udce9")
    checkpoint.write_text(tmp_path / "classes.csv", "caf\udce9")
    assert (tmp_path / "classes.csv").read_text() == r"caf\udce9"


def test_nothing_saved(tmp_path):
    assert checkpoint.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize("number, code", [(errno.ENOSPC, 74), (errno.EDQUOT, 74), (errno.EIO, 74), (errno.EACCES, 2)])
@pytest.mark.parametrize("place", ["save_file", "fsync"])
def test_failing_write(tmp_path, monkeypatch, number, code, place):
    checkpoint.save(tmp_path, tensors(0), dict(step=0), best=True)

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((checkpoint, "save_file") if place == "save_file" else (os, "fsync")), fail)
    with pytest.raises(UserError) as error:
        checkpoint.save(tmp_path, tensors(1), dict(step=1), best=False)
    assert error.value.code == code and os.strerror(number) in str(error.value)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path)[1] == dict(step=0)
    assert not list(tmp_path.glob(".*"))


def test_file_size_limit(tmp_path):
    """The system's own refusal, met inside the safetensors library."""
    checkpoint.save(tmp_path, tensors(0), dict(step=0), best=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(UserError) as error:
            checkpoint.save(tmp_path, dict(big=torch.zeros(100_000)), dict(step=1), best=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.code == 74 and "File too large" in str(error.value)
    assert checkpoint.load(tmp_path)[1] == dict(step=0)
    assert not list(tmp_path.glob(".*"))


def test_no_folder_to_write_in(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"saving .*--run-dir") as error:
        checkpoint.save(tmp_path / "file" / "below", tensors(), dict(step=0), best=False)
    assert error.value.code == 2


@pytest.mark.parametrize("opt", ["adamw", "sgd", "lion", "adafactor", "lamb", "nadamw", "muon"])
def test_optimizer_state(opt):
    """An optimizer's state, saved by name with JSON metadata and loaded, continues identically."""

    def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))
        return model, create_optimizer_v2(model, opt, lr=0.01, weight_decay=0.1)

    def step(model, optimizer, seed):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    for seed in range(3):
        step(model, optimizer, seed)
    kept, meta = checkpoint.optimizer_state(optimizer, model)
    kept, meta = {k: v.clone() for k, v in kept.items()}, json.loads(json.dumps(meta))
    other, resumed = make()
    other.load_state_dict(model.state_dict())
    checkpoint.load_optimizer_state(resumed, other, kept, meta)
    for m, o in ((model, optimizer), (other, resumed)):
        step(m, o, 7)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
