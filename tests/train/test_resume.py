"""What --resume does with a configuration that has changed, key by key, and where training had got to."""

import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch
from saccade.train import engine
from saccade.train.runtime import checkpoint, config
from saccade.train.runtime.errors import UserError
from saccade.train.runtime.state import FIXED, State, changes
from saccade.train.tasks.classify import Classify
from support.runs import records, state, train

DIGITS = Path(__file__).resolve().parents[2] / "configs/digits/resnet18.py"
# 4 steps, evaluated after 2 and 4.
SHORT = ["model.name=test_resnet", "data.img_size=16", "batch_size=128", "iterations=4", "eval_every=2"]
SHORT += ["log_every=1", "device=cpu", "schedule.sched=none", "ema.decay=0.9"]


@pytest.fixture(scope="session")
def half(once):
    """The folder of a run of 2 of 4 steps. Only to be read."""
    return once("half", lambda folder: train(folder, config.load(DIGITS, [*SHORT, "iterations=2", "epochs=None"])))


@pytest.fixture
def resume(half, command, tmp_path):
    """resume(*overrides) -> (exit code, stdout, stderr, folder) of the run of two steps, resumed to four."""

    def call(*overrides: str) -> tuple[int, str, str, Path]:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        shutil.copytree(half, folder)
        return *command("train", DIGITS, *SHORT, *overrides, "--run-dir", folder, "--resume"), folder

    return call


