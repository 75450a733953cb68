"""Losses and gradients that are not finite: steps skipped and explained, in the same way by all processes."""

import math
import re
from pathlib import Path

import pytest
import torch
from saccade.train.runtime import checkpoint, numbers
from saccade.train.runtime.errors import NUMBERS, UserError
from saccade.train.runtime.numbers import Numbers, Part, examine
from saccade.train.runtime.state import State
from support.jobs import Job
from support.levels import exhaustive
from support.runs import SGD, finish, records, state

ROOT = Path(__file__).parents[2]
FAULTY = ROOT / "tests/support/faulty.py"
DIGITS = ROOT / "configs/digits/resnet18.py"
TINY = ["model.name=test_resnet", "data.img_size=16", "epochs=1", "batch_size=120", "log_every=1", "device=cpu", *SGD]
TINY += ["model.drop_path_rate=0.1", "ema.decay=0.9"]


def job(folder: Path, *arguments, processes: int = 0, config: Path = DIGITS, settings=TINY) -> Job:
    return Job(FAULTY, config, *settings, "--run-dir", folder, *arguments, processes=processes)


def warnings_of(folder: Path) -> list[str]:
    return re.findall("warning: .*", (folder / "log.txt").read_text())


def small(max_skipped: int = 3, loss_spike: float | None = None, scale: float | None = None):
    """A model with a loss, the object under test, and its messages."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
    made = State(model, None, torch.optim.SGD(model.parameters(), 0.1), scaler, "")
    messages: list[str] = []
    watch = Numbers(made, max_skipped, loss_spike, lambda text, show=True, keep=True: messages.append(text))
    return model, made, watch, messages


def step(model, made, watch, factor: float = 1.0, gradient: float | None = None) -> dict | None:
    watch.begin()
    loss = model(torch.eye(3, 4)).square().mean() * factor
    made.scaler.scale(loss).backward()
    if gradient is not None:
        model[0].weight.grad[0, 0] = gradient
    values = watch.accept(dict(loss=loss.detach()), lambda: [Part(0, ["a.png", "b.png"], "1", False)])
    if values is not None:
        made.scaler.step(made.optimizer)
        made.scaler.update()
    made.optimizer.zero_grad()
    made.step += 1
    return values


@pytest.mark.parametrize("bad", [dict(factor=math.nan), dict(factor=math.inf), dict(gradient=math.nan)], ids=str)
def test_a_skipped_step_changes_nothing(bad):
    model, made, watch, messages = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert step(model, made, watch, **bad) is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (made.step, made.skipped, made.skipped_in_row) == (1, 1, 1)
    reason = "the gradient of 0.weight is not finite" if "gradient" in bad else f"the loss is {bad['factor']}"
    (message,) = messages
    assert message == (
        f"warning: step 1 is skipped (1 in a row, 3 end the run): {reason}; the first output that is not finite is "
        "that of 1; images: a.png, b.png"
    )
    assert step(model, made, watch)["loss"] > 0
    assert (made.step, made.skipped, made.skipped_in_row) == (2, 1, 0)
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_too_many_in_a_row():
    model, made, watch, messages = small(max_skipped=2)
    step(model, made, watch, math.nan)
    step(model, made, watch)
    step(model, made, watch, math.nan)
    with pytest.raises(UserError, match=r"2 steps in a row .* \(step 4: the loss is nan\): try a smaller") as error:
        step(model, made, watch, math.nan)
    assert error.value.code == NUMBERS == 70 and len(messages) == 3


def test_weights_that_are_not_finite_are_not_saved():
    model, made, _, _ = small()
    model[0].weight.data[1, 2] = math.inf
    with pytest.raises(UserError, match=r"0\.weight is not finite after step 0, so it is not saved: try a smaller"):
        made.content()


def test_images_are_narrowed_down_and_shortened():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
    images = torch.zeros(4, 2)
    images[2, 1] = math.inf
    names = [f"{i}.png" for i in range(4)]
    assert examine(model, lambda: model(images), names) == Part(0, ["2.png"], "0", True, 1)
    assert examine(model, lambda: model(torch.zeros(4, 2)), names) == Part(0, names, None, False)
    _, _, watch, messages = small()
    watch._warn(5, "why", [Part(0, [f"{i}.png" for i in range(30)], None, False)])
    assert messages[0].endswith(", 28.png, 29.png")  # in log.txt
    assert messages[1].endswith(" 7.png, … and 22 more (log.txt lists them)") and "28.png" not in messages[1]
    assert "no output of a module was not finite" in messages[1]


def test_spikes_are_reported_once():
    _, _, watch, messages = small(loss_spike=4.0)
    for i, loss in enumerate([1.0] * 30 + [3.9, 4.1, 50.0, 1.0, 5.0]):
        watch._watch(i + 1, loss)
    assert [message.partition(" is ")[0] for message in messages] == [
        "warning: the loss of step 32", "warning: the loss of step 35",
    ]  # fmt: skip
    assert "4.1, 4.1 times the median of the 31 before, 1" in messages[0]


def test_fp16_lowers_its_scale_to_a_floor():
    """An overflow under a scale above the floor is no fault of the step; at the floor it is."""
    model, made, watch, messages = small(scale=4.0)
    scales = []
    for _ in range(3):
        assert step(model, made, watch, gradient=math.inf) is None
        scales.append(made.scaler.get_scale())
    assert scales == [2.0, 1.0, 1.0] and made.skipped == 1
    assert messages[0].startswith("fp16's loss scale has fallen to 1, its floor")
    assert "the gradient of 0.weight is not finite at the loss scale's floor of 1" in messages[1]
    assert step(model, made, watch)["loss"] > 0 and made.scaler.get_scale() == numbers.MIN_SCALE


def test_no_gradient_is_silently_zero():
    """The largest of a gradient's values is NaN where any is."""
    for place in range(7):
        values = torch.zeros(7)
        values[place] = math.nan
        assert not torch.nn.utils.get_total_norm([torch.ones(3), values], math.inf).isfinite()


