"""A run from beginning to end, in this process: what it leaves behind, and its switches."""

import json
import shutil
from functools import partial

import pytest
import timm
import torch
from PIL import Image
from saccade.train.data.digits import Digits
from saccade.train.data.folder import ImageFolder
from saccade.train.models import build as model
from saccade.train.runtime import checkpoint, config, distributed
from support.levels import exhaustive

DIGITS = config.__file__.replace("train/runtime/config.py", "configs/digits/resnet18.py")
SGD = ["optimizer.opt=sgd", "optimizer.lr=0.05"]


@pytest.fixture(scope="module", autouse=True)
def threads():
    """More threads than one cost more than they bring at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state(folder, name=checkpoint.LAST):
    return checkpoint.read(folder / "checkpoints" / name)


def same_state(a, b) -> bool:
    (tensors, meta), (others, other_meta) = state(a), state(b)
    return (
        tensors.keys() == others.keys()
        and meta == other_meta
        and all(torch.equal(tensors[k], others[k]) for k in others)
    )


def test_what_a_run_leaves(tiny, command, tmp_path, records):
    run = tmp_path / "run"
    code, out, err = tiny(run, "ema.decay=0.9")
    assert (code, err) == (0, "")
    assert f'timm.create_model("local-dir:{run}", pretrained=True)' in out.splitlines()[-1]
    assert {p.name for p in run.iterdir()} >= {"config.py", "environment.json", "log.txt", "log.jsonl", "checkpoints"}
    assert {"torch", "timm", "saccade"} <= json.loads((run / "environment.json").read_text())["versions"].keys()

    # Log: 9 steps an epoch, one line each, and an evaluation of all 180 images at each epoch's end.
    steps = records(run, "train")
    assert [line["step"] for line in steps] == list(range(1, 19))
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[0]["lr"] < steps[8]["lr"]
    evaluations = records(run, "val")
    assert [(line["step"], line["images"]) for line in evaluations] == [(9, 180), (18, 180)]
    assert {"top1", "top5", "loss", "ema_top1", "ema_top5", "ema_loss"} <= evaluations[0].keys()
    timing = json.loads((run / "log.jsonl").read_text().splitlines()[1])
    assert timing["images_per_s"] > 0 and 0 <= timing["data_share"] <= 1 and timing["memory_gib"] > 0

    # Model: what timm makes of the folder is the best checkpoint, of weights or averaged weights.
    tensors, meta = state(run, checkpoint.BEST)
    kind = meta["best"]["weights"]
    exported = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    assert all(torch.equal(v, tensors[f"{kind}.{k}"]) for k, v in exported.state_dict().items())
    assert exported.num_classes == 10 and exported.pretrained_cfg["input_size"] == (3, 16, 16)

    # Test: on the test split, with the exported weights and with a checkpoint's.
    assert command("test", run, "device=cpu")[0] == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics.keys() >= {"top1", "top5", "images", "seconds"} and metrics["images"] == 360
    digits = Digits(img_size=16)
    images, labels = zip(*digits.dataset("test", digits.inputs({})))
    with torch.no_grad():
        right = exported(torch.stack(images)).argmax(1) == torch.tensor(labels)
    assert metrics["top1"] == pytest.approx(100 * right.float().mean().item())
    best = run / "checkpoints" / checkpoint.BEST
    assert command("test", run, "--checkpoint", best, "--out", tmp_path / "b", "device=cpu")[0] == 0
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert (again["top1"], again["loss"]) == (metrics["top1"], metrics["loss"])

    arguments = [DIGITS, "model.name=test_resnet", "data.img_size=16", "device=cpu"]
    assert command("test", *arguments, "--checkpoint", best, "--out", tmp_path / "c", "--split", "val")[0] == 0
    assert json.loads((tmp_path / "c" / "metrics.json").read_text())["top1"] == meta["best"]["metrics"]["top1"]

    # The resolved config makes the same run; --resume on a finished one changes nothing.
    arguments = [run / "config.py", "--run-dir", tmp_path / "again"]
    assert command("train", *arguments)[0] == 0
    assert same_state(run, tmp_path / "again")
    code, out, err = command("train", *arguments, "--resume")
    assert code == 0 and "resuming after step 18" in out and same_state(run, tmp_path / "again")


def test_folder_in_use(tiny, tmp_path):
    """An earlier run is not lost by accident, and other people's files not at all."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    (theirs / "checkpoints").mkdir(parents=True)
    (theirs / "config.py").write_text("mine")
    for way in ((), ("--overwrite",), ("--resume",)):
        code, _, err = tiny(theirs, *way)
        assert code == 2 and "is not empty and not a run's folder: choose another with --run-dir" in err
    assert (theirs / "checkpoints").exists() and (theirs / "config.py").read_text() == "mine"
    assert tiny(run, "epochs=1")[0] == 0
    (run / "notes.txt").write_text("mine")
    code, _, err = tiny(run, "epochs=1")
    assert code == 2 and "holds a run: continue it with --resume, or start again with --overwrite" in err
    assert tiny(run, "epochs=1", "--overwrite")[0] == 0
    assert (run / "notes.txt").exists()
    for stale in (".config.py.77.tmp", "checkpoints/.last.safetensors.77.tmp", "checkpoints/.tmpAbC123"):
        (run / stale).write_text("half")
    assert tiny(run, "epochs=1", "--resume")[0] == 0
    assert not list(run.rglob(".*"))