def test_the_page_lists_every_key():
    """docs/train.md says of every key of a config what a change does."""
    page = (DIGITS.parents[2] / "docs/train.md").read_text()
    table = page.partition("## Resuming")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([\w.]+)`", table))
    assert {key for key in inspect.signature(engine.train).parameters if key not in ("run_dir", "resume")} <= listed
    assert FIXED.keys() <= listed


@pytest.mark.parametrize("key", engine.known_keys(config.load(DIGITS)))
def test_every_key_is_refused_or_named(key):
    """A change of a key that can't take effect is refused by name; any other is in a message."""
    before, after = config.load(DIGITS, ["checkpoint=a.pth"]), config.load(DIGITS, ["checkpoint=a.pth", f"{key}='new'"])
    if key == "iterations":
        after["epochs"] = before["epochs"]
    if key in FIXED:
        with pytest.raises(UserError, match=rf"^{re.escape(key)} can't change on --resume \(it was .* is 'new'\)"):
            changes(config.dump(before), config.dump(after))
    else:
        (message,) = changes(config.dump(before), config.dump(after))
        assert message.startswith(f"changed since the checkpoint: {key}: ") and message.endswith(" -> 'new'")
    assert changes(config.dump(before), config.dump(before)) == []


def test_values_that_mean_the_same():
    """A key that keeps its meaning is never refused."""
    assert changes("checkpoint = None", "") == ["changed since the checkpoint: checkpoint: None -> not set"]
    assert len(changes("model = dict(name='a', pretrained=False)", "model = dict(name='a')")) == 1


@pytest.mark.parametrize(
    "override, words",
    [
        ("batch_size=64", "batch_size can't change on --resume (it was 128 and is 64)"),
        ("optimizer.opt=sgd", "optimizer.opt can't change on --resume (it was 'adamw' and is 'sgd')"),
        ("model.name=test_vit", "model.name can't change on --resume (it was 'test_resnet' and is 'test_vit')"),
        ("checkpoint=other.pth", "there is no checkpoint other.pth"),
        ("iterations=1", "the run has done 2 steps, and this configuration ends after 1"),
    ],
)
def test_refused(resume, override, words):
    code, _, err, folder = resume(override)
    assert code == 2 and words in err and err.count("\n") == 1, err
    assert state(folder)[1]["step"] == 2


def test_taken_up(resume):
    """Settings of the optimizer, averaging, freezing, seed, precision and lengths are those of the resumed run."""
    changed = ["optimizer.lr=0.0123", "optimizer.weight_decay=0.5", "optimizer.betas=(0.5, 0.6)", "freeze=layer1"]
    changed += ["ema.decay=0.5", "seed=3", "precision=bf16", "accumulate=2", "clip_grad=0.5", "save_every=1"]
    code, out, err, folder = resume(*changed, "task.smoothing=0.2", "iterations=3", "eval_every=3")
    assert (code, err) == (0, ""), err
    for override in [*changed, "task.smoothing=0.2", "iterations=3"]:
        assert f"changed since the checkpoint: {override.partition('=')[0]}: " in out
    tensors, meta = state(folder)
    assert meta["step"] == 3 and "resuming after step 2" in out
    groups = {key.rpartition(".")[2]: set() for key in meta["optimizer"] if key.startswith("group.")}
    for key, value in meta["optimizer"].items():
        if key.startswith("group."):
            groups[key.rpartition(".")[2]].add(str(value))
    assert (groups["lr"], groups["weight_decay"], groups["betas"]) == ({"0.0123"}, {"0.0", "0.5"}, {"[0.5, 0.6]"})
    before, _ = checkpoint.read(folder / "checkpoints" / checkpoint.PREVIOUS)
    for name, value in before.items():
        if name.startswith("model.") and value.is_floating_point() and "running" not in name:
            assert torch.equal(value, tensors[name]) == name.startswith("model.layer1"), name
        if name.startswith("ema.fc"):  # 0.5 of each
            new = tensors[name.replace("ema.", "model.")]
            assert torch.allclose(tensors[name], 0.5 * value + 0.5 * new, atol=1e-6)


def test_averaging_begins_and_ends(half, command, tmp_path):
    """Weights are averaged from the checkpoint's on where they were not before, and no longer where `ema` is None."""
    shutil.copytree(half, tmp_path / "run")
    arguments = [argument for argument in SHORT if not argument.startswith("ema")]
    code, _, err = command("train", DIGITS, *arguments, "--run-dir", tmp_path / "run", "--resume", "iterations=3")
    assert code == 0, err
    assert not any(name.startswith("ema.") for name in state(tmp_path / "run")[0])
    old = state(tmp_path / "run")[0]["model.fc.weight"]
    code, out, err = command("train", DIGITS, *SHORT, "--run-dir", tmp_path / "run", "--resume")
    assert code == 0 and "averaging begins with its weights" in out, err
    tensors = state(tmp_path / "run")[0]
    assert torch.allclose(tensors["ema.fc.weight"], 0.9 * old + 0.1 * tensors["model.fc.weight"], atol=1e-6)


def test_in_place(half, command, tmp_path):
    """A run's folder, or its config.py, continues that run; without --resume it is left as it is."""
    for name in ("folder", "file"):
        run = tmp_path / name
        shutil.copytree(half, run)
        given = run if name == "folder" else run / "config.py"
        code, _, err = command("train", given)
        assert code == 2 and "holds a run: continue it with --resume" in err
        code, out, err = command("train", given, "--resume", "iterations=3")
        assert code == 0 and "resuming after step 2" in out, err
        assert state(run)[1]["step"] == 3 and not (run / "runs").exists()


def test_failed_evaluation_loses_no_step(half, command, tmp_path, monkeypatch):
    """What was trained is saved before an evaluation that fails; resuming evaluates it first."""
    run, evaluate = tmp_path / "run", Classify.evaluate

    def fail(*arguments):
        raise KeyError("no annotations")

    shutil.copytree(half, run)
    monkeypatch.setattr(Classify, "evaluate", fail)
    with pytest.raises(KeyError):
        command("train", DIGITS, *SHORT, "--run-dir", run, "--resume")
    assert (state(run)[1]["step"], state(run)[1]["evaluated"]) == (4, 2)
    assert checkpoint.read(run / "checkpoints" / checkpoint.PREVIOUS)[1]["step"] == 2
    monkeypatch.setattr(Classify, "evaluate", evaluate)
    assert command("train", DIGITS, *SHORT, "--run-dir", run, "--resume")[0] == 0
    assert state(run)[1]["evaluated"] == 4 and [line["step"] for line in records(run, "val")] == [2, 4]
    assert checkpoint.read(run / "checkpoints" / checkpoint.PREVIOUS)[1]["step"] == 2


def test_another_order_is_refused(resume, monkeypatch):
    """Runs of versions that drew the order of very many images otherwise would see some twice and others never."""
    monkeypatch.setattr(engine, "order_method", lambda images: "feistel")
    code, _, err, folder = resume()
    assert code == 2 and re.search(r"orders the \d+ images of an epoch otherwise: resume with that version, or", err)
    assert state(folder)[1]["step"] == 2 and state(folder)[1]["order"] == "stored"


def judged(*evaluations: dict[str, float]) -> int:
    """The index of the evaluation that a State takes for the best."""
    made = State(torch.nn.Linear(1, 1), None, None, None, "")
    for made.step, metrics in enumerate(evaluations):
        made.judge(metrics, lambda metrics: metrics["ap"])
    assert made.best["rank"] == [float(number) for number in made.best["rank"]]
    return made.best["step"]


def test_best_without_a_score():
    """A score comes first; then the lowest val loss; then the latest."""
    nan = float("nan")
    assert judged({"ap": 0.3}, {"ap": 0.5}, {"ap": 0.4}) == 1
    assert judged({"ap": 0.3}, {"ap": nan}) == 0
    assert judged({"ap": nan, "loss": 0.1}, {"ap": 0.0, "loss": 0.9}, {"ap": nan, "loss": 0.0}) == 1
    assert judged({"ap": nan, "loss": 0.5}, {"ap": nan, "loss": 0.2}, {"ap": nan, "loss": 0.3}) == 1
    assert judged({"ap": nan}, {"ap": nan}) == 1
    assert judged({"ap": nan, "loss": nan}, {"ap": nan, "loss": 3.0}, {"ap": nan, "loss": nan}) == 1


def test_undefined_metrics(half, command, tmp_path, monkeypatch):
    """They are null in the log, which stays strict JSON, and a dash for people; the run ends well."""
    evaluate = Classify.evaluate

    def undefined(*arguments):
        metrics, detail = evaluate(*arguments)
        return metrics | dict(top1=float("nan"), ece=float("nan")), detail

    monkeypatch.setattr(Classify, "evaluate", undefined)
    code, out, err = command("train", DIGITS, *SHORT, "iterations=2", "--run-dir", tmp_path / "run")
    assert code == 0 and "val top1 - top5 " in out, err
    text = (tmp_path / "run/log.jsonl").read_text()
    assert "NaN" not in text and records(tmp_path / "run", "val")[0]["top1"] is None
    assert state(tmp_path / "run")[1]["best"]["metrics"]["top1"] is None
