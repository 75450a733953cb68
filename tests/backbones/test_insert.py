"""Plug-in layers go into networks that nobody here wrote."""

import copy
import pickle
import re

import pytest
import timm
import torch
from saccade.backbones import insert
from saccade.backbones.ela import ELA
from saccade.backbones.ulsam import ULSAM
from support.levels import exhaustive
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet
from torch import nn

NETWORKS = {  # modules of it, and how many those are
    "resnet18": ("layer[234].*.bn2", 6),
    "mobilenetv2_100": ("blocks.[456].*.bn2", 7),
    "regnety_002": ("s4", 1),
    "convnext_atto": ("stages.[23].blocks.*.conv_dw", 8),
    "efficientnet_b0": ("blocks.[56]", 2),
}
KWARGS = dict(ela=dict(version="b", residual=True), ulsam=dict(subspaces=2))
ONCE = ["resnet18-ela", "mobilenetv2_100-ulsam", "regnety_002-ela", "convnext_atto-ulsam", "efficientnet_b0-ela"]
PAIRS = [(name, layer) for name in NETWORKS for layer in KWARGS]
every_pair = pytest.mark.parametrize(
    ("name", "layer"), [pair if "-".join(pair) in ONCE else exhaustive(*pair) for pair in PAIRS]
)
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def create(name: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def put(model: nn.Module, layer: str, where=None, **kwargs) -> nn.Module:
    where = where or NETWORKS[model.pretrained_cfg["architecture"]][0]
    return insert(model, layer, where, **(kwargs or KWARGS[layer]))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ELA | ULSAM)}


@every_pair
def test_into_networks_of_others(name, layer):
    """Once behind each module, as if that were a sequence of the two; nothing else changes."""
    plain = create(name)
    before = copy.deepcopy(plain.state_dict())
    model = put(plain, layer)
    assert model is plain and len(layers(model)) == NETWORKS[name][1]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    sequences = create(name)
    for key, m in layers(model).items():
        of = key.removesuffix(f".inserted.{layer}")
        sequences.set_submodule(of, nn.Sequential(sequences.get_submodule(of), copy.deepcopy(m)))
    got, want = model.eval()(IMAGES), sequences.eval()(IMAGES)
    torch.testing.assert_close(got, want)


@every_pair
def test_gradients_reach_every_layer(name, layer):
    model = put(create(name), layer)
    model(IMAGES).square().mean().backward()
    for m in layers(model).values():
        assert all(p.grad is not None and p.grad.isfinite().all() for p in m.parameters())


@every_pair
def test_state_dict_goes_from_one_to_another(name, layer):
    """And so do copies and pickles."""
    model, other = put(create(name), layer), put(timm.create_model(name), layer)
    other.load_state_dict(model.state_dict())
    want = model.eval()(IMAGES)
    for again in (other.eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(IMAGES), want)


