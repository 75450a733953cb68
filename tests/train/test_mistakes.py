"""What goes wrong is one sentence on stderr, the right exit code, and nothing half-written."""

import errno
import os

import pytest
import torch
from saccade.train.runtime import checkpoint
from timm.models import load_state_dict  # noqa: F401  (timm is imported before stderr is captured)


def says(result, code: int, *words: str) -> None:
    """Assert the exit code and one sentence on stderr with these words."""
    actual, _, err = result
    assert actual == code, err
    assert err.count("\n") == 1 and err.startswith(("error: ", "stopped: ")), err
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model.name=resnet81"], ["unknown model resnet81, did you mean resnet"]),
        (["model.drop_rat=0.1"], ["no argument model.drop_rat, did you mean drop_rate"]),
        (["epoch=3"], ["unknown key epoch, did you mean epochs"]),
        (["epochs"], ["'epochs' is not an override"]),
        (["model.name=vit_tiny_patch16_224", "model.img_size=48"], ["can't take images of 16x16", "Input height (16)"]),
        (["model.num_classes=3"], ["model.num_classes can't be set"]),
        (["optimizer.lr=-1"], ["optimizer.lr must be more than 0; got -1"]),
        (["schedule.sched=wsd", "schedule.decay_epochs=50"], ["the optimizer or schedule section is invalid: wsd"]),
        (["model.in_chans=1"], ["can't take images of 16x16 with 3 channels"]),
        (["checkpoint=nowhere.pth"], ["there is no checkpoint nowhere.pth"]),
        (["batch_size=2000"], ["batch_size=2000 is more than the 1257 training images"]),
        (["accumulate=3"], ["batch_size=128 must be a multiple of 3"]),
        (["precision=fp16"], ["precision=fp16 needs a GPU"]),
        (["device=meta"], ["torch cannot use device meta here: use device=cpu"]),
        (["device=quantum"], ["'quantum' is not a device"]),
        (["task.mixup=0.5", "batch_size=63"], ["must be an even number"]),
        (["batch_size=1"], ["is a BatchNorm that would train on one value per channel", "raise batch_size"]),
        (["batch_size=8", "accumulate=8"], ["is a BatchNorm that would train on one value per channel", "accumulate"]),
    ],
    ids=lambda x: x[0] if isinstance(x, list) and "=" in x[0] else "",
)
def test_arguments(tiny, tmp_path, arguments, words):
    says(tiny(tmp_path / "run", *arguments), 2, *words)
    assert not list(tmp_path.glob("run/checkpoints/*")) and not list(tmp_path.glob("run/**/.*"))


def test_other_checkpoint(tiny, tmp_path):
    other = tmp_path / "other.pth"
    torch.save(dict(a=torch.zeros(3)), other)
    says(tiny(tmp_path / "run", f"checkpoint={other}"), 2, "does not fit test_resnet (it lacks", "it has a")
    assert not (tmp_path / "run").exists()  # nothing was in it


def test_run_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    says(tiny(tmp_path / "file" / "run"), 2, "making ", "Not a directory", "--run-dir")


def test_unfinished_run(tiny, command, tmp_path):
    says(command("test", tmp_path), 2, "no config")
    diverged = tiny(tmp_path / "run", "optimizer.lr=1e30", "max_skipped=2")
    says(diverged, 70, "2 steps in a row", "try a smaller optimizer.lr")
    says(command("test", tmp_path / "run"), 2, "has no finished model: give the weights with --checkpoint")


@pytest.mark.parametrize("moment", ["first", "second", "export"])
def test_disk_full(tiny, tmp_path, monkeypatch, moment):
    """Earlier checkpoints are intact, and once there is space the run resumes to the same end."""
    assert tiny(tmp_path / "whole")[0] == 0
    calls = []
    real = checkpoint.save_file

    def write(tensors, path, *rest):
        calls.append(1)
        if moment != "export" and len(calls) == (1 if moment == "first" else 2):
            path.write_bytes(b"some of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, *rest)

    def export(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "save_file", write)
    if moment == "export":
        monkeypatch.setattr("saccade.train.models.build.save_for_hf", export)
    run = tmp_path / "run"
    says(tiny(run), 74, "saving ", "No space left on device", "--resume")
    assert not list(run.rglob(".*")) and not (run / "model.safetensors").exists()
    assert len(list(run.glob("checkpoints/*"))) == dict(first=0, second=1, export=3)[moment]
    monkeypatch.undo()
    assert tiny(run, "--resume")[0] == 0
    ends = [checkpoint.read(tmp_path / name / "checkpoints" / checkpoint.LAST) for name in ("whole", "run")]
    assert ends[0][1] == ends[1][1] and all(torch.equal(v, ends[1][0][k]) for k, v in ends[0][0].items())


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda root: None, "is not a folder"),
        (lambda root: root.mkdir(), "holds no class folders"),
        (lambda root: [(root / name).mkdir(parents=True) for name in "ab"], "holds no images"),
    ],
)
def test_data(command, tmp_path, make, words):
    make(tmp_path / "data")
    config, run = os.path.join(os.path.dirname(__file__), "../../configs/finetune/folder.py"), tmp_path / "run"
    says(command("train", config, f"data.root={tmp_path / 'data'}", "--run-dir", run), 2, words)
    says(
        command("train", config, "--run-dir", run, "--resume"), 2, "data.root is missing: set it in the config or with"
    )


def test_json_is_of_print_config(tiny, tmp_path):
    code, out, err = tiny(tmp_path / "run", "--json")
    assert (code, out) == (2, "") and "--json goes with --print-config" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, hint", [(["--lr", "1e-3"], "optimizer.lr=1e-3"), (["--epochs=3"], "epochs=3")])
def test_options_that_are_keys(tiny, tmp_path, arguments, hint):
    says(tiny(tmp_path / "run", *arguments), 2, f"unknown option {arguments[0].partition('=')[0]}: write {hint}")


def test_not_a_config(command):
    says(command("train", "runs/nope"), 2, "there is no config file and no run runs/nope")


def test_help(command):
    for tool in ("train", "test"):
        code, out, _ = command(tool, "--help")
        assert code == 0 and "Exit codes" in out
