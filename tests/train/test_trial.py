"""Switches of a run: early end, profile, the batch size that fits, and a dry run."""

import inspect
import json
from itertools import count

import pytest
import torch
from saccade.train import engine, trial
from saccade.train.runtime import config
from saccade.train.tasks.classify import Classify
from support.runs import records


def test_patience(tiny, tmp_path, monkeypatch):
    """Scores that only fall: the run ends after the third evaluation, and a resumed one stays there."""
    falling = count()
    monkeypatch.setattr(Classify, "score", lambda self, metrics: -next(falling))
    arguments = ("epochs=6", "patience=2")
    code, out, err = tiny(tmp_path / "run", *arguments)
    assert (code, err) == (0, "")
    assert len(records(tmp_path / "run", "val")) == 3
    assert "ended early, at step 27 of 54: no better score in 2 evaluations" in out
    assert "the best on val was step 9 of 54" in out and (tmp_path / "run" / "model.safetensors").is_file()
    assert tiny(tmp_path / "run", *arguments, "--resume")[0] == 0
    assert len(records(tmp_path / "run", "val")) == 3
    assert tiny(tmp_path / "other", "patience=0")[0] == 2


@pytest.mark.exhaustive
def test_profile(tiny, tmp_path):
    code, out, _ = tiny(tmp_path / "run", "epochs=1", "profile=3")
    assert code == 0 and "profile of the steps:" in out
    assert "aten::convolution" in (tmp_path / "run/profile/operators.txt").read_text()
    trace = json.loads((tmp_path / "run/profile/trace.json").read_text())
    steps = {event["name"] for event in trace["traceEvents"] if event.get("name", "").startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}


@pytest.mark.exhaustive
def test_auto_batch_size(tiny, tmp_path, monkeypatch):
    """The memory of two small batches is extrapolated; the run and its resumption keep the number."""
    found = {}
    real = trial.extrapolate

    def spy(peak, limit, most):
        found.update(peaks=[peak(n) for n in (2, 4, 64)], most=most)
        found["n"] = real(peak, found["peaks"][2], most)  # as if just 64 images fitted
        return found["n"]

    monkeypatch.setattr(trial, "extrapolate", spy)
    code, _, err = tiny(tmp_path / "run", "batch_size=auto", "epochs=1", "accumulate=2")
    assert (code, err) == (0, "")
    assert 32 <= found["n"] <= 128 and found["most"] == 1257 // 2
    assert config.load(tmp_path / "run" / "config.py")["batch_size"] == 2 * found["n"]
    monkeypatch.setattr(trial, "extrapolate", None)
    assert tiny(tmp_path / "run", "batch_size=auto", "epochs=2", "accumulate=2", "--resume")[0] == 0
    assert tiny(tmp_path / "other", "batch_size=many")[0] == 2
    monkeypatch.setattr(trial, "extrapolate", lambda *args: 0)
    code, _, err = tiny(tmp_path / "none", "batch_size=auto")
    assert code == 2 and "not even one image fits" in err and not (tmp_path / "none").exists()


def test_largest_batches():
    def run(images):
        if images > 48:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert trial.grow(run, 1000) == 32 and trial.grow(run, 20) == 16
    assert trial.grow(lambda n: run(100), 1000) == 0
    peak = lambda n: 1000 + 10 * n  # noqa: E731
    assert trial.extrapolate(peak, 1000 + 10 * 64, 1000) == 64
    assert trial.extrapolate(peak, 1000 + 10 * 63, 1000) == 32
    assert trial.extrapolate(peak, 10**9, 1000) == 512 and trial.extrapolate(peak, 500, 1000) == 0
    assert trial.extrapolate(peak, 10**9, 3) == 3
    assert 2**20 < trial.free_memory() < 2**50


def test_a_trial_changes_nothing(classifier_run):
    """Neither weights nor running statistics nor gradients."""
    settings = config.load(classifier_run / "config.py")
    data = config.build(settings["data"])
    task = config.build(settings["task"], data)
    net = task.model(**settings["model"])
    training = data.dataset("train", data.inputs(net.pretrained_cfg), training=True)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    step = trial.trial_step(task, net, training, 8, 0, torch.device("cpu"), torch.inference_mode)
    with pytest.raises(RuntimeError):  # no gradients there: what changes before an error is restored, too
        step()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_dry_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("digits/resnet18", "model.name=test_resnet", "data.img_size=16", "batch_size=64", "epochs=2")
    code, out, err = command("train", *arguments, "freeze=['layer1', 'layer2', 'layer3']", "--dry-run")
    assert code == 0 and "model: test_resnet, 0.28 M parameters are trained" in out, out
    assert all("gpuGetDeviceCount" in line for line in err.splitlines())  # of PyTorch's profiler, without a driver
    assert "1,257 training and 180 val images, 10 classes" in out and "images of 16x16" in out
    assert "38 of 64 images, 19 an epoch" in out and "MiB beyond weights and optimizer" in out
    assert not list(tmp_path.iterdir())
    assert command("train", *arguments, "--dry-run", "batch_size=5000")[0] == 2


def test_a_dry_run_has_the_defaults_of_a_run():
    ours, theirs = (inspect.signature(function).parameters for function in (trial.set_up, engine.train))
    named = [name for name in ours if name in theirs]
    assert len(named) == 13 and {name: ours[name].default for name in named} == {
        name: theirs[name].default for name in named
    }


def test_a_test_needs_a_number(command, classifier_run):
    code, _, err = command("test", classifier_run, "batch_size=auto")
    assert code == 2 and "batch_size=auto is for training" in err