def test_resume_of_nothing(tiny, tmp_path):
    assert "nothing saved yet: starting from the beginning" in tiny(tmp_path, "epochs=1", "--resume")[1]


def test_truncated_checkpoint(tiny, tmp_path, records):
    """The previous good one is used, with a message, and the end is the same."""
    assert tiny(tmp_path / "whole")[0] == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    last = tmp_path / "cut/checkpoints" / checkpoint.LAST
    last.write_bytes(last.read_bytes()[:-100])
    code, out, _ = tiny(tmp_path / "cut", "--resume")
    assert code == 0 and "last.safetensors can't be read" in out and "resuming after step 9" in out
    assert same_state(tmp_path / "whole", tmp_path / "cut")
    assert records(tmp_path / "whole") == records(tmp_path / "cut")


def test_accumulation_is_one_batch(tiny, tmp_path, records):
    """Without BatchNorm, a step of four parts is the step of the whole batch."""
    vit = ["model.name=test_vit", "model.img_size=16", "epochs=1", "clip_grad=0.5", *SGD]
    assert tiny(tmp_path / "a", *vit)[0] == 0
    assert tiny(tmp_path / "b", *vit, "accumulate=4")[0] == 0
    losses = [[line["loss"] for line in records(tmp_path / run, "train")] for run in "ab"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "switches",
    [
        ["precision=bf16", "channels_last=True", "model.name=test_vit"],
        ["grad_checkpointing=True", "accumulate=2", "clip_grad=1.0", "ema.decay=0.99", "ema.use_warmup=True"],
        ["task.mixup=0.8", "task.cutmix=1.0", "model.drop_path_rate=0.1", "workers=1"],
        [
            "task.bce=True",
            "optimizer.opt=lamb",
            "optimizer.layer_decay=0.7",
            "schedule.warmup_epochs=1",
            "schedule.sched=wsd",
        ],
        ["schedule.sched=none", "eval_every=3", "save_every=4"],
    ],
    ids=lambda switches: switches[0],
)
def test_switches(tiny, tmp_path, records, switches):
    """Each trains, and resumes in the middle of an epoch to the same end."""
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert tiny(whole, *switches)[::2] == (0, "")
    losses = [line["loss"] for line in records(whole, "train")]
    assert sum(losses[-3:]) < sum(losses[:3])

    taken = []

    def stop_in_the_middle(request, bad) -> bool:
        taken.append(1)
        return len(taken) == 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.StopRequest, "agreed", stop_in_the_middle)
        code, _, err = tiny(parted, *switches)
    assert code == 75 and err.startswith("stopped: step 4 of 18 is saved")
    assert tiny(parted, *switches, "--resume")[0] == 0
    assert records(parted) == records(whole)
    assert same_state(parted, whole)


