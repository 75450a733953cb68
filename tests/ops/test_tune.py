"""Launch configurations: tables by card, broken tables, and the choice, timed by a clock of the test."""

import json
import warnings

import pytest
import torch
from saccade.ops import aot, tune

CARD = "NVIDIA H200 (test)"


class Kernel:
    __module__, __name__ = "saccade.ops.window_attention.kernel", "fwd_kernel"


KERNEL, ARGS = Kernel(), (torch.ones(2, dtype=torch.bfloat16), 3, torch.ones(2), torch.ones(1))
OPTIONS = dict(D=32, PAD=True, num_warps=4, num_stages=3)
KEY = "window_attention.fwd_kernel bfloat16,float32 D=32 PAD=True num_stages=3 num_warps=4"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Tables in folders of the test: what ships, and the user's."""
    monkeypatch.setattr(tune, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("SACCADE_TUNED", str(tmp_path / "user"))
    monkeypatch.setattr(tune, "_found", {})
    tune.table.cache_clear()
    yield tmp_path
    tune.table.cache_clear()


def test_the_users_folder(monkeypatch, tmp_path):
    assert tune.folder() == tmp_path / "user"
    monkeypatch.delenv("SACCADE_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert str(tune.folder()) == "/cache/saccade/tuned"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(tune.folder()) == "/home/someone/.cache/saccade/tuned"
    assert tune.file_name(CARD) == "nvidia_h200_test.json"


def test_a_key_has_types_and_constants_but_no_sizes():
    assert tune.key(KERNEL, ARGS, OPTIONS) == KEY
    assert tune.key(KERNEL, (ARGS[0], 5, ARGS[2]), OPTIONS) == KEY


def test_variants_start_with_the_default():
    assert tune.variants(OPTIONS) == [{}, dict(num_warps=2), dict(num_warps=8), dict(num_stages=1)]
    few = [{}, dict(num_warps=2), dict(num_stages=2)]
    assert tune.variants(dict(num_warps=1, num_stages=1)) == few
    assert all(2 <= len(tune.variants(dict(num_warps=n))) <= 4 for n in (1, 2, 4, 8, 16))


def test_an_unknown_card_launches_the_defaults():
    assert tune.configured("Other", KERNEL, ARGS, OPTIONS) is OPTIONS


def test_the_users_entry_comes_before_the_shipped_one(tmp_path):
    tune.write(CARD, {KEY: dict(num_warps=2)}, tmp_path / "shipped" / tune.file_name(CARD))
    assert tune.configured(CARD, KERNEL, ARGS, OPTIONS) == OPTIONS | dict(num_warps=2)
    tune.write(CARD, {KEY: dict(num_stages=1)})
    tune.table.cache_clear()
    assert tune.configured(CARD, KERNEL, ARGS, OPTIONS) == OPTIONS | dict(num_stages=1)
    assert tune.configured(CARD, KERNEL, ARGS, OPTIONS | dict(PAD=False)) == OPTIONS | dict(PAD=False)


@pytest.mark.parametrize("change", [dict(num_warps=64), dict(BLOCK_M=512), dict(num_warps="8"), dict(D=16)])
def test_a_change_that_is_no_variant_is_not_used(change):
    tune.write(CARD, {KEY: change})
    assert tune.configured(CARD, KERNEL, ARGS, OPTIONS) == OPTIONS


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read"),
        ("[]", "not of format 1"),
        (json.dumps(dict(format=2, card=CARD, entries={})), "not of format 1"),
        (json.dumps(dict(format=1, card="NVIDIA A100", entries={})), "for 'NVIDIA A100', not for"),
        (json.dumps(dict(format=1, card=CARD, entries=[1])), "entries must be objects"),
        (json.dumps(dict(format=1, card=CARD, entries={KEY: 8})), "entries must be objects"),
    ],
)
def test_a_table_that_cannot_be_used_is_named_and_replaced(text, reason, tmp_path):
    path = tmp_path / "user" / tune.file_name(CARD)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.warns(UserWarning, match=f"{path.name} is not used: .*{reason}"):
        assert tune.configured(CARD, KERNEL, ARGS, OPTIONS) == OPTIONS
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once per process
        assert tune.configured(CARD, KERNEL, ARGS, OPTIONS) == OPTIONS
        assert tune.write(CARD, {KEY: dict(num_warps=8)}) == path
        tune.table.cache_clear()
        assert tune.table(CARD) == {KEY: dict(num_warps=8)}


def clock(times):
    """A timer that runs the function and returns the time of the change it was run with."""
    last = []

    def time(call):
        call()
        return times[json.dumps(last.pop())]

    return last.append, time


def test_the_fastest_variant_is_kept():
    times = {"{}": 1.0, '{"num_warps": 2}': 1.3, '{"num_warps": 8}': 0.7, '{"num_stages": 1}': 0.8}
    run, time = clock(times)
    assert tune.fastest(run, OPTIONS, time) == dict(num_warps=8)
    run, time = clock(times | {"{}": 0.705})  # a difference within the noise
    assert tune.fastest(run, OPTIONS, time) == {}


def test_variants_that_do_not_run_are_skipped_but_the_default_must():
    def run(change):
        if change == failing:
            raise RuntimeError("out of resource: shared memory")

    def time(call):
        call()
        return 1.0

    failing = dict(num_warps=8)
    with pytest.warns(UserWarning, match="'num_warps': 8.*RuntimeError"):
        assert tune.fastest(run, OPTIONS, time) == {}
    failing = {}
    with pytest.raises(RuntimeError, match="shared memory"):
        tune.fastest(run, OPTIONS, time)


def test_tuning_times_once_and_writes(monkeypatch, tmp_path):
    timed = []
    monkeypatch.setattr(tune, "fastest", lambda run, options: timed.append(options) or dict(num_warps=8))
    with tune.tuning():
        for _ in range(2):
            chosen = tune.configured(CARD, KERNEL, ARGS, OPTIONS, run=lambda change: None)
            assert chosen == OPTIONS | dict(num_warps=8)
    assert timed == [OPTIONS]
    table = json.loads((tmp_path / "user" / tune.file_name(CARD)).read_text())
    assert table == dict(format=1, card=CARD, entries={KEY: dict(num_warps=8)})
    assert tune.save() == []


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        tune.main([])
    assert end.value.code == 2
    assert "this machine has no GPU that torch can use, so there is nothing to time" in capsys.readouterr().err


def test_examples_call_every_operator():
    """In PyTorch, on small maps, forward and backward."""
    names = []
    for name, call in tune.examples(torch.float32, "cpu", batch=2, side=28):
        out = call()
        out.sum().backward()
        assert out.isfinite().all()
        names.append(name)
    assert set(names) == set(aot.OPERATORS)
