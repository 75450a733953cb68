"""What is frozen stays as it was to the bit, statistics included, and all the rest learns."""

import re

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from saccade.train.models import detectors
from saccade.train.models.build import create, create_features
from saccade.train.models.freeze import freeze
from saccade.train.runtime import checkpoint, distributed
from saccade.train.runtime.errors import UserError
from support.runs import finish
from torch import nn


@pytest.fixture(scope="module", autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def learning(model: nn.Module) -> set[str]:
    """The children that have something to learn."""
    return {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "name, what, rest",
    [
        ("resnet18", 1, {"layer2", "layer3", "layer4", "fc"}),
        ("resnet18", 4, {"fc"}),
        ("biformer_t", 3, {"stages", "norm", "head"}),
        ("biformer_t", 4, {"norm", "head"}),
        ("davit_t", 4, {"head"}),
        ("halo_h0", 4, {"head"}),
        ("vit_tiny_patch16_224", 11, {"blocks", "norm", "head"}),
        ("resnet18", "layer?", {"conv1", "bn1", "fc"}),
        ("resnet18", ["conv1", "bn1"], {"layer1", "layer2", "layer3", "layer4", "fc"}),
        ("vit_tiny_patch16_224", ("pos_embed", "cls_token", "blocks", "norm"), {"patch_embed", "head"}),
    ],
)
def test_what_learns(name, what, rest):
    with torch.device("meta"):
        model = timm.create_model(name)
    freeze(model, what)
    assert learning(model) == rest
    if name == "biformer_t" and what == 3:
        assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad and n[:6] == "stages"} == {"3"}


@pytest.mark.parametrize("name, frozen", [("resnet18", "(conv1|bn1|layer1)."), ("biformer_t", r"stem|stages.0.")])
def test_stages_of_a_detector_are_those_of_its_backbone(name, frozen):
    """A number counts the stages of the backbone, not the layers of layer decay; pyramid and heads learn."""
    with torch.device("meta"):
        detector = detectors.create("faster_rcnn", create_features(name, [-4, -3, -2, -1]), 3, channels=16, hidden=16)
    freeze(detector, 1)
    own = {id(parameter): name.removeprefix("model.") for name, parameter in detector.body.named_parameters()}
    for name, parameter in detector.named_parameters():
        assert parameter.requires_grad == (not re.match(frozen, own.get(id(parameter), "pyramid"))), name


def test_patterns_reach_into_blocks():
    model = timm.create_model("test_vit")
    freeze(model, ["*.attn", "blocks.0.mlp.fc1.bias"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if ".attn." in n} | {"blocks.0.mlp.fc1.bias"}


def test_modules_to_keep_in_eval_mode():
    """The largest wholly frozen ones; each BatchNorm and each layer that drops at random below them follows."""
    model = timm.create_model("resnet18", drop_path_rate=0.1, num_classes=3)
    still = freeze(model, 2)
    assert [id(m) for m in still] == [id(model.get_submodule(n)) for n in ("conv1", "bn1", "layer1", "layer2")]
    model.train()
    for module in still:
        module.eval()
    training = {
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d) and module.training
    }
    assert training == {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and n[:6] > "layer2"}


@pytest.mark.parametrize(
    "what, sentence",
    [
        (0, "freeze=0 must be 1 to 4, the number of stages of this model"),
        (5, "freeze=5 must be 1 to 4"),
        ("layer9", "freeze: 'layer9' matches no part of the model with weights, did you mean layer"),
        (["layer1", "stem*"], r"freeze: 'stem\*' matches no part of the model"),
        ("maxpool", "'maxpool' matches no part of the model with weights"),
        ("*", r"freeze='\*' leaves no trainable parameters"),
    ],
)
def test_mistakes(what, sentence):
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(UserError, match=sentence) as error:
        freeze(model, what)
    assert "\n" not in str(error.value)


FROZEN = ("conv1.", "bn1.", "layer1.", "layer2.")


@pytest.fixture
def weights(tmp_path):
    """A checkpoint to begin with, and its tensors."""
    torch.manual_seed(0)
    model = create("test_resnet", 10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # a block's last scale is zero: nothing before it learns
        for _ in range(50):  # statistics that are not the digits', and near enough for signals to get through
            model.train()(torch.randn(64, 3, 16, 16))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth", model.state_dict()


def assert_frozen(run, weights) -> None:
    """The run's last weights against those it began with."""
    tensors, _ = checkpoint.read(run / "checkpoints" / checkpoint.LAST)
    for name, before in weights.items():
        same = torch.equal(tensors[f"model.{name}"], before)
        assert same == name.startswith(FROZEN), name
    moments = {name for name in tensors if name.startswith("optimizer.state.")}
    assert moments and not any(name.removeprefix("optimizer.state.").startswith(FROZEN) for name in moments)


def test_training(tiny, records, tmp_path, weights):
    """With averaged weights, and stopped in the middle and resumed: to the same end."""
    file, before = weights
    arguments = ["freeze=2", f"checkpoint={file}", "ema.decay=0.9", "optimizer.layer_decay=0.8"]
    assert tiny(tmp_path / "whole", *arguments)[::2] == (0, "")
    losses = [line["loss"] for line in records(tmp_path / "whole", "train")]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert_frozen(tmp_path / "whole", before)

    taken = []

    def stop_in_the_middle(request, bad) -> bool:
        taken.append(1)
        return len(taken) == 5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.StopRequest, "agreed", stop_in_the_middle)
        assert tiny(tmp_path / "parted", *arguments)[0] == 75
    assert tiny(tmp_path / "parted", *arguments, "--resume")[0] == 0
    ends = [checkpoint.read(tmp_path / name / "checkpoints" / checkpoint.LAST) for name in ("whole", "parted")]
    assert ends[0][1] == ends[1][1] and all(torch.equal(v, ends[1][0][k]) for k, v in ends[0][0].items())


@pytest.mark.parametrize("switch", ["grad_checkpointing=True", "sync_bn=False"])
def test_switches(tiny, tmp_path, weights, switch):
    file, before = weights
    arguments = ["freeze=2", f"checkpoint={file}", "epochs=1", "accumulate=2", "clip_grad=1.0"]
    assert tiny(tmp_path / "run", *arguments, switch)[::2] == (0, "")
    assert_frozen(tmp_path / "run", before)


def test_processes(start, tmp_path, weights):
    """Two processes: DistributedDataParallel waits for no gradient that does not come."""
    file, before = weights
    arguments = ["freeze=2", f"checkpoint={file}", "epochs=1", "--run-dir", tmp_path / "run"]
    assert "unused" not in finish(start(2, *arguments))
    assert_frozen(tmp_path / "run", before)


def test_command_line(tiny, tmp_path):
    code, _, err = tiny(tmp_path / "run", "freeze=layre1")
    assert code == 2 and "freeze: 'layre1' matches no part of the model with weights, did you mean layer1" in err
    code, _, err = tiny(tmp_path / "run", "freeze=(1, 2)")
    assert code == 2 and "freeze must be a whole number, or text, or a list, each item text, or None; got (1, 2)" in err