def test_iterations(tiny, tmp_path, records):
    """In place of epochs: the schedule's lengths and the evaluations are counted in steps."""
    assert tiny(tmp_path / "epochs", "epochs=1", "schedule.warmup_epochs=0", "log_every=1")[0] == 0
    lengths = [
        "schedule.sched=poly",
        "schedule.decay_rate=0.5",
        "schedule.warmup_epochs=2",
        "schedule.warmup_lr=0",
        "optimizer.lr=0.01",
    ]
    steps = ["epochs=None", "iterations=11", "eval_every=4", "log_every=1", *lengths, "schedule.min_lr=0"]
    assert tiny(tmp_path / "steps", *steps)[0] == 0
    assert [line["step"] for line in records(tmp_path / "steps", "val")] == [4, 8, 11]
    rates = [line["lr"] for line in records(tmp_path / "steps", "train")]
    assert rates[:2] == pytest.approx([0, 0.005])
    assert rates[2:] == pytest.approx([0.01 * (1 - step / 11) ** 0.5 for step in range(2, 11)])
    assert tiny(tmp_path / "each", *[given for given in steps if "eval" not in given], "eval_every=None")[0] == 0
    assert [line["step"] for line in records(tmp_path / "each", "val")] == [9, 11]  # every pass over 1,257 images


@pytest.mark.parametrize("backend", ["aot_eager", exhaustive("inductor")])
def test_compile(tiny, tmp_path, records, monkeypatch, backend):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    arguments = ["epochs=1", *SGD, "model.name=test_vit", "model.img_size=16"]
    assert tiny(tmp_path / "eager", *arguments)[0] == 0
    assert tiny(tmp_path / "compiled", *arguments, "compile=True")[0] == 0
    losses = [[line["loss"] for line in records(tmp_path / run, "train")] for run in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_layer_decay_and_no_weight_decay(tiny, tmp_path):
    """timm's parameter groups come from the model: position embeddings are not decayed, early layers learn slower."""
    vit = ["model.name=test_vit", "model.img_size=16", "epochs=1", "optimizer.layer_decay=0.5"]
    assert tiny(tmp_path, *vit)[0] == 0
    plain = state(tmp_path)[1]["optimizer"]
    decays = {v for k, v in plain.items() if k.endswith(".weight_decay")}
    scales = {v for k, v in plain.items() if k.endswith("lr_scale")}
    assert decays == {0.0, 0.05} and len(scales) > 3


def test_finetune_a_folder(command, tmp_path):
    """Digits written as pictures; a head of three classes on weights that had ten."""
    digits = Digits()
    for index, (grey, label) in enumerate(zip(digits._grey, digits._labels)):
        if label < 3 and index < 600:
            folder = tmp_path / "images" / f"number {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(grey).save(folder / f"{index}.png")
    weights = tmp_path / "weights.pth"
    torch.save(model.create("test_resnet", 10).state_dict(), weights)
    arguments = [
        "model={'name': 'test_resnet'}",
        f"checkpoint={weights}",
        f"data.root={tmp_path / 'images'}",
        "epochs=2",
    ]
    arguments += ["data.img_size=32", "batch_size=32", "workers=0", "device=cpu"]
    config_file = config.__file__.replace("train/runtime/config.py", "configs/finetune/folder.py")
    code, _, err = command("train", config_file, *arguments, "--run-dir", tmp_path / "run")
    assert (code, err) == (0, "")
    exported = json.loads((tmp_path / "run/config.json").read_text())
    assert exported["label_names"] == ["number 0", "number 1", "number 2"]
    assert command("test", tmp_path / "run")[0] == 0
    images = len(ImageFolder(str(tmp_path / "images"))._splits["test"])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["images"] == images > 30