@pytest.mark.parametrize("processes", [exhaustive(0), 2])
def test_classification(tmp_path, monkeypatch, processes):
    """A fault of one process in two steps: both skip them, say where and in which image, and end as if never asked."""
    monkeypatch.setenv("FAULT_NAN", f"{max(processes - 1, 0)}:3:4:layer2.0.conv1")
    out = finish(job(tmp_path, processes=processes))
    lines = warnings_of(tmp_path)
    assert len(lines) == 2, out
    for number, line in enumerate(lines, 1):
        assert line.startswith(
            f"warning: step {number + 2} is skipped ({number} in a row, 10 end the run): the loss is nan"
        )
        assert f"that of layer2.0.conv1{' in process 1' if processes else ''}; images: image " in line
        assert line.count("image ") == 1  # of the batch, the one whose output was NaN
    assert "2 steps were skipped, see log.txt" in out
    losses = [line["loss"] for line in records(tmp_path, "train")]
    assert losses[2:4] == [None, None] and all(map(math.isfinite, losses[:2] + losses[4:]))
    tensors, meta = state(tmp_path)
    assert meta["skipped"] == [2, 0] and meta["step"] == 10
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    assert tensors["model.bn1.num_batches_tracked"] == 8


def test_the_last_good_checkpoint_stays(tmp_path, monkeypatch):
    """No checkpoint and no evaluation of steps that were skipped; the run ends with code 70."""
    monkeypatch.setenv("FAULT_NAN", "0:5:99:gradient")
    arguments = ["save_every=1", "max_skipped=3"]
    out = finish(job(tmp_path, *arguments), 70)
    assert "error: 3 steps in a row" in out and "(step 7: the gradient of fc.bias is not finite)" in out
    assert "no output of a module was not finite in a second forward pass" in out
    meta = state(tmp_path)[1]
    assert (meta["step"], meta["skipped"]) == (4, [0, 0])
    assert [line["step"] for line in records(tmp_path, "val")] == []


@pytest.mark.exhaustive
def test_resumes_among_skipped_steps(tmp_path, monkeypatch):
    """The count continues, and the end is that of a run that was not interrupted."""
    monkeypatch.setenv("FAULT_NAN", "-1:4:6:bn1")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(job(whole))
    monkeypatch.setenv("FAULT_KILL", "0:6:SIGTERM")
    finish(job(stopped), 75)
    assert state(stopped)[1]["skipped"] == [3, 3]
    monkeypatch.delenv("FAULT_KILL")
    finish(job(stopped, "--resume"))
    for name, value in state(whole)[0].items():
        assert torch.equal(value, state(stopped)[0][name]), name
    assert state(stopped)[1]["skipped"] == [3, 0]
    assert checkpoint.read(stopped / "checkpoints" / checkpoint.BEST)[1]["step"] == 10


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", ["detector", "segmenter"])
@pytest.mark.parametrize("processes", [0, 2])
def test_dense_tasks(tmp_path, monkeypatch, request, task, processes):
    config, arguments = request.getfixturevalue(f"{task}_arguments")
    monkeypatch.setenv("FAULT_NAN", f"{max(processes - 1, 0)}:2:2:gradient")
    out = finish(job(tmp_path, processes=processes, config=config, settings=arguments))
    (line,) = warnings_of(tmp_path)
    assert line.startswith("warning: step 2 is skipped (1 in a row") and "the gradient of " in line, out
    assert line.count(".jpg") + line.count(".png") == 4  # the names of the batch's images
    assert state(tmp_path)[1]["skipped"] == [1, 0]