@every_pair
def test_features_only(name, layer):
    """Into a wrapped network as into a plain one that gives its intermediate maps."""

    def flat(key: str) -> str:  # as timm flattens ConvNeXt for its wrapper
        return re.sub("^(stages|stem)[.]", r"\1_", key) if name == "convnext_atto" else key

    plain, wrapped = put(create(name), layer), create(name, features_only=True)
    put(wrapped, layer, flat(NETWORKS[name][0]))
    wrapped.load_state_dict(
        {
            key: plain.state_dict()[theirs]
            for theirs in plain.state_dict()
            if (key := flat(theirs)) in wrapped.state_dict()
        }
    )
    assert len(layers(wrapped)) == NETWORKS[name][1]
    maps = plain.eval().forward_intermediates(IMAGES, intermediates_only=True)
    for got, want in zip(wrapped.eval()(IMAGES), maps, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("feature_cls", ["list", "hook", "getter"])
def test_before_or_after_wrapping(feature_cls):
    """Features that hooks collect have passed the layer in either order."""
    kwargs = dict(feature_cls=feature_cls, features_only=True)
    prefix = "" if feature_cls == "list" else "body." if feature_cls == "hook" else "model."
    wrapped = put(create("resnet18", **kwargs), "ela", f"{prefix}layer[34]")
    plain = put(create("resnet18"), "ela", "layer[34]")
    assert len(layers(wrapped)) == 2
    for a, b in zip(layers(plain).values(), layers(wrapped).values()):
        b.load_state_dict(a.state_dict())
    first = dict(list=FeatureListNet, hook=FeatureHookNet, getter=FeatureGetterNet)[feature_cls]
    first = first(plain, out_indices=(0, 1, 2, 3, 4))
    for a, b in zip(wrapped.eval()(IMAGES), first.eval()(IMAGES), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ("layer1.0.conv1", ["layer1.0.conv1"]),
        (["layer1", "layer?.0.bn1"], ["layer1", "layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1", "layer4.0.bn1"]),
        (re.compile(r"layer[12]\.\d"), ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        (["layer1", "layer?"], ["layer1", "layer2", "layer3", "layer4"]),
    ],
    ids=str,
)
def test_where(where, names):
    model = put(create("resnet18"), "ela", where, version="t")
    assert set(layers(model)) == {f"{name}.inserted.ela" for name in names}


def test_two_kinds_in_order():
    model = put(put(create("resnet18"), "ulsam", "layer2.*.bn2"), "ela", "layer[23].*.bn2").eval()
    assert list(model.layer2[0].bn2.inserted._modules) == ["ulsam", "ela"]
    x = torch.randn(1, 128, 4, 6)
    bn = model.layer2[0].bn2
    want = bn.inserted.ela(bn.inserted.ulsam(copy.deepcopy(create("resnet18").eval().layer2[0].bn2)(x)))
    assert torch.equal(bn(x), want)


def test_layers_are_like_the_network():
    """In type, device and mode."""
    model = put(create("resnet18", device="meta", dtype=torch.bfloat16).eval(), "ulsam", subspaces=2)
    assert {(p.device.type, p.dtype) for m in layers(model).values() for p in m.parameters()} == {
        ("meta", torch.bfloat16)
    }
    assert not any(m.training for m in model.modules())
    assert model.train().layer2[0].bn2.inserted.ulsam.training
    gray = put(create("resnet18", in_chans=1), "ela")
    assert gray(IMAGES[:, :1]).isfinite().all()


@pytest.mark.parametrize(
    ("layer", "where", "kwargs", "sentence"),
    [
        ("se", "layer1", {}, "layer must be one of 'ela', 'ulsam', got 'se'"),
        ("ela", "layer9", {}, "no module of ResNet has a name that matches 'layer9'"),
        ("ela", ["layer1", "layer9"], {}, "no module of ResNet has a name that matches 'layer9'"),
        ("ela", re.compile("layer"), {}, "no module of ResNet has a name that matches re.compile"),
        ("ulsam", "layer?", dict(subspaces=3), "layer1: subspaces must divide the 64 channels, got 3"),
        ("ela", "layer?", dict(version="m"), "layer1: version must be one of 't', 'b', 's', 'l', got 'm'"),
        ("ela", "fc", {}, r"fc must return a map \(B, C, H, W\) for a layer to follow it, got shape \(2, 1000\)"),
        (
            "ela",
            ["layer1", "layer1.0.drop"],
            {},
            "layer1.0.drop must return a map .*, got nothing, since it does not run",
        ),
    ],
    ids=["kind", "glob", "one of two", "regex", "g", "version", "no map", "not run"],
)
def test_mistakes_are_refused_in_one_sentence(layer, where, kwargs, sentence):
    """And leave the network as it was."""
    model = create("resnet18")
    model.layer1[0].drop = nn.Identity()
    with pytest.raises(ValueError, match=sentence) as caught:
        insert(model, layer, where, **kwargs)
    assert "\n" not in str(caught.value) and not layers(model)


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"^blocks.1: ELA 'b' takes a multiple of 16 channels, got 24$"):
        put(create("efficientnet_b0"), "ela", "blocks.?")


def test_the_same_layer_twice_is_refused():
    model = put(create("resnet18"), "ela")
    with pytest.raises(ValueError, match=r"^layer2.0.bn2 is already followed by 'ela'$"):
        put(model, "ela")


def test_modules_that_run_their_children_otherwise_are_refused():
    """DenseNet's block hands each child the list of all maps before."""
    model = create("densenet121")
    with pytest.raises(ValueError, match=r"^a layer cannot follow features.denseblock1"):
        put(model, "ulsam", "features.denseblock1")
    assert not any("inserted" in name for name, _ in model.named_modules())
    model(IMAGES)


def test_gradient_checkpointing_changes_nothing():
    results = []
    for enable in (False, True):
        model = put(create("resnet18"), "ela", ["layer2", "layer3.*.bn1"]).eval()
        model.set_grad_checkpointing(enable)
        y = model(IMAGES)
        y.square().mean().backward()
        results.append([y, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)


def test_compiles_and_exports():
    model = put(create("resnet18"), "ela", "layer[34].0.bn1").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(model, (IMAGES,)).module()
    with torch.no_grad():
        want = model(IMAGES)
        torch.testing.assert_close(compiled(IMAGES), want)
        torch.testing.assert_close(exported(IMAGES), want)
