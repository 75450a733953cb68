"""Checkpoints survive what happens to files."""

import errno
import hashlib
import json
import os
import random
import resource

import pytest
import torch
from saccade.train.runtime import checkpoint
from saccade.train.runtime.errors import UserError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from support.levels import exhaustive
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


@pytest.mark.parametrize("trials", [200, exhaustive(5000)])
def test_no_damage_is_silent(tmp_path, trials):
    """Whatever bytes are lost or changed: the file is refused, or reads as it was (padding is all that may differ)."""
    checkpoint.save(tmp_path, tensors(), dict(step=1), best=False)
    whole = (tmp_path / checkpoint.LAST).read_bytes()
    chance, damaged = random.Random(0), tmp_path / "damaged.safetensors"
    refused = 0
    for trial in range(trials):
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
    assert refused > 0.95 * trials


def test_falls_back_to_the_previous(tmp_path):
    for step in range(2):
        checkpoint.save(tmp_path, tensors(step), dict(step=step), best=False)
    last = tmp_path / checkpoint.LAST
    last.write_bytes(last.read_bytes()[:-3])
    read, meta, said = checkpoint.load(tmp_path)
    assert meta["step"] == 0 and same(read, tensors(0))
    assert len(said) == 1 and "last.safetensors" in said[0]
    (tmp_path / checkpoint.PREVIOUS).write_bytes(b"")
    with pytest.raises(
        UserError, match=r"damaged \(\S+last\.\S+ [^;]*\); /\S+previous\.\S+ .*\): start again with --overwrite"
    ):
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
    with pytest.raises(UserError, match=r"saving .* failed .*: choose a folder you can write to") as error:
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


def test_errors_inside_safetensors():
    """The system's error is taken out of the library's text, in both of its forms; another text stays as it is."""
    for text in ('I/O error: Os { code: 28, kind: StorageFull, message: "x" }', "I/O error: x (os error 28)"):
        error = checkpoint.as_os_error(SafetensorError(text))
        assert (error.errno, error.strerror) == (errno.ENOSPC, os.strerror(errno.ENOSPC))
    error = checkpoint.as_os_error(SafetensorError("no tensors"))
    assert (error.errno, error.strerror) == (0, "no tensors")
    system = OSError(errno.EIO, "x")
    assert checkpoint.as_os_error(system) is system


def test_forms_of_files(tmp_path):
    """JSON is indented by two spaces; a checkpoint's checksum does not depend on the order of its metadata."""
    checkpoint.write_json(tmp_path / "a.json", dict(a=[1], b="ä"))
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "a": [\n    1\n  ],\n  "b": "\\u00e4"\n}\n'
    assert checkpoint.to_json(dict(a=1, b=2)) == '{"a": 1, "b": 2}'
    with pytest.raises(ValueError):
        checkpoint.to_json({float("nan"): 1})
    for name, meta in (("a", dict(step=1, best=2)), ("b", dict(best=2, step=1))):
        checkpoint.save(tmp_path / name, dict(a=torch.zeros(1)), meta, best=False)
    with (
        safe_open(tmp_path / "a" / checkpoint.LAST, "pt") as one,
        safe_open(tmp_path / "b" / checkpoint.LAST, "pt") as b,
    ):
        assert one.metadata() == b.metadata()


