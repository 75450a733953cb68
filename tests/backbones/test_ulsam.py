"""ULSAM equals the published layer, alone and in timm's MobileNets, and these do what a timm backbone should."""

import copy

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
from saccade.backbones.ulsam import PARTS, ULSAM, checkpoint_filter_fn, merge_subspaces
from saccade.train.runtime import measure
from support import parity
from support.backbones import InNetworksOfOthers
from support.gradients import assert_gradients
from support.parity import load_file
from timm.utils.model import freeze_batch_norm_2d
from torch import nn
from torchvision.models import mobilenet_v2

pytestmark = pytest.mark.usefixtures("double")  # as default type


@pytest.mark.parametrize("definition", [False, True], ids=["operator", "norms of their own"])
@pytest.mark.parametrize(
    ("name", "subspaces"),
    [
        ("ulsam_c32_g1", 1),
        ("ulsam_c64_g4", 4),
        ("ulsam_c64_g2_rect", 2),
        ("ulsam_c96_g16", 16),
        ("ulsam_c160_g8", 8),
        ("ulsam_c32_g4_train", 4),
    ],
)
def test_equals_published_layer(name, subspaces, definition):
    """Output, gradients and, in training, the running statistics; also where the operator cannot be used."""
    want = parity.load("ulsam", name)

    def ours(state: dict) -> dict:
        return merge_subspaces({key.removeprefix("m."): value for key, value in state.items()})

    layer = ULSAM(want["input"]["shape"][1], subspaces)
    layer.load_state_dict(ours(parity.weights(want)), strict=False)  # which has no counts of batches
    layer.train(want["mode"] == "train")
    if definition:
        layer.norm.register_forward_hook(lambda *args: None)
    x = parity.image(want).requires_grad_()
    y = layer(x)
    parity.assert_equal("out", y, want["outputs"]["out"])
    (y * parity.seeded(1, y.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["outputs"]["grad_x"])
    assert_gradients(layer, want, ours)
    assert sum(p.numel() for p in layer.parameters()) == want["params"]
    if layer.training:
        for key, value in (
            ("running_mean_after", layer.norm.running_mean[:8]),
            ("running_var_after", layer.norm.running_var[:8]),
            ("running_var_point_after", layer.point_norm.running_var[:1]),
        ):
            parity.assert_equal(key, value, want["outputs"][key])
        assert layer.norm.num_batches_tracked == layer.point_norm.num_batches_tracked == 1


SMALL = dict(width=0.25, num_classes=7)


def small(**kwargs):
    """A narrow MobileNetV2 whose ULSAMs have 24 and 40 channels."""
    torch.manual_seed(0)
    return timm.create_model("ulsam_mobilenet_v2", **(SMALL | kwargs))


class TestULSAM(InNetworksOfOthers):
    FIXTURES, NAME, SMALL = "ulsam", "ulsam_mobilenet_v2", SMALL
    small, checkpoint_filter_fn = staticmethod(small), staticmethod(checkpoint_filter_fn)
    WHOLE = (
        ("mobilenetv1_ulsam_replace_layer12_g4", "ulsam_mobilenet_v1", {}),
        ("mobilenetv2_ulsam_14_17_g4", "ulsam_mobilenet_v2", {}),
    )
    COUNTS = dict(  # V1, V2 and V2's f are counted on networks with the published layer, the others follow
        ulsam_mobilenet_v1=3_965_748,
        ulsam_mobilenet_v1_075=2_435_044,
        ulsam_mobilenet_v1_050=1_264_020,
        ulsam_mobilenet_v2=3_067_904,
        ulsam_mobilenet_v2_a=3_387_092,
        ulsam_mobilenet_v2_b=3_185_684,
        ulsam_mobilenet_v2_c=3_333_152,
        ulsam_mobilenet_v2_d=2_866_496,
        ulsam_mobilenet_v2_f=2_630_936,
    )
    test_macs = None  # the paper's: test_costs_are_the_papers
    CHANNELS_LAST = True
    ALIENS = {
        "other places": (dict(replaced=(17,)), "blocks.4.2.conv.weight is missing there and .* here"),
        "other subspaces": (
            dict(subspaces=8),
            r"12 of .* blocks.4.2.point.weight is \(8, 3, 1, 1\) there and \(4, 6, 1, 1\) here",
        ),
        "another family": ("test_resnet", "entries of its blocks do not fit"),
    }
    IMPOSSIBLE = (
        (dict(replaced=(15,)), r"replaced may have the layers 4, 6, 7, 9, .*, 17, got \(15,\)"),
        (dict(inserted=(1, 4)), r"inserted may have the layers from 2 to 18, got \(1, 4\)"),
        (dict(subspaces=5), "subspaces must divide the 24 channels, got 5"),
        (dict(subspaces=0), "subspaces must divide the 24 channels, got 0"),
    )
    LEARNING = dict(replaced=(14,), inserted=(11,), drop_path_rate=0.1, drop_rate=0.1)
    IMAGES = (16, 3, 64, 64)
    COMPILED_SIZE = (32, 48)

    def train(self, model):
        losses = super().train(model)
        assert all(p.grad is not None for p in model.parameters())
        return losses


PAPER = dict(  # parameters and multiply-accumulates in millions
    ulsam_mobilenet_v1=(3.9, 517),
    ulsam_mobilenet_v1_075=(2.4, 296),
    ulsam_mobilenet_v1_050=(1.2, 136),
    ulsam_mobilenet_v2=(2.96, 261.88),
    ulsam_mobilenet_v2_a=(3.28, 277.34),
    ulsam_mobilenet_v2_b=(3.08, 284.54),
    ulsam_mobilenet_v2_c=(3.23, 267.06),
    ulsam_mobilenet_v2_d=(2.77, 269.08),
    ulsam_mobilenet_v2_f=(2.54, 223.77),
)


@pytest.mark.parametrize(("name", "params", "macs"), [(name, *costs) for name, costs in PAPER.items()])
def test_costs_are_the_papers(name, params, macs):
    """Its parameters leave out those of norms, and V2's begin from a rounded 3.4M."""
    model = timm.create_model(name, device="meta")
    count = sum(p.numel() for p in model.parameters() if p.dim() > 1) / 1e6
    if name.startswith("ulsam_mobilenet_v2"):
        count += 3.4 - sum(p.numel() for p in timm.create_model("mobilenetv2_100").parameters() if p.dim() > 1) / 1e6
        assert count == pytest.approx(params, abs=0.012)
    else:
        assert count == pytest.approx(params, abs=0.06)
    x = torch.empty(1, 3, 224, 224, device="meta")
    assert measure.macs(model, x) / 1e6 == pytest.approx(macs, rel=0.005)


def test_places():
    """A layer that is replaced has its place; one that is inserted is the next block of the stage."""
    model = small(replaced=(4, 9), inserted=(5, 17), subspaces=2)
    places = {name: m.conv.out_channels for name, m in model.named_modules() if isinstance(m, ULSAM)}
    assert places == {"blocks.1.1": 8, "blocks.2.1": 8, "blocks.3.1": 16, "blocks.5.3": 40}


def to_published(layer: ULSAM, prefix: str) -> dict:
    """The state dict of a layer with a module for each subspace."""
    parts, g = {ours: theirs for theirs, ours in PARTS.items()}, layer.point.out_channels
    return {
        f"{prefix}.subspaces.{n}.{parts[key.partition('.')[0]]}.{key.partition('.')[2]}": chunk
        for key, value in layer.state_dict().items()
        for n, chunk in enumerate(value.chunk(g) if value.ndim else [value] * g)
    }


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_torchvisions_mobilenet_with_a_layer_inserted(tmp_path, prefix):
    """There it is features.17 after layer 17, and pushes on what follows."""
    torch.manual_seed(0)
    tv, layer = mobilenet_v2(width_mult=0.25, num_classes=7).eval(), ULSAM(40).eval()
    features = nn.Sequential(*tv.features[:17], nn.Identity(), *tv.features[17:])
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    state |= to_published(layer, "features.17")
    state |= {key: value for key, value in tv.state_dict().items() if key.startswith("classifier.")}
    state = {f"{prefix}{key}": value for key, value in state.items()}
    model = load_file(tmp_path, {"state_dict": state}, "ulsam_mobilenet_v2", **SMALL, replaced=(), inserted=(17,))
    x = torch.randn(2, 3, 64, 96)
    features[17] = layer
    tv.features = features
    torch.testing.assert_close(model(x), tv(x), rtol=1e-10, atol=1e-12)


def test_other_norms_do_as_the_operator():
    """Of processes that share statistics, and frozen ones; and a norm alone set to evaluate."""
    layer, x = ULSAM(16), torch.randn(3, 16, 6, 5)
    layer.norm.running_mean.uniform_(), layer.norm.running_var.uniform_(0.5, 1)
    want = layer.eval()(x)
    for replaced in (nn.SyncBatchNorm.convert_sync_batchnorm(layer), freeze_batch_norm_2d(copy.deepcopy(layer))):
        assert type(replaced.norm) is not nn.BatchNorm2d
        torch.testing.assert_close(replaced.eval()(x), want)
    layer.train()
    layer.norm.eval()
    before = layer.norm.running_mean.clone()
    layer(x)
    assert torch.equal(layer.norm.running_mean, before) and layer.point_norm.num_batches_tracked == 1


def test_momentum():
    """The published 0.9 takes nine tenths of each batch; 0.1 is PyTorch's own."""
    x = torch.randn(4, 8, 5, 5)
    layers = {momentum: ULSAM(8, 2, momentum) for momentum in (0.1, 0.9)}
    for momentum, layer in layers.items():
        layer.load_state_dict(layers[0.1].state_dict() if momentum == 0.9 else layer.state_dict())
        layer.norm.reset_running_stats()
        layer(x)
    assert torch.allclose(layers[0.9].norm.running_mean, 9 * layers[0.1].norm.running_mean)
    model = small(momentum=0.3)
    assert {m.norm.momentum for m in model.modules() if isinstance(m, ULSAM)} == {0.3}


def test_pruning_counts_ulsam_as_a_block():
    model = small()
    assert model.prune_intermediate_layers(6, extra_blocks=True)[-1] == 7
    model.prune_intermediate_layers([5], extra_blocks=True)  # ends in a replaced layer
    assert model.num_features == 24 and model(torch.randn(1, 3, 64, 64)).shape == (1, 24, 4, 4)


def test_trains_compiled():
    """Output, gradients and running statistics, in one graph."""
    plain, x = ULSAM(16, 4), torch.randn(4, 16, 9, 7)
    other = copy.deepcopy(plain)
    for f in (plain, torch.compile(other, fullgraph=True, backend="aot_eager")):
        f(x).square().sum().backward()
    for a, b in zip(plain.parameters(), other.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    for a, b in zip(plain.buffers(), other.buffers()):
        torch.testing.assert_close(a, b)
