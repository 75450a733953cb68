"""Weights from files that other programs wrote, and from the network."""

import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from saccade.train.models import build
from saccade.train.models.build import create, create_features, strip_prefixes
from saccade.train.models.weights import read_weights
from saccade.train.runtime.errors import UserError

DIGITS = Path(__file__).resolve().parents[2] / "configs/digits/resnet18.py"


@pytest.fixture(scope="module")
def tensors():
    return create("test_resnet", 10).state_dict()


@pytest.mark.parametrize(
    "prefix, beside",
    [
        ("model.", {"criterion.weight": torch.zeros(3)}),  # Lightning
        ("module.", {}),
        ("_orig_mod.module.", {}),
        ("model._orig_mod.", {}),
        ("backbone.", {"head.fc.weight": torch.zeros(3, 3)}),  # OpenMMLab
    ],
)
def test_prefixes_of_other_programs(tmp_path, tensors, prefix, beside):
    content = {"state_dict": {prefix + key: value for key, value in tensors.items()} | beside, "epoch": 3}
    torch.save(content, tmp_path / "weights.ckpt")
    model = create("test_resnet", 10, checkpoint=tmp_path / "weights.ckpt", new_head=True)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    maps = create_features("test_resnet", checkpoint=tmp_path / "weights.ckpt")
    own = {key.removeprefix("model."): value for key, value in maps.state_dict().items()}
    assert torch.equal(own["layer4.0.conv2.weight"], tensors["layer4.0.conv2.weight"])


@pytest.mark.parametrize("prefix", ["timm_model.", "module.base_model.trunk."])
def test_any_prefix_that_all_names_have(tmp_path, tensors, prefix):
    torch.save({prefix + key: value for key, value in tensors.items()}, tmp_path / "weights.pth")
    model = create("test_resnet", 10, checkpoint=tmp_path / "weights.pth")
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())


def test_containers_of_other_programs(tmp_path):
    """Averaged weights come first; a setting of that name is none; of sets with other names, there may be one."""
    file, x, y = tmp_path / "weights.pth", dict(a=torch.zeros(1)), dict(a=torch.ones(1))
    for content in (
        dict(model=x, ema=dict(module=y, updates=3)),
        dict(state_dict=x, ema_state_dict=y),
        dict(params=x, params_ema=y),
        dict(student=x, teacher=y),
        dict(ema=dict(decay=0.9), model_state_dict=y),
        dict(best_weights=y, optimizer=dict(state={0: x}), epoch=3),
        dict(n_averaged=torch.tensor(3)) | {f"module.{key}": value for key, value in y.items()},
    ):
        torch.save(content, file)
        (tensor,) = read_weights(file).tensors.values()
        assert tensor == 1
    torch.save(dict(left=x, right=y), file)
    with pytest.raises(UserError, match=r"weights.pth has several sets of weights, left, right: save one of them"):
        read_weights(file)


def test_programs_and_arrays(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "model.pt")
    with pytest.raises(UserError, match="is a TorchScript program, not weights"):
        read_weights(tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", weight=np.zeros(3))
    with pytest.raises(UserError, match="holds NumPy arrays"):
        read_weights(tmp_path / "model.npz")


def test_names_without_a_prefix_stay():
    assert strip_prefixes({"conv.weight": 1, "model.x": 2}) == {"conv.weight": 1, "model.x": 2}


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"\n<!DOCTYPE html><html>", "is a web page (HTML), not weights"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b'{"error": "not found"}', "is JSON text"),
        (b"see https://example.org", "is text"),
        (b"PK\x03\x04" + bytes(200), "is damaged or incomplete"),
    ],
)
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_files_that_are_not_weights(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        create("test_resnet", 10, checkpoint=tmp_path / name)
    assert reason in str(error.value) and "\n" not in str(error.value) and "weights_only" not in str(error.value)


def test_pickled_model(tmp_path):
    torch.save(torch.nn.Flatten(), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"holds Python objects \(torch.nn.*save its state_dict alone") as error:
        create("test_resnet", 10, checkpoint=tmp_path / "model.pth")
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("make", [create, create_features])
def test_no_network(monkeypatch, tmp_path, make):
    """One sentence that names the weights, at once."""
    monkeypatch.setattr(build, "_can_reach", lambda endpoint: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start_time = time.monotonic()
    with pytest.raises(UserError, match=r"weights of resnet10t \(timm/resnet10t\S+\) can't be downloaded .*no network"):
        make("resnet10t", **({"num_classes": 1000} if make is create else {}), pretrained=True)
    assert time.monotonic() - start_time < 10


def test_messages_name_the_option_of_the_command(command, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_can_reach", lambda endpoint: False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for arguments, option in [
        (("explain", "resnet10t", "--list", "--pretrained"), "--checkpoint FILE"),
        (("test", DIGITS, "model.num_classes=3"), "--checkpoint FILE"),
        (("train", DIGITS, "model.num_classes=3"), "checkpoint=FILE"),
        (("train", DIGITS, "model.name=resnet10t", "model.pretrained=True", "--dry-run"), "checkpoint=FILE"),
    ]:
        code, _, err = command(*arguments)
        assert code == 2 and err.endswith((f"give it with {option}\n", f"weights from {option}\n")), err


def test_unreachable_server():
    assert not build._can_reach("http://localhost:1") or build.getproxies()