def test_the_step_and_the_checksum_of_a_file(tmp_path):
    checkpoint.save(tmp_path, dict(a=torch.zeros(1)), dict(step=17), best=False)
    assert checkpoint.step(tmp_path / checkpoint.LAST) == 17
    for name, content in (("none", None), ("empty", b""), ("other", b"x" * 99)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert checkpoint.step(tmp_path / name) == -1
    for number, meta in enumerate((None, dict(saccade="{"), dict(saccade="{}"), dict(saccade='{"step": []}'))):
        save_file(dict(a=torch.zeros(1)), tmp_path / f"{number}", meta)
        assert checkpoint.step(tmp_path / f"{number}") == -1
    for content in (b"", b"abc", bytes(range(256)) * 8193):  # more than two pieces
        (tmp_path / "file").write_bytes(content)
        assert checkpoint.checksum(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_label_names(tmp_path):
    """Of a finished run's config.json, or one sentence."""
    file = tmp_path / "config.json"
    file.write_bytes('{"label_names": ["Käfer", "b"]}'.encode())
    assert checkpoint.label_names(tmp_path) == ["Käfer", "b"]
    wrong = r"\(label_names must be a list of names\)"
    for text, reason in (
        ("{}", r"\('label_names'\)"), ("[]", r"\(list indices .*\)"), ("{", r"\(Expecting .*\)"),
        ('{"label_names": []}', wrong), ('{"label_names": "ab"}', wrong), ('{"label_names": ["a", 1]}', wrong),
        ('{"label_names": {"a": "b"}}', wrong), ("[" * 99_999, r"\(maximum recursion .*\)"),
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(
            UserError, match=rf"^\S+/config\.json does not name the model's classes {reason}: train the run again$"
        ):
            checkpoint.label_names(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="No such file"):
        checkpoint.label_names(tmp_path)


def test_without_hard_links(tmp_path, monkeypatch):
    """`previous` and `best` are copies there, byte by byte."""
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    for step in range(2):
        checkpoint.save(tmp_path, tensors(step), dict(step=step), best=True)
    for name, step in ((checkpoint.PREVIOUS, 0), (checkpoint.BEST, 1)):
        assert checkpoint.read(tmp_path / name)[1] == dict(step=step)
    assert len({(tmp_path / name).stat().st_ino for name in os.listdir(tmp_path)}) == 3


def test_files_that_are_refused_are_named(tmp_path):
    checkpoint.save(tmp_path, dict(a=torch.zeros(4)), dict(step=1), best=False)
    last = tmp_path / checkpoint.LAST
    last.write_bytes(last.read_bytes()[:-1] + b"\x01")
    with pytest.raises(checkpoint.Unreadable, match=r"last\.safetensors is damaged \(contents and checksum disagree\)"):
        checkpoint.read(last)
    save_file(dict(a=torch.zeros(1)), tmp_path / "other.safetensors")
    with pytest.raises(checkpoint.Foreign, match=r"other\.safetensors is not a checkpoint of a training run"):
        checkpoint.read(tmp_path / "other.safetensors")


def test_what_of_an_optimizer_is_loaded():
    """Its state and counters; not its groups' settings, nor their parameters. Strides are those of the parameters."""
    model = torch.nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    optimizer.param_groups[0] |= dict(initial_lr=0.5, lr_scale=1.0, param_names=["weight", "bias"])
    model(torch.ones(1, 4, 3, 3)).sum().backward()
    optimizer.step()
    moments, plain = checkpoint.optimizer_state(optimizer, model)
    assert moments.keys() == {"state.weight.momentum_buffer", "state.bias.momentum_buffer"}
    assert not {"group.0.params", "group.0.param_names"} & plain.keys()
    before = {name: value.clone() for name, value in moments.items()}
    saved = {f"group.0.{key}": 9.0 for key in ("lr", "momentum", "initial_lr", "lr_scale")}
    saved |= {"group.0.counter": [1, 2], "group.1.counter": 3}
    moments = {name: value.contiguous() + 1 for name, value in before.items()}
    checkpoint.load_optimizer_state(optimizer, model, moments, saved)
    (group,) = optimizer.param_groups
    kept = (group["lr"], group["momentum"], group["initial_lr"], group["lr_scale"], group["counter"])
    assert kept == (0.5, 0.9, 0.5, 1.0, (1, 2))
    loaded = optimizer.state[model.weight]["momentum_buffer"]
    assert torch.equal(loaded, before["state.weight.momentum_buffer"] + 1) and loaded.stride() == model.weight.stride()
    checkpoint.load_optimizer_state(optimizer, model, {"state.bias.momentum_buffer": torch.zeros(4)}, {})
    assert list(optimizer.state) == [model.bias]  # what is not in the file is gone
    optimizer = torch.optim.SGD([model.weight], 0.5)
    checkpoint.load_optimizer_state(optimizer, model, moments, {})  # the bias is no longer trained
    assert list(optimizer.state) == [model.weight]
    with pytest.raises(KeyError):
        checkpoint.load_optimizer_state(optimizer, model, {"state.other.momentum_buffer": torch.zeros(4)}, {})
