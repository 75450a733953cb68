"""The losses of Sparsifiner's training equal the published ones, and their gradients."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
import torch.nn.functional as F
from saccade.backbones.sparsifiner import checkpoint_filter_fn, rename
from saccade.train.runtime import checkpoint
from saccade.train.runtime.errors import UserError
from saccade.train.tasks.distill import Distill, distillation_loss, reconstruction_loss
from safetensors.torch import load_file
from support import parity

pytestmark = pytest.mark.usefixtures("double")  # as default type


def pair(want: dict) -> list:
    """Student and teacher of a fixture: the teacher's weights, a dense DeiT's, lack the mask predictors."""
    models, weights = [], parity.weights(want)
    sizes = dict(img_size=64, dim=48, depth=2, heads=3, mlp_ratio=2, num_classes=10)
    for part in ("student.", "teacher."):
        model = timm.create_model("sparsifiner_deit_t", **sizes, reduce_n=2, coef_topk=4)
        state = {key.removeprefix(part): value for key, value in weights.items() if key.startswith(part)}
        model.load_state_dict(checkpoint_filter_fn(state, model))
        models.append(model)
    return models


def assert_gradients(student, want: dict) -> None:
    """A term of weight 0 gives gradients of 0 there, and none here."""
    norms = {k.removeprefix("student."): v or None for k, v in want["grads"].items() if k.startswith("student.")}
    parity.assert_gradients(student, norms, rename)


def test_reconstruction_equals_the_published():
    want = parity.load("sparsifiner", "op_loss_recon")
    student, teacher = pair(want)
    x = parity.image(want)
    with torch.no_grad():
        attention = teacher.eval().distill(x, recon=True).attention
    out = student.distill(x, recon=True)
    parity.assert_equal("student_logits", out.logits, want["outputs"]["student_logits"])
    loss = 0.01 * reconstruction_loss(out.connectivity, attention)
    parity.assert_equal("attn_recon_loss", loss[None], want["outputs"]["attn_recon_loss"])
    (loss * parity.seeded(1, (1,))).sum().backward()
    assert_gradients(student, want)


def test_distillation_equals_the_published():
    want = parity.load("sparsifiner", "op_loss_cls_distill")
    student, teacher = pair(want)
    x = parity.image(want)
    target, guide = parity.seeded(2, (2, 10)).softmax(-1), teacher.eval().distill(x, recon=True)
    out = student.distill(x)
    parity.assert_equal("student_logits", out.logits, want["outputs"]["student_logits"])
    classes, tokens = distillation_loss(out.logits, guide.logits, out.features, guide.features, out.alive)
    parts = dict(
        cls_loss=F.cross_entropy(out.logits, target), cls_distill_loss=0.5 * classes, token_distill_loss=0.5 * tokens
    )
    for name, part in parts.items():
        parity.assert_equal(name, part[None], want["outputs"][name])
    (sum(parts.values()) * parity.seeded(1, (1,))).sum().backward()
    assert_gradients(student, want)
    assert all(p.grad is None for p in teacher.parameters())


def test_pruned_patches_do_not_count():
    f, t, logits = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.randn(2, 4)
    alive = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]]).bool()
    _, tokens = distillation_loss(logits, logits, f, t, alive)
    torch.testing.assert_close(tokens, F.mse_loss(f[alive], t[alive]))
    classes, every = distillation_loss(logits, logits, f, t)
    torch.testing.assert_close(every, F.mse_loss(f, t))
    assert abs(classes) < 1e-12


def test_layers_must_be_equally_many():
    with pytest.raises(ValueError, match="layers must be equally many, got 1 and 0"):
        reconstruction_loss([torch.zeros(1, 1, 1, 2)], [])


def test_two_phases_teach_what_they_say(command, tmp_path, records, monkeypatch):
    """Dense, predictors, sparse: three runs of the digits' configs, made small."""
    torch.set_default_dtype(torch.float32)
    small = ["data.img_size=64", "epochs=2", "batch_size=128", "log_every=1", "device=cpu", "schedule.warmup_epochs=0"]
    host = ["model.dim=32", "model.depth=2", "model.heads=2", "model.reduce_n=4", "model.coef_topk=2"]
    configs = Path(__file__).parents[2] / "configs" / "digits"
    dense, predictors, sparse = (tmp_path / name for name in ("dense", "predictors", "sparse"))

    def run(folder, config, *more):
        code, _, err = command("train", configs / config, *small, *more, "--run-dir", folder)
        assert (code, err) == (0, "")
        tensors, _ = checkpoint.read(folder / "checkpoints" / checkpoint.LAST)
        return {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}

    parent = run(
        dense, "sparsifiner_1_dense.py", "epochs=1", "model.embed_dim=32", "model.depth=2", "model.num_heads=2"
    )
    first = run(predictors, "sparsifiner_2_predictors.py", *host, f"checkpoint={dense}")
    second = run(
        sparse, "sparsifiner_3_sparse.py", *host, f"checkpoint={predictors}", f"task.teacher={dense}", "epochs=1"
    )

    own = checkpoint_filter_fn(parent, timm.create_model("sparsifiner_deit_t", **SMALL))
    assert own.keys() == first.keys() == second.keys()
    best = load_file(str(dense / "model.safetensors"))
    for key in first:
        if ".predictor." in key:  # learnt in the first phase, and not after
            assert not torch.equal(first[key], own[key])
            assert torch.equal(second[key], load_file(str(predictors / "model.safetensors"))[key])
    exported = checkpoint_filter_fn(best, timm.create_model("sparsifiner_deit_t", **SMALL))
    assert all(torch.equal(first[key], exported[key]) for key in first if ".predictor." not in key)
    assert not torch.equal(second["blocks.0.attn.qkv.weight"], first["blocks.0.attn.qkv.weight"])
    losses = [line["loss"] for line in records(predictors, "train")]
    assert losses[-1] < 0.8 * losses[0]
    assert {"labels", "logits", "tokens"} <= records(sparse, "train")[0].keys()

    # The teacher's classes are compared with the data's.
    names = list("abcdefghij")
    task = Distill(SimpleNamespace(class_names=names, img_size=64), phase="sparse", teacher=str(dense))
    sizes = {k: v for k, v in SMALL.items() if k not in ("img_size", "num_classes")}
    with pytest.raises(UserError, match=r"task\.teacher=.* is of other classes than the data's"):
        task.trained(task.model("sparsifiner_deit_t", **sizes))
    images = torch.rand(2, 3, 64, 64)
    logits = []
    for names in (list("0123456789"), list("9876543210")):
        task = Distill(SimpleNamespace(class_names=names, img_size=64), phase="sparse", teacher=str(dense))
        torch.manual_seed(0)  # the teacher's file has no mask predictors
        task.trained(task.model("sparsifiner_deit_t", **sizes))
        logits.append(task._teacher(images).detach())
    torch.testing.assert_close(logits[0], logits[1].flip(1), rtol=0, atol=1e-7)  # rows may be summed in another order


SMALL = dict(img_size=64, num_classes=10, dim=32, depth=2, heads=2, reduce_n=4, coef_topk=2)


def test_what_cannot_be_distilled_is_said_in_one_sentence(command, tmp_path):
    configs = Path(__file__).parents[2] / "configs" / "digits"
    task = configs / "sparsifiner_3_sparse.py"
    code, _, err = command("train", task, "task.teacher=None", "--run-dir", tmp_path / "a")
    assert code == 2 and "task.teacher is missing" in err and "Traceback" not in err
    code, _, err = command(
        "train", configs / "sparsifiner_2_predictors.py", "model={'name': 'resnet18'}", "checkpoint=None",
        "--run-dir", tmp_path / "b",
    )  # fmt: skip
    assert code == 2 and "trains a Sparsifiner, and model.name=resnet18 is none" in err and "Traceback" not in err
