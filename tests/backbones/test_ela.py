"""ELA equals the published layer, alone and in MobileNetV2 and ResNet, and these do what a timm backbone should."""

import pytest
import saccade.backbones  # noqa: F401  (registers the models)
import timm
import torch
import torchvision
from saccade.backbones.ela import ELA, VERSIONS, checkpoint_filter_fn
from support import parity
from support.backbones import InNetworksOfOthers
from support.levels import exhaustive
from support.parity import load_file
from timm.layers import create_attn
from torch import nn

pytestmark = pytest.mark.usefixtures("double")  # as default type


LAYERS = [
    "ela_t_c64_14x14",
    "ela_b_c64_14x14",
    "ela_s_c64_14x14",
    "ela_l_c64_14x14",
    "ela_l_c144_13x7",
    "ela_s_c96_3x2",
]


@pytest.mark.parametrize("name", LAYERS)
def test_equals_published_layer(name):
    want = parity.load("ela", name)
    layer = ELA(want["input"]["shape"][1], name[4])
    layer.load_state_dict(parity.weights(want))
    x = parity.image(want).requires_grad_()
    y = layer(x)
    parity.assert_equal("out", y, want["outputs"]["out"])
    (y * parity.seeded(1, y.shape)).sum().backward()
    parity.assert_equal("grad_x", x.grad, want["outputs"]["grad_x"])
    parity.assert_gradients(layer, want["grads"], str)
    assert sum(p.numel() for p in layer.parameters()) == want["params"]


def test_timms_layer_of_that_name_is_another():
    """Two convolutions, norms of one group, SiLU before the sigmoid: its weights do not fit, its values differ."""
    want = parity.load("ela", "timm_efficientlocalattn_c64")
    theirs, ours = create_attn("ela", 64), ELA(64, "b")
    theirs.load_state_dict(parity.weights(want))
    x = parity.image(want)
    parity.assert_equal("out", theirs(x), want["outputs"]["out"])
    assert not set(theirs.state_dict()) & set(ours.state_dict())
    with torch.no_grad():
        ours.conv.weight.copy_(theirs.conv_h.weight.squeeze(3))
        theirs.conv_w.weight.copy_(theirs.conv_h.weight.mT)
        for norm in (theirs.norm_h, theirs.norm_w):
            nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
    assert (theirs(x) - ours(x)).abs().max() > 0.1


def test_residual_adds_its_input():
    x, gate, residual = torch.randn(2, 32, 5, 7), ELA(32, "b"), ELA(32, "b", residual=True)
    residual.load_state_dict(gate.state_dict())
    torch.testing.assert_close(residual(x), x + gate(x))


SMALL = dict(
    ela_resnet18=dict(layers=(1, 1, 1, 1), channels=(32, 32, 64, 64), num_classes=7),
    ela_resnet50=dict(layers=(1, 2, 1, 1), channels=(32, 32, 32, 64), num_classes=7),
    ela_mobilenetv2=dict(width=0.25, num_classes=7),
)
every_kind = pytest.mark.parametrize("name", SMALL)


def small(name: str, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **(SMALL[name] | kwargs))


class TestELA(InNetworksOfOthers):
    FIXTURES, small, checkpoint_filter_fn = "ela", staticmethod(small), staticmethod(checkpoint_filter_fn)
    FORMS = {name: dict(name=name) for name in SMALL}
    WHOLE = (("mobilenetv2_ela_l", "ela_mobilenetv2", {}), ("resnet50_ela_s", "ela_resnet50", {}))
    COUNTS = dict(  # MobileNetV2 and ResNet-50 are counted on the published networks, the others follow
        ela_resnet18=11_770_152,
        ela_resnet34=21_956_264,
        ela_resnet50=25_715_624,
        ela_resnet101=44_890_536,
        ela_mobilenetv2=3_916_904,
    )
    # The plain network's, and the convolutions of 2 · (H + W) positions a layer.
    MACS, MACS_RTOL = dict(ela_resnet50=4.09, ela_mobilenetv2=0.3112), 0.01
    ALIENS = {
        "another version": (
            dict(name="ela_resnet18", version="l"),
            r"1 of .* layer1 .* is \(32, 8, 7\) there and \(32, 8, 5\)",
            dict(name="ela_resnet18"),
        ),
        "another block": (
            dict(name="ela_resnet50"),
            "entries of its layer1 do not fit",
            dict(name="ela_resnet18"),
        ),
        "another width": (
            dict(name="ela_mobilenetv2", width=0.5),
            "entries of its blocks do not",
            dict(name="ela_mobilenetv2"),
        ),
        "another family": (
            dict(name="ela_resnet18"),
            "blocks.0.0.conv_dw.weight is missing there",
            dict(name="ela_mobilenetv2"),
        ),
    }
    IMPOSSIBLE = (
        (dict(name="ela_mobilenetv2", version="t", width=1.0), "ELA 't' takes a multiple of 32 channels, got 144"),
        (dict(name="ela_resnet18", channels=(24, 32, 64, 64)), "ELA 's' takes a multiple of 16 channels, got 24"),
        (dict(name="ela_resnet50", version="x"), "version must be one of 't', 'b', 's', 'l', got 'x'"),
    )
    HEAD_BIAS = 0.5
    LEARNING = dict(drop_path_rate=0.1, drop_rate=0.1)
    COMPILED = {name: form if name == "ela_resnet18" else exhaustive(form) for name, form in FORMS.items()}
    COMPILED_SIZE = (32, 48)

    def options(self, name, **kwargs):
        return dict(name=name) | SMALL[name] | kwargs

    def file(self, weights):
        return {"state_dict": {f"module.{key}": value for key, value in weights.items()}}

    def outputs(self, model, x):
        outputs = super().outputs(model, x)
        return {"stem": getattr(model, "maxpool", nn.Identity())(outputs["stage0"])} | outputs  # after the pool

    def train(self, model):
        losses = super().train(model)
        parts = [p for name, p in model.named_parameters() if "se." in name or "aa." in name]
        assert parts and all(p.grad is not None and p.grad.any() for p in parts)
        return [losses[0], min(losses[-5:])]  # dropout makes single steps noisy


