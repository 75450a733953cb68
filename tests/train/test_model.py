"""Models by name, weights from files, and the messages when they do not fit."""

import json

import pytest
import timm
import torch
from saccade.train.models.build import create, export, probe
from saccade.train.runtime import checkpoint
from saccade.train.runtime.errors import UserError
from safetensors.torch import save_file


@pytest.fixture
def weights(tmp_path):
    """weights(name, **kwargs) -> (model, file of its weights)."""

    def make(name: str = "test_resnet", suffix: str = ".safetensors", **kwargs):
        torch.manual_seed(1)
        model, file = timm.create_model(name, **kwargs), tmp_path / f"{name}{suffix}"
        if suffix == ".safetensors":
            save_file(model.state_dict(), file)
        else:
            torch.save(dict(state_dict=model.state_dict()), file)
        return model, file

    return make


def equal(a: torch.nn.Module, b: torch.nn.Module, without: str = "-") -> bool:
    other = b.state_dict()
    return all(torch.equal(v, other[k]) for k, v in a.state_dict().items() if not k.startswith(without))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_weights_with_their_head(weights, suffix):
    model, file = weights(num_classes=7, suffix=suffix)
    assert equal(create("test_resnet", 7, checkpoint=file), model)


def test_new_head(weights):
    model, file = weights(num_classes=7)
    mine = create("test_resnet", 3, checkpoint=file, new_head=True)
    assert mine.num_classes == 3 and equal(model, mine, without="fc")
    with pytest.raises(UserError, match=r"does not fit test_resnet \(fc.weight is \(7, \d+\), not \(3, \d+\)"):
        create("test_resnet", 3, checkpoint=file)


def test_other_input_channels(weights):
    _, file = weights(num_classes=3)
    model = create("test_resnet", 3, checkpoint=file, in_chans=1).eval()
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("new_head", [False, True])
@pytest.mark.parametrize("classes", [3, 7])
def test_other_architecture(weights, new_head, classes):
    """Also where only the new head lets timm load without strictness: never half a model."""
    _, file = weights("test_vit", num_classes=7)
    sentence = r"does not fit test_resnet \(it lacks .*; it has .* and \d+ more\): give the model\.name"
    with pytest.raises(UserError, match=sentence):
        create("test_resnet", classes, checkpoint=file, new_head=new_head)


def test_damaged_files(weights, tmp_path):
    for suffix in (".safetensors", ".pth"):
        _, file = weights(num_classes=3, suffix=suffix)
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(
            UserError,
            match=r"checkpoint .*test_resnet.* can't be read .*: it is damaged .*; download or convert it again",
        ):
            create("test_resnet", 3, checkpoint=file)
    with pytest.raises(UserError, match="there is no checkpoint"):
        create("test_resnet", 3, checkpoint=tmp_path / "none.pth")


def test_no_code_from_files(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save(dict(state_dict=Evil()), tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"holds Python objects .* which are not loaded as they can run code"):
        create("test_resnet", 3, checkpoint=tmp_path / "evil.pth")


@pytest.mark.parametrize("kind", ["model", "ema"])
def test_weights_of_a_training_checkpoint(tmp_path, kind):
    """The best of the two kinds; a damaged file is refused."""
    model = timm.create_model("test_resnet", num_classes=3)
    other = "ema" if kind == "model" else "model"
    tensors = {f"{kind}.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"{other}.{k}": torch.zeros_like(v) for k, v in model.state_dict().items()}
    checkpoint.save(tmp_path, tensors, dict(best=dict(weights=kind)), best=False)
    assert equal(create("test_resnet", 3, checkpoint=tmp_path / checkpoint.LAST), model)
    content = bytearray((tmp_path / checkpoint.LAST).read_bytes())
    content[-5] ^= 1
    (tmp_path / checkpoint.LAST).write_bytes(content)
    with pytest.raises(UserError, match="contents and checksum disagree"):
        create("test_resnet", 3, checkpoint=tmp_path / checkpoint.LAST)


@pytest.mark.parametrize(
    "name, kwargs, sentence",
    [
        ("resnet81", {}, r"unknown model resnet81, did you mean resnet\d+"),
        ("resnet18.a1_in2k", {}, r"resnet18.a1_in2k can't be built"),
        ("biformer_x", {}, r"unknown model biformer_x, did you mean biformer_"),
        ("local-dri:x", {}, r"model.name=local-dri:x: Unknown model source"),
        ("local-dir:/nowhere", {}, r"the model in /nowhere can't be read"),
        ("some/where", {}, r"has no source prefix"),
        ("test_resnet", dict(drop_rat=0.1), r"test_resnet has no argument model.drop_rat, did you mean drop_rate"),
        ("test_vit", dict(dept=2), r"test_vit has no argument model.dept, did you mean depth"),
        ("biformer_t", dict(n_wins=2), r"biformer_t has no argument model.n_wins, did you mean n_win"),
        ("biformer_t", dict(n_win=2, topks=(1, 9, 4, -2)), r"biformer_t can't be built with n_win=2, .*: topks must"),
        ("test_vit", dict(img_size=100, patch_size=7.5), r"test_vit can't be built"),
    ],
)
def test_sentences(name, kwargs, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        create(name, 10, **kwargs)
    assert "\n" not in str(error.value)


def test_image_size():
    """A model with a fixed input size is built for ours; if no size fits, the model's own message is shown."""
    probe(create("vit_tiny_patch16_224", 10, img_size=48), (3, 48, 48))
    probe(create("test_resnet", 10, img_size=48), (3, 48, 48))
    with pytest.raises(UserError, match=r"can't take images of 48x48 with 3 channels: Input height \(48\)"):
        probe(create("vit_tiny_patch16_224", 10), (3, 48, 48))
    with pytest.raises(UserError, match=r"can't take images of 32x32 with 3 channels: .*channels"):
        probe(create("test_resnet", 10, in_chans=1), (3, 32, 32))


def test_wrong_arguments_beside_a_checkpoint(weights):
    _, file = weights(num_classes=3)
    for kwargs, sentence in ((dict(drop_rat=1), "has no argument model.drop_rat"), (dict(layers=3), "can't be built")):
        with pytest.raises(UserError, match=sentence):
            create("test_resnet", 3, checkpoint=file, new_head=True, **kwargs)


def test_probe_changes_nothing():
    model = create("test_resnet", 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    probe(model, (3, 32, 32))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "name, kwargs",
    [("test_resnet", {}), ("test_vit", dict(img_size=48)), ("biformer_t", dict(n_win=2, topks=(1, 2, 4, -2)))],
)
def test_export(tmp_path, name, kwargs):
    """timm builds the same model from the folder: arguments, classes, preprocessing and weights."""
    model = create(name, 5, **kwargs).to(memory_format=torch.channels_last).eval()
    inputs = dict(input_size=(3, 48, 48), mean=(0.1,) * 3, std=(0.2,) * 3, interpolation="bilinear", crop_pct=1.0)
    export(model, tmp_path, inputs, list("abcde"))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(again(x), model(x))
    resolved = timm.data.resolve_model_data_config(again)
    assert all(resolved[k] == (list(v) if k in ("mean", "std") else v) for k, v in inputs.items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == name and config["num_classes"] == 5 and config["label_names"] == list("abcde")
    assert "num_classes" not in config["model_args"]  # transformers passes both
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert equal(create(f"local-dir:{tmp_path}", 5, pretrained=True), model)
    assert create(name, 3, checkpoint=tmp_path, new_head=True, **kwargs).num_classes == 3