BASE = dict(ela_resnet18=11_689_512, ela_resnet34=21_797_672, ela_resnet50=25_557_032, ela_resnet101=44_549_160)
ADDED = dict(  # by version, where the published code puts the layer
    ela_resnet18=dict(t=13_440, b=17_280, s=80_640, l=111_360),
    ela_resnet50=dict(t=26_432, b=33_984, s=158_592, l=219_008),
    ela_resnet101=dict(t=56_896, b=73_152, s=341_376, l=471_424),
    ela_mobilenetv2=dict(b=63_936, s=298_368, l=412_032),
)


@pytest.mark.parametrize(("name", "version"), [(name, version) for name in ADDED for version in ADDED[name]])
def test_parameters_of_each_version(name, version):
    model = timm.create_model(name, version=version, device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert count == (BASE | dict(ela_mobilenetv2=3_504_872))[name] + ADDED[name][version]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_fits_resnets(version):
    model = timm.create_model("ela_resnet34", version=version, device="meta")
    layers = [m for m in model.modules() if isinstance(m, ELA)]
    kernel, per_group, groups = VERSIONS[version]
    assert len(layers) == 16 and all(m.residual for m in layers)
    assert {m.conv.weight.shape[1:] for m in layers} == {(per_group, kernel)}
    assert {m.gn.num_groups for m in layers} == {groups}


@pytest.mark.parametrize("residual", [False, True])
def test_basic_blocks(tmp_path, residual):
    """torchvision's ResNet-18 with the layer last in each branch, under the published key."""
    torch.manual_seed(0)
    layers = torchvision.models.resnet18(num_classes=7).eval()
    state = layers.state_dict()
    x = torch.randn(2, 3, 65, 96)
    y = layers.maxpool(layers.relu(layers.bn1(layers.conv1(x))))
    for i in range(1, 5):
        for j, block in enumerate(getattr(layers, f"layer{i}")):
            ela = ELA(64 * 2 ** (i - 1), "t", residual)
            state |= {f"layer{i}.{j}.feat0.{key}": value for key, value in ela.state_dict().items()}
            u = ela(block.bn2(block.conv2(block.relu(block.bn1(block.conv1(y))))))
            y = block.relu(u + (block.downsample(y) if block.downsample else y))
    want = layers.fc(y.mean((2, 3)))
    model = load_file(tmp_path, state, "ela_resnet18", num_classes=7, version="t", residual=residual)
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-12)


def test_images_do_not_see_each_other():
    """In training neither: a GroupNorm has no statistics of a batch."""
    layer, x = ELA(32, "l"), torch.randn(3, 32, 9, 5)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_every_memory_format(name, memory_format):
    """Same values and gradients; timm's ResNet changes what a layer returns in place."""
    x, results = torch.randn(2, 3, 64, 64), []
    for y in (x, x.to(memory_format=memory_format)):
        model = small(name)
        out = model(y)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_trains_compiled():
    layer, x, results = ELA(32, "s", residual=True), torch.randn(2, 32, 9, 7), []
    for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = f(x)
        y.square().sum().backward()
        results.append([y, *(p.grad.clone() for p in layer.parameters())])
        layer.zero_grad()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b)
